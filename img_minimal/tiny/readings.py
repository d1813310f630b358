"""Does the oracle read a drawn picture as a person does? 360 pictures of the base, each read by eye.

`twins/readings.parquet` holds pictures that the base drew for validation prompts, the prompts, and what a person saw
who had the palette beside them: "red circle 1, unclear cross 5", places numbered like the keys of a telephone. The
oracle's thresholds were chosen on the first 240; the others are `fresh`.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor

from img_minimal.files import decode, from_pil
from img_minimal.tiny.grammar import Prompt, parse
from img_minimal.tiny.oracle import Verdict, compare, judge
from img_minimal.tiny.world import CELLS, Shape


@dataclass(frozen=True)
class Reading:
    """A picture (3, 64, 64) in [0, 1], what it was drawn for, and the verdict on what a person saw in it."""

    image: Tensor
    prompt: Prompt
    by_eye: Verdict
    fresh: bool


def readings() -> list[Reading]:
    """The pictures that the repository ships."""
    found = []
    for row in pq.read_table(Path(__file__).parent / "twins" / "readings.parquet").to_pylist():
        shapes = [words.rsplit(" ", 2) for words in row["reading"].split(", ")]
        scene = tuple(Shape(colour, form, *CELLS[int(place) - 1], 8.0) for colour, form, place in shapes)
        prompt, pixels = parse(row["prompt"]), from_pil([decode(row["image"]["bytes"])])[0]
        found.append(Reading(pixels, prompt, compare(scene, prompt), row["fresh"]))
    return found


def agreement(pictures: list[Reading]) -> dict[str, float]:
    """Shares of pictures that oracle and person call alike: right or wrong, nameable or not, and in the same words.

    `meant`: the same words, or wrong with a shape that neither could name, which they may tell in other words.
    """
    verdicts = judge(torch.stack([p.image for p in pictures]), [p.prompt for p in pictures])
    pairs = [(p.by_eye, verdict) for p, verdict in zip(pictures, verdicts)]
    alike = {
        "strict": [eye.strict == oracle.strict for eye, oracle in pairs],
        "unclear": [eye.unclear == oracle.unclear for eye, oracle in pairs],
        "words": [eye.words == oracle.words for eye, oracle in pairs],
        "meant": [eye.words == oracle.words or (eye.unclear and oracle.unclear) for eye, oracle in pairs],
    }
    return {name: sum(same) / len(pairs) for name, same in alike.items()}
