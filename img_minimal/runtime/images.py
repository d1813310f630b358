"""Images as tensors and as PIL: (B, 3, H, W) in [0, 1] <-> list[Image]."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from img_minimal.runtime.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # others may start programs of their own
LONGEST = 8192  # pixels
NARROWEST = 100  # times as long as wide; Qwen's processor refuses 200, and nobody prefers a line


def check_finite(images: Tensor, first: int) -> None:
    """Raises UserError, instead of a black picture, if an image (B, ...) is not finite; `first` is its number."""
    broken = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise UserError(
            f"image {first + broken[0]} is not finite: check --scale, the models' files, and --dtype (fp16 overflows "
            "in some models; try bf16 or fp32)"
        )


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> B images."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def from_pil(images: list[Image.Image]) -> Tensor:
    """Images of one size -> (B, 3, H, W) in [0, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def png(image: Image.Image, text: dict[str, object] | None = None) -> bytes:
    """Encoded without loss, so that what is read is what was drawn; `text` can be read back as `image.text`."""
    buffer, notes = io.BytesIO(), PngInfo()
    for key, value in (text or {}).items():
        notes.add_itxt(key, str(value))
    image.save(buffer, "PNG", pnginfo=notes)
    return buffer.getvalue()


def open_image(path: str) -> Image.Image:
    """A picture from a file, as `decode` reads it. Raises UserError if there is none."""
    try:
        return decode(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no picture that can be read"
        raise UserError(f"{path}: {why}; expected {', '.join(FORMATS)}") from None


def decode(data: bytes) -> Image.Image:
    """An encoded image -> RGB as a viewer shows it: turned as EXIF says, on white where it is transparent.

    Raises OSError if the bytes are damaged, of a format that data sets of images do not use, or of a picture whose
    padded square would take gigabytes.
    """
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if max(image.size) > LONGEST:
        raise OSError(f"{image.width} x {image.height} pixels, more than {LONGEST} on a side")
    if max(image.size) > NARROWEST * min(image.size):
        raise OSError(f"{image.width} x {image.height} pixels, a line and no picture")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: scaled, where a plain conversion would cut
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if values.max() > 255 else 255
        return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
