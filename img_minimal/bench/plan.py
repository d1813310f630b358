"""Estimate what a training run takes before models are loaded: memory, bytes per sample, disk.

Counted from the models' settings alone (a config.json each) on PyTorch's meta device, so it takes
seconds and downloads next to nothing.
"""

import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from img_minimal.aligner import ImplicitAligner
from img_minimal.backbone import backbone_class
from img_minimal.cli import check
from img_minimal.detector import mark_trainable
from img_minimal.devices import Precision, best_device, count_parameters
from img_minimal.hub.mllms import mllm_config, read_settings
from img_minimal.hub.weights import opening
from img_minimal.presets import Models, Preset

TEXT_STATES = {"sdxl": 77, "flux": 512}  # of a prompt, as guidance by text
# Parameters and the tokens' (N, D) of the public adapters' heads, until these are downloaded.
PUBLIC_HEADS = {"sdxl": (82_961_664, (16, 2048)), "flux": (12_607_488, (4, 4096))}
QUESTION = 64  # tokens that question and prompt take, about
# Image tokens of an MLLM that sees images at their own size (as Qwen2.5-VL), at 1024 x 1024.
NATIVE_PATCHES = 1369


def aligner_plan(preset: Preset, guidance: str, folder: Path, cache_gb: float) -> str:
    """Describe a run of `--stage aligner` that writes to `folder`.

    Raises UserError if a model's settings cannot be read or the disk is too small.
    """
    models, data, training = preset.models, preset.data, preset.training
    precision = Precision.named(models.dtype, best_device())
    settings = read_settings(models.image_encoder, "--image-encoder")
    with opening(models.image_encoder, "CLIP vision model"), torch.device("meta"):
        config = CLIPVisionConfig(**settings.get("vision_config", settings))
        encoder = count_parameters(CLIPVisionModelWithProjection(config))
    encoder_bytes = encoder * precision.weights.itemsize
    head, (tokens, width) = image_tokens(preset.backbone, models)
    costs = [
        ("image encoder", encoder, encoder_bytes, models.image_encoder),
        ("image tokens", head, head * 4, models.resampler or models.ip_adapter),
    ]
    if guidance == "text":
        length, guidance_width = TEXT_STATES[preset.backbone], width
        rest = f"and the whole of {models.base}, for its text encoders"
    else:
        location = preset.guide(guidance)
        mllm = build_mllm(location)
        guidance_width = mllm.config.get_text_config().hidden_size
        length = QUESTION + NATIVE_PATCHES
        if mllm.config.model_type == "llava":
            vision = mllm.config.vision_config
            length = QUESTION + (vision.image_size // vision.patch_size) ** 2
        rest = "nothing that draws"
        count = count_parameters(mllm)
        costs.insert(0, ("MLLM", count, count * precision.mllm.itemsize, location))
    sizes = training.depth, training.heads, training.head_dim
    with torch.device("meta"):
        aligner = count_parameters(ImplicitAligner(width, guidance_width, *sizes))
    note = "fp32 weights, reference, gradients, two moments (Muon has one)"
    costs.append(("aligner", aligner, aligner * 20, note))
    checkpoint, saved = aligner * 16, aligner * 4
    check_disk(folder, 2 * checkpoint + saved)  # a new checkpoint is whole before the old one goes

    guidance_bytes = length * (2 * guidance_width + 1)  # bf16 and a mask
    token_bytes = 2 * tokens * width * 4  # of loser and winner
    sample = guidance_bytes + token_bytes
    pairs = f"{data.max_pairs:,} pairs" if data.max_pairs else "all pairs"
    if data.cache_dir == "none":
        held = "all of them"
        if training.chunk:
            held = f"two chunks of {training.chunk} pairs, {short(2 * training.chunk * sample)}"
        kept = f", streamed; features of {held} in memory, none on disk"
    else:
        room = int(cache_gb * 1e9 / sample / (1 + data.identity_share))
        kept = f"; features in {data.cache_dir}, at most {cache_gb:g} GB ({room:,} pairs)"
    return (
        f"plan: an aligner for {preset.name}, {training.steps:,} steps of {training.batch_size}\n"
        f"{describe_costs(costs)}; {rest}\n"
        f"  a sample: {short(guidance_bytes)} guidance (about {length} x {guidance_width}, bf16) + "
        f"{short(token_bytes)} tokens\n"
        f"  data: {pairs} of {data.pairs}{kept}\n"
        f"  on disk: {folder}/checkpoint.pt {short(checkpoint)}, aligner.safetensors {short(saved)}"
    )


def mllm_plan(preset: Preset, folder: Path) -> str:
    """Describe a run of `--stage mllm` that writes to `folder`.

    Raises UserError if the model's settings cannot be read or the disk is too small.
    """
    settings, location = preset.finetuning, preset.models.stock_mllm
    precision = Precision.named(preset.models.dtype, best_device())
    model = build_mllm(location)
    count = count_parameters(model)
    mark_trainable(model, settings.lora_rank)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what, learned_bytes = "all but the vision encoder", learned * 12
    if settings.lora_rank:
        what, learned_bytes = f"LoRA of rank {settings.lora_rank}", learned * 16
    note = f"{what}: fp32 gradients and two moments (Muon has one)"
    costs = [
        ("MLLM", count, count * precision.mllm.itemsize, location),
        ("learned", learned, learned_bytes, note),
    ]
    checkpoint, saved = learned * 12, count * 2
    check_disk(folder, 2 * (checkpoint + saved))
    return (
        f"plan: a detector from {location}, {settings.steps:,} steps of {settings.batch_size}\n"
        f"{describe_costs(costs)}\n"
        f"  data: {preset.data.triplets}, streamed, {settings.chunk or 'all'} triplets at a time\n"
        f"  on disk: {folder}/checkpoint.pt {short(checkpoint)}, {folder}/mllm/ {short(saved)}"
    )


def image_tokens(backbone: str, models: Models) -> tuple[int, tuple[int, int]]:
    """Count the parameters of the adapter's head; also return the tokens' (N, D).

    Raises UserError if the adapter is damaged or of another kind.
    """
    files = models.ip_adapter, models.resampler or models.ip_adapter
    if not all(Path(path).is_file() for path in files):
        return PUBLIC_HEADS[backbone]
    with opening(models.ip_adapter, "IP-Adapter of this model"):
        return backbone_class(backbone).image_prompts.head_size(models)


def build_mllm(location: str) -> PreTrainedModel:
    """Build an MLLM without weights, from its config.json.

    Raises UserError if that cannot be read or is another kind of model's.
    """
    config = mllm_config(location)
    with opening(location, "multimodal LLM"), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def describe_costs(costs: list[tuple[str, int, int, str]]) -> str:
    """List each model's name, parameters, bytes and a note, and the sum of the bytes."""
    lines, total = [], 0
    for name, count, size, note in costs:
        lines.append(f"  {name:14} {short(count, ''):>8} parameters {short(size):>9}   {note}")
        total += size
    lines.append(f"  {'in memory':34} {short(total):>9}   and activations")
    return "\n".join(lines)


def short(number: float, unit: str = "B") -> str:
    """Shorten bytes, 1234567 -> "1.23 MB", or with unit "" a count, 1234567 -> "1.23 M"."""
    for scale, prefix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "K")):
        if number >= scale:
            return f"{number / scale:.3g} {prefix}{unit}"
    return f"{number:.0f} {unit}".strip()


def check_disk(folder: Path, needed: int) -> None:
    """Raise UserError if the folder's disk has less than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    message = f"{short(free)} are free there, the run writes {short(needed)}"
    check(free >= needed, f"{folder}: {message}; choose another folder")
