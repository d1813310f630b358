"""What an aligner is trained on: frozen features, kept in a folder or computed as pairs stream by, in endless batches.

No diffusion model takes part in aligner training: a pair becomes two sets of image tokens and the MLLM's features of
its non-preferred image. So an `Encoder` holds an image tokenizer and an MLLM, and nothing that draws.

With a cache all samples are at hand, in an order of its own in every epoch. In a stream they are at hand a chunk at a
time: files come in a random order, and samples in a random order within a chunk.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import accumulate, count, takewhile
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from img_minimal.backbone import Backbone, ImagePrompt
from img_minimal.cli import UserError
from img_minimal.data.pairs import START, Pair, Stream, StreamPosition
from img_minimal.files import read_json, write_whole
from img_minimal.hub.weights import read_metadata, read_weights, write_weights
from img_minimal.mllm import GuidanceEncoder, cat_padded, guidance_features
from img_minimal.run import Ranks

NEXT_CHUNK = 1_000_003  # between the seeds of two chunks' questions
UNSEEN_BYTES = 1e9  # of features that validation keeps in memory
PREFERENCE = "pair with a preference; label_0 and label_1 must be 1 and 0"
Value = TypeVar("Value")


# 1. Features


@dataclass
class Features:
    """N samples: what the aligner gets (guidance, mask, loser) and what it should answer (winner)."""

    guidance: Tensor  # (N, L, H) bf16
    mask: Tensor  # (N, L)
    loser: Tensor  # (N, K, D): c_l, the tokens to correct
    winner: Tensor  # (N, K, D): c_w
    validation: Tensor  # (N,): not to be trained on
    is_identity: Tensor  # (N,): a right image that is its own target (c_l = c_w)

    def __len__(self) -> int:
        return len(self.loser)

    def __getitem__(self, i: Tensor | slice) -> "Features":
        """The samples of index `i`."""
        return Features(*(value[i] for value in self.state_dict().values()))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All samples of the parts, guidance padded to the longest."""
        join = {"guidance": cat_padded, "mask": cat_padded}
        names = [field.name for field in fields(cls)]
        return cls(
            **{
                name: join.get(name, torch.cat)([getattr(part, name) for part in parts])
                for name in names
            }
        )

    def state_dict(self) -> dict[str, Tensor]:
        """For a file; `Features(**state)` is the inverse."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def sample_bytes(self) -> int:
        """What one sample takes."""
        return sum(x[:1].nbytes for x in self.state_dict().values()) or 1

    def check_finite(self) -> None:
        """Raises UserError naming the first sample that holds a NaN or an infinity."""
        for name in ("guidance", "loser", "winner"):
            for k, sample in enumerate(getattr(self, name)):
                if not sample.isfinite().all():
                    raise UserError(
                        f"the {name} features of sample {k} are not finite; check the model that made them, delete the "
                        "feature cache and run again"
                    )


@dataclass
class Encoder:
    """The frozen models, and how they are asked; calling it makes features of pairs."""

    tokenizer: ImagePrompt | Backbone
    guide: GuidanceEncoder
    identity_share: (
        float  # as many winners as this share of the pairs become samples that are their own target
    )
    seed: int  # draws the questions
    encode_batch: int = 250  # images that the vision encoder sees at once
    mllm_batch: int = 64  # images that the MLLM sees at once

    @property
    def widths(self) -> tuple[int, int]:
        """D of the tokens and H of the guidance features."""
        return self.tokenizer.token_shape[1], self.guide.width

    def __call__(self, pairs: list[Pair], chunk: int = 0) -> Features:
        """Features of a chunk's pairs; its number draws other questions. Raises UserError if one is not finite."""
        identity = identity_samples(pairs, self.identity_share)
        seeds = range(
            self.seed + NEXT_CHUNK * chunk,
            self.seed + NEXT_CHUNK * chunk + len(pairs) + len(identity),
        )
        tokens = compute_tokens(pairs, self.tokenizer, identity, self.encode_batch)
        features = Features(
            **tokens, **compute_guidance(pairs, self.guide, identity, seeds, self.mllm_batch)
        )
        features.check_finite()
        return features


