"""What a training run will cost, printed before a model is loaded: memory, bytes a sample, files.

Counted from the models' settings alone (a config.json each), so it takes seconds and downloads next to nothing.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from img_minimal.aligner import ImplicitAligner
from img_minimal.backbone import true_size
from img_minimal.cli import UserError
from img_minimal.detector import prepare
from img_minimal.devices import Precision, best_device, parameters
from img_minimal.hub.mllms import find_family, is_original, read_settings, transformers_config
from img_minimal.hub.weights import opening
from img_minimal.presets import Preset

TEXT_TOKENS = 64  # about what question and prompt take, beside the image's tokens
NATIVE_TOKENS = 1369  # of an image of 1024 x 1024 for MLLMs that see images at their own size (Qwen2.5-VL)


@dataclass(frozen=True)
class Cost:
    """A model of a run: how many parameters, and what they take in memory while it trains."""

    name: str
    parameters: int
    bytes: int
    note: str

    def __str__(self) -> str:
        return f"  {self.name:14} {amount(self.parameters):>8} parameters {size(self.bytes):>9}   {self.note}"


def mllm_model(location: str) -> PreTrainedModel:
    """An MLLM by its config.json, on the meta device. Raises UserError if it cannot be had or is of no known kind."""
    settings = read_settings(location, "--mllm")
    find_family(settings, location)
    with opening(location, "multimodal LLM"), torch.device("meta"):
        config = transformers_config(settings, location) if is_original(settings) else AutoConfig.for_model(**settings)
        return AutoModelForImageTextToText.from_config(config)


def mllm_sizes(location: str) -> tuple[int, int, int]:
    """Parameters, width H, and length L of a sequence, of an MLLM by its config.json."""
    model = mllm_model(location)
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 if hasattr(vision, "image_size") else NATIVE_TOKENS
    return parameters(model), model.config.text_config.hidden_size, patches + TEXT_TOKENS


def aligner_plan(preset: Preset, guidance: str, folder: Path, cache_gb: float) -> str:
    """The plan of `--stage aligner`. Raises UserError if settings cannot be read or the disk is too small."""
    precision = Precision.named(preset.dtype, best_device())
    with opening(preset.image_encoder, "CLIP vision model"):
        encoder, resampler, (tokens, width) = true_size(preset.backbone).tokenizer_sizes(preset)
    costs = [Cost("image encoder", encoder, encoder * precision.weights.itemsize, preset.image_encoder),
             Cost("image tokens", resampler, resampler * 4, preset.resampler or preset.ip_adapter)]  # fmt: skip
    if guidance == "text":
        length = true_size(preset.backbone).TEXT_LENGTH
        height, without = width, f"and the whole of {preset.base}, for its text encoders"
    else:
        location = preset.guide(guidance)
        number, height, length = mllm_sizes(location)
        costs.insert(0, Cost("MLLM", number, number * precision.mllm.itemsize, location))
        without = "nothing that draws"
    with torch.device("meta"):
        aligner = parameters(ImplicitAligner(width, height, preset.depth, preset.heads, preset.head_dim))
    note = "fp32 weights, reference, gradients, two moments (Muon has one)"
    costs.append(Cost("aligner", aligner, aligner * 20, note))
    guidance_bytes, token_bytes = length * (2 * height + 1), 2 * 4 * tokens * width
    check_disk(folder, aligner * (2 * 16 + 4))  # a checkpoint is replaced by a whole new one
    return "\n".join([
        f"plan: an aligner for {preset.name}, {preset.train_steps:,} steps of {preset.batch_size}",
        *map(str, costs),
        f"  {'in memory':14} {'':>8}            {size(sum(c.bytes for c in costs)):>9}   and activations; {without}",
        f"  a sample: {size(guidance_bytes)} guidance (about {length} x {height}, bf16) + {size(token_bytes)} tokens",
        data_plan(preset, guidance_bytes + token_bytes, cache_gb),
        f"  on disk: {folder}/checkpoint.pt {size(aligner * 16)}, aligner.safetensors {size(aligner * 4)}",
    ])  # fmt: skip


def data_plan(preset: Preset, sample: int, cache_gb: float) -> str:
    """Which pairs, and where their features of `sample` bytes each are kept."""
    pairs = f"{preset.max_pairs:,} pairs" if preset.max_pairs else "all pairs"
    if preset.cache_dir == "none":
        held = f"two chunks of {preset.chunk_pairs} pairs, {size(2 * preset.chunk_pairs * sample)}"
        held = held if preset.chunk_pairs else "all of them"
        return f"  data: {pairs} of {preset.pairs}, streamed; features of {held} in memory, none on disk"
    room = int(cache_gb * 1e9 / sample / (1 + preset.identity_share))
    return (
        f"  data: {pairs} of {preset.pairs}; features in {preset.cache_dir}, at most {cache_gb:g} GB ({room:,} pairs)"
    )


def mllm_plan(preset: Preset, folder: Path) -> str:
    """The plan of `--stage mllm`. Raises UserError if settings cannot be read or the disk is too small."""
    settings, precision = preset.finetuning, Precision.named(preset.dtype, best_device())
    model = mllm_model(preset.stock_mllm)
    number = parameters(model)
    prepare(model, settings.lora_rank)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    how = f"LoRA of rank {settings.lora_rank}" if settings.lora_rank else "all but the vision encoder"
    added = learned if settings.lora_rank else 0
    costs = [
        Cost("MLLM", number, number * precision.mllm.itemsize, preset.stock_mllm),
        Cost("learned", learned, learned * 12 + added * 4, f"{how}: fp32 gradients and two moments (Muon has one)"),
    ]
    disk = {"checkpoint.pt": learned * 12, "mllm/": number * 2}
    check_disk(folder, 2 * sum(disk.values()))
    return "\n".join([
        f"plan: a detector from {preset.stock_mllm}, {settings.steps:,} steps of {settings.batch_size}",
        *map(str, costs),
        f"  {'in memory':14} {'':>8}            {size(sum(c.bytes for c in costs)):>9}   and activations",
        f"  data: {preset.triplets}, streamed, {settings.chunk or 'all'} triplets at a time",
        "  on disk: " + ", ".join(f"{folder}/{name} {size(value)}" for name, value in disk.items()),
    ])  # fmt: skip


def check_disk(folder: Path, needed: int) -> None:
    """Raises UserError if less than that is free where the folder is."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: {size(free)} are free there, the run writes {size(needed)}; choose another folder")


def amount(number: int) -> str:
    """1234567 -> "1.23 M"."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)


def size(number: float) -> str:
    """Bytes -> "6.55 MB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f} B"
