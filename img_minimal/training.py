"""What the training loop in train.py stands on: the state of a run, the order of the data, validation, signals."""

import copy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from img_minimal.aligner import ImplicitAligner
from img_minimal.features import Features
from img_minimal.pipeline import align, best_device
from img_minimal.preference import ReferenceRefresh, squared_distance
from img_minimal.presets import Preset


@dataclass
class Trainer:
    """All state of a run; `state_dict` goes into a checkpoint."""

    aligner: ImplicitAligner
    reference: ImplicitAligner
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    refresh: ReferenceRefresh
    step: int = 0

    @classmethod
    def new(cls, preset: Preset, data: Features, refresh_after: int, seed: int) -> Self:
        """A fresh aligner and its reference, which starts as its copy."""
        torch.manual_seed(seed)
        width, guidance_width = data.loser.shape[-1], data.guidance.shape[-1]
        aligner = ImplicitAligner(width, guidance_width, preset.depth, preset.heads).to(best_device())
        reference = copy.deepcopy(aligner).requires_grad_(False)
        optimizer = torch.optim.AdamW(aligner.parameters(), preset.lr, weight_decay=preset.weight_decay)
        hold, steps = preset.constant_share, preset.train_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: 1.0 if s <= hold * steps else max(0.02, (steps - s) / ((1 - hold) * steps))
        )
        return cls(aligner, reference, optimizer, schedule, ReferenceRefresh(refresh_after))

    def state_dict(self) -> dict:
        """Weights, reference, optimiser, schedule, refresh counter, RNG and position in the data."""
        parts = ("aligner", "reference", "optimizer", "schedule", "refresh")
        return {p: getattr(self, p).state_dict() for p in parts} | {"step": self.step, "rng": torch.get_rng_state()}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""
        for part in ("aligner", "reference", "optimizer", "schedule", "refresh"):
            getattr(self, part).load_state_dict(state[part])
        self.step = state["step"]
        torch.set_rng_state(state["rng"])


def batch_indices(step: int, batch_size: int, samples: Tensor, seed: int) -> Tensor:
    """Which samples step `step` sees: a function of the step, so that the position in the data is a number."""
    per_epoch = max(1, len(samples) // batch_size)
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return samples[order[position * batch_size : (position + 1) * batch_size]]


@torch.no_grad()
def validate(trainer: Trainer, data: Features) -> dict[str, float]:
    """On prompts not trained on: error of f, of doing nothing, and the share of losers that move nearer to c_w."""
    aligned = align(trainer.aligner, data.loser, data.guidance, data.mask, passes=1)
    after, before = squared_distance(data.winner, aligned), squared_distance(data.winner, data.loser)
    wrong = ~data.kept
    return {
        "validation_error": after[wrong].mean().item(),
        "identity_error": before[wrong].mean().item(),
        "nearer": (after < before)[wrong].float().mean().item(),
        "kept_error": after[data.kept].mean().item() if data.kept.any() else 0.0,
    }


class Stop:
    """Remembers that Ctrl-C or SIGTERM came, so that the loop can save before it ends."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[Self]:
        """Catch both signals within the block."""
        before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True
