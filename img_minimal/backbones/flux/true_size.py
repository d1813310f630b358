"""FLUX.1-dev and XLabs' adapter at true size: their public settings, for counting and for checking a file's keys."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from img_minimal.backbones import Sampling
from img_minimal.backbones.flux.backbone import FluxBackbone
from img_minimal.backbones.flux.image_prompt import ImagePrompt, TokenProjection, load_ip_adapter
from img_minimal.backbones.flux.injection import ImageBranch
from img_minimal.files.mllm_layouts import square
from img_minimal.files.pretrained import read_settings
from img_minimal.presets import Preset
from img_minimal.runtime.devices import Placement, Precision, parameters

T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
CLIP_L_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_L_VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "projection_dim": 768, "image_size": 224, "patch_size": 14,
}  # fmt: skip
FLUX_TRANSFORMER = {"guidance_embeds": True}  # diffusers' own defaults else
FLUX_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TOKEN_SHAPE = (4, 4096)
TEXT_LENGTH = 512  # tokens of a prompt's states
ALWAYS_FP32 = ("vae", "projection")
DRAWS = ("transformer", "branch", "vae")  # the parts that are used together; the text's encoders make room for them
ENCODES_TEXT = ("text_encoder", "text_encoder_2")


def parts(device: torch.device | str = "meta") -> dict[str, nn.Module]:
    """Everything that `--model flux` draws and tokenizes with; on another device than meta with random weights."""
    with torch.device(device):
        transformer = FluxTransformer2DModel(**FLUX_TRANSFORMER)
        return {
            "transformer": transformer,
            "branch": ImageBranch.for_transformer(transformer),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L_TEXT)),
            "text_encoder_2": T5EncoderModel(T5Config(**T5_XXL)),
            "vae": AutoencoderKL(**FLUX_VAE),
            "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP_L_VISION)),
            "projection": TokenProjection(),
        }


def backbone(
    parts: dict[str, nn.Module], tokenizers: Path, sampling: Sampling, precision: Precision, placement: Placement
) -> FluxBackbone:
    """A backbone of such parts, which draws noise; tokenizers are those of any FLUX folder, the twin's will do."""
    pipe = FluxPipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "text_encoder_2", "transformer")},
        tokenizer=CLIPTokenizer.from_pretrained(tokenizers / "tokenizer", model_max_length=77),
        tokenizer_2=AutoTokenizer.from_pretrained(tokenizers / "tokenizer_2", model_max_length=TEXT_LENGTH),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    encoder = parts["image_encoder"]
    processor = CLIPImageProcessorPil(**square(encoder.config.image_size))
    image_prompt = ImagePrompt(encoder, processor, parts["projection"], precision)
    placement.add("text", *(parts[name] for name in ENCODES_TEXT))
    placement.add("diffusion", *(parts[name] for name in DRAWS))
    placement.add("image_prompt", image_prompt)
    return FluxBackbone(pipe, parts["branch"], image_prompt, sampling, precision, placement)


def activations(parts: dict[str, nn.Module], encode_batch: int) -> dict[str, Callable[[], object]]:
    """What is alive at once while an image is drawn, decoded, and while images are encoded, as calls to be watched."""

    def denoise() -> object:
        """One step at 1024 x 1024, of two: positive and negative."""
        return parts["transformer"](
            torch.empty(2, 4096, 64), torch.empty(2, 512, 4096), torch.empty(2, 768), torch.empty(2),
            torch.empty(4096, 3), torch.empty(512, 3), torch.empty(2),
        )  # fmt: skip

    return {
        "draw": denoise,
        "decode": lambda: parts["vae"].decode(torch.empty(1, 16, 128, 128)),
        "encode": lambda: parts["image_encoder"](torch.empty(encode_batch, 3, 224, 224)),
    }


def tokenizer_sizes(preset: Preset) -> tuple[int, int, tuple[int, int]]:
    """Parameters of the vision encoder and of the projection, and (N, D) of the tokens, without loading them."""
    settings = read_settings(preset.image_encoder, "--image-encoder")
    config = CLIPVisionConfig(**settings.get("vision_config", settings))
    with torch.device("meta"):
        encoder = CLIPVisionModelWithProjection(config)
        projection = TokenProjection()
    shape = TOKEN_SHAPE
    if Path(preset.ip_adapter).is_file():
        state, _ = load_ip_adapter(preset.ip_adapter)
        projection = TokenProjection.from_state_dict(state, preset.ip_adapter)
        shape = projection.tokens, projection.norm.normalized_shape[0]
    return parameters(encoder), parameters(projection), shape
