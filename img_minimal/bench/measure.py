"""Wall times of calls in turn, in one run: medians, and ratios to the first of them with their spread."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds (median) of a call, and its ratio to the first call of the same round: median, lowest, highest."""

    seconds: float
    ratio: float
    low: float
    high: float


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call; on a GPU until it has finished."""
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def in_turn(calls: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, Timing]:
    """Each call once a round, after one round to warm up. A ratio is taken within a round, so that drifts cancel."""
    table = [[seconds(call) for call in calls.values()] for _ in range(rounds + 1)][1:]
    found = {}
    for name, times in zip(calls, zip(*table)):
        ratios = sorted(own / row[0] for own, row in zip(times, table))
        found[name] = Timing(sorted(times)[rounds // 2], ratios[rounds // 2], ratios[0], ratios[-1])
    return found


def rows(title: str, timings: dict[str, Timing]) -> str:
    """A Markdown table."""
    lines = [f"| {title} | ms | ratio | spread |", "|---|---|---|---|"]
    for name, t in timings.items():
        lines.append(f"| {name} | {t.seconds * 1e3:.1f} | {t.ratio:.2f} | {t.low:.2f} to {t.high:.2f} |")
    return "\n".join(lines)


def matmul_rate(device: torch.device, size: int = 2048, rounds: int = 7, dtype: torch.dtype = torch.float32) -> float:
    """FLOP per second of a square product: what this machine can do at best, measured in the same run."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / in_turn({"product": lambda: a @ b}, rounds)["product"].seconds
