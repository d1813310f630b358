"""Muon for matrices, AdamW for the rest, behind the interface of one optimiser."""

import copy

import pytest
import torch
from torch import nn

from img_minimal.optimizer import MuonAdamW, new_optimizer, orthogonalized


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def one_step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    net(x).square().sum().backward()
    optimizer.step()


def test_matrices_move_as_with_muon_alone_and_vectors_as_with_adamw_alone() -> None:
    ours, parts = model(), model()
    both = MuonAdamW(ours.parameters(), 1e-2, 0.01, torch.bfloat16)
    muon = torch.optim.Muon(
        [p for p in parts.parameters() if p.ndim == 2], 1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([p for p in parts.parameters() if p.ndim != 2], 1e-2, weight_decay=0.01)
    for seed in range(3):
        one_step(ours, both, seed)
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
        parts.zero_grad()
        parts(x).square().sum().backward()
        muon.step()
        adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), parts.parameters()))


def test_a_muon_update_of_a_matrix_has_singular_values_of_about_one_size() -> None:
    net = model()
    before = net[0].weight.detach().clone()
    one_step(net, MuonAdamW(net.parameters(), 1e-2, 0.0, torch.float32), 0)
    values = torch.linalg.svdvals(net[0].weight.detach() - before)
    assert values.max() / values.min() < 2.5


def test_orthogonalized_in_fp32_is_what_it_is_in_float64_and_near_what_it_is_in_bf16() -> None:
    torch.manual_seed(0)
    for shape in ((6, 8), (8, 6), (16, 16)):
        matrix = torch.randn(*shape)
        exact = orthogonalized(matrix, torch.float64)
        assert (orthogonalized(matrix, torch.float32) - exact).abs().max() < 1e-5
        assert (orthogonalized(matrix, torch.bfloat16) - exact).abs().max() < 0.1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_reloaded_optimiser_goes_on_to_bitwise_the_same_weights(name: str) -> None:
    net = model()
    optimizer = new_optimizer(name, net.parameters(), 1e-2, 0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5**s)
    for seed in range(2):
        one_step(net, optimizer, seed)
        schedule.step()
    other = copy.deepcopy(net)
    again = new_optimizer(name, other.parameters(), 1e-2, 0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    later = torch.optim.lr_scheduler.LambdaLR(again, lambda s: 0.5**s)
    later.load_state_dict(schedule.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(2, 4):
        for one, opt, sched in ((net, optimizer, schedule), (other, again, later)):
            one_step(one, opt, seed)
            sched.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


def test_a_schedule_sets_the_rate_of_both_halves() -> None:
    net = model()
    optimizer = MuonAdamW(net.parameters(), 1e-2, 0.0, torch.float32)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.1)
    schedule.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == pytest.approx([1e-3, 1e-3])
