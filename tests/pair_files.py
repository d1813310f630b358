"""Pairs for tests: all of a file at once (the product reads them as a stream), and tables of one-coloured pictures."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from img_minimal.data.pairs import Pair, Place, pair_stream


def read_pairs(path: str | Path, limit: int = 0) -> tuple[list[Pair], int]:
    """The first `limit` pairs (0: all), and how many rows were skipped."""
    stream = pair_stream(path, limit=limit)
    return [pair for chunk in stream.chunks() for pair in chunk.items], stream.skipped.total()


def jpeg(value: int) -> bytes:
    """A one-coloured picture whose first pixel tells which one it is."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def number(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


def rows(count: int, first: int = 0) -> list[dict]:
    """Pair k shows pictures 2k (winner) and 2k + 1 modulo 256, winners on either side."""
    made = []
    for k in range(first, first + count):
        sides = [(jpeg(2 * k % 256), 1.0), (jpeg((2 * k + 1) % 256), 0.0)][:: 1 if k % 2 else -1]
        (a, x), (b, y) = sides
        made.append({"caption": f"prompt {k}", "jpg_0": a, "jpg_1": b, "label_0": x, "label_1": y, "ranking_id": k})
    return made


def write(folder: Path, *tables: list[dict], name: str = "train") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, table in enumerate(tables):
        pq.write_table(pa.Table.from_pylist(table), folder / f"{name}-{k:05d}.parquet", row_group_size=4)
    return folder


def pairs_of(stream, place: Place | None = None) -> list[Pair]:
    return [pair for chunk in stream.chunks(*[place] * (place is not None)) for pair in chunk.items]


def numbers(folder: Path) -> list[dict]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
