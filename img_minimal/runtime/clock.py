"""How long each step of a command took, and how much memory it needed at most."""

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Clock:
    """Adds up seconds by the name of a step: `with clock("draw"): ...`; `print(clock)` gives seconds and shares."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """The time within this context counts for `step`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - begin

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        shares = ", ".join(f"{step} {seconds / total:.0%}" for step, seconds in self.seconds.items())
        return f"{total:.1f} s: {shares}; {peak_memory()}"


def peak_memory() -> str:
    """The most that this process has held until now, on the GPU if there is one."""
    if torch.cuda.is_available():
        return f"at most {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of GPU memory"
    return f"at most {peak_bytes() / 1e9:.2f} GB of memory"


def peak_bytes() -> int:
    """The most of the computer's memory that this process has held until now."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where the line below would also count the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
