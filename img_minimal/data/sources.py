"""What an aligner is trained on: features kept in a cache, or computed as pairs stream by. The loop sees no difference.

With a cache all samples are at hand, in an order of its own in every epoch. In a stream they are at hand a chunk at a
time: files come in a random order, and samples in a random order within a chunk.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from img_minimal.data.batches import Part
from img_minimal.data.cache import FeatureCache
from img_minimal.data.features import Encoder
from img_minimal.data.pairs import Pair
from img_minimal.data.stream import START, Chunk, Place, Stream, prefetch
from img_minimal.files.pretrained import read_settings
from img_minimal.presets import Preset
from img_minimal.questions import find_questions
from img_minimal.runtime.atomic import file_print
from img_minimal.runtime.devices import best_device
from img_minimal.runtime.errors import UserError
from img_minimal.runtime.ranks import ALONE, Ranks

UNSEEN_BYTES = 1e9  # of features that validation keeps in memory
PREFERENCE = "pair with a preference; label_0 and label_1 must be 1 and 0"


class CachedData:
    """All samples at once, from a `FeatureCache` that is completed first; only for that the `encoder` is loaded.

    `widths` (D, H) of tokens and guidance, `unseen` samples for validation, `parts` for `Batches`, a description, and
    the `stream` that counts what it skips. Several processes compute it together, and all of them see all of it.
    """

    shared = True

    def __init__(self, stream: Stream[Pair], encoder: Callable[[], Encoder], cache: FeatureCache, ranks: Ranks = ALONE):
        self.stream = stream
        with ranks.together():
            if not cache.complete:
                print(f"computing frozen features of {stream.source}, once", flush=True)
                cache.collect(stream, lambda pairs, number: encoder()(pairs, number), (ranks.rank, ranks.world))
        self.data = cache.open()
        self.widths, self.unseen = self.data.widths, _unseen(self.data)
        spared = int(self.data.validation.sum())
        self.description = f"{len(self.data)} samples in {cache.folder}, {spared} of them for validation"

    def parts(self, place: Place) -> Iterator[Part]:
        """The one part there is, at whatever place."""
        yield Part(self.data, (~self.data.validation).nonzero().flatten())


class StreamedData:
    """A chunk of samples at a time, the next one read and decoded meanwhile; the first one holds those for validation.

    `encode(items, chunk)` makes data of a chunk's items: indexed by tensors, with `validation` (N,) and `sample_bytes`.
    Raises UserError if there is no item at all; `what` says what was looked for. Each process has a stream of its own.
    """

    shared = False

    def __init__(self, stream: Stream, encode: Callable[[list, int], Any], what: str = PREFERENCE):
        self.stream, self.encode = stream, encode
        self.widths = getattr(encode, "widths", None)  # (D, H), of an Encoder
        chunk = next(stream.chunks(), None)
        if chunk is None:
            raise UserError(f"{stream.source}: holds no {what}")
        self.first: tuple[Part, Place] | None = (self._part(chunk), chunk.after)
        self.unseen = _unseen(self.first[0].data)
        self.description = f"a stream of {stream.source}, {len(chunk.items):,} rows at a time"

    def parts(self, place: Place) -> Iterator[Part]:
        """Chunks from `place` to the end of an epoch."""
        if place == START and self.first:
            part, place = self.first
            if self.stream.size:  # else it is everything there is, and serves every epoch
                self.first = None
            yield part
        for chunk in prefetch(self.stream.chunks(place)):
            if any(not item.validation for item in chunk.items):
                yield self._part(chunk)

    def _part(self, chunk: Chunk) -> Part:
        number = chunk.place.chunk
        data = self.encode([item for item in chunk.items if number == 0 or not item.validation], number)
        return Part(data, (~data.validation).nonzero().flatten(), chunk.place)


def _unseen(data: Any) -> Any:
    """The samples for validation, as many as a gigabyte holds."""
    return data[data.validation.nonzero().flatten()[: int(UNSEEN_BYTES / data.sample_bytes)]]


def cache_key(preset: Preset, guidance: str, seed: int) -> dict[str, str]:
    """Everything that features depend on, in words and hashes, for a cache to compare."""
    guide = preset.guide(guidance)
    sizes = [_image_size(read_settings(preset.image_encoder, "--image-encoder"))]
    if guidance != "text":
        sizes.append(_image_size(read_settings(guide, "--mllm")))
    return {
        "the MLLM" if guidance != "text" else "the base": _identity(guide),
        "the image encoder": _identity(preset.image_encoder),
        "the IP-Adapter": _identity(preset.ip_adapter),
        "the Resampler": _identity(preset.resampler or preset.ip_adapter),
        "the pairs": _identity(preset.pairs),
        "at most this many pairs": str(preset.max_pairs),
        "this many pairs in a chunk": str(preset.chunk_pairs),
        "a share of identity samples": str(preset.identity_share),
        "the questions, one drawn for each sample": _hash(find_questions(preset.questions)),
        # As asked for: what it means on this machine and on the next differs in rounding only.
        "dtype": preset.dtype or f"the default of {best_device().type}",
        "image size": " and ".join(sizes),
        "seed": str(seed),
    }


def _image_size(settings: dict) -> str:
    """The pixels of a side that a model looks at, by its config.json; whole CLIPs and LLaVAs have it one level down."""
    inner = settings.get("vision_config")
    return str(settings.get("image_size") or (isinstance(inner, dict) and inner.get("image_size")) or "its own")


def _identity(location: str) -> str:
    path = Path(location)
    return f"{path.name} {_hash(file_print(path))}" if path.exists() else location


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
