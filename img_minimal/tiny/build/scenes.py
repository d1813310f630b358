"""The base model's training data: scenes as latents, vision features and captions, computed once."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from img_minimal.tiny.build.loop import autocast
from img_minimal.tiny.build.vae import random_pictures


def build(workdir: Path, target: Path, count: int = 48_000) -> None:
    """Write `workdir/scenes.pt`: latents (N, 4, 8, 8), features (N, 65, 128), caption number (N,), captions."""
    vae = AutoencoderKL.from_pretrained(target / "sdxl/vae")
    vision = CLIPVisionModelWithProjection.from_pretrained(target / "image_encoder", dtype=torch.float32)
    prompts, pictures = random_pictures(count, seed=21)
    latents, features = [], []
    with torch.no_grad(), autocast():
        for part in tqdm(pictures.split(250), desc="scenes"):
            x = part.float() / 127.5 - 1
            latents.append((vae.encode(x).latent_dist.mode() * vae.config.scaling_factor).half())
            features.append(vision(x, output_hidden_states=True).hidden_states[-2].bfloat16())
    captions = sorted({str(p) for p in prompts})
    number = {caption: k for k, caption in enumerate(captions)}
    torch.save(
        {
            "latents": torch.cat(latents),
            "features": torch.cat(features),
            "caption": torch.tensor([number[str(p)] for p in prompts]),
            "captions": captions,
        },
        workdir / "scenes.pt",
    )


@torch.no_grad()
def encode_text(target: Path, captions: list[str]) -> tuple[Tensor, Tensor]:
    """What SDXL's UNet reads: both encoders' penultimate states (B, 16, 128) and the second's embedding (B, 128)."""
    states, pooled = [], None
    for folder, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        tokenizer = CLIPTokenizer.from_pretrained(target / f"sdxl/tokenizer{folder}")
        encoder = kind.from_pretrained(target / f"sdxl/text_encoder{folder}", dtype=torch.float32)
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        out = [encoder(part, output_hidden_states=True) for part in tokens.split(1000)]
        states.append(torch.cat([o.hidden_states[-2] for o in out]))
        pooled = torch.cat([o[0] for o in out])
    return torch.cat(states, dim=-1), pooled