def identity_samples(pairs: list[Pair], identity_share: float) -> list[Pair]:
    """Pairs, up to this share, whose winner is also to be its own target.

    Without them (the paper has none) an aligner is only ever shown images that are wrong. They are those whose winner
    loses under another prompt: what wins everywhere may be of a kind that the aligner is never asked about.
    """
    losers = {_name(p.loser) for p in pairs}
    return [p for p in pairs if _name(p.winner) in losers][: round(identity_share * len(pairs))]


def compute_tokens(
    pairs: list[Pair],
    tokenizer: ImagePrompt | Backbone,
    identity: list[Pair],
    batch_size: int = 250,
) -> dict[str, Tensor]:
    """Image tokens of all pairs, then of the winners of `identity`; an image of several pairs is encoded once."""
    images, number = distinct([p.winner for p in [*pairs, *identity]] + [p.loser for p in pairs])
    starts = tqdm(range(0, len(images), batch_size), desc="image tokens", leave=False)
    tokens = torch.cat(
        [tokenizer.tokens(images[k : k + batch_size]).float().cpu() for k in starts]
    )[number]
    winner, loser = tokens.split([len(pairs) + len(identity), len(pairs)])
    return {
        "loser": torch.cat([loser, winner[len(pairs) :]]),
        "winner": winner,
        "validation": torch.tensor([p.validation for p in [*pairs, *identity]]),
        "is_identity": torch.arange(len(pairs) + len(identity)) >= len(pairs),
    }


