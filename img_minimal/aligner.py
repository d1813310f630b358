"""The Implicit Aligner (Figs. 9 and 10): correct an image prompt by what an MLLM saw.

    paper    here       shape             SDXL
    h        guidance   (B, L, H)         (B, ~640, 5120)   last hidden states of the MLLM
    c_l      tokens     (B, N, D)         (B, 16, 2048)     image prompt of the first image
    f(h, c)  result     (B, N, D)         (B, 16, 2048)     image prompt of the image to draw

The result is the input plus a correction whose last layer starts at zero, so an untrained aligner
changes nothing.

The attention block is the Perceiver's, as in the Resampler of IP-Adapter Plus: a few tokens attend
to a long context and to themselves. Parameter names are those of the public IP-Adapter files:

    layers.{i}.0.{norm1, norm2, to_q, to_kv, to_out}    PerceiverAttention
    layers.{i}.1.{0, 1, 3}                              feed_forward
"""

from numbers import Integral
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from img_minimal.cli import AnyPath, check
from img_minimal.files import check_finite
from img_minimal.hub.weights import NOTES, fill, opening, read_metadata, read_weights, write_weights


class PerceiverAttention(nn.Module):
    """Let N tokens attend to L context features and to themselves (Fig. 10).

    Written out rather than fused: it reads like the formula, and with N = 16 the attention map is
    too small for a fused kernel to save anything.
    """

    def __init__(self, width: int, heads: int, head_dim: int = 64):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        inner = heads * head_dim  # may differ from width: SDXL's aligner has 20 x 64 inside 2048
        self.norm1 = nn.LayerNorm(width)  # of the context
        self.norm2 = nn.LayerNorm(width)  # of the tokens
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)  # keys are the first half
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(
        self, tokens: Tensor, context: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the update of tokens (B, N, D) from the context (B, L, D), without the residual.

        mask (B, L), bool, is True where the context is valid. Returns the update (B, N, D) and the
        attention weights (B, heads, N, L + N) in fp32, of which each row sums to 1.
        """
        context, tokens = self.norm1(context), self.norm2(tokens)
        split = "b n (p h d) -> p b h n d"
        (q,) = rearrange(self.to_q(tokens), split, p=1, h=self.heads)  # (B, heads, N, d)
        k, v = rearrange(self.to_kv(context), split, p=2, h=self.heads)  # (B, heads, L, d)
        k_self, v_self = rearrange(self.to_kv(tokens), split, p=2, h=self.heads)

        q = q * self.head_dim**-0.5  # scaled before the product, which could overflow in fp16
        scores = torch.cat([q @ k.mT, q @ k_self.mT], dim=-1)  # (B, heads, N, L + N)
        if mask is not None:
            visible = F.pad(mask, (0, tokens.shape[1]), value=True)
            scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
        # In half precision the softmax would lose the tail of a long context.
        weights = scores.softmax(dim=-1, dtype=torch.float32)

        on_context, on_self = weights.to(v.dtype).split([k.shape[2], tokens.shape[1]], dim=-1)
        out = on_context @ v + on_self @ v_self  # (B, heads, N, d)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)")), weights


def feed_forward(width: int, mult: int = 4) -> nn.Sequential:
    """Build LayerNorm and a two-layer perceptron: (B, N, D) -> (B, N, D), without the residual."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, mult * width, bias=False),
        nn.GELU(),
        nn.Linear(mult * width, width, bias=False),
    )


