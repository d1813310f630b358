"""Every run's schedule, and the optimisers of aligner training: AdamW, or Muon, which needs about half of the steps.

Muon makes every update of a matrix orthogonal, so that all of its directions learn at one pace. It is meant for
matrices; biases, gains and the like stay with AdamW. torch's own Muon iterates in bf16 whatever the hardware, which
takes 40 times as long as fp32 on a CPU without bf16 units; this one computes as it is told, and is equal to torch's
when that is bf16.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Five Newton-Schulz steps towards U V^T of matrix = U S V^T, (M, N) -> (M, N); products in `dtype`.

    The coefficients are Keller Jordan's: singular values end between about 0.7 and 1.2, near enough to 1.
    """
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        update = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, update, x, beta=3.4445)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalized; their size is AdamW's, so one learning rate serves both."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype = dtype  # of the Newton-Schulz iteration

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Nesterov momentum, orthogonalize, decay, update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalized(parameter.grad.lerp(momentum, group["momentum"]), self.dtype)
                size = 0.2 * max(parameter.shape) ** 0.5  # the root mean square of AdamW's updates
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * size)


class MuonAdamW(torch.optim.Optimizer):
    """Two optimisers that look like one: Muon for the matrices among `parameters`, AdamW for the rest."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype):
        parameters = list(parameters)
        matrices = [p for p in parameters if p.ndim == 2]
        rest = [p for p in parameters if p.ndim != 2]
        muon = Muon(matrices, lr, weight_decay, dtype)
        self.parts = [muon, torch.optim.AdamW(rest, lr, weight_decay=weight_decay)]
        super().__init__(parameters, {})
        self._share_groups()

    def _share_groups(self) -> None:
        # The very dicts of the two, so that a schedule that sets a learning rate here sets it there.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters from their gradients."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def new_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The optimiser of that name, adamw or muon, over `parameters`; `dtype` is what Muon's products are in."""
    if name == "muon":
        return MuonAdamW(parameters, lr, weight_decay, dtype)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    raise ValueError(f"unknown optimiser {name!r}; expected adamw or muon")


def warmup_constant_decay(steps: int, warmup: int, hold: float, floor: float) -> Callable[[int], float]:
    """Learning-rate factor by step: linear up, constant until `hold` of the run, then linear down to `floor`."""

    def factor(step: int) -> float:
        """Share of the full rate at this step."""
        decay = 1.0 if step <= hold * steps else max(floor, (steps - step) / ((1 - hold) * steps))
        return min(1.0, (step + 1) / warmup, decay)

    return factor
