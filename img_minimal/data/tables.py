"""Tables as people have them: parquet, `datasets.save_to_disk`, webdataset tars, JSON lists beside images, the hub.

A table has files, and each file gives its rows as dicts from any row on. Which columns hold what is a matter of
*layouts*: the first layout whose columns a table has is the one that it is read in. A local path is a name, never a
pattern, whatever characters it holds.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from img_minimal.runtime.errors import UserError

KINDS = (".parquet", ".arrow", ".tar", ".jsonl", ".json")  # a folder is read in the first kind that it holds
# Words by which files and folders say which rows they hold, as `datasets` reads them.
EVALUATION = {"validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
TRAINING = {"train", "training"}
REMOVED = {
    "yuvalkirstain/pickapic_v2": "--pairs with a copy that you have (parquet or webdataset tars), or with another set: "
    "data-is-better-together/open-image-preferences-v1-binarized, or local folders of HPDv2 and HPDv3",
}
REMOVED["yuvalkirstain/pickapic_v1"] = REMOVED["yuvalkirstain/pickapic_v2"]
Layout = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """The rows of some local files, all of one layout. `root` is the folder that rows' paths are relative to."""

    paths: tuple[Path, ...]
    layout: Layout
    root: Path

    @property
    def files(self) -> int:
        """How many there are."""
        return len(self.paths)

    def name(self, file: int) -> str:
        """For messages."""
        return str(self.paths[file])

    def rows(self, file: int, first: int = 0) -> Iterator[dict]:
        """The rows of a file from one on. Raises OSError or ValueError where it is damaged."""
        path = self.paths[file]
        yield from _READ[path.suffix.lower()](path, self.layout, first)


@dataclass(frozen=True)
class HubTable:
    """The rows of a data set on the hub, of which `datasets` fetches what is read and keeps nothing."""

    data: Any  # datasets.IterableDataset
    layout: Layout
    source: str
    root: None = None

    @property
    def files(self) -> int:
        """How many there are."""
        return self.data.num_shards

    def name(self, file: int) -> str:
        """For messages."""
        return f"file {file} of {self.source}"

    def rows(self, file: int, first: int = 0) -> Iterator[dict]:
        """The rows of a file from one on."""
        part = self.data.shard(self.files, file)
        yield from part.skip(first) if first else part


def open_table(source: str, layouts: Sequence[Layout]) -> Table | HubTable:
    """A table in the first layout that it has. Raises UserError in one line if there is no such table."""
    wanted = "expected the columns " + ", or ".join(", ".join(layout) for layout in layouts)
    path = Path(source).expanduser()
    if not path.exists() and (path.is_absolute() or path.suffix.lower() in KINDS or source.count("/") != 1):
        raise UserError(f"{source}: no such file or folder; {wanted}, in {', '.join(KINDS)}")
    if not path.exists():
        return _open_hub(source, layouts, wanted)
    paths = _training_files(path)
    if not paths:
        raise UserError(f"{source}: holds no training table; {wanted}, in {', '.join(KINDS)}")
    root = path if path.is_dir() else path.parent
    names = {file: _columns(file, source, wanted) for file in paths}
    layout = _layout(names[paths[0]], layouts, str(paths[0]), wanted)
    for file, columns in names.items():
        if missing := [column for column in layout if column not in columns]:
            raise UserError(f"{file}: has no column {missing[0]!r}, which {paths[0].name} has; {wanted}")
    return Table(tuple(paths), layout, root)


def _open_hub(source: str, layouts: Sequence[Layout], wanted: str) -> HubTable:
    if source in REMOVED:
        raise UserError(f"{source}: this data set was removed from the hub in 2025; use {REMOVED[source]}")
    import datasets  # takes a second, and only the hub needs it

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in our own message
    try:
        data = datasets.load_dataset(source, split="train", streaming=True)
        columns = data.column_names or list(next(iter(data)))
    except ConnectionError:
        raise UserError(f"{source}: the hub cannot be reached; name a local parquet file or folder instead") from None
    except (OSError, ValueError, StopIteration) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"{source}: cannot be read as a table ({first_line(error)}); {wanted}") from None
    layout = _layout(columns, layouts, source, wanted)
    data = data.select_columns(list(layout))
    # Images as bytes: a damaged one costs its row, not the run.
    return HubTable(data.decode(False) if data.features else data, layout, source)


