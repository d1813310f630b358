"""The one place that opens models: from a preset, the names of things, to the things themselves.

Locations are resolved and the headers of all files checked before the first model is loaded, so that mistakes show
early and together. Everything else in this package is handed objects.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from tqdm import tqdm

from img_minimal.aligner import ImplicitAligner
from img_minimal.around import sampling_of
from img_minimal.backbones import Backbone, backbone_class
from img_minimal.data.cache import FeatureCache
from img_minimal.data.features import Encoder
from img_minimal.data.pairs import pair_stream
from img_minimal.data.sources import CachedData, StreamedData, cache_key
from img_minimal.files.mllm_layouts import announced_width
from img_minimal.files.weights import opening
from img_minimal.mllm import MLLM, Guide, TextGuidance
from img_minimal.pipeline import IMG
from img_minimal.places import BACKBONE, TOKENIZER, check_guidance_width, check_token_width, fetch
from img_minimal.presets import Preset, find_preset, with_overrides
from img_minimal.questions import find_questions
from img_minimal.runtime.cli import writable_folder
from img_minimal.runtime.devices import Placement, Precision, best_device, known_device
from img_minimal.runtime.ranks import ALONE, Ranks

NEXT_RANK = 1_000_000_007  # between the seeds of two processes' questions


def load_backbone(
    preset: Preset, placement: Placement | None = None, loaded: Callable[[], object] = lambda: None
) -> Backbone:
    """The base model with its image prompt; `loaded` is called after each of its models."""
    return _open_backbone(fetch(preset, BACKBONE), placement, loaded)


def _open_backbone(preset: Preset, placement: Placement | None, loaded: Callable[[], object]) -> Backbone:
    """The same, of a preset whose locations are local paths already."""
    placement = placement or Placement(best_device(), preset.offload)
    precision = Precision.named(preset.dtype, placement.device)
    return backbone_class(preset.backbone).open(preset, sampling_of(preset), precision, placement, loaded)


def load_guide(preset: Preset, kind: str, backbone: Backbone | None = None, device: str | None = None) -> Guide:
    """What guides: the finetuned MLLM ("mllm"), the "stock" one, or the prompt's embedding ("text").

    An MLLM waits for its turn where the backbone's parts do, unless it has a device of its own. Raises UserError if its
    files are missing or wrong.
    """
    if kind == "text":
        backbone = backbone or load_backbone(preset)
        return TextGuidance(backbone.text_states, backbone.text_width)
    device = known_device(device) if device else backbone.placement.waiting if backbone else best_device()
    path = preset.guide(kind)
    with opening(path, "multimodal LLM"):
        dtype = Precision.named(preset.dtype, best_device()).mllm
        return MLLM.from_pretrained(path, dtype, device, find_questions(preset.questions))


def load_img(preset: Preset | str, aligner: str | None = None, mllm_device: str | None = None) -> IMG:
    """The whole method, by a preset or its name; `aligner` names another aligner file, `mllm_device` e.g. "cuda:1".

    Checks that aligner, image prompt and MLLM belong together before anything big is loaded. Raises UserError in one
    line.
    """
    preset = find_preset(preset) if isinstance(preset, str) else preset
    preset = fetch(with_overrides(preset, aligner=aligner), ("aligner", "mllm", *BACKBONE))
    f = ImplicitAligner.from_file(preset.aligner)
    check_token_width(f, backbone_class(preset.backbone).token_width(preset), preset)
    check_guidance_width(f, announced_width(preset.mllm), preset.mllm)
    with tqdm(total=4, desc="loading models", leave=False, delay=2) as bar:
        backbone = _open_backbone(preset, None, bar.update)
        mllm = load_guide(preset, "mllm", backbone, mllm_device)
    check_guidance_width(f, mllm.width, preset.mllm)
    return IMG(backbone, mllm, f, preset.passes, preset.mllm_batch, mllm_device=mllm_device)


def load_encoder(preset: Preset, guidance: str, seed: int) -> Encoder:
    """The frozen models that make features of pairs; only guidance by "text" needs the base model, for its encoders."""
    settings = (preset.identity_share, seed, preset.encode_batch, preset.mllm_batch)
    if guidance == "text":
        backbone = load_backbone(preset)
        return Encoder(backbone, load_guide(preset, "text", backbone), *settings)
    device = best_device()
    precision = Precision.named(preset.dtype, device)
    preset = fetch(replace(preset, mllm=preset.guide(guidance)), (*TOKENIZER, "mllm"))
    tokenizer = backbone_class(preset.backbone).open_tokenizer(preset, precision, device)
    return Encoder(tokenizer, load_guide(preset, "mllm"), *settings)


def load_training_data(
    preset: Preset, guidance: str, seed: int, cache_gb: float, ranks: Ranks = ALONE
) -> CachedData | StreamedData:
    """What an aligner is trained on, as the preset's `cache_dir` says; models are loaded only if features are missing.

    Several processes share what is to be computed: the shards of a cache, or the files of a stream. Raises UserError
    for a stale cache, or pairs or models that cannot be read.
    """
    if preset.cache_dir == "none":
        share = ranks.rank, ranks.world
        stream = pair_stream(preset.pairs, preset.chunk_pairs, preset.max_pairs, seed, share)
        # Every process has files of its own, and asks other questions.
        return StreamedData(stream, load_encoder(preset, guidance, seed + ranks.rank * NEXT_RANK))
    stream = pair_stream(preset.pairs, preset.chunk_pairs, preset.max_pairs, seed)
    encoder = cache(lambda: load_encoder(preset, guidance, seed))
    return CachedData(stream, encoder, _cache(preset, guidance, seed, cache_gb), ranks)


def compute_features(preset: Preset, guidance: str, seed: int, cache_gb: float, share: tuple[int, int]) -> str:
    """The r-th of n parts of a cache, of `share` (r, n), by a job of its own. Returns what there is now, in words.

    Raises UserError as `load_training_data` does.
    """
    stream = pair_stream(preset.pairs, preset.chunk_pairs, preset.max_pairs, seed)
    encoder, kept = cache(lambda: load_encoder(preset, guidance, seed)), _cache(preset, guidance, seed, cache_gb)
    kept.collect(stream, lambda pairs, number: encoder()(pairs, number), share)
    there = sorted(kept.folder.glob("[0-9]*.safetensors"))
    return f"{len(there)} shards in {kept.folder}" + (", all there are" if kept.complete else "")


def _cache(preset: Preset, guidance: str, seed: int, cache_gb: float) -> FeatureCache:
    root = writable_folder(preset.cache_dir)
    source = Path(preset.pairs).stem if Path(preset.pairs).exists() else preset.pairs.replace("/", "--")
    name = f"{preset.name}-{guidance}-{source}-{preset.max_pairs or 'all'}-seed{seed}"
    return FeatureCache(root, name, cache_key(preset, guidance, seed), cache_gb * 1e9)
