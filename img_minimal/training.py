"""What the training loop in train.py stands on: the state of a run, the order of the data, validation, signals."""

import copy
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor

from img_minimal.aligner import ImplicitAligner
from img_minimal.data.stream import START, Place
from img_minimal.errors import UserError
from img_minimal.features import Features
from img_minimal.models.devices import best_device
from img_minimal.optimizer import new_optimizer, warmup_constant_decay
from img_minimal.pipeline import align
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
    def new(cls, preset: Preset, widths: tuple[int, int], refresh_after: int, seed: int) -> Self:
        """A fresh aligner for tokens and guidance of these widths (D, H), and its reference, which starts as a copy."""
        torch.manual_seed(seed)
        aligner = ImplicitAligner(*widths, preset.depth, preset.heads, preset.head_dim).to(best_device())
        reference = copy.deepcopy(aligner).requires_grad_(False)
        optimizer = new_optimizer(preset.optimizer, aligner.parameters(), preset.lr, preset.weight_decay)
        factor = warmup_constant_decay(preset.train_steps, warmup=1, hold=preset.constant_share, floor=0.02)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return cls(aligner, reference, optimizer, schedule, ReferenceRefresh(refresh_after))

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


@dataclass
class Part:
    """Data that is at hand at once: a chunk of a stream, or everything. `data[index]` is a batch."""

    data: Any
    samples: Tensor  # which of the data are trained on
    place: Place = START


class Batches:
    """Batches without end: parts in their order, the samples of each part in an order of their own in every epoch.

    `parts(place)` gives the parts from a place on to the end of an epoch. `state_dict` is the position, so that a
    resumed run sees what it would have seen. The last samples of a part, if they make no whole batch, wait for another
    epoch.
    """

    def __init__(self, parts: Callable[[Place], Iterator[Part]], batch_size: int, seed: int):
        self.parts, self.batch_size, self.seed = parts, batch_size, seed
        self.epoch, self.place, self.batch = 0, START, 0
        self.where = ""  # the latest batch, for messages

    def __iter__(self) -> Iterator[Any]:
        while True:
            fruitful = self.place != START or self.batch > 0
            for part in self.parts(self.place):
                self.place = part.place
                per_epoch = max(1, len(part.samples) // self.batch_size) if len(part.samples) else 0
                for k in range(self.batch, per_epoch):
                    step, seed = self.epoch * per_epoch + k, self.seed + 7919 * part.place.chunk
                    index = batch_indices(step, self.batch_size, part.samples, seed)
                    self.batch, self.where, fruitful = k + 1, f"samples {index.tolist()[:8]}...", True
                    if part.place.chunk:
                        self.where += f" of chunk {part.place.chunk}"
                    yield part.data[index]
                self.batch = 0
            if not fruitful:
                raise UserError("there is nothing to train on: no pair has a preference, or all are for validation")
            self.epoch, self.place = self.epoch + 1, START

    def state_dict(self) -> dict:
        """Epoch, place of the part, batches of it that were given."""
        return {"epoch": self.epoch, "place": asdict(self.place), "batch": self.batch}

    def resume(self, state: dict | None, step: int) -> None:
        """Go on from a `state_dict`; without one (old checkpoints) by passing over the batches of `step` steps."""
        if state is None:
            for _ in islice(iter(self), step):
                pass
        else:
            self.epoch, self.place, self.batch = state["epoch"], Place(**state["place"]), state["batch"]


def batch_indices(step: int, batch_size: int, samples: Tensor, seed: int) -> Tensor:
    """Which samples step `step` sees: a function of the step, so that the position in the data is a number."""
    per_epoch = max(1, len(samples) // batch_size)
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return samples[order[position * batch_size : (position + 1) * batch_size]]


@torch.no_grad()
def validate(trainer: Trainer, data: Features) -> dict[str, float]:
    """On prompts not trained on: error of f, of doing nothing, and the share of losers that move nearer to c_w.

    Nothing if there are no such prompts.
    """
    if data.kept.all():
        return {}
    at_once = min(250, int(5e8 / (4 * data.guidance[0].numel())) + 1)  # half a gigabyte of guidance in fp32
    aligned = align(trainer.aligner, data.loser, data.guidance, data.mask, passes=1, batch_size=at_once)
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
