"""Flags that commands share: where models are, how to compute, how to draw. They change one number of a preset each."""

import math
from dataclasses import dataclass, fields

from img_minimal.presets import Preset, with_overrides
from img_minimal.runtime.cli import check, option


@dataclass
class ModelFlags:
    """Flags that every command shares: other locations than the preset's, and how to compute. Inherit to have them."""

    base: str | None = option(None, "base model: diffusers pipeline, folder or hub id; default: the preset's")
    unet: str | None = option(None, "UNet instead of the base's, e.g. mhdang/dpo-sdxl-text2image-v1/unet")
    image_encoder: str | None = option(None, "CLIP vision model, folder or hub id; default: the preset's")
    ip_adapter: str | None = option(None, "IP-Adapter file (.bin, .safetensors); default: the preset's")
    resampler: str | None = option(None, "file that replaces the adapter's Resampler; '' keeps the adapter's own")
    mllm: str | None = option(None, "LLaVA or other multimodal LLM, folder or hub id; default: the preset's")
    questions: str | None = option(None, "how the MLLM is asked: a JSON list of phrasings, {} where the prompt goes")
    dtype: str | None = option(
        None, "precision of the big models; default: by device", choices=["fp32", "bf16", "fp16", "mixed"]
    )
    offload: bool = option(False, "keep one big model on the GPU at a time, the others in the computer's memory")

    def applied_to(self, preset: Preset) -> Preset:
        """The preset with what these flags change."""
        return with_overrides(preset, **{field.name: getattr(self, field.name) for field in fields(ModelFlags)})


@dataclass
class SamplingFlags(ModelFlags):
    """Flags of the commands that draw."""

    aligner: str | None = option(None, "aligner file, e.g. outputs/train/aligner.safetensors, or on the hub")
    steps: int | None = option(None, "denoising steps; default: the preset's")
    passes: int | None = option(None, "applications of the aligner; default: the preset's")
    scale: float | None = option(None, "weight of the aligned image tokens; default: the preset's")
    scale_end: float | None = option(None, "share of it that is left at the last step; default: the preset's")
    height: int | None = option(None, "of the images in pixels; default: the model's own size")
    width: int | None = option(None, "of the images in pixels; default: the model's own size")

    def applied_to(self, preset: Preset) -> Preset:
        """The preset with what these flags change. Raises UserError for numbers that cannot be."""
        for name in ("steps", "passes", "height", "width"):
            value = getattr(self, name)
            check(value is None or 1 <= value <= 100_000, f"--{name} is {value}, expected 1 to 100,000")
        for name in ("scale", "scale_end"):
            value = getattr(self, name)
            fits = value is None or (value >= 0 and math.isfinite(value))
            check(fits, f"--{name.replace('_', '-')} is {value}, expected 0 or more")
        return with_overrides(
            super().applied_to(preset),
            aligner=self.aligner,
            sampling_steps=self.steps,
            passes=self.passes,
            scale=self.scale,
            scale_end=self.scale_end,
            height=self.height,
            width=self.width,
        )
