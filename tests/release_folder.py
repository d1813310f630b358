"""What a user has after the downloads: folders and files of the same names and layouts as the real ones, only small."""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
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
from img_minimal.sdxl import Resampler
from img_minimal.sdxl import ImageBranch
from img_minimal.presets import TINY, Preset, find_preset, with_overrides

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
    """Weights large enough that every part shows in the result, also those that are usually initialised to zero."""
    noise = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=noise) * (0.1 if p.ndim == 1 else 0.7 / p[0].numel() ** 0.5)
        if p.ndim == 1:
            p.data += 0.5
    return module.eval()


def new_unet(seed: int) -> UNet2DConditionModel:
    return lively(UNet2DConditionModel(**UNET), seed)


def new_base() -> StableDiffusionXLPipeline:
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "sdxl" / "tokenizer", model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, projection_dim=24, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, sample_size=64, scaling_factor=0.13025,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return StableDiffusionXLPipeline(
        vae=lively(vae, 1), text_encoder=lively(CLIPTextModel(text), 2),
        text_encoder_2=lively(CLIPTextModelWithProjection(text), 3), tokenizer=tokenizer, tokenizer_2=tokenizer,
        unet=new_unet(4), scheduler=scheduler,
    )  # fmt: skip


def write_release(folder: Path) -> None:
    """What a user has after the downloads, in files of the same names and layouts, only small."""
    new_base().save_pretrained(folder / "base")
    new_unet(5).save_pretrained(folder / "dpo" / "unet")
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=64, image_size=224, patch_size=56, num_hidden_layers=3,
        num_attention_heads=2, projection_dim=16,
    )  # fmt: skip
    encoder = lively(CLIPVisionModelWithProjection(vision), 6)
    encoder.save_pretrained(folder / "image_encoder")
    torch.save(  # the published file is old and holds a buffer that today's class does not have
        encoder.state_dict() | {"vision_model.embeddings.position_ids": torch.arange(17)[None]},
        folder / "image_encoder" / "pytorch_model.bin",
    )
    (folder / "image_encoder" / "model.safetensors").unlink()

    resampler = lively(Resampler(48, 64, tokens=4, width=64, depth=2, heads=1), 7).state_dict()
    branch = lively(ImageBranch.for_unet(new_unet(4)), 8).state_dict()
    other = lively(Resampler(48, 64, tokens=4, width=64, depth=2, heads=1), 9).state_dict()
    torch.save(resampler, folder / "resampler.pth")
    torch.save({"image_proj": other, "ip_adapter": branch}, folder / "ip-adapter-other.bin")
    torch.save({"image_proj": resampler, "ip_adapter": branch}, folder / "ip-adapter-whole.bin")
    torch.save({"ip_adapter": branch}, folder / "ip-adapter-half.bin")
    flat = {f"image_proj.{k}": v for k, v in resampler.items()} | {f"ip_adapter.{k}": v for k, v in branch.items()}
    save_file(flat, folder / "ip-adapter.safetensors")

    llava = LlavaConfig.from_pretrained(TINY / "llava-stock")
    lively(LlavaForConditionalGeneration(llava), 10).save_pretrained(folder / "llava")
    LlavaProcessor.from_pretrained(TINY / "llava-stock").save_pretrained(folder / "llava")
    aligner = lively(ImplicitAligner(64, llava.text_config.hidden_size, depth=2, heads=1), 11)
    torch.save({f"module.{k}": v for k, v in aligner.state_dict().items()}, folder / "aligner_sdxl.pth")
    aligner.save(folder / "aligner.safetensors")


def locations(folder: Path) -> dict[str, str]:
    names = {"base": "base", "image_encoder": "image_encoder", "ip_adapter": "ip-adapter-other.bin",
             "resampler": "resampler.pth", "mllm": "llava", "aligner": "aligner_sdxl.pth"}  # fmt: skip
    return {name: str(folder / path) for name, path in names.items()}


def preset(folder: Path, **more: object) -> Preset:
    return with_overrides(find_preset("sdxl"), **(locations(folder) | {"sampling_steps": 2} | more))


def command(monkeypatch, folder: Path, *arguments: object, **changed: object) -> None:
    flags = [f"--{name.replace('_', '-')}={path}" for name, path in (locations(folder) | changed).items()]
    line = ["sample.py", "--model=sdxl", f"--prompt={PROMPT}", "--steps=2", *flags, *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", line)
