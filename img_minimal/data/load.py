"""Load what an aligner is trained on, from a preset: encoder, cached or streamed features."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from img_minimal.backbone import open_backbone, open_image_prompt
from img_minimal.cli import writable_folder
from img_minimal.data.features import CachedData, Encoder, FeatureCache, StreamedData
from img_minimal.data.pairs import Share, Stream, pair_stream
from img_minimal.data.tables import training_files
from img_minimal.devices import best_device
from img_minimal.files import fingerprint, model_name, short_hash, version
from img_minimal.hub.mllms import mllm_config
from img_minimal.hub.parts import ADAPTER, open_guide
from img_minimal.hub.questions import find_questions
from img_minimal.hub.where import fetch
from img_minimal.presets import Preset
from img_minimal.run import Ranks

RANK_SEEDS = 1_000_000_007  # between the seeds of two ranks' questions


def load_encoder(preset: Preset, guidance: str, seed: int) -> Encoder:
    """Load the frozen models that turn pairs into features.

    Nothing that draws is loaded, except for guidance by "text", which needs the base's encoders.
    """
    preset = preset.guided_by(guidance)
    if guidance == "text":
        tokenizer = open_backbone(fetch(preset, *ADAPTER, "unet", "base"))
        guide = open_guide(preset.models, "text", tokenizer)
    else:
        mllm_config(preset.models.mllm)  # refuses other kinds before any download
        preset = fetch(preset, *ADAPTER, "mllm")
        tokenizer = open_image_prompt(preset.backbone, preset.models)
        guide = open_guide(preset.models, "mllm")
    models = preset.models
    share = preset.data.identity_share
    return Encoder(tokenizer, guide, share, seed, models.encode_batch, models.mllm_batch)


def load_training_data(
    preset: Preset, guidance: str, seed: int, cache_gb: float, ranks: Ranks
) -> CachedData | StreamedData:
    """Open the training data; models are loaded only if features are missing.

    Ranks share the work: the shards of a cache, or the files of a stream. Raises UserError for a
    stale cache, or for pairs or models that cannot be read.
    """
    data, chunk = preset.data, preset.training.chunk
    if data.cache_dir == "none":
        stream = pair_stream(data.pairs, chunk, data.max_pairs, seed, ranks.share)
        # Each rank has files of its own, and draws other questions.
        return StreamedData(stream, load_encoder(preset, guidance, seed + ranks.rank * RANK_SEEDS))
    return CachedData(*_to_cache(preset, guidance, seed, cache_gb), ranks)


def compute_features(
    preset: Preset, guidance: str, seed: int, cache_gb: float, share: Share
) -> str:
    """Compute the r-th of n parts of a cache, of `share` (r, n); returns a summary.

    Raises UserError as `load_training_data` does.
    """
    stream, encoder, features = _to_cache(preset, guidance, seed, cache_gb)
    features.collect(stream, encoder, share)
    shards = [*features.folder.glob("[0-9]*.safetensors")]
    end = ", all there are" if features.complete else ""
    return f"{len(shards)} shards in {features.folder}{end}"


def _to_cache(
    preset: Preset, guidance: str, seed: int, cache_gb: float
) -> tuple[Stream, Callable[[], Encoder], FeatureCache]:
    """Open what fills a cache: pairs, the encoder, which is loaded when it is called, and it."""
    data = preset.data
    stream = pair_stream(data.pairs, preset.training.chunk, data.max_pairs, seed)
    encoder = cache(lambda: load_encoder(preset, guidance, seed))
    return stream, encoder, open_cache(preset, guidance, seed, cache_gb)


def open_cache(preset: Preset, guidance: str, seed: int, cache_gb: float) -> FeatureCache:
    """Open the feature cache of a preset, with everything its features depend on."""
    models, data, guide = preset.models, preset.data, preset.guide(guidance)
    pairs, source, path = data.pairs, data.pairs.replace("/", "--"), Path(data.pairs)
    if path.exists():
        files = [(fingerprint(file), version(file)) for file in training_files(path)]
        pairs = f"{path.name} {short_hash(files)}"
        # Many files are called train.parquet.
        source = f"{path.stem}-{short_hash(files)}"
    name = f"{preset.name}-{guidance}-{source}-{data.max_pairs or 'all'}-seed{seed}"
    provenance = {
        "the MLLM" if guidance != "text" else "the base": model_name(guide),
        "the image encoder": model_name(models.image_encoder),
        "the IP-Adapter": model_name(models.ip_adapter),
        "the Resampler": model_name(models.resampler or models.ip_adapter),
        "the pairs": pairs,
        "at most this many pairs": str(data.max_pairs),
        "this many pairs in a chunk": str(preset.training.chunk),
        "a share of identity samples": str(data.identity_share),
        "the questions, one drawn for each sample": short_hash(find_questions(models.questions)),
        # As asked for: what it resolves to on this machine differs in rounding only.
        "dtype": models.dtype or f"the default of {best_device().type}",
        "seed": str(seed),
    }
    return FeatureCache(writable_folder(data.cache_dir) / name, provenance, cache_gb * 1e9)
