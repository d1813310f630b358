"""What the guidance's keys and values save when they are computed once and not in every pass of the aligner."""

import time
from collections.abc import Callable

import torch

from img_minimal.aligner import ImplicitAligner


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call; on a GPU until it has finished."""
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@torch.no_grad()
def passes(device: torch.device, images: int, rounds: int = 7, length: int = 640) -> str:
    """Three passes in one call against three calls of one pass, in turn, at SDXL's true size: the median ratio."""
    torch.manual_seed(0)
    aligner = ImplicitAligner(2048, 5120).to(device).eval()
    guidance = torch.randn(images, length, 5120, device=device)
    tokens = torch.randn(images, 16, 2048, device=device)

    def three_calls() -> None:
        """As if nothing were known of the call before."""
        x = tokens
        for _ in range(3):
            x = aligner(guidance, x)

    aligner(guidance, tokens)  # warms up
    both = [(seconds(lambda: aligner(guidance, tokens, passes=3)), seconds(three_calls)) for _ in range(rounds)]
    ratios = sorted(once / apart for once, apart in both)
    times = [sorted(column)[rounds // 2] for column in zip(*both)]
    return (
        f"{images} image{'s' * (images > 1)}, guidance {length} x 5120: three passes in one call {times[0]:.3f} s, in "
        f"three calls {times[1]:.3f} s (medians of {rounds}); ratio {ratios[rounds // 2]:.2f} [{ratios[0]:.2f}, "
        f"{ratios[-1]:.2f}]"
    )
