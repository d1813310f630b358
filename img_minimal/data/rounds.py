"""Pairs that a model makes for itself: which of two images wins, in Pick-a-Pic's columns, and how rounds are mixed.

x0 is what the base drew for a prompt, x1 what IMG drew from the same seed with the current aligner.

    x1 is better      loser x0, winner x1     what worked, once more
    x0 is better      loser x1, winner x0     the next aligner learns not to break things
    both are right    x0 is its own target    and to leave alone what is right
    both wrong alike  dropped
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import torch
from PIL.Image import Image

from img_minimal.data.batches import Part
from img_minimal.data.cache import Shards
from img_minimal.data.features import Features
from img_minimal.data.stream import Place
from img_minimal.runtime.images import png

TYPES = {"jpg": pa.binary(), "label": pa.float64(), "model": pa.string()}
SIDES = {f"{name}_{k}": kind for name, kind in TYPES.items() for k in (0, 1)}
SCHEMA = pa.schema({"caption": pa.string(), "ranking_id": pa.int64()} | SIDES)
Outcome = Literal["img", "base", "both", "none"]


def pair_rows(
    prompts: Sequence[str],
    base: Sequence[Image],
    img: Sequence[Image],
    outcomes: Sequence[Outcome],
    model: str,
    first: int = 0,
) -> list[dict]:
    """Rows in Pick-a-Pic's columns, numbered from `first`; `model` drew the second images. The dropped give none."""
    rows = []
    for number, (prompt, x0, x1, outcome) in enumerate(zip(prompts, base, img, outcomes, strict=True), first):
        if outcome == "none":
            continue
        second, drawn_by = (x0, "base") if outcome == "both" else (x1, model)
        first_wins = outcome != "img"
        rows.append({
            "caption": prompt, "jpg_0": png(x0), "jpg_1": png(second), "label_0": float(first_wins),
            "label_1": float(not first_wins), "ranking_id": number, "model_0": "base", "model_1": drawn_by,
        })  # fmt: skip
    return rows


def count(outcomes: Sequence[Outcome], categories: Sequence[str]) -> dict:
    """How many pairs each outcome gives, and how many of IMG's wins each category."""
    counts = Counter(outcomes)
    wins = Counter(category for outcome, category in zip(outcomes, categories) if outcome == "img")
    return {
        "drawn": len(outcomes), "pairs": len(outcomes) - counts["none"], "img_better": counts["img"],
        "base_better": counts["base"], "both_right": counts["both"], "wins_by_category": dict(sorted(wins.items())),
    }  # fmt: skip


@dataclass
class Mixture:
    """Original data, of a cache or a stream, with pairs of the latest rounds among them.

    `replay` is the share of original samples that is left at least; 0 leaves none, and so does without them.
    """

    original: object  # CachedData or StreamedData
    rounds: list[Shards]
    replay: float
    seed: int

    def parts(self, place: Place) -> Iterator[Part]:
        """The parts of the original data, each with as many of the new samples as it can take."""
        new = Shards([features for shards in self.rounds for features in shards.parts])
        for part in self.original.parts(place):
            own = part.data.parts if isinstance(part.data, Shards) else [part.data]
            joined, first = Shards([*own, *new.parts]), sum(map(len, own))
            most = len(new) if not self.replay else round(len(part.samples) * (1 - self.replay) / self.replay)
            generator = torch.Generator().manual_seed(self.seed + part.place.chunk)
            chosen = first + torch.randperm(len(new), generator=generator)[:most].sort().values
            samples = torch.cat([part.samples, chosen]) if self.replay else chosen
            yield Part(joined, samples, part.place)


def step_size(features: Features | Shards, most: int = 1000) -> float:
    """|c_w - c_l|, the mean over pairs of two images: how far a pair asks the aligner to go."""
    index = torch.arange(min(len(features), most))
    some = features[index]
    distance = (some.winner - some.loser).flatten(1).norm(dim=1)
    moved = distance[~some.is_identity & (distance > 0)]
    return moved.mean().item() if len(moved) else 0.0
