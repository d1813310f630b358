"""Preference pairs in Pick-a-Pic's columns: caption, jpg_0, jpg_1 (bytes), label_0, label_1 (1, 0, or 0.5 = tie)."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from img_minimal.data.stream import LONGEST_TEXT, TOO_LONG, Decode, Skipped, Stream

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")


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
    """A row, winner first. Raises Skipped for a tie or without a prompt, OSError for damaged images."""
    if not isinstance(row["caption"], str) or not row["caption"].strip():
        raise Skipped("without a prompt")
    if len(row["caption"]) > LONGEST_TEXT:
        raise Skipped(TOO_LONG)
    if {row["label_0"], row["label_1"]} != {0, 1}:
        raise Skipped("ties")
    first, second = ("jpg_0", "jpg_1") if row["label_0"] == 1 else ("jpg_1", "jpg_0")
    return Pair(row["caption"], decode(row[first]), decode(row[second]))


def pair_stream(source: str | Path, size: int = 0, limit: int = 0, seed: int = 0) -> Stream[Pair]:
    """Pairs of a hub data set, a folder or a file, in chunks. Raises UserError if the source is no such table."""
    return Stream(str(source), COLUMNS, parse_pair, size, limit, seed)