def compute_guidance(
    pairs: list[Pair],
    guide: GuidanceEncoder,
    identity: list[Pair],
    seeds: Sequence[int],
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """Guidance features of the same samples, in the same order; a sample's seed draws its question."""
    images = [p.loser for p in pairs] + [p.winner for p in identity]
    prompts = [p.prompt for p in [*pairs, *identity]]
    guidance, mask = guidance_features(
        guide, images, prompts, seeds, batch_size, progress="guidance features"
    )
    return {"guidance": guidance, "mask": mask}


def _name(image: Image) -> object:
    """The same for images of the same bytes."""
    return getattr(image, "digest", id(image))


def distinct(images: list[Image]) -> tuple[list[Image], list[int]]:
    """Each image once, and for every image its position among them; images of equal bytes are one."""
    once = {_name(image): image for image in images}
    position = {name: k for k, name in enumerate(once)}
    return list(once.values()), [position[_name(image)] for image in images]


# 2. A folder of features


class Shards:
    """The samples of several files as one `Features`-like sequence, read from disk when they are asked for."""

    def __init__(self, parts: list[Features]):
        self.parts = parts
        self.ends = torch.tensor(list(accumulate(len(part) for part in parts)))
        self.validation = torch.cat([part.validation for part in parts])
        self.sample_bytes = parts[0].sample_bytes
        self.widths = parts[0].loser.shape[-1], parts[0].guidance.shape[-1]  # D, H

    def __len__(self) -> int:
        return len(self.validation)

    def __getitem__(self, index: Tensor) -> Features:
        """The samples of `index` (B,), in memory."""
        part, pieces, positions = torch.bucketize(index, self.ends, right=True), [], []
        for p in part.unique().tolist() or [0]:
            here = (part == p).nonzero().flatten()
            pieces.append(self.parts[p][index[here] - int(self.ends[p]) + len(self.parts[p])])
            positions.append(here)
        return Features.join(pieces)[torch.cat(positions).argsort()]


class FeatureCache:
    """A folder of shards, one a chunk, that takes at most `limit` bytes together with the caches beside it.

    It pays for ablations. SDXL's features take 6.8 MB a sample, so a cache holds the first pairs of a stream and not
    all. `making` says in words what the features depend on. Raises UserError if the folder was made otherwise, naming
    the first thing that differs.
    """

    def __init__(self, folder: Path, making: dict[str, str], limit: float):
        self.folder, self.limit = folder, limit
        self.path, self.note = folder / "cache.json", {"making": making}
        if self.path.exists():
            instead = f"delete {folder}, or choose another --cache-dir"
            self.note = read_json(
                self.path, dict, instead, check=lambda note: note["making"].keys()
            )
        before = self.note["making"]
        for key in [*making, *before]:
            if before.get(key) != making.get(key):
                raise UserError(
                    f"{folder}: these features were made with {key} {before.get(key)}, this run has "
                    f"{making.get(key)}; delete the folder to compute them anew, or choose another --cache-dir"
                )

    def shard(self, chunk: int) -> Path:
        """Where a chunk's features are, or will be."""
        return self.folder / f"{chunk:05d}.safetensors"

    @property
    def files(self) -> list[Path]:
        """The shards from the first one on, in order, up to one that is missing."""
        return list(takewhile(Path.exists, map(self.shard, count())))

    @property
    def room(self) -> float:
        """Bytes that are left for another shard."""
        return self.limit - sum(
            file.stat().st_size for file in self.folder.parent.rglob("*.safetensors")
        )

    @property
    def complete(self) -> bool:
        """Nothing is left to compute: every pair is in it, or another shard would not fit."""
        files = self.files
        return bool(files) and (
            len(files) == self.note.get("shards") or self.room <= self.note.get("full", -1)
        )

    def collect(
        self, stream: Stream[Pair], encoder: Callable, share: tuple[int, int] = (0, 1)
    ) -> None:
        """Compute and keep what is missing, until the stream ends or the cache is full; goes on where it stopped.

        Of `share` (r, n) only every n-th chunk from the r-th on is computed: n processes fill one folder. Raises
        UserError if not even the first chunk fits.
        """
        self._write_note()
        position, chunks = START, None
        while True:
            if (file := self.shard(position.chunk)).exists():
                position, chunks = StreamPosition(**self._read_note(file)["after"]), None
                continue
            chunks = chunks or ahead(stream.chunks(position))
            if (chunk := next(chunks, None)) is None:
                return self._write_note(shards=position.chunk)
            position = chunk.after
            if chunk.position.chunk % share[1] != share[0]:
                continue
            features = encoder(chunk.items, chunk.position.chunk)
            size = (
                sum(x.nbytes for x in features.state_dict().values()) + 4096
            )  # a file has a header
            if size > self.room:
                if not self.files:
                    raise UserError(
                        f"{self.folder.parent}: the features of {len(chunk.items)} pairs take {size / 1e9:.3g} GB, and "
                        f"there is room for {max(0.0, self.room) / 1e9:.3g}; raise --cache-gb, lower --max-pairs, "
                        "delete old caches there, or compute features in every epoch with --cache-dir none"
                    )
                return self._write_note(full=self.room)
            note = {
                "after": asdict(position),
                "digest": digest(features.state_dict(), asdict(position)),
            }
            write_weights(file, features.state_dict(), {"note": json.dumps(note)})

    def open(self) -> Shards:
        """All samples, their digests compared. Raises UserError if a shard is damaged, or if there is none."""
        if not self.files:
            raise UserError(
                f"{self.folder}: holds no features; there was no pair to compute them of"
            )
        parts = []
        for file in tqdm(self.files, desc="checking features", leave=False, delay=2):
            note = self._read_note(file)
            state = read_weights(file)
            same = digest(state, note["after"]) == note["digest"]
            if not same or state.keys() != {field.name for field in fields(Features)}:
                raise UserError(f"{file}: damaged (its digest is another); delete it and run again")
            parts.append(Features(**state))
        return Shards(parts)

    def _read_note(self, file: Path) -> dict:
        """The position of what follows a shard, and its digest."""
        try:
            note = json.loads(read_metadata(file)["note"])
            StreamPosition(**note["after"]), note["digest"]
            return note
        except (SafetensorError, TypeError, LookupError, ValueError) as error:
            raise UserError(
                f"{file}: damaged ({type(error).__name__}); delete it and run again"
            ) from None

    def _write_note(self, **more: float) -> None:
        self.note |= more
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.note, indent=1))


