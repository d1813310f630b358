"""InstructPix2Pix's columns: original_image (bytes), edited_prompt, edit_prompt (what to change, in words)."""

from dataclasses import dataclass
from typing import ClassVar

from PIL.Image import Image

from img_minimal.data.stream import LONGEST_TEXT, TOO_LONG, Decode, Skipped, Stream, text_of

COLUMNS = ("original_image", "edit_prompt", "edited_prompt")


@dataclass(frozen=True)
class Triplet:
    """An image, a prompt, and the instruction that would make the image match it ("nothing" if it does already)."""

    image: Image
    prompt: str
    instruction: str
    validation: ClassVar[bool] = False  # held out by its place in the stream, not by its prompt


def parse_triplet(row: dict, decode: Decode) -> Triplet:
    """A row. Raises Skipped without a prompt or instruction, OSError for a damaged image."""
    words = [text_of(row[name]).strip() for name in ("edited_prompt", "edit_prompt")]
    if not all(words):
        raise Skipped("without words")
    if max(map(len, words)) > LONGEST_TEXT:
        raise Skipped(TOO_LONG)
    return Triplet(decode(row["original_image"]), *words)


def triplet_stream(source: str, size: int = 0, seed: int = 0) -> Stream[Triplet]:
    """Triplets of a hub data set, a folder or a file, in chunks. Raises UserError if the source is no such table."""
    return Stream(str(source), {COLUMNS: parse_triplet}, size, seed=seed)
