"""Estimate what a training run takes before models are loaded: memory, bytes per sample, disk.

Counted from the models' settings alone (a config.json each) on PyTorch's meta device, so it takes
seconds and downloads next to nothing.
"""

import shutil
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from img_minimal.aligner import ImplicitAligner
from img_minimal.backbone import announced_head
from img_minimal.cli import check
from img_minimal.data.tables import DAMAGE, training_files
from img_minimal.detector import mark_trainable
from img_minimal.devices import Precision, best_device, count_parameters
from img_minimal.hub.mllms import mllm_config, read_settings
from img_minimal.hub.weights import opening
from img_minimal.presets import Data, Preset

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
        encoder = CLIPVisionModelWithProjection(config)
    size, location = precision.weights.itemsize, models.image_encoder
    costs = [("image encoder", count_parameters(encoder), size, location)]
    location = models.resampler or models.ip_adapter
    head, (tokens, width) = PUBLIC_HEADS[preset.backbone]
    if Path(models.ip_adapter).is_file() and Path(location).is_file():
        head, (tokens, width) = announced_head(preset.backbone, models)
    costs.append(("image tokens", head, 4, location))
    length, guidance_width = TEXT_STATES[preset.backbone], width
    drawing = f"the whole of {models.base}, for its text encoders"
    if guidance != "text":
        location, drawing = preset.guide(guidance), "nothing that draws"
        mllm = build_mllm(location)
        costs.append(("MLLM", count_parameters(mllm), precision.mllm.itemsize, location))
        guidance_width = mllm.config.get_text_config().hidden_size
        length = QUESTION + getattr(mllm.config, "image_seq_length", NATIVE_PATCHES)
    with torch.device("meta"):
        sizes = training.depth, training.heads, training.head_dim
        aligner = count_parameters(ImplicitAligner(width, guidance_width, *sizes))
    note = "fp32 weights, reference, gradients, two moments (Muon has one)"
    costs.append(("aligner", aligner, 20, note))

    guidance_bytes = length * (2 * guidance_width + 1)  # bf16 and a mask
    token_bytes = 2 * tokens * width * 4  # of loser and winner
    sample, pairs = guidance_bytes + token_bytes, count_pairs(data)
    held = short(2 * training.chunk * sample)
    kept = f"streamed; features of two chunks of {training.chunk} in memory, {held}, none on disk"
    if data.cache_dir != "none":
        room = int(cache_gb * 1e9 / sample / (1 + data.identity_share))
        kept = f"features in {data.cache_dir}, at most {cache_gb:g} GB ({room:,} pairs)"
        pairs = min(pairs, room)
    title = f"an aligner for {preset.name}, {training.steps:,} steps of {training.batch_size}"
    if pairs:
        title += f"; each pair is seen {training.steps * training.batch_size / pairs:,.1f} times"
    details = (
        f"a sample: {short(guidance_bytes)} guidance (about {length} x {guidance_width}, bf16) + "
        f"{short(token_bytes)} tokens\n"
        f"  data: {data.max_pairs or 'all'} pairs of {data.pairs}, {kept}"
    )
    files = {"checkpoint.pt": aligner * 16, "aligner.safetensors": aligner * 4}
    return describe(title, costs, f"{drawing}\n  {details}", folder, files)


def mllm_plan(preset: Preset, folder: Path) -> str:
    """Describe a run of `--stage mllm` that writes to `folder`.

    Raises UserError if the model's settings cannot be read or the disk is too small.
    """
    settings, location = preset.finetuning, preset.models.stock_mllm
    size = Precision.named(preset.models.dtype, best_device()).mllm.itemsize
    model = build_mllm(location)
    costs = [("MLLM", count_parameters(model), size, location)]
    mark_trainable(model, settings.lora_rank)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what, each = "all but the vision encoder", 12
    if settings.lora_rank:
        what, each = f"LoRA of rank {settings.lora_rank}, its weights", 16
    costs.append(("learned", learned, each, f"{what}, gradients, two moments in fp32"))
    title = f"a detector from {location}, {settings.steps:,} steps of {settings.batch_size}"
    chunk = f"{settings.chunk or 'all'} triplets at a time"
    details = f"nothing that draws\n  data: {preset.data.triplets}, streamed, {chunk}"
    files = {"checkpoint.pt": learned * 12, "mllm/": costs[0][1] * 2}
    return describe(title, costs, details, folder, files)


def describe(title: str, costs: list, details: str, folder: Path, files: dict[str, int]) -> str:
    """Format a plan; costs are name, parameters, bytes of each, and a note.

    Raises UserError if the folder's disk has no room for the files, twice: a new one is whole
    before the old one goes.
    """
    free, needed = shutil.disk_usage(folder).free, 2 * sum(files.values())
    message = f"{short(free)} are free there, the run writes {short(needed)}"
    check(free >= needed, f"{folder}: {message}; choose another folder")
    lines, total = [f"plan: {title}"], 0
    for name, count, each, note in costs:
        total += count * each
        count, size = tqdm.format_sizeof(count), short(count * each)
        lines.append(f"{name:14} {count:>6} parameters {size:>7}   {note}")
    lines.append(f"{'in memory':32} {short(total):>7}   and activations; {details}")
    sizes = [f"{folder}/{name} {short(size)}" for name, size in files.items()]
    return "\n  ".join([*lines, f"on disk: {', '.join(sizes)}"])


def build_mllm(location: str) -> PreTrainedModel:
    """Build an MLLM without weights, from its config.json.

    Raises UserError if that cannot be read or is another kind of model's.
    """
    config = mllm_config(location)
    with opening(location, "multimodal LLM"), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def count_pairs(data: Data) -> int:
    """Count the pairs to train on, by the flag or in local parquet files; 0 if it is not known."""
    rows = 0
    with suppress(*DAMAGE):  # or another format; what is damaged is told when it is read
        files = training_files(Path(data.pairs).expanduser())
        rows = sum(pq.read_metadata(file).num_rows for file in files)
    return min(filter(None, (data.max_pairs, rows)), default=0)


def short(size: float) -> str:
    """Shorten bytes: 1234567 -> "1.23MB"."""
    return tqdm.format_sizeof(size, "B")
