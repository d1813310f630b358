"""Build the optimiser (AdamW or Muon) and the learning-rate schedule of a training run."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from img_minimal.cli import check
from img_minimal.presets import Training


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Approximate U V^T of matrix = U S V^T by five Newton-Schulz steps: (M, N) -> (M, N).

    Products are in `dtype`. With Keller Jordan's coefficients all singular values end between
    about 0.7 and 1.2, which is close enough to 1.
    """
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        update = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, update, x, beta=3.4445)
    return x.T if tall else x


class Muon(torch.optim.AdamW):
    """Orthogonalize the momentum of matrices; update biases, gains and the like by AdamW.

    All directions of a matrix learn at one pace, which halves the steps an aligner needs. The size
    of an update is AdamW's, so one learning rate serves both. torch.optim.Muon takes matrices only
    and iterates in bf16 on any hardware, 18 times as slow as fp32 on a CPU without bf16 units.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype
    ):
        super().__init__(parameters, lr, weight_decay=weight_decay)
        self.dtype = dtype  # of the Newton-Schulz products

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update matrices by Nesterov momentum, orthogonalized; leave the rest to AdamW."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim == 2 and p.grad is not None:
                    self._step_matrix(p, group["lr"], group["weight_decay"])
                    p.grad = None  # so that AdamW passes over it
        super().step()

    def _step_matrix(self, p: nn.Parameter, lr: float, weight_decay: float) -> None:
        state = self.state[p]
        if not state:  # AdamW expects a step counter in every state that it loads
            state |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
        momentum = state["momentum"].lerp_(p.grad, 0.05)
        update = orthogonalized(p.grad.lerp(momentum, 0.95), self.dtype)
        p.mul_(1 - lr * weight_decay)
        p.add_(update, alpha=-lr * 0.2 * max(p.shape) ** 0.5)


def optimizer_and_schedule(
    settings: Training,
    parameters: Iterable[nn.Parameter],
    floor: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Create what a run's settings ask for; its rate ends at `floor` times `settings.lr`."""
    optimizer = new_optimizer(
        settings.optimizer, parameters, settings.lr, settings.weight_decay, dtype
    )
    warmup, hold = max(1, settings.warmup), settings.constant_share
    return optimizer, LambdaLR(
        optimizer, warmup_constant_decay(settings.steps, warmup, hold, floor)
    )


def new_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
) -> torch.optim.Optimizer:
    """Create "adamw" or "muon"; `dtype` is that of Muon's products."""
    if name == "muon":
        return Muon(parameters, lr, weight_decay, dtype)
    check(name == "adamw", f"unknown optimizer {name!r}; expected adamw or muon")
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


def warmup_constant_decay(
    steps: int, warmup: int, hold: float, floor: float
) -> Callable[[int], float]:
    """Return the learning-rate factor by step.

    It rises linearly for `warmup` steps, stays at 1 until `hold` of the run, and falls linearly to
    `floor`.
    """

    def factor(step: int) -> float:
        decay = 1.0
        if step > hold * steps:
            decay = max(floor, (steps - step) / ((1 - hold) * steps))
        return min(1.0, (step + 1) / warmup, decay)

    return factor
