"""Preference pairs as public data sets have them.

Pick-a-Pic                caption, jpg_0, jpg_1 (bytes), label_0, label_1 (1, 0, or 0.5 = tie)
Open Image Preferences    prompt, chosen, rejected
HPDv3                     prompt, path1, path2: files; the first was preferred
HPDv2                     prompt, image_path: files, human_preference: [1, 0] or [0, 1]
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from img_minimal.data.stream import LONGEST_TEXT, TOO_LONG, Decode, Skipped, Stream, text_of

TIE = "ties"
UNLABELLED = "whose labels are no preference (1 and 0)"


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt; people preferred the winner."""

    prompt: str
    winner: Image
    loser: Image

    @property
    def validation(self) -> bool:
        """For measuring the error on prompts that were not trained on."""
        return held_back(self.prompt)


def held_back(prompt: str) -> bool:
    """One prompt in ten is not trained on."""
    return hashlib.sha256(prompt.encode()).digest()[0] % 10 == 0


def parse_pair(row: dict, decode: Decode) -> Pair:
    """A row of Pick-a-Pic, winner first. Raises Skipped for a tie or without a prompt, OSError for damaged images."""
    return _pair(row["caption"], (row["jpg_0"], row["jpg_1"]), (row["label_0"], row["label_1"]), decode)


def _parse_chosen(row: dict, decode: Decode) -> Pair:
    return _pair(row["prompt"], (row["chosen"], row["rejected"]), (1, 0), decode)


def _parse_paths(row: dict, decode: Decode) -> Pair:
    return _pair(row["prompt"], (row["path1"], row["path2"]), (1, 0), decode)


def _parse_lists(row: dict, decode: Decode) -> Pair:
    images, labels = row["image_path"], row["human_preference"]
    if not (isinstance(images, list) and isinstance(labels, list) and len(images) == len(labels) == 2):
        raise Skipped("that compare more or less than two images")
    return _pair(row["prompt"], images, labels, decode)


LAYOUTS = {
    ("caption", "jpg_0", "jpg_1", "label_0", "label_1"): parse_pair,
    ("prompt", "chosen", "rejected"): _parse_chosen,
    ("prompt", "path1", "path2"): _parse_paths,
    ("prompt", "image_path", "human_preference"): _parse_lists,
}


def _pair(prompt: object, images: Sequence, labels: Sequence, decode: Decode) -> Pair:
    prompt = text_of(prompt)
    if not prompt.strip():
        raise Skipped("without a prompt")
    if len(prompt) > LONGEST_TEXT:
        raise Skipped(TOO_LONG)
    try:
        labels = [float(label) for label in labels]
    except (TypeError, ValueError, OverflowError):
        raise Skipped(UNLABELLED) from None
    if labels[0] == labels[1] and labels[0] in (0, 0.5, 1):
        raise Skipped(TIE)
    if sorted(labels) != [0, 1]:
        raise Skipped(UNLABELLED)
    first, second = images if labels[0] == 1 else reversed(images)
    return Pair(prompt, decode(first), decode(second))


def pair_stream(
    source: str | Path, size: int = 0, limit: int = 0, seed: int = 0, share: tuple[int, int] = (0, 1)
) -> Stream[Pair]:
    """Pairs of a hub data set, folder or file in any of `LAYOUTS`, in chunks. Raises UserError if there are none."""
    return Stream(str(source), LAYOUTS, size, limit, seed, share)
