"""Fused attention beside the plain formula, forward and in a training step, at the twin's and at the MLLM's shapes."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from img_minimal.bench.measure import Timing, in_turn, rows

SHAPES = {"the twin's LLaVA": (64, 4, 96, 40), "LLaVA-7B's heads": (1, 32, 640, 128)}  # (B, heads, L, d)


def attention_costs(device: torch.device, rounds: int = 7, shapes: dict[str, tuple] = SHAPES) -> str:
    """What torch picks by itself beside its plain kernel, for both directions."""
    found: dict[str, Timing] = {}
    for name, shape in shapes.items():
        q, k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in range(3))

        def forward(kernel: SDPBackend, q=q, k=k, v=v) -> torch.Tensor:
            """Causal attention."""
            with sdpa_kernel(kernel):
                return scaled_dot_product_attention(q, k, v, is_causal=True)

        def look(kernel: SDPBackend, forward=forward) -> None:
            """No gradients: features, sampling."""
            with torch.no_grad():
                forward(kernel)

        kernels = {"plain": SDPBackend.MATH, "fused": SDPBackend.FLASH_ATTENTION}
        for what, call in (("forward", look), ("forward and backward", lambda k, f=forward: f(k).sum().backward())):
            calls = {f"{name}, {what}, {kind}": lambda c=call, k=kernel: c(k) for kind, kernel in kernels.items()}
            found |= in_turn(calls, rounds)
    return rows("attention, fp32", found)
