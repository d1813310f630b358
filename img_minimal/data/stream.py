"""Tables too large to download, read a chunk at a time: Pick-a-Pic (335 GB), InstructPix2Pix, or local parquet.

A *source* is a parquet file, a folder of them, or the name of a data set on the hub, of which `datasets` fetches the
parts that are read and keeps none. Rows become items by a `parse` function; a chunk is a list of items and remembers
its `Place`, so that a stopped run can go on from the file it was in.
"""

import hashlib
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any, Generic, TypeVar

import pyarrow.parquet as pq
import torch
from PIL import Image

from img_minimal.runtime.cli import warn
from img_minimal.runtime.errors import UserError
from img_minimal.runtime.images import decode

Item = TypeVar("Item")
Decode = Callable[[Any], Image.Image]


class Skipped(Exception):
    """A row that gives no item; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class Place:
    """Where a chunk begins: its number, the file and the row in it, and how many items came before it."""

    chunk: int = 0
    file: int = 0
    row: int = 0
    items: int = 0


START = Place()
LONGEST_TEXT = 2000  # characters; guidance features of a whole chunk are padded to its longest prompt
TOO_LONG = f"with more than {LONGEST_TEXT} characters of text"
DAMAGED = "with damaged images"


@dataclass(frozen=True)
class Chunk(Generic[Item]):
    """Some items, the place they begin at, and the place of what follows."""

    items: list[Item]
    place: Place
    after: Place


class Stream(Generic[Item]):
    """The items of a source, in chunks of `size` (0: all in one), at most `limit` of them (0: no limit).

    Files come in an order drawn from `seed`, for tables are often sorted by date; rows come as they stand.
    `parse(row, decode)` returns an item or raises Skipped, and `decode` may raise OSError for damaged images: rows
    without an item are counted in `skipped` by reason. Raises UserError if the source is no such table.
    """

    def __init__(
        self, source: str, columns: tuple[str, ...], parse: Callable[[dict, Decode], Item],
        size: int = 0, limit: int = 0, seed: int = 0,
    ):  # fmt: skip
        self.source, self.parse, self.size, self.limit = source, parse, size, limit
        self.table = open_table(source, columns)
        order = torch.randperm(self.table.num_shards, generator=torch.Generator().manual_seed(seed))
        self.files, self.skipped, self.warned = order.tolist(), Counter(), 0

    def _rows(self, place: Place) -> Iterator[tuple[int, int, dict]]:
        for file in range(place.file, len(self.files)):
            part = self.table.shard(len(self.files), self.files[file])
            first = place.row if file == place.file else 0
            try:
                for row, values in enumerate(part.skip(first) if first else part, start=first):
                    yield file, row, values
            except (OSError, ValueError) as error:  # a lost connection, a cut file; ArrowInvalid is a ValueError
                raise UserError(
                    f"{self.source}: reading stopped in file {file} of {len(self.files)} "
                    f"({_first_line(error)}); mend that and go on with --resume"
                ) from None

    def chunks(self, place: Place = START) -> Iterator[Chunk[Item]]:
        """Chunks from `place` on, to the end of the source. Images with the same bytes are decoded once a chunk."""
        items, begin, taken = [], place, place.items
        if self.limit and taken >= self.limit:
            return
        pictures = _DecodeOnce()

        def attempt(numbered: tuple[int, int, dict]) -> tuple[int, int, Item | str]:
            """The row as an item, or why it is left out."""
            file, row, values = numbered
            try:
                return file, row, self.parse(values, pictures)
            except Skipped as reason:
                return file, row, str(reason)
            except Exception:  # PIL's decoders raise nearly anything for bad bytes, and a cell may hold no bytes at all
                return file, row, DAMAGED

        for file, row, item in in_threads(attempt, self._rows(place)):
            if isinstance(item, str):
                self.skipped[item] += 1
                continue
            items.append(item)
            taken += 1
            if len(items) == self.size or taken == self.limit:
                after = Place(begin.chunk + 1, file, row + 1, taken)
                self._warn()
                yield Chunk(items, begin, after)
                if taken == self.limit:
                    return
                items, begin, pictures.seen = [], after, {}
        self._warn()
        if items:
            yield Chunk(items, begin, Place(begin.chunk + 1, len(self.files), 0, taken))

    def _warn(self) -> None:
        if self.skipped[DAMAGED] > self.warned:
            self.warned = self.skipped[DAMAGED]
            warn(f"{self.source}: skipped {self.warned} rows with damaged images so far")

    def skips(self) -> str:
        """What was skipped so far, for people: "rows skipped: 120 ties, 1 with damaged images"; "" if nothing was."""
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()) if count)
        return counts and f"rows skipped: {counts}"


class _DecodeOnce:
    """Encoded bytes, or {"bytes": ...} as image columns have it -> RGB; the same bytes give the same object."""

    def __init__(self):
        self.seen: dict[bytes, Image.Image] = {}

    def __call__(self, data: bytes | dict | None) -> Image.Image:
        data = data.get("bytes") if isinstance(data, dict) else data
        if not data or not isinstance(data, bytes):
            raise OSError("no image")
        key, seen = hashlib.sha256(data).digest(), self.seen
        if key not in seen:
            seen.setdefault(key, decode(data))  # two threads may decode it at once; both take the first
        return seen[key]


def open_table(source: str, columns: tuple[str, ...]) -> Any:
    """A streaming `datasets.IterableDataset` of these columns. Raises UserError if there is no such table."""
    import datasets  # takes a second, and only training needs it

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in our own message
    path, wanted = Path(source), f"expected parquet with the columns {', '.join(columns)}"
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    files = [f for f in files if f.name.startswith("train")] or files  # other splits may lie beside it
    local = bool(files) or path.is_absolute() or path.suffix == ".parquet" or path.is_dir()
    if local and not files:
        raise UserError(f"{source}: {'no parquet in it' if path.is_dir() else 'no such file or folder'}; {wanted}")
    options = dict(split="train", streaming=True, columns=list(columns))
    try:
        if local:
            schemas = {file: pq.read_schema(file).names for file in files}
            table = datasets.load_dataset("parquet", data_files=[str(f) for f in files], **options)
        else:
            table = datasets.load_dataset(source, **options)
            schemas = {source: table.column_names or columns}
    except ConnectionError:
        raise UserError(f"{source}: the hub cannot be reached; name a local parquet file or folder instead") from None
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"{source}: cannot be read as a table ({_first_line(error)}); {wanted}") from None
    for name, names in schemas.items():
        missing = [column for column in columns if column not in names]
        if missing:
            raise UserError(f"{name}: has no column {missing[0]!r}; {wanted}")
    return table.decode(False) if table.features else table  # images as bytes: a damaged one costs its row, not the run


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_threads(function: Callable[[Any], Any], values: Iterable) -> Iterator:
    """Like `map`, some values ahead and in order; PIL lets go of Python's lock while it decodes."""
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for value in values:
            waiting.append(pool.submit(function, value))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def prefetch(values: Iterator[Item]) -> Iterator[Item]:
    """The same values, the next one prepared in a thread of its own while the last one is worked on."""
    queue: Queue = Queue(maxsize=1)
    done, gone = object(), threading.Event()

    def fill() -> None:
        """Put values into the queue until there are no more, or nobody waits for them."""
        try:
            for value in values:
                queue.put((value, None))
                if gone.is_set():
                    return
            queue.put((done, None))
        except BaseException as error:  # noqa: BLE001 - raised again where the value was wanted
            queue.put((done, error))

    threading.Thread(target=fill, daemon=True).start()
    try:
        while True:
            value, error = queue.get()
            if error is not None:
                raise error
            if value is done:
                return
            yield value
    finally:
        gone.set()
        while not queue.empty():  # lets the thread out of its `put`
            queue.get_nowait()
