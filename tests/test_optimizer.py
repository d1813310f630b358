"""Muon updates matrices, AdamW the rest, behind the interface of one optimiser."""

import pytest
import torch
from torch import nn

from img_minimal.optimizer import Muon, orthogonalized, warmup_constant_decay


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def one_step(net: nn.Module, seed: int, *optimizers: torch.optim.Optimizer) -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    net.zero_grad()
    net(x).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_matrices_move_as_with_torchs_muon_and_vectors_as_with_its_adamw():
    ours, theirs = model(), model()
    both = Muon(ours.parameters(), 1e-2, 0.01, torch.bfloat16)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    muon = torch.optim.Muon(matrices, 1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    vectors = [p for p in theirs.parameters() if p.ndim != 2]
    adamw = torch.optim.AdamW(vectors, 1e-2, weight_decay=0.01)
    for seed in range(3):
        one_step(ours, seed, both)
        one_step(theirs, seed, muon, adamw)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_a_muon_update_of_a_matrix_has_singular_values_of_about_one_size():
    net = model()
    before = net[0].weight.detach().clone()
    one_step(net, 0, Muon(net.parameters(), 1e-2, 0.0, torch.float32))
    values = torch.linalg.svdvals(net[0].weight.detach() - before)
    assert values.max() / values.min() < 2.5


@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (16, 16)])
def test_orthogonalizing_in_fp32_is_as_exact_as_in_float64_and_in_bf16_near_it(shape):
    torch.manual_seed(0)
    matrix = torch.randn(*shape)
    exact = orthogonalized(matrix, torch.float64)
    assert (orthogonalized(matrix, torch.float32) - exact).abs().max() < 1e-5
    assert (orthogonalized(matrix, torch.bfloat16) - exact).abs().max() < 0.1


def test_the_learning_rate_rises_stays_and_falls_to_its_floor():
    factor = warmup_constant_decay(steps=100, warmup=4, hold=0.5, floor=0.02)
    rates = [factor(step) for step in (0, 1, 3, 50, 75, 99, 100)]
    assert rates == [0.25, 0.5, 1.0, 1.0, 0.5, 0.02, 0.02]
