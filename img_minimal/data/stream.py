"""Tables too large to download, read a chunk at a time: Pick-a-Pic (335 GB), InstructPix2Pix, or local files.

A *source* is a file, a folder, or the name of a data set on the hub, see tables.py. Rows become items by the `parse`
function of their layout; a chunk is a list of items and remembers its `Place`, so that a stopped run can go on from
the file it was in.
"""

import hashlib
import os
import tarfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any, Generic, TypeVar

import torch
from PIL import Image

from img_minimal.data.tables import Layout, first_line, open_table
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


def text_of(cell: object) -> str:
    """A cell's text, also where the column holds bytes; "" if it is none."""
    if isinstance(cell, bytes):
        try:
            return cell.decode()
        except UnicodeDecodeError:
            return ""
    return cell if isinstance(cell, str) else ""


@dataclass(frozen=True)
class Chunk(Generic[Item]):
    """Some items, the place they begin at, and the place of what follows."""

    items: list[Item]
    place: Place
    after: Place


class Stream(Generic[Item]):
    """The items of a source, in chunks of `size` (0: all in one), at most `limit` of them (0: no limit).

    Files come in an order drawn from `seed`, for tables are often sorted by date; rows come as they stand.
    `layouts` are known sets of columns, each with the function that parses its rows. `parse(row, decode)` returns an
    item or raises Skipped, and `decode` may raise OSError for damaged images: rows without an item are counted in
    `skipped` by reason. Of `share` (r, n) only the r-th of n parts is given, for n processes that share the work.
    Raises UserError if the source is no such table.
    """

    def __init__(
        self, source: str, layouts: Mapping[Layout, Callable[[dict, Decode], Item]],
        size: int = 0, limit: int = 0, seed: int = 0, share: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        rank, world = share
        self.source, self.size, self.limit = source, size, limit and (limit + world - 1 - rank) // world
        self.table = open_table(source, list(layouts))
        self.parse = layouts[self.table.layout]
        order = torch.randperm(self.table.files, generator=torch.Generator().manual_seed(seed))
        # Whole files are dealt out; the rows of each are where there are fewer files than processes.
        whole = len(order) >= world
        self.files, self.row_share = (
            order[rank::world].tolist() if whole else order.tolist(),
            (0, 1) if whole else share,
        )
        self.skipped, self.warned = Counter(), 0

    def _rows(self, place: Place) -> Iterator[tuple[int, int, dict]]:
        for file in range(place.file, len(self.files)):
            first = place.row if file == place.file else 0
            try:
                for row, values in enumerate(self.table.rows(self.files[file], first), start=first):
                    if row % self.row_share[1] == self.row_share[0]:
                        yield file, row, values
            # A lost connection, a cut file, a cell that cannot be cast; ArrowInvalid is a ValueError.
            except (OSError, ValueError, TypeError, NotImplementedError, EOFError, tarfile.TarError) as error:
                raise UserError(
                    f"{self.table.name(self.files[file])}: reading stopped, in file {file} of {len(self.files)} of "
                    f"{self.source} ({first_line(error)}); repair or remove it and go on with --resume"
                ) from None

    def chunks(self, place: Place = START) -> Iterator[Chunk[Item]]:
        """Chunks from `place` on, to the end of the source. Images with the same bytes are decoded once a chunk."""
        items, begin, taken = [], place, place.items
        if self.limit and taken >= self.limit:
            return
        pictures = _DecodeOnce(self.table.root)

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
    """Encoded bytes, {"bytes": ..., "path": ...} as image columns have it, or a path -> RGB.

    The same bytes give one object, or two of the same `digest` where threads read ahead of a chunk. Paths are relative
    to the table's folder `root`, or to one in it that is called like what it holds.
    """

    def __init__(self, root: Path | None = None):
        self.root, self.seen = root, {}

    def __call__(self, data: bytes | dict | str | None) -> Image.Image:
        if isinstance(data, dict):
            data = data.get("bytes") or data.get("path")
        if isinstance(data, str) and self.root is not None:
            places = (self.root / folder / data for folder in ("", "images", "train"))
            data = next((place.read_bytes() for place in places if place.is_file()), None)
        if not data or not isinstance(data, bytes):
            raise OSError("no image")
        key, seen = hashlib.sha256(data).digest(), self.seen
        if key not in seen:
            image = decode(data)
            image.digest = key  # threads read ahead of a chunk, so the same bytes may still become two objects in it
            seen.setdefault(key, image)  # two threads may decode it at once; both take the first
        return seen[key]


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
