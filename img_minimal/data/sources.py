"""What an aligner is trained on: features kept in a cache, or computed as pairs stream by. The loop sees no difference.

With a cache all samples are at hand, in an order of its own in every epoch. In a stream they are at hand a chunk at a
time: files come in a random order, and samples in a random order within a chunk.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from img_minimal.cli import writable_folder
from img_minimal.data.feature_cache import FeatureCache, Shards
from img_minimal.data.pairs import Pair, pair_stream
from img_minimal.data.stream import START, Chunk, Place, Stream, ahead
from img_minimal.errors import UserError
from img_minimal.features import Encoder, Features, file_print
from img_minimal.models.devices import Precision, best_device
from img_minimal.models.plan import read_settings
from img_minimal.presets import Preset
from img_minimal.questions import QUESTIONS
from img_minimal.training import Part

UNSEEN_BYTES = 1e9  # of features that validation keeps in memory


class CachedData:
    """All samples at once, from a `FeatureCache` that is completed first; only for that the `encoder` is loaded.

    `widths` (D, H) of tokens and guidance, `unseen` samples for validation, `parts` for `Batches`, a description, and
    the `stream` that counts what it skips.
    """

    def __init__(self, stream: Stream[Pair], encoder: Callable[[], Encoder], cache: FeatureCache):
        self.stream = stream
        if not cache.complete:
            print(f"computing frozen features of {stream.source}, once", flush=True)
            cache.collect(stream, lambda pairs, number: encoder()(pairs, number))
        self.data = cache.open()
        self.widths, self.unseen = self.data.widths, _unseen(self.data)
        spared = int(self.data.validation.sum())
        self.description = f"{len(self.data)} samples in {cache.folder}, {spared} of them for validation"

    def parts(self, place: Place) -> Iterator[Part]:
        """The one part there is, at whatever place."""
        yield Part(self.data, (~self.data.validation).nonzero().flatten())


class StreamedData:
    """A chunk of samples at a time, the next one read and decoded meanwhile; the first one holds those for validation.

    Raises UserError if there is no pair at all.
    """

    def __init__(self, stream: Stream[Pair], encoder: Encoder):
        self.stream, self.encoder = stream, encoder
        self.widths = encoder.widths
        chunk = next(stream.chunks(), None)
        if chunk is None:
            raise UserError(f"{stream.source}: holds no pair with a preference; label_0 and label_1 must be 1 and 0")
        self.first: tuple[Part, Place] | None = (self._encode(chunk), chunk.after)
        self.unseen = _unseen(self.first[0].data)
        self.description = f"a stream of {stream.source}, {len(chunk.items)} pairs at a time"

    def parts(self, place: Place) -> Iterator[Part]:
        """Chunks from `place` to the end of an epoch."""
        if place == START and self.first:
            (part, place), self.first = self.first, None
            yield part
        for chunk in ahead(self.stream.chunks(place)):
            if any(not pair.validation for pair in chunk.items):
                yield self._encode(chunk)

    def _encode(self, chunk: Chunk[Pair]) -> Part:
        first = chunk.place.chunk == 0
        data = self.encoder([p for p in chunk.items if first or not p.validation], chunk.place.chunk)
        return Part(data, (~data.validation).nonzero().flatten(), chunk.place)


def _unseen(data: Features | Shards) -> Features:
    index = data.validation.nonzero().flatten()
    size = sum(x.nbytes for x in data[index[:1]].state_dict().values()) or 1
    return data[index[: int(UNSEEN_BYTES / size)]]


def training_data(preset: Preset, guidance: str, seed: int, cache_gb: float) -> CachedData | StreamedData:
    """As the preset's `cache_dir` says. Raises UserError for a stale cache, or pairs or models that cannot be read."""
    stream = pair_stream(preset.pairs, preset.chunk_pairs, preset.max_pairs, seed)
    encoder = cache(lambda: Encoder.from_preset(preset, guidance, seed))
    if preset.cache_dir == "none":
        return StreamedData(stream, encoder())
    root = writable_folder(preset.cache_dir)
    source = Path(preset.pairs).stem if Path(preset.pairs).exists() else preset.pairs.replace("/", "--")
    name = f"{preset.name}-{guidance}-{source}-{preset.max_pairs or 'all'}-seed{seed}"
    kept = FeatureCache(root, name, making(preset, guidance, seed), cache_gb * 1e9)
    return CachedData(stream, encoder, kept)


def making(preset: Preset, guidance: str, seed: int) -> dict[str, str]:
    """Everything that features depend on, in words and hashes, for a cache to compare."""
    precision = Precision.named(preset.dtype, best_device())
    guide = preset.guide(guidance)
    sizes = [read_settings(preset.image_encoder, "--image-encoder").get("image_size")]
    if guidance != "text":
        settings = read_settings(guide, "--mllm")
        sizes.append(settings.get("vision_config", {}).get("image_size") or "its own")
    return {
        "the MLLM" if guidance != "text" else "the base": _identity(guide),
        "the image encoder": _identity(preset.image_encoder),
        "the IP-Adapter": _identity(preset.ip_adapter),
        "the Resampler": _identity(preset.resampler or preset.ip_adapter),
        "the pairs": _identity(preset.pairs),
        "at most this many pairs": str(preset.max_pairs),
        "this many pairs in a chunk": str(preset.chunk_pairs),
        "a share of winners kept": str(preset.keep_share),
        "the question bank": _hash(QUESTIONS),
        "dtype": f"{precision.weights} and {precision.mllm}".replace("torch.", ""),
        "image size": " and ".join(map(str, sizes)),
        "seed": str(seed),
    }


def _identity(location: str) -> str:
    path = Path(location)
    return f"{path.name} {_hash(file_print(path))}" if path.exists() else location


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
