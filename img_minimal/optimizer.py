"""The optimisers of aligner training: AdamW, as in the paper, or Muon, which needs about half of the steps.

Muon makes every update of a matrix orthogonal, so that all of its directions learn at one pace. It is meant for
matrices; biases, gains and the like stay with AdamW.
"""

from collections.abc import Iterable
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


def new_optimizer(name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float):
    """ "adamw" or "muon" over `parameters`. Raises KeyError for another name."""
    kinds = {"adamw": lambda p: torch.optim.AdamW(p, lr, weight_decay=weight_decay),
             "muon": lambda p: MuonAdamW(p, lr, weight_decay)}  # fmt: skip
    return kinds[name](parameters)
