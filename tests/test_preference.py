"""The preference objective against the densities it was derived from, and the rule that refreshes the reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

from img_minimal.preference import ReferenceRefresh, preference_loss, squared_distance

PARTS = [(True, True), (True, False), (False, True)]  # (dpo, spin)


def features(seed: int = 0) -> list[torch.Tensor]:
    """aligned, reference, winner, loser, each (B, N, D)."""
    torch.manual_seed(seed)
    return [torch.randn(5, 3, 4) for _ in range(4)]


def log_density(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """log p(x | c) of the Gaussian around f(c) with variance 1/2 (Eq. 16), in float64: (B,)."""
    return Normal(mean.double(), math.sqrt(0.5)).log_prob(x.double()).flatten(1).sum(1)


@pytest.mark.parametrize(("dpo", "spin"), PARTS)
@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_loss_is_that_of_the_gaussian_densities(dpo, spin, weight):
    aligned, reference, winner, loser = features()

    def ratio(x: torch.Tensor) -> torch.Tensor:  # log p_f(x) / p_ref(x)
        return log_density(x, aligned) - log_density(x, reference)

    argument = dpo * (ratio(winner) - ratio(loser)) + spin * (ratio(winner) - ratio(reference))
    base = (winner.double() - aligned.double()).square().flatten(1).sum(1).mean()
    expected = base + weight * torch.log1p(torch.exp(-argument)).mean()
    loss, metrics = preference_loss(*features(), weight=weight, dpo=dpo, spin=spin, norm="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    if dpo and spin:
        assert metrics["margin"].item() == pytest.approx(argument.mean().item(), rel=1e-4)
        assert metrics["implicit_accuracy"].item() == pytest.approx((argument > 0).double().mean().item())


def test_without_both_parts_only_the_base_loss_is_left():
    aligned, reference, winner, loser = features()
    loss, _ = preference_loss(aligned, reference, winner, loser, dpo=False, spin=False)
    assert loss.item() == pytest.approx(F.mse_loss(aligned, winner).item())


@pytest.mark.parametrize(("dpo", "spin"), PARTS)
def test_an_aligner_equal_to_its_reference_has_preference_loss_log_2(dpo, spin):
    aligned, _, winner, loser = features()
    loss, metrics = preference_loss(aligned, aligned.clone(), winner, loser, dpo=dpo, spin=spin)
    assert metrics["preference_loss"].item() == pytest.approx(math.log(2))
    assert loss.item() == pytest.approx(metrics["error"].item() + math.log(2))
    assert metrics["error"] == metrics["reference_error"]


def test_the_argument_is_affine_in_the_aligned_features():
    aligned, reference, winner, loser = (x.double() for x in features())
    step = torch.randn_like(aligned)

    def argument(t: float) -> float:
        return preference_loss(aligned + t * step, reference, winner, loser, norm="sum")[1]["margin"].item()

    second_difference = argument(1) - 2 * argument(0) + argument(-1)
    assert abs(argument(1) - argument(-1)) > 1
    assert abs(second_difference) < 1e-12  # what is given in float64 is computed in float64


def test_the_gradient_points_along_twice_the_winner_minus_the_loser_minus_the_reference():
    aligned, reference, winner, loser = (x[:1] for x in features())  # one sample: one factor
    aligned.requires_grad_()
    loss, metrics = preference_loss(aligned, reference, winner, loser, norm="sum")
    base = squared_distance(winner, aligned, "sum").mean()
    (gradient,) = torch.autograd.grad(loss - base, aligned)
    along = 2 * winner - loser - reference
    factor = -2 * torch.sigmoid(-metrics["margin"])  # l'(x) = -sigmoid(-x)
    assert torch.allclose(gradient, factor * along, atol=1e-6 + 1e-4 * along.abs().max().item())


def test_the_reference_gets_no_gradient_and_metrics_keep_no_graph():
    tensors = [x.requires_grad_() for x in features()]
    loss, metrics = preference_loss(*tensors)
    loss.backward()
    assert tensors[0].grad is not None and tensors[1].grad is None
    assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values())


def test_the_norm_is_a_mean_or_a_sum_and_nothing_else():
    a, b = torch.zeros(2, 3, 4, dtype=torch.half), torch.full((2, 3, 4), 200.0, dtype=torch.half)
    assert squared_distance(a, b, "sum").tolist() == [12 * 200.0**2] * 2  # beyond fp16's 65504: computed in fp32
    assert squared_distance(a, b).tolist() == [200.0**2] * 2
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        squared_distance(a, b, "max")


def test_the_reference_is_refreshed_at_the_kth_success_on_end_and_not_before():
    rule = ReferenceRefresh(k=10)
    assert [rule.update(1.0, 2.0) for _ in range(9)] == [False] * 9
    assert rule.update(1.0, 2.0)
    assert [rule.update(1.0, 2.0) for _ in range(10)] == [False] * 9 + [True]
    assert rule.refreshes == 2


@pytest.mark.parametrize("error", [2.0, 3.0, float("nan")])  # a tie is no success; nor is a failed step
def test_one_miss_starts_the_count_again(error):
    rule = ReferenceRefresh(k=3)
    assert [rule.update(e, 2.0) for e in (1, 1, error, 1, 1, 1)] == [False] * 5 + [True]


def test_a_resumed_rule_goes_on_where_it_stopped():
    first, second = ReferenceRefresh(k=3), ReferenceRefresh(k=3)
    for _ in range(5):
        first.update(1.0, 2.0)
    second.load_state_dict(first.state_dict())
    assert second.update(1.0, 2.0) and second.refreshes == 2


def test_a_count_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        ReferenceRefresh(k=0)
