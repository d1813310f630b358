"""A bounded cache of features: safetensors shards in a folder, one a chunk, and a note of everything that made them.

It pays for ablations. SDXL's features take 6.8 MB a sample, so a cache holds the first pairs of a stream and not all.
A cache of another making is refused and named, never used and never silently replaced.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from img_minimal.data.features import Features
from img_minimal.data.pairs import Pair
from img_minimal.data.stream import START, Place, Stream, prefetch
from img_minimal.files.weights import read_metadata, read_weights, write_safetensors
from img_minimal.runtime.atomic import write_whole
from img_minimal.runtime.errors import UserError
from img_minimal.runtime.json_files import read_json


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
        if len(self.parts) == 1 or not len(index):
            return self.parts[0][index]
        part, pieces, places = torch.bucketize(index, self.ends, right=True), [], []
        for p in part.unique().tolist():
            here = (part == p).nonzero().flatten()
            pieces.append(self.parts[p][index[here] - int(self.ends[p]) + len(self.parts[p])])
            places.append(here)
        return Features.join(pieces)[torch.cat(places).argsort()]


def digest(state: dict[str, Tensor], note: dict) -> str:
    """A checksum of tensors and a note: reading 1 GB takes a second, and a flipped bit shows."""
    value = zlib.crc32(json.dumps(note).encode())
    for name in sorted(state):
        value = zlib.crc32(f"{name} {state[name].dtype} {tuple(state[name].shape)}".encode(), value)
        value = zlib.crc32(state[name].contiguous().flatten().view(torch.uint8).numpy(), value)
    return f"{value:08x}"


class FeatureCache:
    """A folder `root/name` of shards that holds at most `limit` bytes, with all caches of the same root.

    `making` says in words what the features depend on. Raises UserError if the folder was made otherwise, naming the
    first thing that differs, or if its note is unreadable.
    """

    def __init__(self, root: Path, name: str, making: dict[str, str], limit: float):
        self.root, self.folder, self.limit = root, root / name, limit
        self.note, self.state = self.folder / "cache.json", {"making": making, "complete": False}
        if self.note.exists():
            self._compare(making)

    def _compare(self, making: dict[str, str]) -> None:
        instead = f"delete {self.folder}, or choose another --cache-dir"
        found = read_json(self.note, dict, instead, check=lambda note: (note["making"].keys(), note["complete"]))
        before = found["making"]
        for key in [*making, *(key for key in before if key not in making)]:
            if before.get(key) != making.get(key):
                raise UserError(
                    f"{self.folder}: these features were made with {key} {before.get(key)}, this run has "
                    f"{making.get(key)}; delete the folder to compute them anew, or choose another --cache-dir"
                )
        self.state = found

    @property
    def files(self) -> list[Path]:
        """The shards from the first one on, in order, up to one that is missing."""
        there = sorted(self.folder.glob("[0-9]*.safetensors"))
        return [file for number, file in enumerate(there) if file == self._shard(number)]

    @property
    def complete(self) -> bool:
        """Nothing is left to compute: every pair is in it, or another shard would not fit."""
        files = len(self.files)
        whole = self.state["complete"] and files == self.state.get("shards", files)  # else somebody deleted one
        return bool(files) and (whole or self.state.get("full_at", 0) >= self._room())

    def _room(self) -> float:
        """Bytes that this cache may take: the limit less what others of the same root take."""
        others = set(self.root.rglob("*.safetensors")) - set(self.files)
        return self.limit - sum(file.stat().st_size for file in others)

    def collect(
        self,
        stream: Stream[Pair],
        encoder: Callable[[list[Pair], int], Features],
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Compute and keep what is missing, until the stream ends or the cache is full; goes on where it stopped.

        Of `share` (r, n) only every n-th chunk from the r-th on is computed: n processes fill one folder. Raises
        UserError if not even the first chunk fits.
        """
        place, chunks = START, None
        while True:
            if (file := self._shard(place.chunk)).exists():
                place, chunks = self._after(file), None
                continue
            chunks = chunks or prefetch(stream.chunks(place))
            if (chunk := next(chunks, None)) is None:
                break
            place = chunk.after
            if chunk.place.chunk % share[1] != share[0]:
                continue
            features = encoder(chunk.items, chunk.place.chunk)
            size, room = sum(x.nbytes for x in features.state_dict().values()), self._room()
            if sum(file.stat().st_size for file in self.files) + size + 4096 > room:  # a file has a header
                if not self.files:
                    raise UserError(
                        f"{self.root}: the features of {len(chunk.items)} pairs take {size / 1e9:.3g} GB, and there is "
                        f"room for {max(0.0, room) / 1e9:.3g}; raise --cache-gb, lower --max-pairs, delete old caches "
                        "there, or compute features in every epoch with --cache-dir none"
                    )
                self._write_note(full_at=room)
                return
            self._write_note()
            after = asdict(chunk.after)
            note = {"after": after, "digest": digest(features.state_dict(), after)}
            write_safetensors(self._shard(chunk.place.chunk), features.state_dict(), {"note": json.dumps(note)})
        if share == (0, 1) or len(self.files) == place.chunk:  # else others are still at it
            self._write_note(complete=True, shards=len(self.files))

    def _shard(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}.safetensors"

    def _after(self, file: Path) -> Place:
        """The place of what follows a shard."""
        try:
            return Place(**json.loads(read_metadata(file)["note"])["after"])
        except (SafetensorError, TypeError, LookupError, ValueError) as error:
            raise UserError(f"{file}: damaged ({type(error).__name__}); delete it and run again") from None

    def open(self) -> Shards:
        """All samples, their digests compared. Raises UserError if a shard is damaged, or if there is none."""
        if not self.files:
            raise UserError(f"{self.folder}: holds no features; there was no pair to compute them of")
        files = tqdm(self.files, desc="checking features", leave=False, delay=2)
        return Shards([self._read(file) for file in files])

    def _read(self, file: Path) -> Features:
        try:
            state, note = read_weights(file), json.loads(read_metadata(file)["note"])
            if digest(state, note["after"]) != note["digest"]:
                raise ValueError("its digest is another")
            return Features(**state)
        except (UserError, TypeError, LookupError, AttributeError, ValueError) as error:
            raise UserError(f"{file}: damaged ({error}); delete it and run again") from None

    def _write_note(self, **changes: object) -> None:
        self.state |= changes
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.note, json.dumps(self.state, indent=1))
