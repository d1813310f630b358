"""Flags that commands share: where models are, how to compute, how to draw. They change one number of a preset each."""

from dataclasses import dataclass, fields, replace
from typing import Any

from img_minimal.presets import Preset, find_preset, with_overrides
from img_minimal.runtime.cli import check, option

LIMITS = (("steps", 1, 10_000), ("passes", 1, 100), ("height", 1, 8192), ("width", 1, 8192), ("scale", 0, 1000),
          ("scale_end", 0, 1000), ("guidance_scale", 0, 1000))  # fmt: skip


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
    guidance_scale: float | None = option(None, "of classifier-free guidance; default: the preset's")
    negative_prompt: str | None = option(None, "what not to draw; default: zeros for SDXL, the empty prompt for FLUX")
    passes: int | None = option(None, "applications of the aligner; default: the preset's")
    scale: float | None = option(None, "weight of the aligned image tokens; default: the preset's")
    scale_end: float | None = option(None, "share of it that is left at the last step; default: the preset's")
    height: int | None = option(None, "of the images in pixels; default: the model's own size")
    width: int | None = option(None, "of the images in pixels; default: the model's own size")

    def applied_to(self, preset: Preset) -> Preset:
        """The preset with what these flags change. Raises UserError for numbers that cannot be."""
        for name, least, most in LIMITS:
            value = getattr(self, name)
            fits = value is None or least <= value <= most
            check(fits, f"--{name.replace('_', '-')} is {value}, expected {least} to {most:,}")
        return with_overrides(
            super().applied_to(preset),
            aligner=self.aligner,
            sampling_steps=self.steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            passes=self.passes,
            scale=self.scale,
            scale_end=self.scale_end,
            height=self.height,
            width=self.width,
        )


def chosen_preset(config: Any) -> Preset:
    """The preset with what the command line of train.py changes. Raises UserError for values that cannot be."""
    preset = config.applied_to(find_preset(config.model))
    names = "pairs max_pairs triplets cache_dir save_every preference_weight norm round_steps round_prompts"
    preset = with_overrides(preset, **{name: getattr(config, name) for name in names.split()})
    both = dict(batch_size=config.batch_size, lr=config.lr, save_every=config.save_every)
    if config.stage == "mllm":
        preset = replace(preset, stock_mllm=config.mllm or preset.stock_mllm)
        preset = replace(preset, finetuning=with_overrides(preset.finetuning, steps=config.steps, **both))
        steps, batch_size, save_every = (getattr(preset.finetuning, n) for n in ("steps", "batch_size", "save_every"))
    else:
        preset = with_overrides(preset, train_steps=config.steps, **both)
        steps, batch_size, save_every = preset.train_steps, preset.batch_size, preset.save_every
    at_least_one = {"steps": steps, "batch-size": batch_size, "save-every": save_every}
    for name, value in (at_least_one | {"refresh-after": config.refresh_after}).items():
        check(value > 0, f"--{name} is {value}, expected 1 or more")
    rate = preset.finetuning.lr if config.stage == "mllm" else preset.lr
    check(rate > 0, f"--lr is {rate}, expected more than 0")
    weight = preset.preference_weight
    check(weight >= 0, f"--preference-weight is {weight}, expected 0 or more")
    check(preset.max_pairs >= 0, f"--max-pairs is {preset.max_pairs}, expected 0 (all) or more")
    check(config.seed >= 0, f"--seed is {config.seed}, expected 0 or more")
    check(config.rounds > 0, f"--rounds is {config.rounds}, expected 1 or more")
    for name in ("round_steps", "round_prompts"):
        check(getattr(preset, name) > 0, f"--{name.replace('_', '-')} is {getattr(preset, name)}, expected 1 or more")
    check(config.replay >= 0, f"--replay is {config.replay}, expected 0 to 1")
    check(not config.shard or preset.cache_dir != "none", "--shard computes a cache: give --cache-dir a folder")
    fp16 = config.stage == "mllm" and preset.dtype == "fp16"
    check(not fp16, "--stage mllm cannot train with --dtype fp16, whose gradients vanish; choose bf16")
    check(config.cache_gb > 0, f"--cache-gb is {config.cache_gb}, expected more than 0; --cache-dir none for no cache")
    return preset


def share_of(shard: str) -> tuple[int, int]:
    """ "3/16" -> (3, 16). Raises UserError for anything else."""
    words = shard.split("/")
    fits = len(words) == 2 and all(word.isdecimal() and len(word) < 8 for word in words)
    check(
        fits and int(words[0]) < int(words[1]), f"--shard is {shard!r}, expected i/n with i from 0 to n - 1, as in 0/8"
    )
    return int(words[0]), int(words[1])
