"""The order of training data: parts of a stream or everything at once, batches without end, a place to resume from."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from img_minimal.data.stream import START, Place
from img_minimal.runtime.errors import UserError


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
    epoch. Of `share` (r, n) every batch is the r-th of n parts of one that n processes share.
    """

    def __init__(
        self, parts: Callable[[Place], Iterator[Part]], batch_size: int, seed: int, share: tuple[int, int] = (0, 1)
    ):
        self.parts, self.batch_size, self.seed, self.share = parts, batch_size, seed, share
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
                    index = batch_indices(step, self.batch_size, part.samples, seed)[self.share[0] :: self.share[1]]
                    if len(index) * self.share[1] != min(self.batch_size, len(part.samples)):
                        raise UserError(f"{len(part.samples)} samples: too few for {self.share[1]} processes to share")
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

    def resume(self, state: dict) -> None:
        """Go on from a `state_dict`."""
        self.epoch = state["epoch"]
        self.place = Place(**state["place"])
        self.batch = state["batch"]


def batch_indices(step: int, batch_size: int, samples: Tensor, seed: int) -> Tensor:
    """Which samples step `step` sees: a function of the step, so that the position in the data is a number."""
    per_epoch = max(1, len(samples) // batch_size)
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return samples[order[position * batch_size : (position + 1) * batch_size]]
