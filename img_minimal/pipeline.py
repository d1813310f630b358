"""IMG from end to end (Fig. 2): draw, look, align, draw again with the same seed.

    prompt --SDXL--> image --MLLM--> h  \\
                       |                 aligner --> tokens --SDXL, same prompt and seed--> better image
                       +--CLIP, Resampler--> c_l /
"""

import random
from collections.abc import Sequence
from typing import Self

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from img_minimal.aligner import ImplicitAligner
from img_minimal.errors import UserError
from img_minimal.image_prompt import load_ip_adapter
from img_minimal.images import to_pil
from img_minimal.mllm import announced_width
from img_minimal.models.devices import Precision, best_device
from img_minimal.models.hub import fetch
from img_minimal.painter import Guidance, Painter
from img_minimal.presets import Preset, with_overrides


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
        with bar:
            mllm = painter.guide("mllm")
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
