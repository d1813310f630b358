"""Decoupled cross-attention (IP-Adapter): image tokens condition a UNet beside its text, and leave no trace.

Each cross-attention of the UNet gets a second pair of key and value projections, for the image tokens. Its output is

    to_out( Attention(Q, K_text, V_text) + scale * Attention(Q, K_image, V_image) )

`ImageBranch` holds these projections; `inject` puts them to work for the length of a `with` block:

    branch = ImageBranch.for_unet(unet)
    with inject(unet, branch, tokens, scale=0.2):
        noise = unet(latents, t, text, ...).sample

Written for SDXL's UNet, whose cross-attentions have no group, spatial or query/key norms.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor, nn

from img_minimal.backbones import check_injected


def cross_attentions(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """The UNet's cross-attentions; each key is the layer's place among *all* attention processors.

    That is how IP-Adapter files number them: odd ones only, and down blocks before up blocks before the middle.
    """
    names = enumerate(unet.attn_processors)
    return {str(i): unet.get_submodule(n.removesuffix(".processor")) for i, n in names if "attn2" in n.split(".")}


class ImageBranch(nn.ModuleDict):
    """Keys and values of the image tokens, a pair of projections (D -> layer width) per cross-attention.

    Parameter names are `{N}.to_k_ip.weight` and `{N}.to_v_ip.weight`, as under `ip_adapter.` in the public files.
    """

    @classmethod
    def for_unet(
        cls, unet: UNet2DConditionModel, token_width: int | None = None, device: torch.device | None = None
    ) -> Self:
        """A new branch in the UNet's dtype, for image tokens of width `token_width` (default: as wide as the text's).

        Where the widths agree it starts as a copy of the text branch, so that image tokens near the text's
        embeddings mean something from the first step on; otherwise it starts at random.
        """
        branch = cls()
        for key, attn in cross_attentions(unet).items():
            branch[key] = nn.ModuleDict()
            for name, text in (("to_k_ip", attn.to_k), ("to_v_ip", attn.to_v)):
                width = token_width or text.in_features
                like = {"dtype": text.weight.dtype, "device": device or text.weight.device}
                branch[key][name] = nn.Linear(width, text.out_features, bias=False, **like)
                if width == text.in_features and not text.weight.is_meta:
                    branch[key][name].load_state_dict({"weight": text.weight.detach()})
        return branch


class DecoupledAttention:
    """Attention processor of one cross-attention: text as in diffusers' AttnProcessor2_0, plus the image tokens."""

    def __init__(self, projections: nn.ModuleDict, tokens: Tensor, scale: float | Tensor):
        self.projections, self.tokens, self.scale = projections, tokens, scale
        self.keys_values: tuple[Tensor, Tensor] | None = None

    def image_keys_values(self) -> tuple[Tensor, Tensor]:
        """Projected image tokens, 2 x (B, N, width): the same in every denoising step, hence computed once.

        Not when gradients are on: each training step needs a graph of its own.
        """
        if torch.is_grad_enabled():
            return self.projections["to_k_ip"](self.tokens), self.projections["to_v_ip"](self.tokens)
        if self.keys_values is None:
            self.keys_values = self.projections["to_k_ip"](self.tokens), self.projections["to_v_ip"](self.tokens)
        return self.keys_values

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Spatial features (B, S, C), text (B, T, E) -> (B, S, C). Raises ValueError if B is not that of the tokens."""
        batch, residual, text = len(hidden_states), hidden_states, encoder_hidden_states
        if batch != len(self.tokens):
            raise ValueError(
                f"the UNet sees a batch of {batch}, but there are image tokens for {len(self.tokens)}: with "
                "classifier-free guidance the batch is doubled, so pass torch.cat([negative, positive])"
            )
        if attention_mask is not None:  # (B, 1, T) -> (B, heads, 1, T)
            attention_mask = attn.prepare_attention_mask(attention_mask, text.shape[1], batch)
            attention_mask = rearrange(attention_mask, "(b h) q t -> b h q t", b=batch)
        query, key, value, image_key, image_value = self.project(attn, hidden_states, text)
        out = merge(F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask))
        image = merge(F.scaled_dot_product_attention(query, image_key, image_value))  # the same query for both

        scale = self.scale
        if isinstance(scale, Tensor):
            scale = scale.to(image)[:, None, None] if scale.ndim else scale.item()
        linear, dropout = attn.to_out
        out = dropout(linear(out + scale * image))
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor

    def project(self, attn: Attention, hidden_states: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """Query (B, heads, S, d), key and value of the text (B, heads, T, d), and of the image (B, heads, N, d)."""
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        query, key, value = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        both = (query, key, value, *(x.to(query.dtype) for x in self.image_keys_values()))
        return tuple(rearrange(x, "b n (h d) -> b h n d", h=attn.heads) for x in both)

    @torch.no_grad()
    def attend(self, attn: Attention, hidden_states: Tensor, text: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Both branches opened up, for looking at them: {"text" and "image": (output (B, S, C), weights)}.

        Outputs are those of the formula above, before `to_out` and without the scale; weights (B, heads, S, T or N)
        are in fp32. Text is taken to be without a mask, as in SDXL.
        """
        query, *keys_values = self.project(attn, hidden_states, text)
        branches = {}
        for name, key, value in zip(("text", "image"), keys_values[::2], keys_values[1::2]):
            scores = (query * query.shape[-1] ** -0.5) @ key.mT
            weights = scores.softmax(dim=-1, dtype=torch.float32)
            branches[name] = merge(weights.to(value.dtype) @ value), weights
        return branches


def merge(heads: Tensor) -> Tensor:
    """(B, heads, S, d) -> (B, S, heads * d)."""
    return rearrange(heads, "b h n d -> b n (h d)")


@contextmanager
def inject(
    unet: UNet2DConditionModel, branch: ImageBranch, tokens: Tensor, scale: float | Tensor
) -> Iterator[UNet2DConditionModel]:
    """Within this context the UNet also attends to `tokens`; afterwards, also after an error, it is as before.

    tokens (B, N, D): for the batch that the UNet will see, with classifier-free guidance
    `torch.cat([negative, positive])`. scale: one number, or a tensor (B,) with one per sample, or a tensor () that may
    be changed in place between calls. With the number 0 the UNet is not touched at all. Do not change the branch's
    weights within the context; with gradient checkpointing run the backward pass within it too, because that calls
    the UNet again.
    Raises ValueError if tokens, scale or branch do not fit; a wrong batch is noticed when the UNet is called.
    """
    if not isinstance(scale, Tensor) and scale == 0:
        yield unet
        return
    layers = cross_attentions(unet)
    if layers.keys() != branch.keys():
        raise ValueError(
            f"the image branch has {len(branch)} layers, the UNet {len(layers)} cross-attentions, or their numbers "
            "differ: use the IP-Adapter made for this UNet"
        )
    weight = next(branch.parameters())
    check_injected(tokens, weight.shape[1], scale)
    tokens = tokens.to(weight)
    before = {key: attn.processor for key, attn in layers.items()}
    try:
        for key, attn in layers.items():
            attn.set_processor(DecoupledAttention(branch[key], tokens, scale))
        yield unet
    finally:
        for key, attn in layers.items():
            attn.set_processor(before[key])
