"""All pairs of a file at once, for tests; the product reads them as a stream."""

from pathlib import Path

from img_minimal.data.pairs import Pair, pair_stream


def read_pairs(path: str | Path, limit: int = 0) -> tuple[list[Pair], int]:
    """The first `limit` pairs (0: all), and how many rows were skipped."""
    stream = pair_stream(path, limit=limit)
    return [pair for chunk in stream.chunks() for pair in chunk.items], stream.skipped.total()
