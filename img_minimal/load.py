"""The one place that opens models: from a preset, the names of things, to the things themselves.

Locations are resolved and the headers of all files checked before the first model is loaded, so that mistakes show
early and together. Everything else in this package is handed objects.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

from tqdm import tqdm

from img_minimal.aligner import ImplicitAligner
from img_minimal.backbones import Backbone, Sampling, backbone_class
from img_minimal.data.cache import FeatureCache
from img_minimal.data.features import Encoder
from img_minimal.data.pairs import pair_stream
from img_minimal.data.sources import CachedData, StreamedData, cache_key
from img_minimal.files.hub import fetch_file, fetch_folder, on_hub
from img_minimal.files.mllm_layouts import announced_width
from img_minimal.files.weights import opening
from img_minimal.mllm import MLLM, Guide, TextGuidance
from img_minimal.pipeline import IMG
from img_minimal.presets import Preset, find_preset, with_overrides
from img_minimal.questions import find_questions
from img_minimal.runtime.cli import writable_folder
from img_minimal.runtime.devices import Placement, Precision, best_device
from img_minimal.runtime.errors import UserError
from img_minimal.runtime.ranks import ALONE, Ranks

FILES = ("ip_adapter", "resampler", "aligner")  # the other locations are folders
TOKENIZER = ("ip_adapter", "resampler", "image_encoder")  # what turns images into tokens
NEXT_RANK = 1_000_000_007  # between the seeds of two processes' questions
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


def load_backbone(
    preset: Preset, placement: Placement | None = None, loaded: Callable[[], object] = lambda: None
) -> Backbone:
    """The base model with its image prompt; `loaded` is called after each of its models."""
    return _open_backbone(fetch(preset, BACKBONE), placement, loaded)


def _open_backbone(preset: Preset, placement: Placement | None, loaded: Callable[[], object]) -> Backbone:
    """The same, of a preset whose locations are local paths already."""
    placement = placement or Placement(best_device(), preset.offload)
    precision = Precision.named(preset.dtype, placement.device)
    sampling = Sampling(
        steps=preset.sampling_steps,
        guidance_scale=preset.guidance_scale,
        true_cfg_scale=preset.true_cfg_scale,
        scale=preset.scale,
        scale_end=preset.scale_end,
        draw_batch=preset.draw_batch,
        encode_batch=preset.encode_batch,
        height=preset.height,
        width=preset.width,
    )
    return backbone_class(preset.backbone).open(preset, sampling, precision, placement, loaded)


def load_guide(preset: Preset, kind: str, backbone: Backbone | None = None) -> Guide:
    """What guides: the finetuned MLLM ("mllm"), the "stock" one, or the prompt's embedding ("text").

    An MLLM waits for its turn where the backbone's parts do. Raises UserError if its files are missing or wrong.
    """
    if kind == "text":
        backbone = backbone or load_backbone(preset)
        return TextGuidance(backbone.text_states, backbone.text_width)
    device = backbone.placement.waiting if backbone else best_device()
    path = preset.guide(kind)
    with opening(path, "multimodal LLM"):
        dtype = Precision.named(preset.dtype, best_device()).mllm
        return MLLM.from_pretrained(path, dtype, device, find_questions(preset.questions))


def load_img(preset: Preset | str, aligner: str | None = None) -> IMG:
    """The whole method, by a preset or its name; `aligner` names another aligner file.

    Checks that aligner, image prompt and MLLM belong together before anything big is loaded. Raises UserError in one
    line.
    """
    preset = find_preset(preset) if isinstance(preset, str) else preset
    preset = fetch(with_overrides(preset, aligner=aligner), ("aligner", "mllm", *BACKBONE))
    f = ImplicitAligner.from_file(preset.aligner)
    width = backbone_class(preset.backbone).token_width(preset)
    if width not in (None, f.width):
        raise UserError(
            f"{preset.aligner}: made for image tokens of width {f.width}, but those of "
            f"{preset.resampler or preset.ip_adapter} have width {width}; use the files of one base model"
        )
    _check_width(f, announced_width(preset.mllm), preset.mllm)
    with tqdm(total=4, desc="loading models", leave=False, delay=2) as bar:
        backbone = _open_backbone(preset, None, bar.update)
        mllm = load_guide(preset, "mllm", backbone)
    _check_width(f, mllm.width, preset.mllm)
    return IMG(backbone, mllm, f, preset.passes, preset.mllm_batch)


def _check_width(aligner: ImplicitAligner, width: int | None, mllm: str) -> None:
    """Raises UserError if the aligner was trained for guidance features of another width."""
    if width not in (None, aligner.guidance_width):
        raise UserError(
            f"this aligner was trained for an MLLM of width {aligner.guidance_width}, {mllm} has width {width}: use "
            "the MLLM it was trained with (5120: LLaVA-1.5-13B, 4096: LLaVA-1.5-7B), or train an aligner for this one"
        )


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
