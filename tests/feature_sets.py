"""Make random features to train on, in memory, as a cache or a stream would give them."""

import os
import signal
from collections.abc import Iterator

import torch

from img_minimal.data.features import Batches, Features, Part
from img_minimal.data.pairs import StreamPosition
from img_minimal.run import Ranks, Run

WIDTHS = 64, 32  # D, H


def some_features(count: int = 60, seed: int = 1) -> Features:
    """Draw features whose winners are a function of their losers; the last 10 count as identity."""
    generator = torch.Generator().manual_seed(seed)
    loser = torch.randn(count, 4, WIDTHS[0], generator=generator)
    lengths = torch.randint(3, 8, (count,), generator=generator)
    return Features(
        guidance=torch.randn(int(lengths.sum()), WIDTHS[1], generator=generator).bfloat16(),
        lengths=lengths,
        longest=torch.full((count,), 7),
        loser=loser,
        winner=loser.flip(-1),
        validation=torch.arange(count) % 6 == 0,
        is_identity=torch.arange(count) >= count - 10,
    )


class Data:
    """Features in chunks, as `train` takes them."""

    def __init__(self, *chunks: Features):
        self.chunks = chunks
        self.unseen = chunks[0][chunks[0].validation]

    def parts(self, position: StreamPosition) -> Iterator[Part]:
        for k, features in enumerate(self.chunks):
            if k >= position.chunk:
                samples = (~features.validation).nonzero().flatten()
                yield Part(features, samples, StreamPosition(chunk=k))

    def batches(self, batch_size: int, seed: int, ranks: Ranks) -> Batches:
        return Batches(self.parts, batch_size, seed, ranks.share, shared=True)


def interrupt(run: Run, step: int) -> None:
    """Let a signal come in a step of a run."""
    log = run.log

    def with_signal(*samples: str, **metrics: torch.Tensor) -> dict[str, float]:
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return log(*samples, **metrics)

    run.log = with_signal
