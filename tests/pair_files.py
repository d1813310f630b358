"""Write tables of one-coloured pictures, and read all their pairs at once."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from img_minimal.data.pairs import START, Pair, Stream, StreamPosition, pair_stream

FORMATS = ("parquet", "arrow", "tar", "json", "jsonl", "csv")


def read_pairs(path: str | Path, limit: int = 0) -> tuple[list[Pair], int]:
    """Read the first `limit` pairs (0: all); also count the skipped rows."""
    stream = pair_stream(path, limit=limit)
    return pairs_of(stream), stream.skipped.total()


def pairs_of(stream: Stream[Pair], position: StreamPosition = START) -> list[Pair]:
    """Read all pairs from a position on."""
    return [pair for chunk in stream.chunks(position) for pair in chunk.items]


def jpeg(value: int) -> bytes:
    """Encode a one-coloured picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def number(image: Image.Image) -> int:
    """Return the value that `jpeg` encoded."""
    return image.getpixel((0, 0))[0]


def rows(count: int, first: int = 0) -> list[dict]:
    """Build pairs k of pictures 2k (winner) and 2k + 1 modulo 256, with winners on either side."""
    table = []
    for k in range(first, first + count):
        winner, loser = jpeg(2 * k % 256), jpeg((2 * k + 1) % 256)
        images = (winner, loser) if k % 2 else (loser, winner)
        row = {"caption": f"prompt {k}", "jpg_0": images[0], "jpg_1": images[1]}
        row |= {"label_0": float(k % 2), "label_1": float(1 - k % 2), "ranking_id": k}
        table.append(row)
    return table


def tie(row: dict) -> None:
    """Make a row a tie."""
    row |= {"label_0": 0.5, "label_1": 0.5}


def write(folder: Path, *tables: list[dict], name: str = "train") -> Path:
    """Write a folder of parquet files."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, table in enumerate(tables):
        path = folder / f"{name}-{k:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(table), path, row_group_size=4)
    return folder


def write_as(kind: str, folder: Path, table: list[dict]) -> Path:
    """Write a folder in one of FORMATS: one file, or two of "arrow"."""
    folder.mkdir()
    if kind == "parquet":
        write(folder, table)
    elif kind == "arrow":
        structs = [row | {"jpg_0": {"bytes": row["jpg_0"], "path": None}} for row in table]
        datasets.Dataset.from_list(structs).save_to_disk(folder / "saved", num_shards=2)
    elif kind == "tar":
        write_tar(folder / "00000.tar", table)
    else:
        for k in (1, 2):
            (folder / f"{k}.png").write_bytes(jpeg(k))
        lines = []
        for row in table:
            line = {"prompt": row["caption"], "path1": "1.png", "path2": "2.png"}
            lines.append(json.dumps(line))
        text = f"[{','.join(lines)}]" if kind == "json" else "\n\n".join(lines)
        if kind == "csv":  # labels are text, and a prompt may hold a comma
            lines = [f'"{row["caption"]}",1.png,2.png,0' for row in table]
            text = "\n".join(["prompt,image_0,image_1,label", *lines])
        (folder / f"train.{kind}").write_text(text)
    return folder


def write_tar(path: Path, table: list[dict], folders: Sequence[str] = ()) -> None:
    """Write Pick-a-Pic in webdataset's format; members of odd rows have an extension.

    `folders` go before the names of each row.
    """
    with tarfile.open(path, "w") as file:
        for k, row in enumerate(table):
            for name, value in row.items():
                content = value if isinstance(value, bytes) else str(value).encode()
                folder = folders[k] + "/" if folders and folders[k] else ""
                member = tarfile.TarInfo(f"{folder}{k:06d}.{name}" + ".txt" * (k % 2))
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