def digest(state: dict[str, Tensor], note: dict) -> str:
    """A checksum of tensors and a note: reading 1 GB takes a second, and a flipped bit shows."""
    value = zlib.crc32(json.dumps(note).encode())
    for name in sorted(state):
        value = zlib.crc32(f"{name} {state[name].dtype} {tuple(state[name].shape)}".encode(), value)
        value = zlib.crc32(state[name].contiguous().flatten().view(torch.uint8).numpy(), value)
    return f"{value:08x}"


# 3. What training sees: parts of data that are at hand at once, and batches of them without end


@dataclass
class Part:
    """Data that is at hand at once: a chunk of a stream, or everything. `data[index]` is a batch."""

    data: Any
    samples: Tensor  # which of the data are trained on
    position: StreamPosition = START


class CachedData:
    """All samples at once, from a `FeatureCache` that is completed first; only for that the `encoder` is loaded.

    `widths` (D, H) of tokens and guidance, `unseen` samples for validation, `parts` for `Batches`, a description, and
    the `stream` that counts what it skips. Several processes compute it together, and all of them see all of it.
    """

    def __init__(
        self,
        stream: Stream[Pair],
        encoder: Callable[[], Encoder],
        cache: FeatureCache,
        ranks: Ranks | None = None,
    ):
        ranks = ranks or Ranks()
        self.stream = stream
        with ranks.together():
            if not cache.complete:
                print(f"computing frozen features of {stream.source}, once", flush=True)
                cache.collect(
                    stream,
                    lambda pairs, number: encoder()(pairs, number),
                    (ranks.rank, ranks.world),
                )
        self.data = cache.open()
        self.widths, self.unseen = self.data.widths, _unseen(self.data)
        spared = int(self.data.validation.sum())
        self.description = (
            f"{len(self.data)} samples in {cache.folder}, {spared} of them for validation"
        )

    def batches(self, batch_size: int, seed: int, ranks: Ranks) -> "Batches":
        """Endless batches of which each rank takes its part. Raises UserError if they cannot share one."""
        ranks.split(batch_size, "--batch-size")
        return Batches(self.parts, batch_size, seed, (ranks.rank, ranks.world), shared=True)

    def parts(self, position: StreamPosition) -> Iterator[Part]:
        """The one part there is, at whatever position."""
        yield Part(self.data, (~self.data.validation).nonzero().flatten())


class StreamedData:
    """A chunk of samples at a time, the next one read and decoded meanwhile; the first one holds those for validation.

    `encode(items, chunk)` makes data of a chunk's items: indexed by tensors, with `validation` (N,) and `sample_bytes`.
    Raises UserError if there is no item at all; `what` says what was looked for. Each process has a stream of its own.
    """

    def __init__(self, stream: Stream, encode: Callable[[list, int], Any], what: str = PREFERENCE):
        self.stream, self.encode = stream, encode
        self.widths = getattr(encode, "widths", None)  # (D, H), of an Encoder
        chunk = next(stream.chunks(), None)
        if chunk is None:
            raise UserError(f"{stream.source}: holds no {what}")
        self.first: tuple[Part, StreamPosition] | None = (self._part(chunk), chunk.after)
        self.unseen = _unseen(self.first[0].data)
        self.description = f"a stream of {stream.source}, {len(chunk.items):,} rows at a time"

    def batches(self, batch_size: int, seed: int, ranks: Ranks) -> "Batches":
        """Endless batches of this rank's own files. Raises UserError if the ranks cannot share a batch."""
        return Batches(self.parts, ranks.split(batch_size, "--batch-size"), seed)

    def parts(self, position: StreamPosition) -> Iterator[Part]:
        """Chunks from `position` to the end of an epoch."""
        if position == START and self.first:
            part, position = self.first
            if self.stream.size:  # else it is everything there is, and serves every epoch
                self.first = None
            yield part
        for chunk in ahead(self.stream.chunks(position)):
            if any(not item.validation for item in chunk.items):
                yield self._part(chunk)

    def _part(self, chunk: Any) -> Part:
        number = chunk.position.chunk
        data = self.encode(
            [item for item in chunk.items if number == 0 or not item.validation], number
        )
        return Part(data, (~data.validation).nonzero().flatten(), chunk.position)


