"""Preference pairs and edit triplets from tables too large to download, a chunk at a time and from any position on.

Pick-a-Pic                caption, jpg_0, jpg_1 (bytes), label_0, label_1 (1, 0, or 0.5 = tie)
Open Image Preferences    prompt, chosen, rejected
HPDv3                     prompt, path1, path2: files; the first was preferred
HPDv2                     prompt, image_path: files, human_preference: [1, 0] or [0, 1]
InstructPix2Pix           original_image, edited_prompt, edit_prompt: what to change, in words

A *source* is a file, a folder, or the name of a data set on the hub. Rows that give nothing are counted by reason.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from PIL.Image import Image

from img_minimal.cli import UserError, warn
from img_minimal.data.tables import DAMAGE, Layout, first_line, open_table
from img_minimal.files import decode

Item = TypeVar("Item")
Parse = Callable[
    [dict, Callable[[Any], Image]], Any
]  # a row, and what decodes its images -> an item
LONGEST_TEXT = (
    2000  # characters; guidance features of a whole chunk are padded to its longest prompt
)
AHEAD = 64  # rows that are decoded together, in threads


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt; people preferred the winner."""

    prompt: str
    winner: Image
    loser: Image

    @property
    def validation(self) -> bool:
        """For measuring the error on prompts that were not trained on."""
        return held_back(self.prompt)


@dataclass(frozen=True)
class Triplet:
    """An image, a prompt, and the instruction that would make the image match it ("nothing" if it does already)."""

    image: Image
    prompt: str
    instruction: str
    validation: ClassVar[bool] = False  # held out by its position in the stream, not by its prompt


class Skipped(Exception):
    """A row that gives no item; the message is the reason under which it is counted."""


DAMAGED = "with damaged images"
TOO_LONG = f"with more than {LONGEST_TEXT} characters of text"
UNLABELLED = "whose labels are no preference (1 and 0)"


def held_back(prompt: str) -> bool:
    """One prompt in ten is not trained on."""
    return hashlib.sha256(prompt.encode()).digest()[0] % 10 == 0


def text_of(cell: object) -> str:
    """A cell's text, also where the column holds bytes; "" if it is none."""
    try:
        cell = cell.decode() if isinstance(cell, bytes) else cell
    except UnicodeDecodeError:
        return ""
    return cell if isinstance(cell, str) else ""


def parse_pair(prompt: object, images: Any, labels: Any, decode: Callable[[Any], Image]) -> Pair:
    """Winner first. Raises Skipped for a tie, without a prompt or labels, OSError for damaged images."""
    prompt = text_of(prompt)
    if not prompt.strip():
        raise Skipped("without a prompt")
    if len(prompt) > LONGEST_TEXT:
        raise Skipped(TOO_LONG)
    if not (
        isinstance(images, (tuple, list))
        and isinstance(labels, (tuple, list))
        and len(images) == len(labels) == 2
    ):
        raise Skipped("that compare more or less than two images")
    try:
        labels = [float(label) for label in labels]
    except (TypeError, ValueError, OverflowError):
        raise Skipped(UNLABELLED) from None
    if labels[0] == labels[1] and labels[0] in (0, 0.5, 1):
        raise Skipped("ties")
    if sorted(labels) != [0, 1]:
        raise Skipped(UNLABELLED)
    first, second = images if labels[0] == 1 else reversed(images)
    return Pair(prompt, decode(first), decode(second))


def parse_triplet(row: dict, decode: Callable[[Any], Image]) -> Triplet:
    """Raises Skipped without a prompt or instruction, OSError for a damaged image."""
    words = [text_of(row[name]).strip() for name in ("edited_prompt", "edit_prompt")]
    if not all(words):
        raise Skipped("without words")
    if max(map(len, words)) > LONGEST_TEXT:
        raise Skipped(TOO_LONG)
    return Triplet(decode(row["original_image"]), *words)


PAIRS: dict[Layout, Parse] = {
    ("caption", "jpg_0", "jpg_1", "label_0", "label_1"): lambda row, decode: parse_pair(
        row["caption"], (row["jpg_0"], row["jpg_1"]), (row["label_0"], row["label_1"]), decode
    ),
    ("prompt", "chosen", "rejected"): lambda row, decode: parse_pair(
        row["prompt"], (row["chosen"], row["rejected"]), (1, 0), decode
    ),
    ("prompt", "path1", "path2"): lambda row, decode: parse_pair(
        row["prompt"], (row["path1"], row["path2"]), (1, 0), decode
    ),
    ("prompt", "image_path", "human_preference"): lambda row, decode: parse_pair(
        row["prompt"], row["image_path"], row["human_preference"], decode
    ),
}
TRIPLETS: dict[Layout, Parse] = {("original_image", "edit_prompt", "edited_prompt"): parse_triplet}


def pair_stream(
    source: str | Path,
    size: int = 0,
    limit: int = 0,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
) -> "Stream[Pair]":
    """Pairs of a source, in chunks. Raises UserError if it is no table of pairs."""
    return Stream(str(source), PAIRS, size, limit, seed, share)


def triplet_stream(source: str | Path, size: int = 0, seed: int = 0) -> "Stream[Triplet]":
    """Triplets of a source, in chunks. Raises UserError if it is no table of triplets."""
    return Stream(str(source), TRIPLETS, size, seed=seed)


