"""Image files: odd metadata turns nothing, and what is no picture is said in words."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from refusals import refused

from img_minimal.files import decode, open_image

EXIF = {
    "garbage": b"Exif\0\0II*\0\xff\xff\xff\xff",
    "no TIFF": b"Exif\0\0nothing",
    "empty": b"Exif\0\0",
    # An orientation that is a text, one that is none of eight, and a table without an end.
    "text": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04six\0\0\0\0\0",
    "nine": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0\0\0\0\0",
    "long": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03\0\0\0\x01\0\x06",
}


def picture() -> Image.Image:
    """Draw noise, wider than high, without loss in any format used here."""
    noise = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def saved(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("name", EXIF)
def test_exif_that_cannot_be_read_turns_nothing(kind, name):
    options = {"lossless": True} if kind == "WEBP" else {}
    if kind != "TIFF":
        options["exif"] = EXIF[name]
    assert decode(saved(kind, **options)).tobytes() == picture().tobytes()


@pytest.mark.parametrize(
    "texts",
    [
        {"Raw profile type exif": "exif\n 8\nzzzz"},
        {"XML:com.adobe.xmp": "<x tiff:Orientation='9'"},
        {"Raw profile type exif": ""},
    ],
)
def test_a_png_with_odd_profiles_is_what_a_viewer_shows(texts):
    notes = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        notes.add_text(key, value)
    assert decode(saved("PNG", pnginfo=notes)).tobytes() == picture().tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_picture_is_turned_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x9286] = b"a comment"
    turned = decode(saved(kind, exif=exif, lossless=True))
    assert turned.size == ((6, 4) if orientation < 5 else (4, 6))
    upright = [None, 0, 3, 1, 5, 4, 6, 2][orientation - 1]  # of Image.Transpose
    expected = picture() if upright is None else picture().transpose(upright)
    assert turned.tobytes() == expected.tobytes()


def png_header(width: int, height: int) -> bytes:
    """Write the beginning of a PNG that claims a size."""
    content = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b"\x89PNG\r\n\x1a\n"
    for chunk in (content, b"IDAT" + zlib.compress(bytes(100))):
        chunks += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return chunks


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png_header(9000, 100), ["9000 x 100 pixels, more than 8192 on a side"]),
        (png_header(14_000, 14_000), ["pixels"]),
        (png_header(2**31 - 1, 2**31 - 1), ["pixels"]),
        (png_header(5000, 10), ["5000 x 10 pixels is a line"]),
        (png_header(0, 0), ["not a readable picture"]),
        (saved("PNG")[:60], ["expected JPEG, PNG"]),
        (saved("WEBP")[:40], ["expected JPEG, PNG"]),
        (b"GIF89a", ["not a readable picture"]),
        (b"", ["not a readable picture"]),
    ],
)
def test_what_is_no_picture_is_refused_in_words(tmp_path: Path, data, words):
    (tmp_path / "mine.png").write_bytes(data)
    with refused("mine.png: ", *words):
        open_image(str(tmp_path / "mine.png"))
    with pytest.raises(OSError):
        decode(data)