def _unseen(data: Any) -> Any:
    """The samples for validation, as many as a gigabyte holds."""
    return data[data.validation.nonzero().flatten()[: int(UNSEEN_BYTES / data.sample_bytes)]]


def ahead(values: Iterator[Value]) -> Iterator[Value]:
    """The same values (none of them None), the next one prepared in a thread while the last one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        prepared = pool.submit(next, values, None)
        while (value := prepared.result()) is not None:
            prepared = pool.submit(next, values, None)
            yield value


class Batches:
    """Batches without end: parts in their order, the samples of each part in an order of their own in every epoch.

    `parts(position)` gives the parts from a position on to the end of an epoch. `state_dict` is the position, so that a
    resumed run sees what it would have seen. The last samples of a part, if they make no whole batch, wait for another
    epoch. Of `share` (r, n) every batch is the r-th of n parts of one that n processes share.
    """

    def __init__(
        self,
        parts: Callable[[StreamPosition], Iterator[Part]],
        batch_size: int,
        seed: int,
        share: tuple[int, int] = (0, 1),
        shared: bool = False,
    ):
        self.parts, self.batch_size, self.seed, self.share = parts, batch_size, seed, share
        self.shared = shared  # all ranks are at the same position
        self.epoch, self.position, self.batch = 0, START, 0
        self.where = ""  # the latest batch, for messages

    def __iter__(self) -> Iterator[Any]:
        while True:
            fruitful = self.position != START or self.batch > 0
            for part in self.parts(self.position):
                self.position, count = part.position, len(part.samples)
                per_epoch = max(1, count // self.batch_size) if count else 0
                for k in range(self.batch, per_epoch):
                    step, seed = self.epoch * per_epoch + k, self.seed + 7919 * part.position.chunk
                    index = batch_indices(step, self.batch_size, part.samples, seed)[
                        self.share[0] :: self.share[1]
                    ]
                    if len(index) * self.share[1] != min(self.batch_size, count):
                        raise UserError(
                            f"{count} samples: too few for {self.share[1]} processes to share"
                        )
                    self.batch, self.where, fruitful = (
                        k + 1,
                        f"samples {index.tolist()[:8]}...",
                        True,
                    )
                    if part.position.chunk:
                        self.where += f" of chunk {part.position.chunk}"
                    yield part.data[index]
                self.batch = 0
            if not fruitful:
                raise UserError(
                    "there is nothing to train on: no pair has a preference, or all are for validation"
                )
            self.epoch, self.position = self.epoch + 1, START

    def state_dict(self) -> dict:
        """Epoch, position of the part, batches of it that were given."""
        return {"epoch": self.epoch, "position": asdict(self.position), "batch": self.batch}

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`."""
        self.epoch, self.position, self.batch = (
            state["epoch"],
            StreamPosition(**state["position"]),
            state["batch"],
        )


def batch_indices(step: int, batch_size: int, samples: Tensor, seed: int) -> Tensor:
    """Which samples step `step` sees: a function of the step, so that the position in the data is a number."""
    per_epoch = max(1, len(samples) // batch_size)
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(
        len(samples), generator=torch.Generator().manual_seed(seed * 100_003 + epoch)
    )
    return samples[order[position * batch_size : (position + 1) * batch_size]]