@dataclass(frozen=True)
class StreamPosition:
    """Where a chunk begins: its number, the file and the row in it, and how many items came before it."""

    chunk: int = 0
    file: int = 0
    row: int = 0
    items: int = 0


START = StreamPosition()


@dataclass(frozen=True)
class Chunk(Generic[Item]):
    """Some items, the position they begin at, and the position of what follows."""

    items: list[Item]
    position: StreamPosition
    after: StreamPosition


class Stream(Generic[Item]):
    """The items of a source, in chunks of `size` (0: all in one), at most `limit` of them (0: no limit).

    Files come in an order drawn from `seed`, for tables are often sorted by date; rows come as they stand. Of `share`
    (r, n) only the r-th of n parts is given, for n processes that share the work. Raises UserError if the source is no
    such table.
    """

    def __init__(
        self, source: str, layouts: Mapping[Layout, Parse], size: int = 0, limit: int = 0, seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        rank, world = share
        self.source, self.size, self.limit = (
            source,
            size,
            limit and (limit + world - 1 - rank) // world,
        )
        self.table = open_table(source, list(layouts))
        self.parse = layouts[self.table.layout]
        files = torch.randperm(
            len(self.table.files), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        # Whole files are dealt out; the rows of each are where there are fewer files than processes.
        self.files, self.rows = (
            (files[rank::world], (0, 1)) if len(files) >= world else (files, share)
        )
        self.skipped, self.warned = Counter(), 0

    def chunks(self, position: StreamPosition = START) -> Iterator[Chunk[Item]]:
        """Chunks from `position` on, to the end of the source. Images with the same bytes are decoded once a chunk."""
        items, begin, pictures = [], position, Pictures(self.table.root)
        if self.limit and position.items >= self.limit:
            return
        with ThreadPoolExecutor() as pool:  # PIL lets go of Python's lock while it decodes
            rows = self._rows(position)
            while some := list(islice(rows, AHEAD)):
                for (file, row, _), item in zip(
                    some, pool.map(lambda one: self._item(one[2], pictures), some)
                ):
                    if isinstance(item, str):
                        self.skipped[item] += 1
                        continue
                    items.append(item)
                    taken = begin.items + len(items)
                    if len(items) == self.size or taken == self.limit:
                        after = StreamPosition(begin.chunk + 1, file, row + 1, taken)
                        self._warn()
                        yield Chunk(items, begin, after)
                        if taken == self.limit:
                            return
                        items, begin, pictures.seen = [], after, {}
        self._warn()
        if items:
            yield Chunk(
                items,
                begin,
                StreamPosition(begin.chunk + 1, len(self.files), 0, begin.items + len(items)),
            )

    def _rows(self, position: StreamPosition) -> Iterator[tuple[int, int, dict]]:
        """(file, row, content) of every row of this share, from a position on."""
        for file in range(position.file, len(self.files)):
            first = position.row if file == position.file else 0
            try:
                for row, content in enumerate(
                    self.table.read(self.files[file], first), start=first
                ):
                    if row % self.rows[1] == self.rows[0]:
                        yield file, row, content
            except DAMAGE as error:  # a lost connection, a cut file, a cell that cannot be cast
                raise UserError(
                    f"{self.table.files[self.files[file]]}: reading stopped, in file {file} of {len(self.files)} of "
                    f"{self.source} ({first_line(error)}); repair or remove it and go on with --resume"
                ) from None

    def _item(self, row: dict, pictures: "Pictures") -> Item | str:
        """A row as an item, or why it is left out."""
        try:
            return self.parse(row, pictures)
        except Skipped as reason:
            return str(reason)
        except Exception:  # PIL's decoders raise nearly anything for bad bytes, and a cell may hold no bytes at all
            return DAMAGED

    def _warn(self) -> None:
        if self.skipped[DAMAGED] > self.warned:
            self.warned = self.skipped[DAMAGED]
            warn(f"{self.source}: skipped {self.warned} rows with damaged images so far")

    def skips(self) -> str:
        """What was skipped so far, for people: "rows skipped: 120 ties, 1 with damaged images"; "" if nothing was."""
        counts = ", ".join(
            f"{count} {reason}" for reason, count in sorted(self.skipped.items()) if count
        )
        return counts and f"rows skipped: {counts}"


def prompts_of(stream: "Stream[Pair]") -> Iterator[str]:
    """Yield the usable prompts of a stream of pairs, without decoding images."""
    column = stream.table.layout[0]
    for file in stream.files:
        for row in stream.table.read(file, 0):
            prompt = text_of(row[column])
            if prompt.strip() and len(prompt) <= LONGEST_TEXT:
                yield prompt


class Pictures:
    """Encoded bytes, {"bytes": ..., "path": ...} as image columns have it, or a path -> RGB; the same bytes once.

    Two threads may decode the same bytes at once: an image's `digest` says what it is. Paths are relative to `root`,
    or to a folder in it that is called like what it holds.
    """

    def __init__(self, root: Path | None = None):
        self.root, self.seen = root, {}

    def __call__(self, cell: Any) -> Image:
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str) and self.root is not None:
            positions = (self.root / folder / cell for folder in ("", "images", "train"))
            cell = next(
                (position.read_bytes() for position in positions if position.is_file()), None
            )
        if not cell or not isinstance(cell, bytes):
            raise OSError("no image")
        digest, seen = hashlib.sha256(cell).digest(), self.seen
        if digest not in seen:
            image = decode(cell)
            image.digest = digest
            seen.setdefault(digest, image)
        return seen[digest]
