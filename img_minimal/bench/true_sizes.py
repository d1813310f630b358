"""The public models at true size, on PyTorch's meta device: parameters are counted without a download or memory."""

from functools import cache

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from img_minimal.aligner import ImplicitAligner
from img_minimal.backbone import true_size
from img_minimal.hub.mllms import CLIP_336_CONFIG

VICUNA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
VICUNA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
MLLMS = {"llava-13b": VICUNA_13B, "llava-7b": VICUNA_7B, "qwen2.5-vl-7b": QWEN_7B}


def build_mllm(name: str) -> nn.Module:
    """A multimodal LLM of `MLLMS`, to be called within `torch.device("meta")` or, with random weights, another."""
    if name.startswith("qwen"):
        config = Qwen2_5_VLConfig(text_config=QWEN_7B, vision_config=QWEN_VISION, tie_word_embeddings=False)
        return Qwen2_5_VLForConditionalGeneration(config)
    text = LlamaConfig(vocab_size=32064, **MLLMS[name])
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**CLIP_336_CONFIG))
    )


@cache
def models(mllm: str, backbone: str = "sdxl") -> dict[str, nn.Module]:
    """Everything that a command uses with that backbone; seconds, and no memory."""
    shapes = true_size(backbone)
    found = shapes.parts()
    with torch.device("meta"):
        found["aligner"] = ImplicitAligner(shapes.TOKEN_SHAPE[1], MLLMS[mllm]["hidden_size"])
        found["mllm"] = build_mllm(mllm)
    return found
