"""Decoupled attention (XLabs' IP-Adapter for FLUX): image tokens condition a transformer, and leave no trace.

Each double-stream block gets a second pair of key and value projections, for the image tokens. Its image stream becomes

    image = block(image, text) + scale * Attention(Q, K_image, V_image)

with Q the block's own query of the image positions, normalised and not yet rotated. Text positions see no image tokens;
the sum comes after the block's MLP, without output projection or gate. The single-stream blocks stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention
from einops import rearrange
from torch import Tensor, nn

from img_minimal.backbones import check_injected


class ImageBranch(nn.ModuleDict):
    """Keys and values of the image tokens, a pair of projections (D -> model width) for each double-stream block.

    Parameter names are `{i}.to_k_ip.{weight, bias}` and `{i}.to_v_ip.{weight, bias}`, i the block's number.
    """

    @classmethod
    def for_transformer(cls, transformer: FluxTransformer2DModel, token_width: int | None = None) -> Self:
        """A new branch in the transformer's dtype, for tokens of `token_width` (default: as wide as the text's)."""
        width = token_width or transformer.config.joint_attention_dim
        like = {"dtype": transformer.dtype, "device": transformer.device}
        pair = ("to_k_ip", "to_v_ip")
        return cls(
            {
                str(i): nn.ModuleDict({name: nn.Linear(width, transformer.inner_dim, **like) for name in pair})
                for i in range(len(transformer.transformer_blocks))
            }
        )


class DecoupledAttention:
    """Attention processor of one double-stream block: its own, plus the image tokens.

    Returns three tensors; diffusers' block adds the third to the image stream after its MLP.
    """

    def __init__(self, own: object, projections: nn.ModuleDict, tokens: Tensor, scale: Tensor | float):
        self.own, self.scale = own, scale
        # The same in every denoising step, hence computed once: (B, N, width).
        self.keys, self.values = projections["to_k_ip"](tokens), projections["to_v_ip"](tokens)

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image stream (B, S, C) and text stream (B, T, C) -> (image (B, S, C), text (B, T, C), to add (B, S, C))."""
        batch = len(hidden_states)
        if batch != len(self.keys):
            raise ValueError(
                f"the transformer sees a batch of {batch}, but there are image tokens for {len(self.keys)}: with true "
                "classifier-free guidance the batch is doubled, so pass torch.cat([negative, positive])"
            )
        queries: list[Tensor] = []  # overheard, so that the block's own processor stays as it is
        overhear = attn.to_q.register_forward_hook(lambda module, args, output: queries.append(output))
        try:
            image, text = self.own(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        finally:
            overhear.remove()
        query = queries[0] if queries else attn.to_q(hidden_states)  # a processor of fused projections asks another
        query, key, value = (
            rearrange(x, "b n (h d) -> b h n d", h=attn.heads) for x in (query, self.keys, self.values)
        )
        heard = F.scaled_dot_product_attention(attn.norm_q(query), key.to(query.dtype), value.to(query.dtype))
        scale = self.scale
        if isinstance(scale, Tensor):
            scale = scale.to(heard)[:, None, None] if scale.ndim else scale.item()
        return image, text, scale * rearrange(heard, "b h n d -> b n (h d)")


@contextmanager
def inject(
    transformer: FluxTransformer2DModel, branch: ImageBranch, tokens: Tensor, scale: float | Tensor
) -> Iterator[FluxTransformer2DModel]:
    """Within this context the transformer also attends to `tokens`; afterwards, also after an error, it is as before.

    tokens (B, N, D): for the batch that the transformer will see, with true classifier-free guidance
    `torch.cat([negative, positive])`. scale: one number, or a tensor (B,) with one per sample, or a tensor () that may
    be changed in place between calls. With the number 0 the transformer is not touched at all. Raises ValueError if
    tokens, scale or branch do not fit; a wrong batch is noticed when the transformer is called.
    """
    if not isinstance(scale, Tensor) and scale == 0:
        yield transformer
        return
    blocks = transformer.transformer_blocks
    if len(branch) != len(blocks):
        raise ValueError(
            f"the image branch has {len(branch)} layers, the transformer {len(blocks)} double-stream blocks: use the "
            "IP-Adapter made for this transformer"
        )
    weight = next(branch.parameters())
    check_injected(tokens, weight.shape[1], scale)
    tokens = tokens.to(weight)
    before = [block.attn.processor for block in blocks]
    try:
        for i, block in enumerate(blocks):
            block.attn.set_processor(DecoupledAttention(before[i], branch[str(i)], tokens, scale))
        yield transformer
    finally:
        for block, own in zip(blocks, before):
            block.attn.set_processor(own)
