"""Where the files of a preset are on this machine: local paths, downloaded where necessary."""

from collections.abc import Iterable
from dataclasses import replace

from img_minimal.aligner import ImplicitAligner
from img_minimal.files.hub import fetch_file, fetch_folder, on_hub
from img_minimal.presets import Preset
from img_minimal.runtime.devices import Precision, best_device
from img_minimal.runtime.errors import UserError

FILES = ("ip_adapter", "resampler", "aligner")  # the other locations are folders
TOKENIZER = ("ip_adapter", "resampler", "image_encoder")  # what turns images into tokens
BACKBONE = (*TOKENIZER, "unet", "base")


def fetch(preset: Preset, names: Iterable[str]) -> Preset:
    """The preset with the named locations (its fields) as local paths, downloaded where necessary.

    Half-precision files are preferred where a repository has both and the preset's dtype wants them. Raises UserError
    in one line if a location cannot be had, WeightsError if its files are damaged.
    """
    half = not Precision.named(preset.dtype, best_device()).fp32_weights
    flags = {name: "--" + name.replace("_", "-") for name in names if getattr(preset, name)}
    for name, flag in flags.items():
        on_hub(getattr(preset, name), flag)  # a mistyped local path shows before anything is downloaded
    found = {}
    for name, flag in flags.items():
        location = getattr(preset, name)
        if name in FILES:
            found[name] = str(fetch_file(location, flag))
        else:
            without = ("unet",) if name == "base" and preset.unet else ()
            found[name] = str(fetch_folder(location, flag, half, without))
    return replace(preset, **found)


def check_token_width(aligner: ImplicitAligner, width: int | None, preset: Preset) -> None:
    """Raises UserError if the aligner was trained for image tokens of another width."""
    if width not in (None, aligner.width):
        raise UserError(
            f"{preset.aligner}: made for image tokens of width {aligner.width}, but those of "
            f"{preset.resampler or preset.ip_adapter} have width {width}; use the files of one base model"
        )


def check_guidance_width(aligner: ImplicitAligner, width: int | None, mllm: str) -> None:
    """Raises UserError if the aligner was trained for guidance features of another width."""
    if width not in (None, aligner.guidance_width):
        raise UserError(
            f"this aligner was trained for an MLLM of width {aligner.guidance_width}, {mllm} has width {width}: use "
            "the MLLM it was trained with (5120: LLaVA-1.5-13B, 4096: LLaVA-1.5-7B), or train an aligner for this one"
        )
