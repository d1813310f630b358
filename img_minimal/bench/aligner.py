"""The aligner against the formula written plainly: keys and values of everything anew in every pass, one softmax."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from img_minimal.aligner import ImplicitAligner
from img_minimal.bench.measure import in_turn, matmul_rate, rows

SIZES = {"width": 2048, "guidance_width": 5120}  # SDXL and LLaVA-13B
LENGTH, TOKENS = 640, 16  # of the guidance, and image tokens


def plain_pass(aligner: ImplicitAligner, guidance: Tensor, tokens: Tensor) -> Tensor:
    """Figs. 9 and 10 as a reader would write them down first; the same numbers."""
    h, x = aligner.proj_in(guidance), tokens
    for attention, feed_forward in aligner.layers:
        own = attention.norm2(x)
        everything = torch.cat([attention.norm1(h), own], dim=1)  # (B, L + N, D)
        q, k, v = attention.to_q(own), *attention.to_kv(everything).chunk(2, dim=-1)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=attention.heads) for y in (q, k, v))
        weights = F.softmax(q @ k.mT / attention.head_dim**0.5, dim=-1)
        x = x + attention.to_out(rearrange(weights @ v, "b h n d -> b n (h d)"))
        x = x + feed_forward(x)
    return tokens + aligner.zero_linear(aligner.norm_out(aligner.proj_out(x)))


def aligner_costs(device: torch.device, batch: int = 1, rounds: int = 5, **sizes: int) -> str:
    """One and three passes, and a training step, beside the plain formula; the step as a share of the matmul rate."""
    torch.manual_seed(0)
    aligner = ImplicitAligner(**(SIZES | sizes)).to(device)
    torch.nn.init.normal_(aligner.zero_linear.weight, std=0.02)
    guidance = torch.randn(batch, LENGTH, aligner.guidance_width, device=device)
    tokens = torch.randn(batch, TOKENS, aligner.width, device=device)

    def plain(passes: int) -> Tensor:
        """Pass after pass."""
        x = tokens
        for _ in range(passes):
            x = plain_pass(aligner, guidance, x)
        return x

    def step(call) -> None:
        """Forward and backward."""
        aligner.zero_grad(set_to_none=True)
        call().square().mean().backward()

    with torch.no_grad():
        assert torch.allclose(plain(3), aligner(guidance, tokens, passes=3), atol=1e-3), "not the same formula"
        one, three = (
            in_turn(
                {
                    f"plain formula, passes: {n}": lambda n=n: plain(n),
                    f"ours, passes: {n}": lambda n=n: aligner(guidance, tokens, passes=n),
                },
                rounds,
            )
            for n in (1, 3)
        )
    training = in_turn(
        {
            "plain formula, training step": lambda: step(lambda: plain(1)),
            "ours, training step": lambda: step(lambda: aligner(guidance, tokens)),
        },
        rounds,
    )
    with FlopCounterMode(display=False) as counter:
        step(lambda: aligner(guidance, tokens))
    share = counter.get_total_flops() / training["ours, training step"].seconds / matmul_rate(device)
    title = f"aligner, batch {batch}, guidance {LENGTH} x {aligner.guidance_width}"
    return (
        rows(title, one | three | training)
        + f"\n\nThe training step runs at {share:.0%} of this machine's matmul rate."
    )
