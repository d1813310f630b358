"""Stream preference pairs and edit triplets from tables too large to download.

Pick-a-Pic                caption, jpg_0, jpg_1 (bytes), label_0, label_1 (1, 0, or 0.5 for a tie)
Open Image Preferences    prompt, chosen, rejected
HPDv3                     prompt, path1, path2: image files; the first was preferred
HPDv2                     prompt, image_path: image files, human_preference: [1, 0] or [0, 1]
One's own, e.g. a .csv    prompt, image_0, image_1: image files, label: number of the better one
InstructPix2Pix           original_image, edited_prompt, edit_prompt: what to change, in words

A *source* is a file, a folder, or a data set on the hub. It is read in chunks, from any chunk on.
Unusable rows are skipped and counted by reason.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, ClassVar, Generic, TypeVar

import torch
from PIL.Image import Image

from img_minimal.cli import AnyPath, UserError, warn
from img_minimal.data.tables import (
    DAMAGE,
    OUTSIDE,
    Layout,
    Skipped,
    find_inside,
    first_line,
    open_table,
)
from img_minimal.files import decode

Item = TypeVar("Item")
Share = tuple[int, int]  # (r, n): the r-th of n parts, counted from 0; one for each of n processes
EVERYTHING = (0, 1)
Decode = Callable[[Any], Image]  # a cell -> its image
Parse = Callable[[list, Decode], Any]  # the cells of a layout -> an item
LONGEST_TEXT = 2000  # characters: batches are padded to the longest prompt
DECODED_AT_ONCE = 64  # rows, in threads

# Reasons for skipping a row.
DAMAGED = "with damaged images"
TOO_LONG = f"with more than {LONGEST_TEXT} characters of text"
UNLABELLED = "whose labels are no preference (1 and 0) between two images"


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt; people preferred the winner."""

    prompt: str
    winner: Image
    loser: Image

    @property
    def validation(self) -> bool:
        """True if the pair is held out for validation."""
        return held_back(self.prompt)


@dataclass(frozen=True)
class Triplet:
    """An image, a prompt, and the instruction that makes the image match ("nothing" if it does)."""

    image: Image
    prompt: str
    instruction: str
    validation: ClassVar[bool] = False  # held out by its position in the stream, not by its prompt


def held_back(prompt: str) -> bool:
    """Select one prompt in ten, which is never trained on."""
    return hashlib.sha256(prompt.encode()).digest()[0] % 10 == 0


def text_of(cell: object) -> str:
    """Convert a cell, text or bytes, to text. Raises Skipped if it is neither, empty or long."""
    try:
        cell = cell.decode() if isinstance(cell, bytes) else cell
    except UnicodeDecodeError:
        raise Skipped("without text") from None
    if not isinstance(cell, str) or not cell.strip():
        raise Skipped("without text")
    if len(cell) > LONGEST_TEXT:
        raise Skipped(TOO_LONG)
    return cell


def parse_pair(cells: list, decode: Decode) -> Pair:
    """Build a pair of a row's prompt, two images, and labels: 1 marks the winner.

    One label is the number of the winner, and without any it is the first image. Raises Skipped for
    a tie, or without a prompt or labels, and OSError for damaged images.
    """
    prompt, first, second, *labels = cells
    prompt = text_of(prompt)
    try:
        if isinstance(first, list):  # a list of images, and one of labels
            (first, second), labels = first, second
        labels = list(map(float, labels)) or [1, 0]
        label, other_label = labels if labels[1:] else (1 - labels[0], labels[0])
    except (TypeError, ValueError, OverflowError):
        raise Skipped(UNLABELLED) from None
    if label == other_label and label in (0, 0.5, 1):
        raise Skipped("ties")
    if {label, other_label} != {0, 1}:
        raise Skipped(UNLABELLED)
    winner, loser = (first, second) if label == 1 else (second, first)
    return Pair(prompt, decode(winner), decode(loser))


