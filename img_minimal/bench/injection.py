"""What image tokens add to a block of SDXL's UNet and of FLUX's transformer, beside diffusers' own IP-Adapter."""

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import (
    FluxIPAdapterAttnProcessor,
    FluxPosEmbed,
    FluxTransformerBlock,
)
from torch import nn

from img_minimal.bench.measure import Timing, in_turn, rows
from img_minimal.flux import DecoupledAttention as FluxDecoupled
from img_minimal.sdxl import DecoupledAttention as SDXLDecoupled

# (width, heads, side of the picture that the block sees at 1024 x 1024): SDXL attends at two of its three widths.
SDXL_BLOCKS = ((640, 10, 64), (1280, 20, 32))
BATCH, TEXT, TOKENS, TOKEN_WIDTH = 2, 77, 16, 2048  # with classifier-free guidance


def pair(width: int, token_width: int, bias: bool, device: torch.device) -> nn.ModuleDict:
    """Keys and values of image tokens for one block."""
    names = ("to_k_ip", "to_v_ip")
    return nn.ModuleDict({name: nn.Linear(token_width, width, bias=bias, device=device) for name in names})


def sdxl_block(device: torch.device, width: int, heads: int, side: int, rounds: int) -> dict[str, Timing]:
    """A transformer block plain, with our processor, and with diffusers'."""
    block = BasicTransformerBlock(width, heads, width // heads, cross_attention_dim=TOKEN_WIDTH).to(device)
    x = torch.randn(BATCH, side * side, width, device=device)
    text = torch.randn(BATCH, TEXT, TOKEN_WIDTH, device=device)
    tokens = torch.randn(BATCH, TOKENS, TOKEN_WIDTH, device=device)
    own = pair(width, TOKEN_WIDTH, False, device)
    theirs = IPAdapterAttnProcessor2_0(width, TOKEN_WIDTH, num_tokens=(TOKENS,), scale=[0.2]).to(device)
    plain = block.attn2.processor
    ours = SDXLDecoupled(own, tokens, 0.2)

    def call(processor: object, states: object) -> None:
        """One pass through the block."""
        block.attn2.set_processor(processor)
        block(x, encoder_hidden_states=states)

    return in_turn(
        {
            f"SDXL block of {width}, plain": lambda: call(plain, text),
            f"SDXL block of {width}, ours": lambda: call(ours, text),
            f"SDXL block of {width}, diffusers": lambda: call(theirs, (text, [tokens[:, None]])),
        },
        rounds,
    )


def flux_block(device: torch.device, width: int, heads: int, side: int, rounds: int) -> dict[str, Timing]:
    """The same of a double-stream block."""
    block = FluxTransformerBlock(width, heads, width // heads).to(device)
    image = torch.randn(1, side * side, width, device=device)
    text = torch.randn(1, 128, width, device=device)
    temb = torch.randn(1, width, device=device)
    head = width // heads
    rotary = FluxPosEmbed(10_000, [head - 2 * (3 * head // 16 * 2), 3 * head // 16 * 2, 3 * head // 16 * 2])(
        torch.zeros(128 + side * side, 3, device=device)
    )
    tokens = torch.randn(1, 4, 4096, device=device)
    plain = block.attn.processor
    ours = FluxDecoupled(plain, pair(width, 4096, True, device), tokens, 0.2)
    theirs = FluxIPAdapterAttnProcessor(width, 4096, num_tokens=(4,), scale=[0.2], device=device)

    def call(processor: object, **more: object) -> None:
        """One pass through the block."""
        block.attn.set_processor(processor)
        block(image, text, temb, rotary, **more)

    handed = {"joint_attention_kwargs": {"ip_hidden_states": [tokens], "ip_adapter_masks": None}}
    return in_turn(
        {
            f"FLUX double block of {width}, plain": lambda: call(plain),
            f"FLUX double block of {width}, ours": lambda: call(ours),
            f"FLUX double block of {width}, diffusers": lambda: call(theirs, **handed),
        },
        rounds,
    )


@torch.no_grad()
def injection_costs(
    device: torch.device, rounds: int = 5, sdxl: tuple = SDXL_BLOCKS, flux: tuple[int, int, int] = (3072, 24, 32)
) -> str:
    """One block of each width at SDXL's shapes, and a double block of FLUX, at 512 x 512."""
    torch.manual_seed(0)
    found = {}
    for block in sdxl:
        found |= sdxl_block(device, *block, rounds)
    return rows("a block, in one denoising step", found | flux_block(device, *flux, rounds))
