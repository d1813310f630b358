"""Tables that the build leaves behind, and the images in them, for people and for the parts after it."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from img_minimal.files import replacing


def save_table(table: pa.Table, path: Path, what: str) -> None:
    """Write a parquet file, as small as it gets, and say how many of `what` it holds."""
    with replacing(path) as partial:
        pq.write_table(table, partial, compression="zstd", compression_level=19)
    print(f"{len(table)} {what} in {path}, {path.stat().st_size / 1e6:.1f} MB")


def to_webp(pixels: Tensor) -> bytes:
    """(3, 64, 64) in [0, 1] -> a lossless WebP of 64 colours, about 240 bytes."""
    array = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).quantize(64).convert("RGB").save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def to_jpeg(image: Image.Image) -> bytes:
    """Encoded without colour subsampling, which would smear shapes of ten pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, subsampling=0, optimize=True)
    return buffer.getvalue()
