"""Turn pairs into frozen features, keep or stream them, and draw endless batches.

Training an aligner runs no diffusion model: a pair becomes two sets of image tokens and the MLLM's
features of its non-preferred image. An `Encoder` therefore holds an image tokenizer and an MLLM.

With a cache all samples are at hand and are shuffled in every epoch. A stream gives them a chunk at
a time: files come in random order, and samples are shuffled within a chunk.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Self

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from img_minimal.backbone import Backbone, ImagePrompt
from img_minimal.cli import UserError, check, writable_folder
from img_minimal.data.pairs import (
    EVERYTHING,
    START,
    Chunk,
    Pair,
    Share,
    Stream,
    StreamPosition,
    prefetch,
)
from img_minimal.files import read_json, version, write_whole
from img_minimal.hub.weights import read_metadata, read_weights, write_weights
from img_minimal.mllm import GuidanceEncoder, guidance_features, padded
from img_minimal.run import Ranks

QUESTION_SEEDS = 1_000_003  # between the first seeds of two chunks' questions
ORDER_SEEDS = 7919  # between the seeds of two chunks' orders
EPOCH_SEEDS = 100_003  # seeds reserved for the epochs of one order
MAX_VALIDATION_BYTES = 1e9
PREFERENCE = "pair with a preference; label_0 and label_1 must be 1 and 0"


# Features


@dataclass
class Features:
    """N samples: inputs of the aligner (guidance, loser) and its target (winner).

    Guidance lies end to end, so that one large image makes no chunk of Qwen's 90 times as large.
    """

    guidance: Tensor  # (sum of lengths, H) bf16
    lengths: Tensor  # (N,)
    longest: Tensor  # (N,): the greatest length of the sample's chunk
    loser: Tensor  # (N, K, D): c_l, the tokens to correct
    winner: Tensor  # (N, K, D): c_w
    validation: Tensor  # (N,): held out
    is_identity: Tensor  # (N,): a good image that is its own target (c_l = c_w)

    def __len__(self) -> int:
        return len(self.loser)

    def __getitem__(self, index: Tensor | slice) -> "Features":
        ends = self.lengths.cumsum(0)
        spans = zip((ends - self.lengths)[index].tolist(), ends[index].tolist())
        pieces = [self.guidance[start:end] for start, end in spans]
        others = [value[index] for value in list(vars(self).values())[1:]]
        return Features(torch.cat([self.guidance[:0], *pieces]), *others)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Concatenate samples."""
        states = [part.state_dict().values() for part in parts]
        return cls(*map(torch.cat, zip(*states)))

    def padded(self) -> tuple[Tensor, Tensor]:
        """Return guidance (N, L, H) and its mask (N, L); batches of a chunk have equal shapes."""
        return padded(self.guidance, self.lengths, int(self.longest.max()))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name; `Features(**state)` is the inverse."""
        return dict(vars(self))

    @property
    def widths(self) -> tuple[int, int]:
        """(D, H) of tokens and guidance."""
        return self.loser.shape[-1], self.guidance.shape[-1]

    @property
    def sample_bytes(self) -> int:
        """Memory of one sample, on average."""
        return 1 + sum(value.nbytes for value in vars(self).values()) // max(1, len(self))


@dataclass
class Encoder:
    """Frozen models that turn pairs into features."""

    tokenizer: ImagePrompt | Backbone
    guide: GuidanceEncoder
    identity_share: float  # identity samples per pair, at most
    seed: int  # draws the questions
    encode_batch: int  # images that the vision encoder sees at once
    mllm_batch: int  # images that the MLLM sees at once

    def __call__(self, pairs: list[Pair], chunk: int = 0) -> Features:
        """Compute features of a chunk's pairs and identity samples.

        Each chunk number draws other questions. Raises UserError if a feature is not finite.
        """
        samples = pairs + identity_samples(pairs, self.identity_share)
        first_seed = self.seed + QUESTION_SEEDS * chunk
        seeds = range(first_seed, first_seed + len(samples))
        winner, loser = self.tokens(samples)
        losers, prompts = [s.loser for s in samples], [s.prompt for s in samples]
        guidance, lengths = guidance_features(
            self.guide, losers, prompts, seeds, self.mllm_batch, progress="guidance features"
        )
        longest = torch.full_like(lengths, int(lengths.max()))
        validation = torch.tensor([sample.validation for sample in samples])
        is_identity = torch.arange(len(samples)) >= len(pairs)
        for name, values in ("guidance", guidance), ("loser", loser), ("winner", winner):
            check(
                values.isfinite().all(),
                f"the {name} features of chunk {chunk} are not finite; check the model that made "
                "them, delete the feature cache and run again",
            )
        return Features(guidance, lengths, longest, loser, winner, validation, is_identity)

    def tokens(self, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
        """Compute image tokens (N, K, D) of winners and losers; equal images are encoded once."""
        images, index = distinct([p.winner for p in pairs] + [p.loser for p in pairs])
        starts = range(0, len(images), self.encode_batch)
        tokens = []
        for k in tqdm(starts, desc="image tokens", leave=False):
            batch = images[k : k + self.encode_batch]
            tokens.append(self.tokenizer.tokens(batch).float().cpu())
        return torch.cat(tokens)[index].split(len(pairs))


def identity_samples(pairs: list[Pair], share: float) -> list[Pair]:
    """Make up to `share` of the pairs' winners their own targets (winner = loser).

    They teach the aligner to leave good images alone; the paper has none, and its aligner only ever
    sees wrong images. Only winners that lose under another prompt are taken: what wins everywhere
    may be of a kind that the aligner is never asked about.
    """
    losers = {image_key(pair.loser) for pair in pairs}
    candidates = [pair for pair in pairs if image_key(pair.winner) in losers]
    chosen = candidates[: round(share * len(pairs))]
    return [Pair(pair.prompt, pair.winner, pair.winner) for pair in chosen]


def image_key(image: Image) -> object:
    """Return a key that images of equal bytes share."""
    return getattr(image, "digest", id(image))


def distinct(images: list[Image]) -> tuple[list[Image], list[int]]:
    """Drop repeated images; also returns the index of every image among those that are left."""
    keys = [image_key(image) for image in images]
    once = dict(zip(keys, images))
    index = {key: k for k, key in enumerate(once)}
    return list(once.values()), [index[key] for key in keys]


# A folder of features


class Shards:
    """Samples of several files, indexed like one `Features` and read from disk on demand."""

    def __init__(self, parts: list[Features]):
        self.parts = parts
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self.validation = torch.cat([part.validation for part in parts])
        self.sample_bytes = parts[0].sample_bytes

    def __len__(self) -> int:
        return len(self.validation)

    def __getitem__(self, index: Tensor) -> Features:
        """Read the samples of `index` (B,) into memory."""
        shards, pieces = torch.bucketize(index, self.ends, right=True), []
        for k, part in enumerate(self.parts):
            pieces.append(part[index[shards == k] - (self.ends[k] - len(part))])
        order = shards.argsort(stable=True).argsort()
        return Features.join(pieces)[order]


class FeatureCache:
    """A folder with one shard of features per chunk of a stream, for ablations.

    All caches in the same parent folder together take at most `limit` bytes: at 6.8 MB a sample for
    SDXL, a cache holds the first pairs of a stream and not all. `provenance` describes all that the
    features depend on. A cache built with other settings is rejected, by the first difference.
    """

    def __init__(self, folder: Path, provenance: dict[str, str], limit: float):
        self.folder, self.limit = folder, limit
        self.path, self.note = folder / "cache.json", {"making": provenance}
        advice = f"delete {folder} to compute them anew, or choose another --cache-dir"
        if self.path.exists():
            self.note = read_json(
                self.path, dict, advice, inspect=lambda n: (n["making"].keys(), +n.get("full", 0))
            )
        before = self.note["making"]
        for name in [*provenance, *before]:
            was, now = before.get(name), provenance.get(name)
            check(
                was == now,
                f"{folder}: these features were made with {name} {was}, this run has {now}; "
                f"{advice}",
            )

    def _shard(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}.safetensors"

    @property
    def files(self) -> list[Path]:
        """List the shards in order, up to the first missing one."""
        return list(takewhile(Path.exists, map(self._shard, count())))

    @property
    def room(self) -> float:
        """Bytes left for another shard."""
        shards = self.folder.parent.rglob("*.safetensors")
        return self.limit - sum(file.stat().st_size for file in shards)

    @property
    def complete(self) -> bool:
        """True if it holds every pair, or if another shard would not fit."""
        every_pair = len(self.files) == self.note.get("shards")
        return bool(self.files) and (every_pair or self.room <= self.note.get("full", -1))

    def collect(
        self, stream: Stream[Pair], encoder: Callable[[], Encoder], share: Share = EVERYTHING
    ) -> None:
        """Compute the missing shards, until the stream ends or the cache is full.

        `encoder` is called when features are missing. With a `share` of the chunks, several
        processes fill one folder. Raises UserError if not even the first chunk fits.
        """
        rank, world = share
        self._write_note()
        position, chunks = START, None
        while True:
            # A shard knows where the next chunk starts, so its own pairs are not read again.
            file = self._shard(position.chunk)
            if file.exists():
                position = self._read_note(file)[0]
                chunks = None
                continue
            chunks = chunks or prefetch(stream.chunks(position))
            chunk = next(chunks, None)
            if chunk is None:
                self._write_note(shards=position.chunk)
                return
            position = chunk.next_position
            if chunk.position.chunk % world != rank:
                continue
            state = encoder()(chunk.items, chunk.position.chunk).state_dict()
            size = sum(value.nbytes for value in state.values()) + 4096  # of the file's header
            if size > self.room:
                check(
                    self.files,
                    f"{self.folder.parent}: has no room for the {size / 1e9:.3g} GB of features of "
                    f"{len(chunk.items)} pairs; raise --cache-gb, lower --max-pairs, delete old "
                    "caches there, or compute features in every epoch with --cache-dir none",
                )
                self._write_note(full=self.room)
                return
            images = [p.winner for p in chunk.items] + [p.loser for p in chunk.items]
            files = {str(image.file): version(image.file) for image in images if image.file}
            note = {"after": asdict(position), "digest": digest(state, position), "files": files}
            write_weights(file, state, {"note": json.dumps(note)})

    def open(self) -> Shards:
        """Map all shards.

        Raises UserError if one is damaged or there is none, or if an image file was replaced.
        """
        check(self.files, f"{self.folder}: holds no features; there was no pair to compute them of")
        parts = []
        for file in tqdm(self.files, desc="checking features", leave=False, delay=2):
            position, expected, images = self._read_note(file)
            for image, made_with in images.items():
                same = not Path(image).exists() or version(Path(image)) == made_with
                check(same, f"{file}: made with another {image}; delete it and run again")
            state = read_weights(file)
            same = digest(state, position) == expected
            check(same, f"{file}: damaged (its digest is another); delete it and run again")
            parts.append(Features(**state))
        return Shards(parts)

    def _read_note(self, file: Path) -> tuple[StreamPosition, str, dict]:
        """Read a shard's note: position of the chunk after it, digest, and files of its images."""
        try:
            note = json.loads(read_metadata(file)["note"])
            return StreamPosition(**note["after"]), note["digest"], note["files"]
        except (SafetensorError, TypeError, LookupError, ValueError) as error:
            kind = type(error).__name__
            raise UserError(f"{file}: damaged ({kind}); delete it and run again") from None

    def _write_note(self, **changes: float) -> None:
        self.note |= changes
        writable_folder(self.folder)
        write_whole(self.path, json.dumps(self.note, indent=1))


