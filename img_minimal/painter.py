"""The painter: a base model with its IP-Adapter, which draws from text alone or with image tokens beside it."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm

from img_minimal.diffusion import draw
from img_minimal.image_prompt import ImagePrompt, load_ip_adapter
from img_minimal.injection import ImageBranch
from img_minimal.mllm import MLLM
from img_minimal.models.devices import Placement, Precision, best_device
from img_minimal.models.hub import fetch, variant
from img_minimal.models.weights import fill, opening
from img_minimal.presets import Preset


class Guidance(Protocol):
    """What can tell the aligner about an image and its prompt: an MLLM, or (as a control) text embeddings."""

    width: int

    def guidance(self, images: list[Image], prompts: list[str], rng: random.Random) -> tuple[Tensor, Tensor]:
        """Features (B, L, width) and mask (B, L)."""


@dataclass
class Painter:
    """A base model that can draw from text alone or with image tokens, and turn images into tokens."""

    pipe: StableDiffusionXLPipeline
    branch: ImageBranch
    image_prompt: ImagePrompt
    preset: Preset
    precision: Precision
    placement: Placement

    @classmethod
    def from_preset(
        cls, preset: Preset, adapter: tuple[dict, dict] | None = None, loaded: Callable[[], object] = lambda: None
    ) -> Self:
        """Load base model, vision encoder and IP-Adapter, of which `adapter` may be what `load_ip_adapter` returned.

        The UNet is loaded once, from `preset.unet` if that is given, else from the base. `loaded` is called after each
        of three models. Raises UserError if a file is missing or wrong.
        """
        placement = Placement(best_device(), preset.offload)
        precision = Precision.named(preset.dtype, placement.device)
        half = precision.weights != torch.float32
        preset = fetch(preset, ("ip_adapter", "resampler", "image_encoder", "unet", "base"), half)
        image_proj, ip_adapter = adapter or load_ip_adapter(preset.ip_adapter, preset.resampler)
        image_prompt = ImagePrompt.from_pretrained(
            preset.image_encoder, image_proj, precision.weights, placement.waiting, precision.autocast
        )
        loaded()
        unet_folder = preset.unet or Path(preset.base) / "unet"
        kind = {"dtype": precision.weights, "variant": variant(unet_folder, precision.weights)}
        with opening(unet_folder, "UNet"):
            unet = UNet2DConditionModel.from_pretrained(unet_folder, **kind)
        loaded()
        branch = ImageBranch.for_unet(unet, token_width=next(iter(ip_adapter.values())).shape[1])
        fill(branch, {key: value.to(unet.dtype) for key, value in ip_adapter.items()}, preset.ip_adapter)
        kind = {
            "dtype": {"default": precision.weights, "vae": torch.float32},
            "variant": variant(preset.base, precision.weights),
        }
        with opening(preset.base, "SDXL pipeline"):
            pipe = StableDiffusionXLPipeline.from_pretrained(preset.base, unet=unet, add_watermarker=False, **kind)
        loaded()
        pipe.set_progress_bar_config(disable=True)
        placement.add("diffusion", *(m for m in pipe.components.values() if isinstance(m, nn.Module)), branch)
        placement.add("image_prompt", image_prompt)
        return cls(pipe, branch.requires_grad_(False), image_prompt, preset, precision, placement)

    def draw(
        self,
        prompts: list[str],
        seeds: list[int],
        tokens: Tensor | None = None,
        scale: float | None = None,
        progress: str | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]; with `tokens` (B, N, D) as image prompt, at the preset's scale or another."""
        scale, negative = 0.0 if tokens is None else self.preset.scale if scale is None else scale, None
        if scale:
            self.placement.bring("image_prompt")
            negative = self.image_prompt.negative()
        self.placement.bring("diffusion")
        return draw(
            self.pipe, prompts, seeds, steps=self.preset.sampling_steps, guidance_scale=self.preset.guidance_scale,
            branch=self.branch, tokens=tokens, negative=negative, scale=scale, scale_end=self.preset.scale_end,
            autocast=self.precision.autocast, batch_size=self.preset.draw_batch, progress=progress,
        )  # fmt: skip

    def tokens(self, images: list[Image], progress: str | None = None) -> Tensor:
        """Image tokens (B, N, D) of images."""
        self.placement.bring("image_prompt")
        batch_size = self.preset.encode_batch
        starts = tqdm(range(0, len(images), batch_size), desc=progress, disable=progress is None, leave=False)
        return torch.cat([self.image_prompt.tokens(images[k : k + batch_size]).cpu() for k in starts])

    @torch.no_grad()
    def guidance(self, images: list[Image], prompts: list[str], rng: random.Random) -> tuple[Tensor, Tensor]:
        """Text embeddings in the place of an MLLM's features: the "text" row of the paper's Table 5."""
        self.placement.bring("diffusion")
        states = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0].float()
        return states, torch.ones(states.shape[:2], dtype=torch.bool)

    @property
    def width(self) -> int:
        """Width of the text embeddings."""
        return self.pipe.unet.config.cross_attention_dim

    def guide(self, kind: str) -> Guidance:
        """What guides: the finetuned MLLM ("mllm"), the "stock" one, or the prompt's embedding ("text").

        An MLLM is loaded to where it waits for its turn. Raises UserError if its files are missing or wrong.
        """
        if kind == "text":
            return self
        path = self.preset.guide(kind)
        with opening(path, "multimodal LLM"):
            return MLLM.from_pretrained(path, self.precision.mllm, self.placement.waiting)
