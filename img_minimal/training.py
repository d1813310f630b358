"""What the training loop in train.py stands on: the state of a run, validation, signals."""

import copy
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from img_minimal.aligner import ImplicitAligner, align
from img_minimal.data.batches import Batches
from img_minimal.data.features import Features
from img_minimal.data.sources import CachedData, StreamedData
from img_minimal.preference import ReferenceRefresh, squared_distance
from img_minimal.presets import Preset
from img_minimal.runtime.devices import Precision, best_device
from img_minimal.runtime.errors import UserError
from img_minimal.runtime.optimizer import new_optimizer, warmup_constant_decay
from img_minimal.runtime.ranks import ALONE, Ranks


@dataclass
class Trainer:
    """All state of a run; `state_dict` goes into a checkpoint."""

    aligner: ImplicitAligner
    reference: ImplicitAligner
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    refresh: ReferenceRefresh
    precision: Precision
    step: int = 0

    @classmethod
    def new(cls, preset: Preset, widths: tuple[int, int], refresh_after: int, seed: int) -> Self:
        """A fresh aligner for tokens and guidance of these widths (D, H), and its reference, which starts as a copy."""
        device = best_device()
        precision = Precision.named(preset.dtype, device)
        torch.manual_seed(seed)
        aligner = ImplicitAligner(*widths, preset.depth, preset.heads, preset.head_dim).to(device)
        reference = copy.deepcopy(aligner).requires_grad_(False)
        optimizer = new_optimizer(
            preset.optimizer, aligner.parameters(), preset.lr, preset.weight_decay, precision.compute
        )
        factor = warmup_constant_decay(preset.train_steps, warmup=1, hold=preset.constant_share, floor=0.02)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return cls(aligner, reference, optimizer, schedule, ReferenceRefresh(refresh_after), precision)

    def state_dict(self) -> dict:
        """Weights, reference, optimiser, schedule, refresh counter, RNG and step."""
        parts = ("aligner", "reference", "optimizer", "schedule", "refresh")
        return {p: getattr(self, p).state_dict() for p in parts} | {"step": self.step, "rng": torch.get_rng_state()}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""
        for part in ("aligner", "reference", "optimizer", "schedule", "refresh"):
            getattr(self, part).load_state_dict(state[part])
        self.step = state["step"]
        torch.set_rng_state(state["rng"])


@torch.no_grad()
def validate(trainer: Trainer, data: Features) -> dict[str, float]:
    """On prompts not trained on: error of f, of doing nothing, and the share of losers that move nearer to c_w.

    Nothing if there are no such prompts.
    """
    if data.is_identity.all():
        return {}
    at_once = min(250, int(5e8 / (4 * data.guidance[0].numel())) + 1)  # half a gigabyte of guidance in fp32
    aligned = align(trainer.aligner, data.loser, data.guidance, data.mask, passes=1, batch_size=at_once)
    after, before = squared_distance(data.winner, aligned), squared_distance(data.winner, data.loser)
    wrong = ~data.is_identity
    return {
        "validation_error": after[wrong].mean().item(),
        "identity_error": before[wrong].mean().item(),
        "nearer": (after < before)[wrong].float().mean().item(),
        "identity_sample_error": after[data.is_identity].mean().item() if data.is_identity.any() else 0.0,
    }


def new_batches(data: CachedData | StreamedData, batch_size: int, seed: int, ranks: Ranks = ALONE) -> Batches:
    """This rank's part of every batch: of a cache that all see, or of a stream of its own.

    Raises UserError if the ranks cannot share a batch.
    """
    own = ranks.share(batch_size, "--batch-size")
    if data.shared:
        return Batches(data.parts, batch_size, seed, (ranks.rank, ranks.world))
    return Batches(data.parts, own, seed)


def own_place(places: list[dict] | dict, same_for_all: bool, ranks: Ranks) -> dict:
    """Where a rank goes on, of the places that a checkpoint holds for all of them.

    Raises UserError if they are those of another number of ranks, each with files of its own.
    """
    places = [places] if isinstance(places, dict) else places
    if same_for_all:
        return places[0]
    if len(places) != ranks.world:
        raise UserError(
            f"the run began with {len(places)} processes, each with files of its own, and this one has {ranks.world}: "
            f"resume with torchrun --nproc_per_node={len(places)}, or keep features with --cache-dir from the start"
        )
    return places[ranks.rank]


def check_loss(loss: float, step: int, samples: str, folder: Path) -> None:
    """Raises UserError, before the weights are touched, if the loss of a step is not finite."""
    if not math.isfinite(loss):
        raise UserError(
            f"the loss of step {step} is {loss} ({samples}); the last checkpoint is kept in {folder}. "
            "Lower --lr, or check these samples"
        )


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
