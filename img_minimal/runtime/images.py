"""Images as tensors and as PIL: (B, 3, H, W) in [0, 1] <-> list[Image]."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from img_minimal.runtime.errors import UserError


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


def decode(data: bytes) -> Image.Image:
    """An encoded image (JPEG, WebP, ...) -> RGB. Raises OSError if the bytes are damaged."""
    return Image.open(io.BytesIO(data)).convert("RGB")
