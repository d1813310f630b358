"""IMG from end to end (Fig. 2): draw, look, align, draw again with the same seed.

    prompt --SDXL--> image --MLLM--> h  \\
                       |                 aligner --> tokens --SDXL, same prompt and seed--> better image
                       +--CLIP, Resampler--> c_l /
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from diffusers import StableDiffusionXLPipeline
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from img_minimal.aligner import ImplicitAligner
from img_minimal.diffusion import draw
from img_minimal.errors import UserError
from img_minimal.image_prompt import ImagePrompt, load_ip_adapter
from img_minimal.images import to_pil
from img_minimal.injection import ImageBranch
from img_minimal.mllm import MLLM
from img_minimal.presets import Preset
from img_minimal.weights import fill


def best_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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

    @classmethod
    def from_preset(cls, preset: Preset) -> Self:
        """Load base model, vision encoder and IP-Adapter. Raises UserError or OSError if a file is missing or wrong."""
        device = best_device()
        pipe = StableDiffusionXLPipeline.from_pretrained(_folder(preset.base), dtype=torch.float32).to(device)
        pipe.set_progress_bar_config(disable=True)
        image_proj, ip_adapter = load_ip_adapter(preset.ip_adapter)
        branch = ImageBranch.for_unet(pipe.unet, token_width=next(iter(ip_adapter.values())).shape[1])
        fill(branch, {key: value.to(pipe.unet.dtype) for key, value in ip_adapter.items()}, preset.ip_adapter)
        image_proj = {key: value.float() for key, value in image_proj.items()}
        image_prompt = ImagePrompt.from_pretrained(_folder(preset.image_encoder), image_proj)
        image_prompt = image_prompt.to(device, torch.float32)
        return cls(pipe, branch.requires_grad_(False), image_prompt.requires_grad_(False), preset)

    def draw(
        self,
        prompts: list[str],
        seeds: list[int],
        tokens: Tensor | None = None,
        scale: float | None = None,
        progress: str | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]; with `tokens` (B, N, D) as image prompt, at the preset's scale or another."""
        scale = 0.0 if tokens is None else self.preset.scale if scale is None else scale
        negative = self.image_prompt.negative() if scale else None
        return draw(
            self.pipe, prompts, seeds, steps=self.preset.sampling_steps, guidance_scale=self.preset.guidance_scale,
            branch=self.branch, tokens=tokens, negative=negative, scale=scale, progress=progress,
        )  # fmt: skip

    def tokens(self, images: list[Image], batch_size: int = 250, progress: str | None = None) -> Tensor:
        """Image tokens (B, N, D) of images."""
        starts = tqdm(range(0, len(images), batch_size), desc=progress, disable=progress is None, leave=False)
        return torch.cat([self.image_prompt.tokens(images[k : k + batch_size]).cpu() for k in starts])

    @torch.no_grad()
    def guidance(self, images: list[Image], prompts: list[str], rng: random.Random) -> tuple[Tensor, Tensor]:
        """Text embeddings in the place of an MLLM's features: the "text" row of the paper's Table 5."""
        states = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0].float()
        return states, torch.ones(states.shape[:2], dtype=torch.bool)

    @property
    def width(self) -> int:
        """Width of the text embeddings."""
        return self.pipe.unet.config.cross_attention_dim


def look(
    guide: Guidance,
    images: list[Image],
    prompts: list[str],
    seed: int,
    batch_size: int = 64,
    progress: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Guidance features of many images in batches: h (B, L, H) in bf16 and mask (B, L), padded to the longest."""
    rng, features, masks = random.Random(seed), [], []
    for k in tqdm(range(0, len(images), batch_size), desc=progress, disable=progress is None, leave=False):
        h, mask = guide.guidance(images[k : k + batch_size], prompts[k : k + batch_size], rng)
        features.append(h.to("cpu", torch.bfloat16))
        masks.append(mask.cpu())
    length = max(mask.shape[1] for mask in masks)
    pad = torch.nn.functional.pad
    return (
        torch.cat([pad(h, (0, 0, 0, length - h.shape[1])) for h in features]),
        torch.cat([pad(mask, (0, length - mask.shape[1])) for mask in masks]),
    )


@torch.no_grad()
def align(
    aligner: ImplicitAligner, tokens: Tensor, features: Tensor, mask: Tensor, passes: int, batch_size: int = 250
) -> Tensor:
    """f applied `passes` times in fp32, in batches: (B, N, D) -> (B, N, D). Raises UserError on a wrong MLLM or NaN."""
    device, aligned = next(aligner.parameters()).device, []
    try:
        for part in zip(features.split(batch_size), tokens.split(batch_size), mask.split(batch_size)):
            h, c, m = (x.to(device) for x in part)
            aligned.append(aligner(h.float(), c, m, passes).cpu())
    except ValueError as error:
        raise UserError(str(error)) from None
    aligned = torch.cat(aligned)
    broken = (~aligned.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise UserError(
            f"the aligned features of image {broken[0]} are not finite; check the MLLM's and aligner's files"
        )
    return aligned


class IMG:
    """The whole method: `IMG.from_preset(find_preset("tiny-sdxl"))(["a red circle"], [0])`."""

    def __init__(self, painter: Painter, mllm: Guidance, aligner: ImplicitAligner):
        self.painter, self.mllm, self.aligner = painter, mllm, aligner.eval()

    @classmethod
    def from_preset(cls, preset: Preset, aligner: str | None = None) -> Self:
        """Load everything; `aligner` names another aligner file. Raises UserError or OSError as the parts do."""
        aligner = ImplicitAligner.from_file(aligner or preset.aligner)  # the cheapest first, so that typing errors are
        painter = Painter.from_preset(preset)
        mllm = MLLM.from_pretrained(_folder(preset.mllm), device=painter.pipe.device)
        return cls(painter, mllm, aligner.to(painter.pipe.device))

    def align(self, images: Tensor, prompts: list[str], seed: int, passes: int | None = None) -> Tensor:
        """Steps 2 and 3: images (B, 3, H, W) -> aligned tokens (B, N, D). `seed` draws the MLLM's questions."""
        pictures = to_pil(images)
        features, mask = look(self.mllm, pictures, prompts, seed)
        tokens = self.painter.tokens(pictures)
        return align(self.aligner, tokens, features, mask, passes or self.painter.preset.passes)

    def __call__(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        rounds: int = 1,
        passes: int | None = None,
        scale: float | None = None,
    ) -> list[Tensor]:
        """Initial images and those of each round, `rounds + 1` tensors (B, 3, H, W) in [0, 1].

        Every round looks at the latest images and draws again from the same seeds.
        """
        images = [self.painter.draw(prompts, seeds)]
        for k in range(rounds):
            tokens = self.align(images[-1], prompts, seed=seeds[0] + k, passes=passes)
            images.append(self.painter.draw(prompts, seeds, tokens, scale))
        return images


def _folder(path: str) -> str:
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise UserError(
            f"{path}: no such folder; the twins come with the repository, or: python -m img_minimal.tiny.build"
        )
    return path
