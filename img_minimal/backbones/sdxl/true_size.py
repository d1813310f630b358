"""SDXL and its adapter at true size: their public settings, for counting and for checking a file's keys.

To be built on PyTorch's meta device, where a model has shapes and no values. The models in use are opened with the
settings in their own folders.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from img_minimal.backbones import Sampling
from img_minimal.backbones.sdxl.backbone import SDXLBackbone
from img_minimal.backbones.sdxl.image_prompt import ImagePrompt, Resampler, load_ip_adapter
from img_minimal.backbones.sdxl.injection import ImageBranch
from img_minimal.files.mllm_layouts import square
from img_minimal.files.pretrained import read_settings
from img_minimal.presets import Preset
from img_minimal.runtime.devices import Placement, Precision, parameters

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
TOKEN_SHAPE = (16, 2048)
TEXT_LENGTH = 77  # tokens of a prompt's states
ALWAYS_FP32 = ("vae", "resampler")  # in every run
DRAWS = ("unet", "branch", "text_encoder", "text_encoder_2", "vae")  # the parts that are used together


def parts(device: torch.device | str = "meta") -> dict[str, nn.Module]:
    """Everything that `--model sdxl` draws and tokenizes with; on another device than meta with random weights."""
    with torch.device(device):
        unet = UNet2DConditionModel(**SDXL_UNET)
        return {
            "unet": unet,
            "branch": ImageBranch.for_unet(unet),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L_TEXT)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**BIG_G_TEXT)),
            "vae": AutoencoderKL(**SDXL_VAE),
            "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_H)),
            "resampler": Resampler(VIT_H["hidden_size"], TOKEN_SHAPE[1]),
        }


def backbone(
    parts: dict[str, nn.Module], tokenizers: Path, sampling: Sampling, precision: Precision, placement: Placement
) -> SDXLBackbone:
    """A backbone of such parts, which draws noise; tokenizers are those of any SDXL folder, the twin's will do."""
    sizes = {"model_max_length": TEXT_LENGTH}
    pipe = StableDiffusionXLPipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "text_encoder_2", "unet")},
        tokenizer=CLIPTokenizer.from_pretrained(tokenizers / "tokenizer", **sizes),
        tokenizer_2=CLIPTokenizer.from_pretrained(tokenizers / "tokenizer_2", **sizes),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    encoder = parts["image_encoder"]
    processor = CLIPImageProcessorPil(**square(encoder.config.image_size))
    image_prompt = ImagePrompt(encoder, processor, parts["resampler"], precision)
    placement.add("diffusion", *(parts[name] for name in DRAWS))
    placement.add("image_prompt", image_prompt)
    return SDXLBackbone(pipe, parts["branch"], image_prompt, sampling, precision, placement)


def activations(parts: dict[str, nn.Module], encode_batch: int) -> dict[str, Callable[[], object]]:
    """What is alive at once while an image is drawn, decoded, and while images are encoded, as calls to be watched."""

    def denoise() -> object:
        """One step at 1024 x 1024, of two: with and without text."""
        added = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
        text = torch.empty(2, 77, 2048)
        return parts["unet"](torch.empty(2, 4, 128, 128), torch.empty(1), text, added_cond_kwargs=added)

    return {
        "draw": denoise,
        "decode": lambda: parts["vae"].decode(torch.empty(1, 4, 128, 128)),
        "encode": lambda: parts["image_encoder"](torch.empty(encode_batch, 3, 224, 224), output_hidden_states=True),
    }


def tokenizer_sizes(preset: Preset) -> tuple[int, int, tuple[int, int]]:
    """Parameters of the vision encoder and of the Resampler, and (N, D) of the tokens, without loading them."""
    config = CLIPVisionConfig(**read_settings(preset.image_encoder, "--image-encoder"))
    with torch.device("meta"):
        encoder = CLIPVisionModelWithProjection(config)
        resampler = Resampler(config.hidden_size, TOKEN_SHAPE[1])  # SDXL's, if the file is not here to be asked
    if all(Path(path).is_file() for path in (preset.ip_adapter, preset.resampler or preset.ip_adapter)):
        resampler = Resampler.from_state_dict(load_ip_adapter(preset.ip_adapter, preset.resampler)[0])
    shape = resampler.latents.shape[1], resampler.proj_out.out_features
    return parameters(encoder), parameters(resampler), shape