def digest(state: dict[str, Tensor], position: StreamPosition) -> str:
    """Compute a checksum that shows a flipped bit; it takes a second per GB."""
    value = zlib.crc32(json.dumps(asdict(position)).encode())
    for name, tensor in sorted(state.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy(), value)
    return f"{value:08x}"


# Training data: parts that are in memory together, and endless batches of them


@dataclass
class Part:
    """Data at hand together: a chunk of a stream, or everything. `data[index]` is a batch."""

    data: Any
    samples: Tensor  # indices of the samples to train on
    position: StreamPosition = START


class CachedData:
    """Samples of a `FeatureCache`, which is completed first; `unseen` are for validation.

    `encoder` loads the models, if features are missing. Several processes compute features
    together, and each of them sees all samples.
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
                cache.collect(stream, encoder, ranks.share)
        self.data = cache.open()
        self.unseen = _validation_samples(self.data)
        self.description = (
            f"{len(self.data)} samples in {cache.folder}, {self.data.validation.sum()} of them for "
            "validation"
        )

    def batches(self, batch_size: int, seed: int, ranks: Ranks) -> "Batches":
        """Return endless batches that ranks share. Raises UserError if the size is indivisible."""
        ranks.split(batch_size, "--batch-size")
        return Batches(self.parts, batch_size, seed, ranks.share, shared=True)

    def parts(self, position: StreamPosition) -> Iterator[Part]:
        """Yield the single part, whatever the position."""
        yield Part(self.data, (~self.data.validation).nonzero().flatten())


class StreamedData:
    """A chunk of samples at a time, while the next one is read; each process has its own stream.

    `encode(items, chunk number)` makes data that are indexed by tensors, with `validation` (N,).
    The first chunk holds the samples for validation, `unseen`. Raises UserError if the stream is
    empty; `what` names its items.
    """

    def __init__(self, stream: Stream, encode: Callable[[list, int], Any], what: str = PREFERENCE):
        self.stream, self.encode = stream, encode
        chunk = next(stream.chunks(), None)
        check(chunk is not None, f"{stream.source}: holds no {what}")
        first_part = self._encode(chunk)
        self.unseen = _validation_samples(first_part.data)
        self.first = first_part, chunk.next_position
        self.description = f"a stream of {stream.source}, {len(chunk.items):,} rows at a time"

    def batches(self, batch_size: int, seed: int, ranks: Ranks) -> "Batches":
        """Return batches of this rank's own files. Raises UserError if the size is indivisible."""
        return Batches(self.parts, ranks.split(batch_size, "--batch-size"), seed)

    def parts(self, position: StreamPosition) -> Iterator[Part]:
        """Yield encoded chunks from `position` to the end of an epoch."""
        if position == START and self.first:
            part, position = self.first
            # A first chunk that is the whole source serves every epoch.
            if self.stream.size:
                self.first = None
            yield part
        for chunk in prefetch(self.stream.chunks(position)):
            if not all(item.validation for item in chunk.items):
                yield self._encode(chunk)

    def _encode(self, chunk: Chunk) -> Part:
        """Encode a chunk; only the first one spends the models on validation samples."""
        number, items = chunk.position.chunk, chunk.items
        if number > 0:
            items = [item for item in items if not item.validation]
        data = self.encode(items, number)
        return Part(data, (~data.validation).nonzero().flatten(), chunk.position)


