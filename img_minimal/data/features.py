"""Frozen features for training the aligner: all that the training loop sees of a preference pair.

No diffusion model takes part in aligner training: a pair becomes two sets of image tokens and the MLLM's features of
its non-preferred image. So an `Encoder` holds an image tokenizer and an MLLM, and nothing that draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from img_minimal.backbones import ImageTokenizer
from img_minimal.data.pairs import Pair
from img_minimal.mllm import Guide, cat_padded, guidance_features
from img_minimal.runtime.errors import UserError

NEXT_CHUNK = 1_000_003  # between the seeds of two chunks' questions


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
        return Features(*(getattr(self, field.name)[i] for field in fields(self)))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All samples of the parts, guidance padded to the longest."""
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        join = {"guidance": cat_padded, "mask": cat_padded}
        return cls(**{name: join.get(name, torch.cat)(column) for name, column in columns.items()})

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
            for start in range(0, len(self), 1000):
                bad = (~getattr(self, name)[start : start + 1000].isfinite()).flatten(1).any(1).nonzero()
                if len(bad):
                    raise UserError(
                        f"the {name} features of sample {start + int(bad[0])} are not finite; check the model that "
                        "made them, delete the feature cache and run again"
                    )


@dataclass
class Encoder:
    """The frozen models, and how they are asked; calling it makes features of pairs."""

    tokenizer: ImageTokenizer
    guide: Guide
    identity_share: float  # as many winners as this share of the pairs become samples that are their own target
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
        tokens = compute_tokens(pairs, self.tokenizer, identity, self.encode_batch)
        seed = self.seed + NEXT_CHUNK * chunk
        guidance = compute_guidance(pairs, self.guide, identity, seed, self.mllm_batch)
        features = Features(**tokens, **guidance)
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
    pairs: list[Pair], tokenizer: ImageTokenizer, identity: list[Pair], batch_size: int = 250
) -> dict[str, Tensor]:
    """Image tokens of all pairs, then of the winners of `identity`; an image of several pairs is encoded once."""
    images, number = distinct([p.winner for p in [*pairs, *identity]] + [p.loser for p in pairs])
    starts = tqdm(range(0, len(images), batch_size), desc="image tokens", leave=False)
    tokens = torch.cat([tokenizer.tokens(images[k : k + batch_size]).float().cpu() for k in starts])[number]
    winner, loser = tokens.split([len(pairs) + len(identity), len(pairs)])
    return {
        "loser": torch.cat([loser, winner[len(pairs) :]]),
        "winner": winner,
        "validation": torch.tensor([p.validation for p in [*pairs, *identity]]),
        "is_identity": torch.arange(len(pairs) + len(identity)) >= len(pairs),
    }


def compute_guidance(
    pairs: list[Pair], guide: Guide, identity: list[Pair], seed: int, batch_size: int = 64
) -> dict[str, Tensor]:
    """Guidance features of the same samples, in the same order; `seed`, `seed` + 1, ... draw the questions."""
    images = [p.loser for p in pairs] + [p.winner for p in identity]
    prompts = [p.prompt for p in [*pairs, *identity]]
    guidance, mask = guidance_features(
        guide, images, prompts, range(seed, seed + len(images)), batch_size, progress="guidance features"
    )
    return {"guidance": guidance, "mask": mask}


def _name(image: Image) -> object:
    """The same for images of the same bytes."""
    return getattr(image, "digest", id(image))


def distinct(images: list[Image]) -> tuple[list[Image], list[int]]:
    """Each image once, and for every image its place among them; images of equal bytes are one."""
    place: dict[object, int] = {}
    number = [place.setdefault(_name(image), len(place)) for image in images]
    objects = {_name(image): image for image in images}
    return list(objects.values()), number
