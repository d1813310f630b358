"""Every run's schedule, and the optimisers of aligner training: AdamW, or Muon, which needs about half of the steps.

Muon makes every update of a matrix orthogonal, so that all of its directions learn at one pace. It is meant for
matrices; biases, gains and the like stay with AdamW.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Two optimisers that look like one: Muon for the matrices among `parameters`, AdamW for the rest."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float):
        parameters = list(parameters)
        matrices, rest = ([p for p in parameters if (p.ndim == 2) == wanted] for wanted in (True, False))
        # With updates as large as AdamW's, one learning rate serves both.
        muon = torch.optim.Muon(matrices, lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
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
    name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser of that name, adamw or muon, over `parameters`. Raises KeyError for another name."""
    return {"adamw": torch.optim.AdamW, "muon": MuonAdamW}[name](parameters, lr=lr, weight_decay=weight_decay)


def warmup_constant_decay(steps: int, warmup: int, hold: float, floor: float) -> Callable[[int], float]:
    """Learning-rate factor by step: linear up, constant until `hold` of the run, then linear down to `floor`."""

    def factor(step: int) -> float:
        """Share of the full rate at this step."""
        decay = 1.0 if step <= hold * steps else max(floor, (steps - step) / ((1 - hold) * steps))
        return min(1.0, (step + 1) / warmup, decay)

    return factor
