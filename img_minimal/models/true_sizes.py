"""The public models at true size: their settings, and how to build them without a download, memory or numbers.

On PyTorch's meta device a model has shapes and no values, so that parameters can be counted, and a file's keys checked,
on a laptop. Needed for memory estimates and for tests; the models in use are opened with the settings in their folders.
"""

from functools import cache

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from img_minimal.aligner import ImplicitAligner
from img_minimal.image_prompt import Resampler
from img_minimal.injection import ImageBranch
from img_minimal.models.llava_layout import CLIP_336_CONFIG

SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
SDXL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG_G_TEXT = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280,
}  # fmt: skip
VIT_H = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "projection_dim": 1024, "image_size": 224, "patch_size": 14,
}  # fmt: skip
VICUNA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
VICUNA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
MLLMS = {"llava-13b": VICUNA_13B, "llava-7b": VICUNA_7B, "qwen2.5-vl-7b": QWEN_7B}


def build_mllm(name: str) -> nn.Module:
    """A multimodal LLM of `MLLMS`, to be called on the meta device."""
    if name.startswith("qwen"):
        config = Qwen2_5_VLConfig(text_config=QWEN_7B, vision_config=QWEN_VISION, tie_word_embeddings=False)
        return Qwen2_5_VLForConditionalGeneration(config)
    text = LlamaConfig(vocab_size=32064, **MLLMS[name])
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**CLIP_336_CONFIG))
    )


@cache
def models(mllm: str) -> dict[str, nn.Module]:
    """Everything that `--model sdxl` uses, at true size on the meta device: no memory, and seconds only."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
        return {
            "unet": unet,
            "branch": ImageBranch.for_unet(unet),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L_TEXT)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**BIG_G_TEXT)),
            "vae": AutoencoderKL(**SDXL_VAE),
            "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_H)),
            "resampler": Resampler(1280, 2048),
            "aligner": ImplicitAligner(2048, MLLMS[mllm]["hidden_size"]),
            "mllm": build_mllm(mllm),
        }


def parameters(module: nn.Module) -> int:
    """How many numbers a model has."""
    return sum(p.numel() for p in module.parameters())
