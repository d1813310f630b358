"""Write what a user has after the downloads: the real names and layouts, small and random."""

import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from img_minimal.aligner import ImplicitAligner
from img_minimal.presets import TWINS, Preset, find_preset
from img_minimal.sdxl import Resampler, new_branch

PROMPT = "a red circle above a blue square"
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 64,
    "norm_num_groups": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
    "use_linear_projection": True,
}


def lively(module: nn.Module, seed: int) -> nn.Module:
    """Draw weights large enough that every part shows in the result, even what starts at zero."""
    noise = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        scale = 0.1 if p.ndim == 1 else 0.7 / p[0].numel() ** 0.5
        p.data = torch.randn(p.shape, generator=noise) * scale
        if p.ndim == 1:
            p.data += 0.5
    return module.eval()


def new_unet(seed: int) -> UNet2DConditionModel:
    return lively(UNet2DConditionModel(**UNET), seed)


def new_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TWINS / "sdxl" / "tokenizer", model_max_length=77)


def new_text_config() -> CLIPTextConfig:
    """Configure a small CLIP text encoder for `new_tokenizer`."""
    tokenizer = new_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def new_vae(**more: float | bool) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=64,
        **more,
    )
    return lively(vae, 1)


def flags(files: dict[str, object]) -> list[str]:
    """Return a command line's flags for the fields of a preset."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in files.items()]


def new_base() -> StableDiffusionXLPipeline:
    tokenizer, text = new_tokenizer(), new_text_config()
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    return StableDiffusionXLPipeline(
        vae=new_vae(latent_channels=4, scaling_factor=0.13025),
        text_encoder=lively(CLIPTextModel(text), 2),
        text_encoder_2=lively(CLIPTextModelWithProjection(text), 3),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=new_unet(4),
        scheduler=scheduler,
    )


def new_resampler(seed: int) -> dict[str, torch.Tensor]:
    resampler = Resampler(48, 64, tokens=4, width=64, depth=2, heads=1)
    return lively(resampler, seed).state_dict()


def write_release(folder: Path) -> None:
    new_base().save_pretrained(folder / "base")
    new_unet(5).save_pretrained(folder / "dpo" / "unet")
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=64,
        image_size=224,
        patch_size=56,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=16,
    )
    encoder = lively(CLIPVisionModelWithProjection(vision), 6)
    encoder.save_pretrained(folder / "image_encoder")
    # The published file is old and holds a buffer that today's class does not have.
    positions = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    torch.save(encoder.state_dict() | positions, folder / "image_encoder" / "pytorch_model.bin")
    (folder / "image_encoder" / "model.safetensors").unlink()

    resampler, branch = new_resampler(7), lively(new_branch(new_unet(4)), 8).state_dict()
    torch.save(resampler, folder / "resampler.pth")
    adapters = {
        "other": {"image_proj": new_resampler(9), "ip_adapter": branch},
        "whole": {"image_proj": resampler, "ip_adapter": branch},
        "half": {"ip_adapter": branch},
    }
    for name, adapter in adapters.items():
        torch.save(adapter, folder / f"ip-adapter-{name}.bin")
    flat = {}
    for part, state in adapters["whole"].items():
        flat |= {f"{part}.{key}": value for key, value in state.items()}
    save_file(flat, folder / "ip-adapter.safetensors")

    llava = LlavaConfig.from_pretrained(TWINS / "llava-stock")
    lively(LlavaForConditionalGeneration(llava), 10).save_pretrained(folder / "llava")
    LlavaProcessor.from_pretrained(TWINS / "llava-stock").save_pretrained(folder / "llava")
    aligner = lively(ImplicitAligner(64, llava.text_config.hidden_size, depth=2, heads=1), 11)
    prefixed = {f"module.{key}": value for key, value in aligner.state_dict().items()}
    torch.save(prefixed, folder / "aligner_sdxl.pth")
    aligner.save(folder / "aligner.safetensors")


def diffusers_adapter(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Read the IP-Adapter for diffusers' own `load_ip_adapter`."""
    adapter = torch.load(folder / "ip-adapter-whole.bin", weights_only=True)
    # It takes any Resampler for one of four layers: two more that do nothing.
    for key, value in list(adapter["image_proj"].items()):
        for i in (2, 3):
            adapter["image_proj"].setdefault(key.replace("layers.0.", f"layers.{i}."), value * 0)
    return adapter


def locations(folder: Path) -> dict[str, str]:
    """Return the fields of a preset that name these files."""
    names = {
        "base": "base",
        "image_encoder": "image_encoder",
        "ip_adapter": "ip-adapter-other.bin",
        "resampler": "resampler.pth",
        "mllm": "llava",
        "aligner": "aligner_sdxl.pth",
    }
    return {name: str(folder / path) for name, path in names.items()}


def preset(folder: Path, **more: object) -> Preset:
    """Return SDXL's preset for these files, with two steps."""
    return find_preset("sdxl").changed(**(locations(folder) | {"steps": 2} | more))


def command(monkeypatch, folder: Path, *arguments: object, **changed: object) -> None:
    """Set a command line that draws with these files."""
    given = {"model": "sdxl", "prompt": PROMPT, "steps": 2, **locations(folder), **changed}
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags(given), *map(str, arguments)])