def _validation_samples(data: Any) -> Any:
    """Select the samples for validation, as many as fit into a gigabyte."""
    most = int(MAX_VALIDATION_BYTES / getattr(data, "sample_bytes", 1))
    return data[data.validation.nonzero().flatten()[:most]]


@dataclass
class Batches:
    """Endless iterator over batches: parts in order, samples reshuffled in each part every epoch.

    `parts(position)` yields the parts from a position to the end of an epoch. A part's last samples
    are left out if they do not fill a batch. With a `share`, each batch is that part of the batch
    that several processes share. A run resumed from a `state_dict` sees the same batches.
    """

    parts: Callable[[StreamPosition], Iterator[Part]]
    batch_size: int
    seed: int
    share: Share = EVERYTHING
    shared: bool = False  # all ranks are at the same position
    epoch: int = 0
    position: StreamPosition = START  # of the part
    batch: int = 0  # number of batches of this part that have been given
    where: str = ""  # describes the latest batch in messages

    def __iter__(self) -> Iterator[Any]:
        rank, world = self.share
        while True:
            yielded_any = self.position != START or self.batch > 0
            for part in self.parts(self.position):
                self.position = part.position
                total, chunk = len(part.samples), part.position.chunk
                per_epoch = max(1, total // self.batch_size) if total else 0
                seed = (self.seed + ORDER_SEEDS * chunk) * EPOCH_SEEDS + self.epoch
                order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
                while self.batch < per_epoch:
                    batch = slice(self.batch * self.batch_size, (self.batch + 1) * self.batch_size)
                    index = part.samples[order[batch]][rank::world]
                    fair = len(index) * world == min(self.batch_size, total)
                    check(fair, f"{total} samples: too few for {world} processes to share")
                    self.batch += 1
                    self.where = f"samples {index.tolist()[:8]}... of chunk {chunk}"
                    yielded_any = True
                    yield part.data[index]
                self.batch = 0
            check(
                yielded_any,
                "there is nothing to train on: no pair has a preference, or all are for validation",
            )
            self.epoch += 1
            self.position = START

    def state_dict(self) -> dict:
        """Return the epoch, the position of the part, and the number of its batches given."""
        return {"epoch": self.epoch, "position": asdict(self.position), "batch": self.batch}

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`."""
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.position = StreamPosition(**state["position"])