class PerceiverLayers(nn.ModuleList):
    """A stack of PerceiverAttention and feed_forward blocks, each with a residual (Fig. 10)."""

    def __init__(self, width: int, depth: int, heads: int, head_dim: int = 64):
        super().__init__(
            nn.ModuleList([PerceiverAttention(width, heads, head_dim), feed_forward(width)])
            for _ in range(depth)
        )

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Update tokens (B, N, D) from a context (B, L, D) with mask (B, L): (B, N, D).

        The attention weights of each layer are appended to `maps`.
        """
        for attention, mlp in self:
            update, weights = attention(tokens, context, mask)
            tokens = tokens + update
            tokens = tokens + mlp(tokens)
            if maps is not None:
                maps.append(weights)
        return tokens


class ImplicitAligner(nn.Module):
    """Cross-attention from image tokens to guidance features, between two linear layers (Fig. 9).

    The defaults are SDXL's: with width 2048 and guidance_width 5120, 195 million parameters.
    """

    def __init__(
        self, width: int, guidance_width: int, depth: int = 4, heads: int = 20, head_dim: int = 64
    ):
        super().__init__()
        self.width, self.guidance_width, self.head_dim = width, guidance_width, head_dim
        self.guide = ""  # the MLLM it was trained with, or "text", where that is known
        self.proj_in = nn.Linear(guidance_width, width)
        self.layers = PerceiverLayers(width, depth, heads, head_dim)
        self.proj_out = nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)
        self.zero_linear = nn.Linear(width, width)
        # Training starts at "keep the image prompt"; norm_out keeps this layer's gradient alive.
        nn.init.zeros_(self.zero_linear.weight)
        nn.init.zeros_(self.zero_linear.bias)

    def forward(
        self,
        guidance: Tensor,
        tokens: Tensor,
        mask: Tensor | None = None,
        passes: int = 1,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Compute f(h, c) = c + zero_linear(norm_out(proj_out(x))), x being the layers' output.

        guidance (B, L, H), tokens (B, N, D), mask (B, L) with True = valid -> (B, N, D) in the
        aligner's dtype. Each further pass aligns the result again with the same guidance; sampling
        on SDXL uses 3. `maps` receives each layer's attention weights (B, heads, N, L + N). Raises
        UserError if H or D is not what the aligner was trained for, ValueError as `check_shapes`,
        or without a pass.
        """
        check_shapes("blh bnd bl", guidance, tokens, mask)
        check_count("passes", passes, 1_000_000)
        self.check_widths(guidance.shape[-1], tokens.shape[-1])
        dtype = self.proj_in.weight.dtype
        context, tokens = self.proj_in(guidance.to(dtype)), tokens.to(dtype)
        for _ in range(passes):
            x = self.layers(tokens, context, mask, maps)
            tokens = tokens + self.zero_linear(self.norm_out(self.proj_out(x)))
        return tokens

    def check_widths(self, guidance_width: int | None, token_width: int | None) -> None:
        """Raise UserError for guidance or tokens of a width the aligner was not trained for."""
        check(
            guidance_width in (None, self.guidance_width),
            f"this aligner was trained for an MLLM of width {self.guidance_width}, this one has "
            f"width {guidance_width}: use the MLLM it was trained with (5120: LLaVA-1.5-13B, 4096: "
            "LLaVA-1.5-7B), or train an aligner for this one",
        )
        check(
            token_width in (None, self.width),
            f"this aligner was trained for image tokens of width {self.width}, these have "
            f"width {token_width}: use the image prompt (IP-Adapter) it was trained with",
        )

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Note the width of a head, which leaves no trace in the shapes, and the guide."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination._metadata[NOTES] = self.notes

    @property
    def notes(self) -> dict[str, str]:
        """Notes for a file: one, as more would change their order from file to file."""
        return {"head_dim": f"{self.head_dim} {self.guide}".strip()}

    @classmethod
    def from_file(cls, path: AnyPath) -> Self:
        """Load an aligner in fp32 from a file of `save` or a released .pth.

        All sizes follow from the shapes, except for the width of a head, which a state dict notes,
        also in a run's checkpoint.pt, and which is 64 in the released ones. Raises UserError.
        """
        state = read_weights(path, holds="proj_in.weight")
        with opening(path, "trained aligner"):
            width, guidance_width = state["proj_in.weight"].shape
            note = read_metadata(path, state).get("head_dim", "64")
            head_dim, _, guide = note.partition(" ")
            sizes = layer_sizes(state, int(head_dim))
            with torch.device("meta"):  # no initial values, which the file would replace
                aligner = cls(width, guidance_width, **sizes)
        fill(aligner, state, str(path))
        aligner.guide = guide
        return aligner.float()

    def save(self, path: AnyPath) -> None:
        """Write the weights atomically, in the released files' key layout.

        .pth, .pt and .bin are torch files as the authors' code loads them, all others safetensors.
        """
        write_weights(path, self.state_dict(), self.notes)


def layer_sizes(state: dict[str, Tensor], head_dim: int = 64) -> dict[str, int]:
    """Deduce depth and heads of the `PerceiverLayers` under `layers.` in a state dict.

    Heads leave no trace in the shapes, so `head_dim` must be known. Raises KeyError if there are no
    layers, ValueError if heads of this width do not fit.
    """
    depth = len({key.split(".")[1] for key in state if key.startswith("layers.")})
    heads, rest = divmod(state["layers.0.0.to_q.weight"].shape[0], head_dim)
    if rest or heads < 1:
        raise ValueError(f"heads of width {head_dim} do not fit its layers")
    return {"depth": depth, "heads": heads, "head_dim": head_dim}


@torch.no_grad()
def align(
    aligner: ImplicitAligner,
    tokens: Tensor,
    guidance: Tensor,
    mask: Tensor,
    passes: int,
    batch_size: int = 250,
) -> Tensor:
    """Apply f `passes` times in fp32, in batches.

    tokens (B, N, D), guidance (B, L, H), mask (B, L) -> (B, N, D) on the CPU. Raises UserError if
    the guidance is another MLLM's, or if a result is not finite; ValueError as `check_shapes`.
    """
    check_shapes("blh bnd bl", guidance, tokens, mask)
    device = next(aligner.parameters()).device
    aligned = []
    batches = zip(guidance.split(batch_size), tokens.split(batch_size), mask.split(batch_size))
    for h, c, m in batches:
        h, c, m = h.to(device).float(), c.to(device), m.to(device)
        aligned.append(aligner(h, c, m, passes).cpu())
    result = torch.cat(aligned)
    check_finite(result, 0, "the aligned features of image")
    return result


def check_shapes(layout: str, *tensors: Tensor | None) -> None:
    """Raise ValueError, naming all shapes, unless tensors fit a layout as "blh bnd bl".

    Equal letters are equal sizes: a batch of 1 would broadcast, and the answer would look like any
    other. Two letters are a mask, which is torch.bool; everything else is floating-point.
    """
    fits, shapes, sizes = True, [], {}
    for axes, x in zip(layout.split(), tensors):
        if x is not None:
            shapes.append(f"{x.dtype} {tuple(x.shape)}")
            fits &= len(axes) == x.ndim
            fits &= x.dtype == torch.bool if len(axes) == 2 else x.is_floating_point()
            for axis, size in zip(axes, x.shape):
                fits &= size == sizes.setdefault(axis, size)
    if not fits:
        raise ValueError(
            f"{' and '.join(shapes)} do not fit; expected floating-point {layout}, masks torch.bool"
        )


def check_count(name: str, value: int, limit: int) -> None:
    """Raise ValueError unless a value is a whole number from 1 on, and below `limit`."""
    # `in range(...)` would try every number of the range on a fraction.
    if not isinstance(value, Integral) or not 1 <= value < limit:
        raise ValueError(f"{name} is {value}, expected a whole number of at least 1")
