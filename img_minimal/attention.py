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

    def keys_values(self, context: Tensor) -> Tensor:
        """What a context (B, L, D) gives to every pass alike, so that it is computed once: 2 x (B, heads, L, d)."""
        return self._heads(self.to_kv(self.norm1(context)), 2)

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """(B, n, parts * heads * d) -> (parts, B, heads, n, d)."""
        return rearrange(x, "b n (p h d) -> p b h n d", p=parts, h=self.heads)

    def attend(self, tokens: Tensor, keys_values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Like `forward`, from a context's `keys_values`; also returns the weights (B, heads, N, L + N) in fp32."""
        tokens = self.norm2(tokens)
        k, v = keys_values  # of the context, (B, heads, L, d)
        own_k, own_v = self._heads(self.to_kv(tokens), 2)  # (B, heads, N, d)
        (q,) = self._heads(self.to_q(tokens), 1)
        q = q * self.head_dim**-0.5  # before the product, which could overflow fp16 otherwise
        scores = torch.cat([q @ k.mT, q @ own_k.mT], dim=-1)  # (B, heads, N, L + N)
        if mask is not None:
            sees = F.pad(mask.bool(), (0, tokens.shape[1]), value=True)  # tokens always see themselves
            scores = scores.masked_fill(~sees[:, None, None], -torch.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32)  # half precision would lose the tail of a long context
        of_context, of_tokens = weights.to(v.dtype).split([k.shape[2], own_k.shape[2]], dim=-1)
        out = of_context @ v + of_tokens @ own_v  # (B, heads, N, d)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)")), weights

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the tokens (B, N, D) read from the context (B, L, D) and from each other: (B, N, D), no residual.

        mask (B, L): True where the context is valid, False where it is padding.
        """
        return self.attend(tokens, self.keys_values(context), mask)[0]


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

    def keys_values(self, context: Tensor) -> list[Tensor]:
        """Each layer's keys and values of a context (B, L, D), for several calls of `read`."""
        return [attention.keys_values(context) for attention, _ in self]

    def read(
        self,
        tokens: Tensor,
        keys_values: list[Tensor],
        mask: Tensor | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Like `forward`, from a context's `keys_values`.

        A list given as `maps` receives each layer's attention weights (B, heads, N, L + N) in fp32.
        """
        for (attention, mlp), context in zip(self, keys_values):
            read, weights = attention.attend(tokens, context, mask)
            if maps is not None:
                maps.append(weights)
            tokens = tokens + read
            tokens = tokens + mlp(tokens)
        return tokens

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens (B, N, D), context (B, L, D), mask (B, L) with True = valid -> tokens (B, N, D)."""
        return self.read(tokens, self.keys_values(context), mask)


def layer_sizes(state: dict[str, Tensor], head_dim: int = 64) -> dict[str, int]:
    """depth, heads and head_dim of the `PerceiverLayers` that a state dict holds under `layers.`.

    Heads leave no trace in the shapes, so their width has to be known: it is 64 in all public files. KeyError when
    there is no such layer.
    """
    depth = len({key.split(".")[1] for key in state if key.startswith("layers.")})
    return {"depth": depth, "heads": state["layers.0.0.to_q.weight"].shape[0] // head_dim, "head_dim": head_dim}
