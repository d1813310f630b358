"""Read tables as people have them: parquet, `datasets.save_to_disk`, webdataset, JSON, CSV, hub.

A table has files, and a file has rows, as dicts. A *layout* is a tuple of column names: a table is
read in the first layout whose columns it has. Local files are read here and not by `datasets`,
which takes paths for patterns and test rows for training rows, and reads all rows of a JSON file
differently if one of them is odd.
"""

import csv
import json
import re
import tarfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from img_minimal.cli import AnyPath, UserError, check, warn

# Raised by readers for damaged files; pyarrow's own errors are subclasses of these.
DAMAGE = (
    *(OSError, ValueError, TypeError, NotImplementedError, EOFError, SystemError),
    *(tarfile.TarError, RecursionError, MemoryError, csv.Error),
)
# Words in names of files and folders that tell which rows they hold.
EVALUATION = set("validation valid val dev test testing eval evaluation".split())
TRAINING = {"train", "training"}
# Names of what is no data, and of what lies in it: .ipynb_checkpoints, ._train.parquet, __MACOSX,
# Spark's _temporary, $RECYCLE.BIN, the notes of `datasets`.
NO_DATA = re.compile(r"(^|/)(\.[^./]|__|_temporary|\$|(state|dataset_info|dataset_dict)\.json$)")
Layout = tuple[str, ...]
FIRST_ROWS = 20  # of JSON or a tar, which tell the columns, since a row may lack one
OUTSIDE = "with files outside of the data set"


class Skipped(Exception):
    """Raised for rows that cannot be used, with the reason under which they are counted."""


@dataclass(frozen=True)
class Table:
    """Rows of one layout in some files."""

    layout: Layout
    files: list[str]  # names, for messages
    read: Callable[[int, int], Iterator[dict]]  # (file, first row), both numbers -> rows
    root: Path | None = None  # paths in the rows are relative to this folder


def open_table(source: str, layouts: Collection[Layout]) -> Table:
    """Open a local file or folder, or a data set on the hub.

    Raises UserError in one line if there is no such table.
    """
    columns = ", or ".join(", ".join(layout) for layout in layouts)
    wanted = f"expected the columns {columns}, in {', '.join(READERS)}"
    path = Path(source).expanduser()
    if not path.exists():
        looks_local = path.is_absolute() or path.suffix.lower() in READERS
        hub_id = source.count("/") == 1 and not looks_local
        check(hub_id, f"{source}: no such file or folder; {wanted}")
        return _open_hub(source, layouts, wanted)
    files = training_files(path)
    check(files, f"{source}: holds no training table; {wanted}")
    columns = [_read_columns(file, wanted) for file in files]
    layout = _choose_layout(columns[0], layouts, files[0], wanted)
    for file, names in zip(files, columns):
        _choose_layout(names, [layout], file, f"which {files[0].name} has; {wanted}")

    def read(file: int, first: int) -> Iterator[dict]:
        return READERS[files[file].suffix.lower()](files[file], layout, first)

    return Table(layout, list(map(str, files)), read, path if path.is_dir() else path.parent)


def _open_hub(source: str, layouts: Collection[Layout], wanted: str) -> Table:
    """Stream a data set from the hub; nothing is kept on disk."""
    import datasets  # takes a second, and only the hub needs it

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the errors below say it all
    try:
        data = datasets.load_dataset(source, split="train", streaming=True)
        columns = data.column_names or list(next(iter(data)))
    except ConnectionError:
        raise UserError(
            f"{source}: the hub cannot be reached; name a local parquet file or folder instead"
        ) from None
    except (*DAMAGE, StopIteration) as error:
        raise _unreadable(source, error, wanted) from None
    layout = _choose_layout(columns, layouts, source, wanted)
    data = data.select_columns(list(layout))
    if data.features:
        data = data.decode(False)  # images as bytes: a damaged one costs its row, not the run
    count = data.num_shards
    names = [f"file {k} of {source}" for k in range(count)]
    return Table(layout, names, lambda file, first: iter(data.shard(count, file).skip(first)))


def _choose_layout(
    columns: list[str], layouts: Collection[Layout], name: object, wanted: str
) -> Layout:
    """Return the first layout whose columns all exist, or raise UserError naming a missing one."""
    for layout in layouts:
        if set(layout) <= set(columns):
            return layout
    nearest = min(layouts, key=lambda layout: len(set(layout) - set(columns)))
    missing = next(column for column in nearest if column not in columns)
    raise UserError(f"{name}: has no column {missing!r}, {wanted}")


