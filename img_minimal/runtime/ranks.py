"""Several processes that train together, as torchrun starts them. One process is one rank, and nothing else differs.

Whatever decides how the run goes on (a refresh, a stop, a loss that is not finite, a mistake of the user) is decided by
all ranks together: ranks that decide for themselves drift apart, or wait for each other for ever.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from img_minimal.runtime.errors import UserError

LOST = "another process of this run ended, and its own message says why; go on with the same command and --resume"


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[Self]:
        """Meet the other processes for as long as the block lasts; alone without torchrun.

        If a process is lost, the others end at once, with a line that says so.
        """
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world == 1:
            yield cls()
            return
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield cls(dist.get_rank(), world)
        except RuntimeError as error:
            lost = any(word in str(error) for word in ("onnection", "gloo", "NCCL", "peer", "ncclSystemError"))
            if not lost:
                raise
            # Not an exception: gloo's threads, which wait for the lost one, would never let this process end.
            print(f"error: rank {dist.get_rank()}: {LOST}", file=sys.stderr, flush=True)
            os._exit(2)
        finally:
            dist.destroy_process_group()

    @property
    def main(self) -> bool:
        """Does this one print, validate, save and draw?"""
        return self.rank == 0

    def share(self, number: int, what: str) -> int:
        """This rank's part of a number. Raises UserError if it does not divide."""
        if number % self.world:
            raise UserError(f"{what} is {number}, which {self.world} processes cannot share; choose a multiple of it")
        return number // self.world

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all ranks; NaN anywhere is NaN everywhere."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def gather(self, value: Any) -> list[Any]:
        """What each rank has, on every rank."""
        everything: list[Any] = [value]
        if self.world > 1:
            everything = [None] * self.world
            dist.all_gather_object(everything, value)
        return everything

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks leave this block, or all raise the UserError of one of them."""
        error = None
        try:
            yield
        except (UserError, OSError) as found:
            error = found
        for rank, said in enumerate(self.gather(error and " ".join(str(error).split()))):
            if said is not None:
                raise error or UserError(f"rank {rank}: {said}")

    def parallel(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over the ranks in `backward`."""
        if self.world == 1:
            return module
        device = next(module.parameters()).device
        ids = [torch.cuda.current_device()] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids)


ALONE = Ranks()