def parse_triplet(cells: list, decode: Decode) -> Triplet:
    """Build a triplet of a row's image, prompt and instruction.

    Raises Skipped without a prompt or instruction, and OSError for a damaged image.
    """
    image, *texts = cells
    texts = [text_of(text).strip() for text in texts]
    return Triplet(decode(image), *texts)


PAIRS = (
    ("caption", "jpg_0", "jpg_1", "label_0", "label_1"),
    ("prompt", "chosen", "rejected"),
    ("prompt", "path1", "path2"),
    ("prompt", "image_path", "human_preference"),
    ("prompt", "image_0", "image_1", "label"),
)
TRIPLETS = (("original_image", "edited_prompt", "edit_prompt"),)


@dataclass(frozen=True)
class StreamPosition:
    """Position at which a chunk starts: numbers of chunk, file and row, and of items before it."""

    chunk: int = 0
    file: int = 0
    row: int = 0
    items: int = 0


START = StreamPosition()


@dataclass(frozen=True)
class Chunk(Generic[Item]):
    """Items that are in memory together, and the positions of this chunk and of the next one."""

    items: list[Item]
    position: StreamPosition
    next_position: StreamPosition


class Stream(Generic[Item]):
    """Items of a source, in chunks of `size` (0: all in one), at most `limit` (0: all).

    Files come in an order drawn from `seed`, since tables are often sorted by date; rows keep their
    order. With a `share`, only that part is read. Raises UserError if the source is no such table.
    """

    def __init__(
        self,
        layouts: Collection[Layout],
        parse: Parse,
        source: AnyPath,
        size: int = 0,
        limit: int = 0,
        seed: int = 0,
        share: Share = EVERYTHING,
    ):
        rank, world = share
        self.source, self.size = str(source), size
        # This rank's part of the limit, which may be no item at all.
        self.limit = (limit + world - 1 - rank) // world if limit else sys.maxsize
        self.table = open_table(self.source, layouts)
        self.parse = parse
        generator = torch.Generator().manual_seed(seed)
        files = torch.randperm(len(self.table.files), generator=generator).tolist()
        # With enough files each process gets whole ones; otherwise all read every file.
        enough = len(files) >= world
        self.files = files[rank::world] if enough else files
        self.row_share = EVERYTHING if enough else share
        self.skipped = Counter()  # rows by reason

    def chunks(self, position: StreamPosition = START) -> Iterator[Chunk[Item]]:
        """Yield chunks from `position` to the end of the source.

        Images with the same bytes are decoded once per chunk.
        """
        decoder = ImageDecoder(self.table.root)
        items = islice(self._items(position, decoder), self.limit - position.items)
        while batch := list(islice(items, self.size or None)):
            file, row, _ = batch[-1]
            count = position.items + len(batch)
            next_position = StreamPosition(position.chunk + 1, file, row + 1, count)
            yield Chunk([item for *_, item in batch], position, next_position)
            position = next_position
            decoder.images.clear()

    def _items(
        self, position: StreamPosition, decoder: "ImageDecoder"
    ) -> Iterator[tuple[int, int, Item]]:
        """Yield (file, row, item) of every usable row, and count the others."""
        rows = self.rows(position)
        with ThreadPoolExecutor() as pool:  # PIL releases Python's lock while it decodes
            while batch := list(islice(rows, DECODED_AT_ONCE)):
                parsed = pool.map(lambda row: self._item(row[2], decoder), batch)
                for (file, row, _), item in zip(batch, parsed):
                    if isinstance(item, str):
                        if item in (DAMAGED, OUTSIDE) and not self.skipped[item]:
                            warn(f"{self.source}: skips rows {item}")
                        self.skipped[item] += 1
                    else:
                        yield file, row, item

    def rows(self, position: StreamPosition = START) -> Iterator[tuple[int, int, dict]]:
        """Yield (file, row, content) of every row of this share, from a position on.

        Raises UserError if a file is damaged.
        """
        part, parts = self.row_share
        for file in range(position.file, len(self.files)):
            first = position.row if file == position.file else 0
            try:
                for row, content in enumerate(self.table.read(self.files[file], first), first):
                    if row % parts == part:
                        yield file, row, content
            except DAMAGE as error:  # a lost connection, a cut file, a cell that cannot be cast
                name = self.table.files[self.files[file]]
                raise UserError(
                    f"{name}: reading stopped, in file {file} of {len(self.files)} of "
                    f"{self.source} ({first_line(error)}); repair or remove it and go on with "
                    "--resume"
                ) from None

    def _item(self, row: dict, decoder: "ImageDecoder") -> Item | str:
        """Parse a row to an item, or return the reason why it is skipped."""
        try:
            for column in self.table.layout:
                if row.get(column) is None:
                    raise Skipped(f"without {column}")
            return self.parse([row[column] for column in self.table.layout], decoder)
        except Skipped as reason:
            return str(reason)
        # PIL's decoders raise nearly anything for bad bytes, and a cell may hold no bytes at all.
        except Exception:
            return DAMAGED

    def skips(self) -> str:
        """Describe the rows skipped so far: "rows skipped: 120 ties, 1 with damaged images"."""
        counts = [f"{count} {reason}" for reason, count in sorted(self.skipped.items())]
        return "rows skipped: " + ", ".join(counts) if counts else ""