def training_files(path: Path) -> list[Path]:
    """List the files of a table that hold training rows, going by file and folder names.

    If some are called train, only those; otherwise all that are not called validation, test or the
    like. A folder's files are all of one format.
    """
    if path.is_file():
        return [path]
    files = {}  # with the words of their names
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if NO_DATA.search(name):
            continue
        if file.is_file():
            files[file] = set(re.split(r"[^a-z]+", name.lower()))
        elif file.is_symlink():
            warn(f"{file}: a linked folder, which is not read; name {file.resolve()} itself")
    suffixes = {file.suffix.lower() for file in files}
    suffix = next((suffix for suffix in READERS if suffix in suffixes), None)
    candidates = []
    for file, words in files.items():
        if file.suffix.lower() == suffix and not words & EVALUATION:
            candidates.append(file)
    return [file for file in candidates if files[file] & TRAINING] or candidates


def find_inside(root: Path, name: AnyPath) -> Path | None:
    """Resolve a path that data name; None if it leaves the resolved folder `root`.

    A data set must not read the rest of the disk, by an absolute path, "../" or a link. In the
    hub's cache all files are links to another folder of their repository.
    """
    repository = root.as_posix().split("/snapshots/")[0]
    path = (root / name).resolve()
    return path if path.is_relative_to(repository) else None


def _as_row(cells: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a row of (column, cell). Raises UserError if two columns have one name."""
    row = dict(cells)
    check(len(row) == len(cells), f"two of the columns {', '.join(row)} have one name")
    return row


def _read_columns(path: Path, wanted: str) -> list[str]:
    """Read a file's column names. Raises UserError for a damaged file."""
    suffix = path.suffix.lower()
    check(suffix in READERS, f"{path}: is no table; {wanted}")
    try:
        if suffix == ".parquet":
            schema = pq.read_schema(path)
        elif suffix == ".arrow":
            schema = _open_arrow(path).schema
        else:
            rows = islice(READERS[suffix](path, (), 0), FIRST_ROWS)
            return list(dict.fromkeys(chain.from_iterable(rows)))
        return list(_as_row([(name, None) for name in schema.names]))
    except DAMAGE as error:
        raise _unreadable(path, error, wanted) from None


def _unreadable(name: object, error: Exception, wanted: str) -> UserError:
    return UserError(f"{name}: cannot be read as a table ({first_line(error)}); {wanted}")


def first_line(error: Exception) -> str:
    """Shorten an error's message to its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# One reader per format: the rows of a file from row `first` on.


def _read_parquet(path: Path, layout: Layout, first: int) -> Iterator[dict]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(64, columns=list(layout)):
            yield from batch.slice(first).to_pylist()
            first = max(0, first - len(batch))


def _read_arrow(path: Path, layout: Layout, first: int) -> Iterator[dict]:
    table = _open_arrow(path).read_all()  # mapped, not read
    for batch in table.select(list(layout)).slice(first).to_batches(64):
        yield from batch.to_pylist()


def _open_arrow(path: Path) -> Any:
    try:
        return pa.ipc.open_stream(pa.memory_map(str(path)))  # `datasets` writes this format
    except pa.ArrowInvalid:
        return pa.ipc.open_file(pa.memory_map(str(path)))


def _read_tar(path: Path, layout: Layout, first: int) -> Iterator[dict]:
    yield from islice(_tar_rows(path), first, None)


def _tar_rows(path: Path) -> Iterator[dict]:
    """Yield rows of webdataset: consecutive members called KEY.COLUMN or KEY.COLUMN.EXTENSION.

    Cells are bytes as they stand, whatever they look like.
    """
    cells, row_key = [], None
    with tarfile.open(path, "r|*") as file:
        for member in file:
            if NO_DATA.search(member.name) or not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            key, _, column = name.partition(".")
            if cells and (folder, key) != row_key:
                yield _as_row(cells)
                cells = []
            row_key = folder, key
            cells.append((column.split(".")[0], file.extractfile(member).read()))
    if cells:
        yield _as_row(cells)


def _read_json(path: Path, layout: Layout, first: int) -> Iterator[dict]:
    """Yield rows of a list of objects (.json), or of one object per line (.jsonl)."""
    decode = json.JSONDecoder(object_pairs_hook=_as_row).decode
    with path.open(encoding="utf-8-sig") as file:
        if path.suffix.lower() == ".jsonl":
            rows = map(decode, filter(str.strip, file))
        else:
            rows = decode(file.read())
        for row in islice(rows, first, None):
            if not isinstance(row, dict):
                raise ValueError(f"expected a row as an object, found {type(row).__name__}")
            yield row


def _read_csv(path: Path, layout: Layout, first: int) -> Iterator[dict]:
    """Yield rows of the columns that the first line names; all cells are text."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = filter(None, csv.reader(file))
        names = next(rows, [])
        for cells in islice(rows, first, None):
            yield _as_row(list(zip(names, cells)))


READERS = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".tar": _read_tar,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
}
