"""Perceiver attention: a few tokens look at a long context and at themselves.

The Resampler of IP-Adapter Plus and IMG's Implicit Aligner (Fig. 10) are both stacks of this block, so it lives here
once. Parameter names follow the public IP-Adapter files, which therefore load without renaming:

    layers.{i}.0.{norm1, norm2, to_q, to_kv, to_out}    PerceiverAttention
    layers.{i}.1.{0, 1, 3}                              feed_forward
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class PerceiverAttention(nn.Module):
    """Queries: N tokens. Keys and values: L context features followed by the N tokens themselves.

    Written out rather than fused: it reads like the formula, and with N = 16 the attention map is too small for a
    fused kernel to save anything. torch's fused attention is its oracle in the tests.
    """

    def __init__(self, width: int, heads: int, head_dim: int = 64):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        inner = heads * head_dim  # may differ from width: SDXL's aligner has 20 x 64 = 1280 inside 2048
        self.norm1 = nn.LayerNorm(width)  # of the context
        self.norm2 = nn.LayerNorm(width)  # of the tokens
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)  # keys are the first half
        self.to_out = nn.Linear(inner, width, bias=False)

    def attend(self, tokens: Tensor, context: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Like `forward`, but returns (output (B, N, D), attention weights (B, heads, N, L + N) in fp32)."""
        context, tokens = self.norm1(context), self.norm2(tokens)
        q = self.to_q(tokens)  # (B, N, heads * d)
        k, v = self.to_kv(torch.cat([context, tokens], dim=1)).chunk(2, dim=-1)  # 2 x (B, L + N, heads * d)
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=self.heads) for x in (q, k, v))
        scores = (q * self.head_dim**-0.5) @ k.mT  # (B, heads, N, L + N); fp16 could overflow were q not scaled first
        if mask is not None:
            sees = F.pad(mask.bool(), (0, tokens.shape[1]), value=True)  # tokens always see themselves
            scores = scores.masked_fill(~sees[:, None, None], -torch.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32)  # half precision would lose the tail of a long context
        out = rearrange(weights.to(v.dtype) @ v, "b h n d -> b n (h d)")
        return self.to_out(out), weights

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the tokens (B, N, D) read from the context (B, L, D) and from each other: (B, N, D), no residual.

        mask (B, L): True where the context is valid, False where it is padding.
        """
        return self.attend(tokens, context, mask)[0]


def feed_forward(width: int, mult: int = 4) -> nn.Sequential:
    """LayerNorm and a two-layer perceptron, `mult` times wider inside: (B, N, D) -> (B, N, D), no residual."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, mult * width, bias=False),
        nn.GELU(),
        nn.Linear(mult * width, width, bias=False),
    )


class PerceiverLayers(nn.ModuleList):
    """`depth` times [PerceiverAttention, feed_forward], each added to its input (Fig. 10)."""

    def __init__(self, width: int, depth: int, heads: int, head_dim: int = 64):
        super().__init__(
            nn.ModuleList([PerceiverAttention(width, heads, head_dim), feed_forward(width)]) for _ in range(depth)
        )

    def forward(
        self, tokens: Tensor, context: Tensor, mask: Tensor | None = None, maps: list[Tensor] | None = None
    ) -> Tensor:
        """tokens (B, N, D), context (B, L, D), mask (B, L) with True = valid -> tokens (B, N, D).

        A list given as `maps` receives each layer's attention weights (B, heads, N, L + N) in fp32.
        """
        for attention, mlp in self:
            read, weights = attention.attend(tokens, context, mask)
            if maps is not None:
                maps.append(weights)
            tokens = tokens + read
            tokens = tokens + mlp(tokens)
        return tokens


def layer_sizes(state: dict[str, Tensor], head_dim: int = 64) -> dict[str, int]:
    """depth, heads and head_dim of the `PerceiverLayers` that a state dict holds under `layers.`.

    Heads leave no trace in the shapes, so their width has to be known: it is 64 in all public files. KeyError when
    there is no such layer.
    """
    depth = len({key.split(".")[1] for key in state if key.startswith("layers.")})
    return {"depth": depth, "heads": state["layers.0.0.to_q.weight"].shape[0] // head_dim, "head_dim": head_dim}