def _layout(columns: Sequence[str], layouts: Sequence[Layout], what: str, wanted: str) -> Layout:
    for layout in layouts:
        if set(layout) <= set(columns):
            return layout
    nearest = max(layouts, key=lambda layout: len(set(layout) & set(columns)))
    missing = next(column for column in nearest if column not in columns)
    raise UserError(f"{what}: has no column {missing!r}; {wanted}")


def _training_files(path: Path) -> list[Path]:
    """The files of a folder's table that hold training rows, by the words in their names and in their folders' names.

    If any is called train, only those; else all that are not called validation, test or the like.
    """
    if path.is_file():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    files = next(filter(None, ([p for p in files if p.suffix.lower() == kind] for kind in KINDS)), [])
    files = [p for p in files if p.name not in ("state.json", "dataset_info.json", "dataset_dict.json")]
    words = {p: set(re.split(r"[^a-z]+", p.relative_to(path).as_posix().lower())) for p in files}
    kept = [p for p in files if not words[p] & EVALUATION]
    return [p for p in kept if words[p] & TRAINING] or kept


def _columns(path: Path, source: str, wanted: str) -> list[str]:
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise UserError(f"{path}: is no table; {wanted}, in {', '.join(KINDS)}")
    try:
        if kind == ".parquet":
            return pq.read_schema(path).names
        if kind == ".arrow":
            with _open_arrow(path) as file:
                return file.schema.names
        return list(next(_READ[kind](path, (), 0), ()))
    # A damaged header fails in any of these ways; ArrowInvalid is a ValueError.
    except (OSError, ValueError, tarfile.TarError, EOFError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: cannot be read as a table ({first_line(error)}); {wanted}") from None


def _parquet(path: Path, layout: Layout, first: int) -> Iterator[dict]:
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if first >= size:
                first -= size
                continue
            for batch in file.iter_batches(64, row_groups=[group], columns=list(layout)):
                yield from batch.to_pylist()[first:]
                first = max(0, first - len(batch))


def _open_arrow(path: Path) -> Any:
    try:
        return pa.ipc.open_stream(pa.memory_map(str(path)))  # as `datasets` writes
    except pa.ArrowInvalid:
        return pa.ipc.open_file(pa.memory_map(str(path)))


def _arrow(path: Path, layout: Layout, first: int) -> Iterator[dict]:
    with _open_arrow(path) as file:
        batches = file if hasattr(file, "__iter__") else map(file.get_batch, range(file.num_record_batches))
        for batch in batches:
            if first < len(batch):
                yield from batch.select(list(layout)).slice(first).to_pylist()
            first = max(0, first - len(batch))


def _tar(path: Path, layout: Layout, first: int) -> Iterator[dict]:
    """Members KEY.COLUMN or KEY.COLUMN.EXTENSION that follow each other are a row; text is parsed where it can be."""

    def samples() -> Iterator[dict]:
        """One row a key."""
        key, row = None, {}
        with closing(tarfile.open(path, "r|*")) as file:
            for member in file:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, rest = base.partition(".")
                if (folder, stem) != key and row:
                    yield row
                    row = {}
                key, column = (folder, stem), rest.split(".")[0]
                content = file.extractfile(member).read()
                row[column] = content if column.startswith("jpg") else _value(content)
        if row:
            yield row

    yield from islice(samples(), first, None)


def _value(content: bytes) -> Any:
    """Text as text, a number as a number."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return content
    try:
        return float(text)
    except ValueError:
        return text


def _jsonl(path: Path, layout: Layout, first: int) -> Iterator[dict]:
    with path.open(encoding="utf-8-sig") as file:
        for line in islice(filter(str.strip, file), first, None):
            yield _object(json.loads(line))


def _json(path: Path, layout: Layout, first: int) -> Iterator[dict]:
    listed = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(listed, list):
        raise ValueError(f"expected a list of rows, found {type(listed).__name__}")
    yield from map(_object, listed[first:])


def _object(row: Any) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"expected a row as an object, found {type(row).__name__}")
    return row


_READ = {".parquet": _parquet, ".arrow": _arrow, ".tar": _tar, ".jsonl": _jsonl, ".json": _json}


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
