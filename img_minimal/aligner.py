"""The Implicit Aligner (Figs. 9 and 10): from "what is wrong with this image" to a corrected image prompt.

    paper   here        shape                 SDXL
    h       guidance    (B, L, H)             (B, ~640, 5120)   last hidden states of the multimodal LLM
    c_l     tokens      (B, N, D)             (B, 16, 2048)     image prompt of the first image
    f(h, c) the result  (B, N, D)             (B, 16, 2048)     image prompt of the image to draw

The result is the input plus a correction whose last layer starts at zero: an untrained aligner changes nothing.
"""

import json
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from img_minimal.attention import PerceiverLayers, layer_sizes
from img_minimal.files.weights import (
    WeightsError,
    fill,
    read_metadata,
    read_weights,
    write_safetensors,
    write_torch,
)
from img_minimal.runtime.atomic import write_whole
from img_minimal.runtime.errors import UserError
from img_minimal.runtime.json_files import read_json


class ImplicitAligner(nn.Module):
    """Cross-attention from image tokens to guidance features, between two linear layers.

    The defaults are SDXL's: with width 2048 and guidance_width 5120, 195 million parameters.
    """

    def __init__(self, width: int, guidance_width: int, depth: int = 4, heads: int = 20, head_dim: int = 64):
        super().__init__()
        self.width, self.guidance_width, self.head_dim = width, guidance_width, head_dim
        self.proj_in = nn.Linear(guidance_width, width)
        self.layers = PerceiverLayers(width, depth, heads, head_dim)
        self.proj_out = nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)
        self.zero_linear = nn.Linear(width, width)
        # Zero, so that training starts at "keep the image prompt"; norm_out before it keeps its gradient alive.
        nn.init.zeros_(self.zero_linear.weight)
        nn.init.zeros_(self.zero_linear.bias)

    def forward(self, guidance: Tensor, tokens: Tensor, mask: Tensor | None = None, passes: int = 1) -> Tensor:
        """f(h, c) = c + zero_linear(norm_out(proj_out(x))), with x the tokens after the layers (Fig. 9).

        guidance (B, L, H), tokens (B, N, D), mask (B, L) with True = valid guidance -> aligned tokens (B, N, D), in
        the aligner's own dtype. With `passes` above 1 the result is aligned again with the same guidance; sampling
        uses 3. Values are not checked. Raises ValueError if H or D is not what this aligner was built for.
        """
        if guidance.shape[-1] != self.guidance_width:
            raise ValueError(
                f"this aligner was trained for an MLLM of width {self.guidance_width}, the guidance features have "
                f"width {guidance.shape[-1]}: use the MLLM it was trained with, or train an aligner for this one"
            )
        if tokens.shape[-1] != self.width:
            raise ValueError(
                f"this aligner was trained for image tokens of width {self.width}, these have width "
                f"{tokens.shape[-1]}: use the image prompt (IP-Adapter) it was trained with"
            )
        dtype = self.proj_in.weight.dtype
        context = self.layers.keys_values(self.proj_in(guidance.to(dtype)))  # the same in every pass
        tokens = tokens.to(dtype)
        for _ in range(passes):
            x = self.layers.read(tokens, context, mask)  # (B, N, D)
            tokens = tokens + self.zero_linear(self.norm_out(self.proj_out(x)))
        return tokens

    @torch.no_grad()
    def attention_maps(self, guidance: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Where each token looks in the first pass: weights (depth, B, heads, N, L + N), each row summing to 1.

        The first L columns are the guidance features, the last N the tokens themselves.
        """
        dtype = self.proj_in.weight.dtype
        maps: list[Tensor] = []
        context = self.layers.keys_values(self.proj_in(guidance.to(dtype)))
        self.layers.read(tokens.to(dtype), context, mask, maps)
        return torch.stack(maps)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """An fp32 aligner from a file of `save`, or from a released .pth; all sizes but one follow from the shapes.

        The width of a head leaves no trace there. It is read from the notes that `save` puts into every file, or from
        the JSON beside it, and is 64, as in the released files, where neither says so. Raises WeightsError if the file
        is missing, damaged, or holds something else.
        """
        state = read_weights(path, holds="proj_in.weight")
        try:
            width, guidance_width = state["proj_in.weight"].shape
            inner = state["layers.0.0.to_q.weight"].shape[0]
        except KeyError as key:
            raise WeightsError(f"{path}: lacks {key}, so it is not an aligner; check which file it is") from None
        except (AttributeError, ValueError, TypeError):  # a number or a dict where a matrix should be
            raise WeightsError(f"{path}: its weights are no aligner's; check which file it is") from None
        sizes = layer_sizes(state, _head_dim(Path(path), inner))
        with torch.device("meta"):  # no time spent on initial values that the file replaces
            aligner = cls(width, guidance_width, **sizes)
        fill(aligner, state, str(path))
        return aligner.float()

    def save(self, path: str | Path) -> None:
        """Write the weights, atomically, in the key layout of the released files.

        A .pth is what the authors' code loads; any other file is safetensors. The sizes stand beside it as JSON (x.pth,
        x.json).
        """
        path = Path(path)
        state = self.state_dict()
        if path.suffix in (".pth", ".pt", ".bin"):
            write_torch(path, state, {"head_dim": str(self.head_dim)})
        else:
            write_safetensors(path, state, {"head_dim": str(self.head_dim)})
        sizes = {"width": self.width, "guidance_width": self.guidance_width} | layer_sizes(state, self.head_dim)
        write_whole(path.with_suffix(".json"), json.dumps(sizes, indent=1) + "\n")


def _head_dim(path: Path, inner: int) -> int:
    """The width of a head from the file, else from the JSON beside it, else 64; `inner` is that of all heads."""
    known, beside = read_metadata(path).get("head_dim"), path.with_suffix(".json")
    if known is None and beside.is_file():
        known = read_json(beside, dict, "restore it", WeightsError, lambda x: x["head_dim"] + 0)["head_dim"]
    known = 64 if known is None else known
    if not str(known).isdecimal() or int(known) < 1 or inner % int(known):
        raise WeightsError(
            f"{path}: heads of width {known} do not make its {inner}; restore {beside.name}, or the file"
        )
    return int(known)


@torch.no_grad()
def align(
    aligner: ImplicitAligner, tokens: Tensor, features: Tensor, mask: Tensor, passes: int, batch_size: int = 250
) -> Tensor:
    """f applied `passes` times in fp32, in batches: tokens (B, N, D), features (B, L, H), mask (B, L) -> (B, N, D).

    Raises UserError if the features are those of another MLLM, or if a result is not finite.
    """
    device = next(aligner.parameters()).device
    aligned = []
    try:
        for part in zip(features.split(batch_size), tokens.split(batch_size), mask.split(batch_size)):
            h, c, m = (x.to(device) for x in part)
            aligned.append(aligner(h.float(), c, m, passes).cpu())
    except ValueError as error:
        raise UserError(str(error)) from None
    aligned = torch.cat(aligned)
    broken = (~aligned.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise UserError(
            f"the aligned features of image {broken[0]} are not finite; check the MLLM's and aligner's files"
        )
    return aligned