pair_stream = partial(Stream, PAIRS, parse_pair)
triplet_stream = partial(Stream, TRIPLETS, parse_triplet)


def prefetch(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Yield the same chunks, while a thread prepares the next one."""

    def ask() -> Queue:
        """Let a thread put the next chunk into a queue; None at the end, or an error."""
        answer = Queue()

        def work() -> None:
            try:
                answer.put(next(chunks, None))
            except BaseException as error:  # raised again where the chunk is wanted
                answer.put(error)

        # A daemon, so that a stopped run does not wait for a chunk that is still downloading.
        Thread(target=work, daemon=True).start()
        return answer

    answer = ask()
    while (chunk := answer.get()) is not None:
        if isinstance(chunk, BaseException):
            raise chunk
        answer = ask()
        yield chunk


def prompts_of(stream: Stream[Pair]) -> Iterator[str]:
    """Yield the usable prompts of a stream of pairs, without decoding images."""
    column = stream.table.layout[0]
    for _, _, row in stream.rows():
        try:
            prompt = text_of(row[column])
        except Skipped:
            continue
        yield prompt


class ImageDecoder:
    """Decode cells of image columns to RGB; equal bytes are decoded once.

    A cell holds encoded bytes, a path, or both in a dict ("bytes", "path"). Paths are relative to
    `root`, `root/images` or `root/train`, and become an image's `file`. Its `digest` identifies its
    bytes: two threads may decode the same bytes at the same time, to two objects.
    """

    def __init__(self, root: Path | None = None):
        self.root = root and root.resolve()
        self.images = {}  # by file and digest

    def __call__(self, cell: Any) -> Image:
        """Decode a cell. Raises OSError if it holds no image, and Skipped for a file outside."""
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        file = None
        if isinstance(cell, str) and self.root is not None:
            file = self._find(cell)
            cell = file.read_bytes()
        if not cell or not isinstance(cell, bytes):
            raise OSError("no image")
        key = file, hashlib.sha256(cell).digest()
        if image := self.images.get(key):
            return image
        image = decode(cell)
        image.file, image.digest = key
        return self.images.setdefault(key, image)

    def _find(self, name: str) -> Path:
        paths = [find_inside(self.root, Path(folder, name)) for folder in ("", "images", "train")]
        for path in filter(None, paths):
            if path.is_file():
                return path
        raise Skipped(OUTSIDE) if None in paths else OSError("no such file")
