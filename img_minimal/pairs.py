"""Preference pairs in Pick-a-Pic's columns: caption, jpg_0, jpg_1 (bytes), label_0, label_1 (1, 0, or 0.5 = tie)."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from PIL.Image import Image
from pyarrow import ArrowInvalid

from img_minimal.errors import UserError
from img_minimal.images import decode

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt; people preferred the winner."""

    prompt: str
    winner: Image
    loser: Image

    @property
    def validation(self) -> bool:
        """One prompt in ten is kept for measuring the error on prompts that were not trained on."""
        return hashlib.sha256(self.prompt.encode()).digest()[0] % 10 == 0


def read_pairs(path: str | Path, limit: int = 0) -> tuple[list[Pair], int]:
    """The first `limit` pairs with a preference (0: all), winner first, and the number of rows that were skipped.

    Skipped are ties and rows whose image bytes are damaged. Raises UserError if the file is no such table.
    """
    try:
        table = pq.read_table(path, columns=list(COLUMNS)).to_pylist()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected parquet with the columns {', '.join(COLUMNS)}") from None
    except (ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not parquet with the columns {', '.join(COLUMNS)} ({reason})") from None
    pairs = []
    seen = 0
    for seen, row in enumerate(table, start=1):
        if limit and len(pairs) == limit:
            seen -= 1
            break
        if {row["label_0"], row["label_1"]} != {0, 1}:
            continue
        first, second = ("jpg_0", "jpg_1") if row["label_0"] == 1 else ("jpg_1", "jpg_0")
        try:
            pairs.append(Pair(row["caption"], decode(row[first]), decode(row[second])))
        except OSError:
            continue
    if not pairs:
        raise UserError(f"{path}: holds no pair with a preference; label_0 and label_1 must be 1 and 0")
    return pairs, seen - len(pairs)
