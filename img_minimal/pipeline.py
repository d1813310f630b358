"""IMG from end to end (Fig. 2): draw, look, align, draw again with the same seed.

    prompt --SDXL--> image --MLLM--> h  \\
                       |                 aligner --> tokens --SDXL, same prompt and seed--> better image
                       +--CLIP, Resampler--> c_l /
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm import tqdm

from img_minimal.aligner import ImplicitAligner
from img_minimal.diffusion import draw
from img_minimal.errors import UserError
from img_minimal.image_prompt import ImagePrompt, load_ip_adapter
from img_minimal.images import to_pil
from img_minimal.injection import ImageBranch
from img_minimal.mllm import MLLM, announced_width
from img_minimal.models.devices import Placement, Precision, best_device
from img_minimal.models.hub import fetch, variant
from img_minimal.models.weights import fill, opening
from img_minimal.presets import Preset, with_overrides


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
    return cat_padded(features), cat_padded(masks)


def cat_padded(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (B_i, L_i, ...) -> (sum of B_i, longest L, ...), padded with zeros after their own length."""
    length = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, 0) * (part.ndim - 2) + (0, length - part.shape[1])) for part in parts])


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
        painter.placement.add("aligner", aligner)
        if mllm is not painter:
            painter.placement.add("mllm", mllm.model)

    @classmethod
    def from_preset(cls, preset: Preset, aligner: str | None = None) -> Self:
        """Load everything; `aligner` names another aligner file.

        Locations and headers of all files are checked first, then that aligner, image prompt and MLLM belong
        together, and only then is anything big loaded. Raises UserError in one line.
        """
        precision = Precision.named(preset.dtype, best_device())
        names = ("aligner", "resampler", "ip_adapter", "image_encoder", "mllm", "unet", "base")
        preset = fetch(with_overrides(preset, aligner=aligner), names, precision.weights != torch.float32)
        aligner = ImplicitAligner.from_file(preset.aligner)
        adapter = load_ip_adapter(preset.ip_adapter, preset.resampler)
        width = adapter[0]["proj_out.weight"].shape[0] if "proj_out.weight" in adapter[0] else aligner.width
        if width != aligner.width:
            raise UserError(
                f"{preset.aligner}: made for image tokens of width {aligner.width}, but those of "
                f"{preset.resampler or preset.ip_adapter} have width {width}; use the files of one base model"
            )
        check_width(aligner, announced_width(preset.mllm), preset.mllm)
        bar = tqdm(total=4, desc="loading models", leave=False, delay=2)
        painter = Painter.from_preset(preset, adapter, bar.update)
        with opening(preset.mllm, "multimodal LLM"), bar:
            mllm = MLLM.from_pretrained(preset.mllm, dtype=precision.mllm, device=painter.placement.waiting)
        check_width(aligner, mllm.width, preset.mllm)
        return cls(painter, mllm, aligner)

    def align(self, images: Tensor, prompts: list[str], seed: int, passes: int | None = None) -> Tensor:
        """Steps 2 and 3: images (B, 3, H, W) -> aligned tokens (B, N, D). `seed` draws the MLLM's questions."""
        pictures, preset, placement = to_pil(images), self.painter.preset, self.painter.placement
        if self.mllm is not self.painter:
            placement.bring("mllm")
        features, mask = look(self.mllm, pictures, prompts, seed, preset.look_batch)
        tokens = self.painter.tokens(pictures)
        placement.bring("aligner")
        return align(self.aligner, tokens, features, mask, passes or preset.passes)

    def explain(self, images: list[Image], prompts: list[str], rng: random.Random) -> list[str]:
        """What the MLLM answers in words; needed by people, not by the method."""
        self.painter.placement.bring("mllm")
        return self.mllm.explain(images, prompts, rng)

    def __call__(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        rounds: int = 1,
        passes: int | None = None,
        scale: float | None = None,
        progress: bool = False,
    ) -> list[Tensor]:
        """Initial images and those of each round, `rounds + 1` tensors (B, 3, H, W) in [0, 1].

        Every round looks at the latest images and draws again from the same seeds.
        """
        images = [self.painter.draw(prompts, seeds, progress="initial" if progress else None)]
        for k in range(rounds):
            tokens = self.align(images[-1], prompts, seed=seeds[0] + k, passes=passes)
            title = f"round {k + 1}" if progress else None
            images.append(self.painter.draw(prompts, seeds, tokens, scale, title))
        return images


def check_width(aligner: ImplicitAligner, width: int | None, mllm: str) -> None:
    """Raises UserError if the aligner was trained for guidance features of another width."""
    if width not in (None, aligner.guidance_width):
        raise UserError(
            f"this aligner was trained for an MLLM of width {aligner.guidance_width}, {mllm} has width {width}: use "
            "the MLLM it was trained with (5120: LLaVA-1.5-13B, 4096: LLaVA-1.5-7B), or train an aligner for this one"
        )
