"""The preference objective is that of its Gaussian densities; a rule refreshes its reference."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

from img_minimal.preference import (
    ReferenceRefresh,
    best_length,
    preference_loss,
    squared_distance,
)


def features() -> list[torch.Tensor]:
    """Draw f, f_ref, c_w and c_l, each (B, N, D)."""
    torch.manual_seed(0)
    return [torch.randn(5, 3, 4) for _ in range(4)]


@pytest.mark.parametrize(("dpo", "spin"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_loss_is_that_of_the_gaussian_densities(dpo, spin, weight):
    f, f_ref, c_w, c_l = (x.double() for x in features())

    def log_ratio(x: torch.Tensor) -> torch.Tensor:
        """Compute log p_f(x) / p_ref(x) of Gaussians with variance 1/2 (Eq. 16)."""
        densities = [Normal(mean, math.sqrt(0.5)).log_prob(x) for mean in (f, f_ref)]
        return (densities[0] - densities[1]).flatten(1).sum(1)

    argument = dpo * (log_ratio(c_w) - log_ratio(c_l)) + spin * (log_ratio(c_w) - log_ratio(f_ref))
    base = (c_w - f).square().flatten(1).sum(1).mean()
    expected = base + weight * torch.log1p(torch.exp(-argument)).mean()
    loss, metrics = preference_loss(*features(), weight=weight, dpo=dpo, spin=spin, norm="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    if dpo and spin:
        assert metrics["margin"].item() == pytest.approx(argument.mean().item(), rel=1e-4)
        wins = (argument > 0).double().mean().item()
        assert metrics["implicit_accuracy"].item() == pytest.approx(wins)


def test_without_both_parts_or_a_reference_only_the_base_loss_is_left():
    f, f_ref, c_w, c_l = features()
    expected = F.mse_loss(f, c_w).item()
    assert preference_loss(f, f_ref, c_w, c_l, dpo=False, spin=False)[0].item() == pytest.approx(
        expected
    )
    loss, metrics = preference_loss(f, None, c_w, c_l)
    assert loss.item() == pytest.approx(expected) and metrics.keys() == {"error"}


def test_errors_are_means_over_elements_whatever_the_norm():
    f, f_ref, c_w, c_l = features()
    expected = {"error": F.mse_loss(f, c_w), "reference_error": F.mse_loss(f_ref, c_w)}
    for norm in ("mean", "sum"):
        _, metrics = preference_loss(f, f_ref, c_w, c_l, norm=norm)
        for name, value in expected.items():
            assert torch.allclose(metrics[name], value)
        assert torch.allclose(
            preference_loss(f, None, c_w, c_l, norm=norm)[1]["error"], F.mse_loss(f, c_w)
        )


def test_the_argument_is_affine_in_f():
    f, f_ref, c_w, c_l = (x.double() for x in features())
    step = torch.randn_like(f)
    margins = []
    for t in (-1, 0, 1):
        _, metrics = preference_loss(f + t * step, f_ref, c_w, c_l, norm="sum")
        margins.append(metrics["margin"].item())
    assert abs(margins[2] - margins[0]) > 1
    # Inputs in float64 are computed in float64.
    assert abs(margins[2] - 2 * margins[1] + margins[0]) < 1e-12


def test_the_gradient_points_along_twice_the_winner_minus_the_loser_minus_the_reference():
    f, f_ref, c_w, c_l = (x[:1].requires_grad_() for x in features())  # one sample: one factor
    loss, metrics = preference_loss(f, f_ref, c_w, c_l, norm="sum")
    base = squared_distance(c_w, f, "sum").mean()
    gradient, of_reference = torch.autograd.grad(loss - base, [f, f_ref], allow_unused=True)
    along = 2 * c_w - c_l - f_ref
    factor = -2 * torch.sigmoid(-metrics["margin"])  # l'(x) = -sigmoid(-x)
    assert torch.allclose(gradient, factor * along, atol=1e-6 + 1e-4 * along.abs().max().item())
    assert of_reference is None, "the opponent does not learn"
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize(
    ("dpo", "spin", "weight", "beyond"),
    [(True, True, 1, 1 / 3), (True, True, 2, 1 / 2), (True, False, 1, 1 / 2), (False, True, 1, 0)],
)
def test_with_a_reference_that_follows_f_comes_to_rest_beyond_the_winner(dpo, spin, weight, beyond):
    f, _, c_w, c_l = (x[:1].double() for x in features())
    for _ in range(100):
        f.requires_grad_()
        terms = {"weight": weight, "dpo": dpo, "spin": spin, "norm": "sum"}
        loss, _ = preference_loss(f, f, c_w, c_l, **terms)
        f = (f - 0.1 * torch.autograd.grad(loss, f)[0]).detach()
    assert torch.allclose(f, c_w + beyond * (c_w - c_l), atol=1e-3)
    if dpo and spin and weight == 1:
        assert torch.allclose(f, (2 * c_w - c_l / 2) / 1.5, atol=1e-3)


def test_the_best_length_of_a_step_makes_its_error_least_and_grows_where_less_of_it_arrives():
    f, _, ideal, c_l = features()
    top, bottom = best_length(f, c_l, ideal)
    best = top.sum() / bottom.sum()
    errors = []
    for s in (best - 0.01, best, best + 0.01):
        errors.append(squared_distance(ideal, c_l + s * (f - c_l)).mean().item())
    assert errors[1] < min(errors[0], errors[2])
    # A step of twice the best length is as good as none, and so (1 + s) / 2 is the border.
    none = squared_distance(ideal, c_l).mean()
    assert torch.allclose(squared_distance(ideal, c_l + 2 * best * (f - c_l)).mean(), none)
    top, bottom = best_length(f, c_l, ideal, reached=c_l + 0.6 * (f - c_l))
    assert (top.sum() / bottom.sum()).item() == pytest.approx(best.item() / 0.6)


def test_the_norm_is_a_mean_or_a_sum_in_at_least_fp32_and_nothing_else():
    a = torch.zeros(2, 3, 4, dtype=torch.half)
    b = torch.full_like(a, 200.0)
    assert squared_distance(a, b, "sum").tolist() == [12 * 200.0**2] * 2  # beyond fp16's 65504
    assert squared_distance(a, b).tolist() == [200.0**2] * 2
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        squared_distance(a, b, "max")


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(1, 3, 4),  # would broadcast
        torch.zeros(3, 4),
        torch.zeros(5, 1, 4),
        torch.zeros(5, 3, 4, 1),
        torch.zeros(5, 3, 4, dtype=torch.long),
        torch.ones(5, 3, 4, dtype=torch.bool),
    ],
)
def test_tensors_that_would_broadcast_or_hold_no_floats_are_refused_with_both_shapes(other):
    points = dict(zip(("f", "f_ref", "c_w", "c_l"), features()))
    both = re.escape(f"{tuple(other.shape)}")
    for name in points:
        with pytest.raises(ValueError, match=both) as caught:
            preference_loss(**points | {name: other})
        assert "(5, 3, 4)" in str(caught.value)
    with pytest.raises(ValueError, match=both):
        preference_loss(points["f"], None, points["c_w"], other)
    with pytest.raises(ValueError, match=both):
        squared_distance(other, points["f"])
    for flat in (torch.zeros(5), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="expected floating-point"):
            squared_distance(flat, flat)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0, torch.ones(5), "1", None])
def test_a_weight_is_one_finite_number(weight):
    with pytest.raises(ValueError, match="weight is .*, expected a finite number"):
        preference_loss(*features(), weight=weight)


def test_the_reference_is_refreshed_at_the_kth_success_in_a_row_and_not_before():
    rule = ReferenceRefresh(k=10)
    for _ in range(2):
        assert [rule.update(1.0, 2.0) for _ in range(10)] == [False] * 9 + [True]
    assert rule.refreshes == 2
    for k in (0, 2.5, math.nan, "3"):
        with pytest.raises(ValueError, match="a whole number of at least 1"):
            ReferenceRefresh(k)


@pytest.mark.parametrize("error", [2.0, 3.0, float("nan")])  # a tie is no success
def test_one_miss_starts_the_count_again(error):
    rule = ReferenceRefresh(k=3)
    assert [rule.update(e, 2.0) for e in (1, 1, error, 1, 1, 1)] == [False] * 5 + [True]
