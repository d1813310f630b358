"""Qwen2.5-VL: sees an image at its own size, so images of one batch may differ in their number of tokens."""

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from img_minimal.models.pretrained import build, read_shards
from img_minimal.models.weights import opening


class ImageProcessor(Qwen2_5_VLProcessor):
    """Qwen's processor without its video half, which would need torchvision."""

    def __init__(self, image_processor: Qwen2VLImageProcessorPil, tokenizer: PreTrainedTokenizerBase):
        # A processor's parts are those that its signature names; the parent's signature also names a video processor.
        super().__init__(image_processor, tokenizer)


def open_qwen(
    folder: Path, settings: dict, dtype: torch.dtype, device: torch.device | str
) -> tuple[Qwen2_5_VLForConditionalGeneration, ImageProcessor]:
    """Model and processor from a folder of Qwen2.5-VL. Raises UserError if a file is missing or damaged."""
    with opening(folder, "Qwen2.5-VL"):
        config = Qwen2_5_VLConfig(**settings)
        processor = ImageProcessor(
            Qwen2VLImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        )
    return build(Qwen2_5_VLForConditionalGeneration, config, read_shards(folder), folder, dtype, device), processor
