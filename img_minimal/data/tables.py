"""Tables as people have them: parquet, `datasets.save_to_disk`, webdataset tars, JSON lists beside images, the hub.

A table has files, and a file has rows, as dicts. *Layouts* say which columns hold what: a table is read in the first
layout whose columns it has. Local files are read here and not by `datasets`, which takes paths for patterns, tests for
training rows, and one odd row for a reason to read the others otherwise.
"""

import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from img_minimal.cli import UserError

# What readers raise for damaged files; pyarrow's own errors are among them.
DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    NotImplementedError,
    EOFError,
    tarfile.TarError,
    RecursionError,
    MemoryError,
)
# Words by which files and folders say which rows they hold.
EVALUATION = {"validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
TRAINING = {"train", "training"}
REMOVED = {
    f"yuvalkirstain/pickapic_v{version}": "--pairs with a copy that you have (parquet or webdataset tars), or with "
    "another set: data-is-better-together/open-image-preferences-v1-binarized, or local folders of HPDv2 and HPDv3"
    for version in (1, 2)
}
Layout = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """The rows of some files, all of one layout; `read(file, first)` gives a file's rows from one on, by numbers."""

    layout: Layout
    files: list[str]  # names, for messages
    read: Callable[[int, int], Iterator[dict]]
    root: Path | None = None  # the folder that paths in the rows are relative to


def open_table(source: str, layouts: Sequence[Layout]) -> Table:
    """A local file or folder, or a data set on the hub. Raises UserError in one line if there is no such table."""
    wanted = "expected the columns " + ", or ".join(", ".join(layout) for layout in layouts)
    path = Path(source).expanduser()
    if not path.exists():
        if path.is_absolute() or path.suffix.lower() in READERS or source.count("/") != 1:
            raise UserError(f"{source}: no such file or folder; {wanted}, in {', '.join(READERS)}")
        return _open_hub(source, layouts, wanted)
    files = training_files(path)
    if not files:
        raise UserError(f"{source}: holds no training table; {wanted}, in {', '.join(READERS)}")
    columns = [_columns(file, wanted) for file in files]
    layout = _choose(columns[0], layouts, str(files[0]), wanted)
    for file, names in zip(files, columns):
        if missing := [name for name in layout if name not in names]:
            raise UserError(
                f"{file}: has no column {missing[0]!r}, which {files[0].name} has; {wanted}"
            )

    def read(file: int, first: int) -> Iterator[dict]:
        return READERS[files[file].suffix.lower()](files[file], layout, first)

    return Table(layout, list(map(str, files)), read, path if path.is_dir() else path.parent)


def _open_hub(source: str, layouts: Sequence[Layout], wanted: str) -> Table:
    """A data set of which `datasets` fetches what is read, and keeps nothing."""
    if source in REMOVED:
        raise UserError(
            f"{source}: this data set was removed from the hub in 2025; use {REMOVED[source]}"
        )
    import datasets  # takes a second, and only the hub needs it

    datasets.logging.set_verbosity(
        datasets.logging.CRITICAL
    )  # what it would log is in our own message
    try:
        data = datasets.load_dataset(source, split="train", streaming=True)
        columns = data.column_names or list(next(iter(data)))
    except ConnectionError:
        raise UserError(
            f"{source}: the hub cannot be reached; name a local parquet file or folder instead"
        ) from None
    except (*DAMAGE, StopIteration) as error:
        raise UserError(
            f"{source}: cannot be read as a table ({first_line(error)}); {wanted}"
        ) from None
    layout = _choose(columns, layouts, source, wanted)
    data = data.select_columns(list(layout))
    data = (
        data.decode(False) if data.features else data
    )  # images as bytes: a damaged one costs its row, not the run
    count = data.num_shards
    names = [f"file {file} of {source}" for file in range(count)]
    return Table(layout, names, lambda file, first: iter(data.shard(count, file).skip(first)))


def _choose(columns: Sequence[str], layouts: Sequence[Layout], what: str, wanted: str) -> Layout:
    for layout in layouts:
        if set(layout) <= set(columns):
            return layout
    nearest = max(layouts, key=lambda layout: len(set(layout) & set(columns)))
    missing = next(column for column in nearest if column not in columns)
    raise UserError(f"{what}: has no column {missing!r}; {wanted}")


def training_files(path: Path) -> list[Path]:
    """The files of a folder's table that hold training rows, by the words in their names and in their folders' names.

    If any is called train, only those; else all that are not called validation, test or the like.
    """
    if path.is_file():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    files = [
        p for p in files if p.name not in ("state.json", "dataset_info.json", "dataset_dict.json")
    ]
    kind = next((kind for kind in READERS if any(p.suffix.lower() == kind for p in files)), None)
    words = {
        p: set(re.split(r"[^a-z]+", p.relative_to(path).as_posix().lower()))
        for p in files
        if p.suffix.lower() == kind
    }
    kept = [p for p in words if not words[p] & EVALUATION]
    return [p for p in kept if words[p] & TRAINING] or kept


def _columns(path: Path, wanted: str) -> list[str]:
    kind = path.suffix.lower()
    if kind not in READERS:
        raise UserError(f"{path}: is no table; {wanted}, in {', '.join(READERS)}")
    try:
        if kind == ".parquet":
            return pq.read_schema(path).names
        if kind == ".arrow":
            return _open_arrow(path).schema.names
        return list(next(READERS[kind](path, (), 0), ()))
    except DAMAGE as error:
        raise UserError(
            f"{path}: cannot be read as a table ({first_line(error)}); {wanted}"
        ) from None


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# One reader for each kind of file: the rows of a file from `first` on.


def _parquet(path: Path, layout: Layout, first: int) -> Iterator[dict]:
    with pq.ParquetFile(path) as file:
        groups = list(range(file.num_row_groups))
        while groups and first >= (rows := file.metadata.row_group(groups[0]).num_rows):
            first -= rows  # groups before it are not read
            del groups[0]
        batches = file.iter_batches(64, row_groups=groups, columns=list(layout)) if groups else ()
        yield from islice((row for batch in batches for row in batch.to_pylist()), first, None)


def _arrow(path: Path, layout: Layout, first: int) -> Iterator[dict]:
    table = _open_arrow(path).read_all()  # mapped, not read
    for batch in table.select(list(layout)).slice(first).to_batches(64):
        yield from batch.to_pylist()


def _open_arrow(path: Path) -> Any:
    try:
        return pa.ipc.open_stream(pa.memory_map(str(path)))  # as `datasets` writes
    except pa.ArrowInvalid:
        return pa.ipc.open_file(pa.memory_map(str(path)))


def _tar(path: Path, layout: Layout, first: int) -> Iterator[dict]:
    """Members KEY.COLUMN or KEY.COLUMN.EXTENSION that follow each other are a row."""

    def cells() -> Iterator[tuple[str, tuple[str, Any]]]:
        with tarfile.open(path, "r|*") as file:
            for member in filter(tarfile.TarInfo.isfile, file):
                folder, _, name = member.name.rpartition("/")
                key, _, column = name.partition(".")
                column, content = column.split(".")[0], file.extractfile(member).read()
                yield (
                    f"{folder}/{key}",
                    (column, content if column.startswith("jpg") else _parsed(content)),
                )

    rows = (dict(cell for _, cell in row) for _, row in groupby(cells(), key=itemgetter(0)))
    yield from islice(rows, first, None)


def _parsed(content: bytes) -> Any:
    """Text as text, a number as a number."""
    try:
        text = content.decode()
        return float(text)
    except UnicodeDecodeError:
        return content
    except ValueError:
        return text


def _json(path: Path, layout: Layout, first: int) -> Iterator[dict]:
    """A list of objects, or an object a line."""
    with path.open(encoding="utf-8-sig") as file:
        rows = (
            map(json.loads, filter(str.strip, file))
            if path.suffix.lower() == ".jsonl"
            else json.load(file)
        )
        if isinstance(rows, dict):
            raise ValueError("expected a list of rows, found an object")
        for row in islice(rows, first, None):
            if not isinstance(row, dict):
                raise ValueError(f"expected a row as an object, found {type(row).__name__}")
            yield row


READERS = {".parquet": _parquet, ".arrow": _arrow, ".tar": _tar, ".jsonl": _json, ".json": _json}
