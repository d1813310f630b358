"""Frozen features for training the aligner, computed once and kept with a fingerprint of what made them.

No diffusion model takes part in aligner training: a pair becomes two sets of image tokens and the MLLM's features of
its non-preferred image, and these are all that the training loop sees.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from img_minimal.errors import UserError
from img_minimal.pairs import Pair
from img_minimal.pipeline import Guidance, Painter, look
from img_minimal.presets import Preset
from img_minimal.questions import QUESTIONS
from img_minimal.weights import read_metadata, read_weights, write_safetensors


@dataclass
class Features:
    """N samples: what the aligner gets (guidance, mask, loser) and what it should answer (winner)."""

    guidance: Tensor  # (N, L, H) bf16
    mask: Tensor  # (N, L)
    loser: Tensor  # (N, K, D): c_l, the tokens to correct
    winner: Tensor  # (N, K, D): c_w
    validation: Tensor  # (N,): not to be trained on
    kept: Tensor  # (N,): the winner as its own target (c_l = c_w)

    def __len__(self) -> int:
        return len(self.loser)

    def __getitem__(self, i: Tensor) -> "Features":
        """The samples of index `i`."""
        return Features(*(getattr(self, field.name)[i] for field in fields(self)))

    def check_finite(self) -> None:
        """Raises UserError naming the first sample that holds a NaN or an infinity."""
        for name in ("guidance", "loser", "winner"):
            for start in range(0, len(self), 1000):
                bad = (~getattr(self, name)[start : start + 1000].isfinite()).flatten(1).any(1).nonzero()
                if len(bad):
                    raise UserError(
                        f"the {name} features of sample {start + int(bad[0])} are not finite; check the model that "
                        "made them, delete the feature cache and run again"
                    )


def compute_tokens(pairs: list[Pair], painter: Painter, keep_share: float) -> dict[str, Tensor]:
    """Image tokens of all pairs, and of `keep_share` x as many winners that are their own target.

    Without the latter (the paper has none) an aligner is only ever shown images that are wrong.
    """
    kept = pairs[: round(keep_share * len(pairs))]
    winner = painter.tokens([p.winner for p in pairs], progress="tokens of winners")
    loser = painter.tokens([p.loser for p in pairs], progress="tokens of losers")
    return {
        "loser": torch.cat([loser, winner[: len(kept)]]),
        "winner": torch.cat([winner, winner[: len(kept)]]),
        "validation": torch.tensor([p.validation for p in [*pairs, *kept]]),
        "kept": torch.arange(len(pairs) + len(kept)) >= len(pairs),
    }


def compute_guidance(pairs: list[Pair], guide: Guidance, keep_share: float, seed: int) -> dict[str, Tensor]:
    """Guidance features of the same samples, in the same order; `seed` draws the questions."""
    kept = pairs[: round(keep_share * len(pairs))]
    images = [p.loser for p in pairs] + [p.winner for p in kept]
    guidance, mask = look(guide, images, [p.prompt for p in [*pairs, *kept]], seed, progress="guidance features")
    return {"guidance": guidance, "mask": mask}


def fingerprint(preset: Preset, models: list[str], seed: int) -> str:
    """Of everything that features depend on: models, pairs, their number, question bank, share, seed."""
    parts = [QUESTIONS, preset.keep_share, preset.max_pairs, seed]
    parts += [file_print(Path(p)) for p in (*models, preset.pairs)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def file_print(path: Path) -> list:
    """Name, size and three samples of every file below a path: fast for 26 GB, and different after a retraining."""
    files, prints = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path], []
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            samples = hashlib.sha256()
            for offset in (0, size // 2, max(0, size - 65_536)):
                stream.seek(offset)
                samples.update(stream.read(65_536))
        prints.append([file.name, size, samples.hexdigest()])
    return prints


def cached(path: Path, mark: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `compute` returns, from the cache file if there is one; else computed, and written there atomically.

    Raises UserError if the file is damaged, or was made by other models, pairs, questions or seed (its `mark`).
    """
    if not path.exists():
        state = compute()
        write_safetensors(path, state, {"fingerprint": mark})
        return state
    state = read_weights(path)
    if read_metadata(path).get("fingerprint") != mark:
        raise UserError(
            f"{path}: made by other models, pairs, questions or seed than this run's; delete it to recompute"
        )
    return state
