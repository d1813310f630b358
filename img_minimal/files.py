"""Read and write files safely: atomic writes, JSON, images, and what a folder was made with."""

import hashlib
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from img_minimal.cli import AnyPath, UserError, check, is_stream, partial_of, writable_folder

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # others may start programs
MAX_SIDE = 8192  # pixels
MAX_ASPECT = 100  # width to height; Qwen's image processor refuses 200


# Atomic writes


@contextmanager
def replacing(path: AnyPath) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` on success and is removed on failure.

    A link stays, and what it leads to is replaced; so does the mode of the file that was there. A
    device or a pipe is written to.
    """
    if is_stream(Path(path)):
        yield Path(path)
        return
    path = Path(path).resolve()
    partial = partial_of(path)  # in the same folder, so that the rename is atomic
    try:
        partial.touch()
        # safetensors leaves files that only their owner may read
        mode = (path if path.exists() else partial).stat().st_mode
        yield partial
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: AnyPath, text: str | bytes) -> None:
    """Replace a file atomically by one that holds `text`."""
    with replacing(path) as partial:
        partial.write_bytes(text.encode() if isinstance(text, str) else text)


# Provenance


def fingerprint(path: Path) -> list:
    """Return name, size and a hash of three samples of every file under `path`.

    Takes milliseconds for a 26 GB model, and changes when the model is retrained.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    prints = []
    for file in files:
        size = file.stat().st_size
        samples = hashlib.sha256()
        with file.open("rb") as stream:
            for offset in (0, size // 2, max(0, size - 65_536)):
                stream.seek(offset)
                samples.update(stream.read(65_536))
        prints.append([file.name, size, samples.hexdigest()])
    return prints


def model_name(location: str) -> str:
    """Name a model in a few letters: its file or folder and a fingerprint, or its hub id."""
    path = Path(location)
    return f"{path.name} {short_hash(fingerprint(path))}" if path.exists() else location


def short_hash(content: object) -> str:
    """Hash whatever JSON can hold, to 12 letters."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def version(path: Path) -> list[int]:
    """Return size and time of a file, which change when it is replaced."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def identity(value: object) -> object:
    """Return the fingerprint of an existing path, and any other value unchanged."""
    if isinstance(value, str) and value and Path(value).exists():
        return fingerprint(Path(value))
    return value


def check_provenance(note: Path, settings: dict, advice: str, used: bool) -> None:
    """Record in `note` which settings a folder was made with.

    Raises UserError naming the first difference if the folder was `used` with other settings, or
    without a note.
    """
    settings = json.loads(json.dumps(settings))
    before = read_json(note, dict, advice) if used else settings
    for name in sorted(settings | before):
        was, now = before.get(name), settings.get(name)
        if was != now:
            raise UserError(
                f"{note.parent} was made with another {name} ({json.dumps(was):.60}; now "
                f"{json.dumps(now):.60}); {advice}"
            )
    write_whole(note, json.dumps(settings, indent=1))


def read_json(path: AnyPath, kind: type, advice: str, inspect: Callable[[Any], Any] = id) -> Any:
    """Read a JSON file that holds a `kind`, dict or list.

    `inspect` may look into the content; whatever it raises counts as wrong content. Raises
    UserError in one line, ending in `advice`, if the file is missing, damaged or of another kind.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(content, kind):
            raise TypeError(f"expected {kind.__name__}, found {type(content).__name__}")
        inspect(content)
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror}); {advice}") from None
    except Exception as problem:  # whatever `inspect` raises
        reason = " ".join(repr(problem).split())[:200]
        raise UserError(f"{path}: unreadable ({reason}); {advice}") from None
    return content


# Images: (B, 3, H, W) in [0, 1] <-> list[PIL.Image]


def check_finite(values: Tensor, first: int, what: str = "image") -> None:
    """Raise UserError for one of `values` (B, ...) with NaN or infinity; `first` numbers them."""
    for number, value in enumerate(values, first):
        check(
            value.isfinite().all(),
            f"{what} {number} is not finite: check --scale, the models' files, and --dtype (fp16 "
            "overflows in some models; try bf16 or fp32)",
        )


def to_pil(images: Tensor | list[Tensor]) -> list[Image.Image]:
    """Convert (B, 3, H, W) in [0, 1], or a list of (3, H, W), to B images."""
    pictures = []
    for image in images:
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        pictures.append(Image.fromarray(pixels.cpu().numpy()))
    return pictures


def from_pil(images: list[Image.Image]) -> Tensor:
    """Convert images of equal size to (B, 3, H, W) in [0, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def png(image: Image.Image, text: dict[str, object] | None = None) -> bytes:
    """Encode losslessly as PNG; `text` can be read back as `image.text`."""
    buffer, notes = io.BytesIO(), PngInfo()
    for key, value in (text or {}).items():
        notes.add_itxt(key, str(value))
    image.save(buffer, "PNG", pnginfo=notes)
    return buffer.getvalue()


def open_image(path: str) -> Image.Image:
    """Read a picture from a file, as `decode` does. Raises UserError if there is none."""
    try:
        return decode(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path}: {reason}; expected {', '.join(IMAGE_FORMATS)} of at most {MAX_SIDE} pixels a "
            "side"
        ) from None


def decode(data: bytes) -> Image.Image:
    """Decode image bytes to RGB as a viewer shows them: EXIF rotation, white behind transparency.

    Raises OSError for damaged bytes, formats that image data sets do not use, and shapes whose
    padded square would take gigabytes.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        size = f"{image.width} x {image.height} pixels"
        if max(image.size) > MAX_SIDE:
            raise OSError(f"{size}, more than {MAX_SIDE} on a side")
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise OSError(f"{size} is a line, not a picture")
        image.load()
        return flattened(image)
    except UnidentifiedImageError:  # its message names a buffer in memory
        raise OSError("not a readable picture") from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly anything for damaged bytes
        raise OSError(f"not a readable picture ({error or type(error).__name__})") from None


def flattened(image: Image.Image) -> Image.Image:
    """Convert a picture to RGB as a viewer shows it: EXIF rotation, white behind transparency.

    Raises UserError for pixels of 32 bits, which have no fixed range.
    """
    with suppress(Exception):  # EXIF that cannot be read turns nothing
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # a plain conversion would clip
        scaled = (np.asarray(image, dtype=np.float64) * (255 / 65535)).round()
        image = Image.fromarray(scaled.astype(np.uint8))
    known = image.mode not in ("I", "F")
    check(known, "a picture has pixels of 32 bits, whose range is unknown; expected 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def as_pictures(images: Image.Image | Tensor | Sequence[Image.Image | Tensor]) -> list[Image.Image]:
    """Make RGB pictures of PIL images, files' or own, and of tensors: (B, 3, H, W) or (3, H, W).

    Raises UserError for tensors other than uint8 or floats in [0, 1].
    """
    alone = isinstance(images, Image.Image) or (isinstance(images, Tensor) and images.ndim == 3)
    pictures = []
    for image in [images] if alone else images:
        if isinstance(image, Tensor):
            values = image / 255 if image.dtype == torch.uint8 else image
            fits = values.is_floating_point() and values.ndim == 3 and len(values) == 3
            if fits and (values.sub(0.5).abs() <= 0.501).all():
                [image] = to_pil([values])
        check(
            isinstance(image, Image.Image),
            f"a picture is {' '.join(repr(image).split()):.60}, expected PIL images, or a tensor "
            "(B, 3, H, W) of uint8 or of floats in [0, 1]",
        )
        pictures.append(flattened(image))
    return pictures


def cached_images(paths: list[Path], draw: Callable[[], Tensor], advice: str) -> list[Image.Image]:
    """Read PNG files of one folder, after drawing all of them together if any is missing.

    Raises UserError ending in `advice` if a file is damaged.
    """
    if not all(path.exists() for path in paths):
        writable_folder(paths[0].parent)
        for path, image in zip(paths, to_pil(draw())):
            write_whole(path, png(image))
    images = []
    for path in paths:
        try:
            images.append(Image.open(path).convert("RGB"))
        except (OSError, SyntaxError):  # Pillow raises both for a damaged PNG
            raise UserError(f"{path}: damaged image; {advice}") from None
    return images


# Time and memory


class Clock:
    """Add up seconds by step: `with clock("draw"): ...`; str() gives the total and the shares."""

    def __init__(self) -> None:
        self.seconds = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Count the time spent in this context for `step`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        shares = ", ".join(f"{step} {s / total:.0%}" for step, s in self.seconds.items())
        return f"{total:.1f} s: {shares}; {peak_memory()}"


def peak_memory() -> str:
    """Describe the peak memory of this process, on the GPU if there is one."""
    if torch.cuda.is_available():
        return f"at most {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of GPU memory"
    peak = peak_bytes() / 1e9
    return "memory not measured" if math.isnan(peak) else f"at most {peak:.2f} GB of memory"


def peak_bytes() -> float:
    """Return the peak resident memory of this process in bytes, NaN where that is not known."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss would also count the parent process
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
