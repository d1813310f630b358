"""Which MLLMs can be opened, from which layouts of files, and how each is asked.

LLaVA in transformers' layout (llava-hf) and in its authors' (llava_original.py), and Qwen2.5-VL, which sees an image at
its own size, so that images of one batch may differ in their number of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from img_minimal.files.llava_original import is_original, open_original_llava
from img_minimal.files.pretrained import build, read_config, read_shards
from img_minimal.files.weights import opening
from img_minimal.runtime.errors import UserError

CONVERSATION = "USER: <image>\n{question} ASSISTANT:"  # LLaVA-1.5 as transformers asks it, and the twins
CONVERSATION_V0 = (  # the first conversation of LLaVA, with which the release asks its own
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions.###Human: <image>\n{question}###Assistant:"
)
CONVERSATION_QWEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)


def open_llava(
    folder: Path, settings: dict, dtype: torch.dtype, device: torch.device | str
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model and processor from a folder in the llava-hf layout. Raises UserError if a file is missing or damaged."""
    with opening(folder, "LLaVA"):
        config = LlavaConfig(**settings)
        vision = config.vision_config
        processor = LlavaProcessor(
            # LLaVA-1.5 was trained on images padded to a square; some folders' settings would cut them instead, or
            # name another size than the vision tower's.
            image_processor=LlavaImageProcessorPil.from_pretrained(folder, do_pad=True, **square(vision.image_size)),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            patch_size=vision.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=int("siglip" not in vision.model_type),  # CLIP has a class token
        )
    return build(LlavaForConditionalGeneration, config, read_shards(folder), folder, dtype, device), processor


def square(side: int) -> dict:
    """Settings of an image processor that gives squares."""
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


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


@dataclass(frozen=True)
class Family:
    """What differs between MLLMs: how a folder is opened, how a question is put, and where an answer ends."""

    open: Callable[[Path, dict, torch.dtype, torch.device | str], tuple[PreTrainedModel, ProcessorMixin]]
    conversation: str
    stop: str | None = None  # beside the end-of-text token


FAMILIES = {
    "llava": Family(open_llava, CONVERSATION),
    "llava, original layout": Family(open_original_llava, CONVERSATION_V0, stop="###"),
    "qwen2_5_vl": Family(open_qwen, CONVERSATION_QWEN),
}


def find_family(config: dict, what: str | Path) -> Family:
    """The family of a model by its config.json. Raises UserError if it is none of ours; `what` is for the message."""
    kind = str(config.get("model_type"))
    name = "llava, original layout" if kind in ("llava", "llava_llama") and is_original(config) else kind
    if name not in FAMILIES:
        raise UserError(f"{what}: model_type {kind!r} is no MLLM known here; expected one of: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def announced_width(folder: str | Path) -> int | None:
    """H as a local folder's config.json has it, without loading the MLLM; None if it leaves that to a default."""
    config = read_config(Path(folder))
    with opening(folder, "multimodal LLM"):
        width = config.get("text_config", config).get("hidden_size")
        return None if width is None else int(width)
