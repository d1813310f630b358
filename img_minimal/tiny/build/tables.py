"""Tables that the build leaves behind, for people and for the parts after it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from img_minimal.runtime.atomic import replacing


def save_table(table: pa.Table, path: Path, what: str) -> None:
    """Write a parquet file, as small as it gets, and say how many of `what` it holds."""
    with replacing(path) as partial:
        pq.write_table(table, partial, compression="zstd", compression_level=19)
    print(f"{len(table)} {what} in {path}, {path.stat().st_size / 1e6:.1f} MB")
