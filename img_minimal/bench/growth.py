"""How cost grows: passes of the aligner, length of the guidance, images drawn at once, pairs that stream by.

Seconds should grow no faster than in proportion, and the memory of a stream should not grow at all.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from img_minimal.aligner import ImplicitAligner
from img_minimal.bench.aligner import LENGTH, SIZES, TOKENS
from img_minimal.bench.measure import in_turn
from img_minimal.data.pairs import pair_stream
from img_minimal.files import peak_bytes
from img_minimal.load import load_backbone
from img_minimal.presets import find_preset

PASSES, LENGTHS = (1, 2, 3, 4, 5), (128, 256, 512, 1024, 2048)
IMAGES, PAIRS = (1, 4, 16, 64), (1024, 4096, 16384, 32768)
Curve = dict[int, float]


@torch.no_grad()
def aligner_curves(device: torch.device, rounds: int, **sizes: int) -> tuple[Curve, Curve]:
    """Seconds by passes at one length of the guidance, and by length with one pass, at true size."""
    aligner = ImplicitAligner(**(SIZES | sizes)).to(device)
    tokens = torch.randn(1, TOKENS, aligner.width, device=device)
    guidance = {n: torch.randn(1, n, aligner.guidance_width, device=device) for n in {LENGTH, *LENGTHS}}
    calls = {f"p{n}": lambda n=n: aligner(guidance[LENGTH], tokens, passes=n) for n in PASSES}
    calls |= {f"l{n}": lambda n=n: aligner(guidance[n], tokens) for n in LENGTHS}
    found = in_turn(calls, rounds)
    return {n: found[f"p{n}"].seconds for n in PASSES}, {n: found[f"l{n}"].seconds for n in LENGTHS}


def drawing_curve(rounds: int, images: tuple[int, ...] = IMAGES) -> Curve:
    """Seconds by how many images of the twin are drawn at once."""
    backbone = load_backbone(find_preset("tiny-sdxl"))
    calls = {str(n): lambda n=n: backbone.draw(["a red circle"] * n, list(range(n))) for n in images}
    return {int(n): timing.seconds for n, timing in in_turn(calls, rounds).items()}


def stream_pairs(count: int, chunk: int = 512) -> dict[str, float]:
    """Read and decode so many pairs in chunks; seconds, and the most that this process has held."""
    begin = time.perf_counter()
    seen = sum(len(part.items) for part in pair_stream(find_preset("tiny-sdxl").pairs, chunk, count, 0).chunks())
    return {"pairs": seen, "seconds": time.perf_counter() - begin, "bytes": peak_bytes()}


def stream_curves(counts: tuple[int, ...] = PAIRS) -> tuple[Curve, Curve]:
    """Seconds and peak bytes by the number of pairs, each in a process of its own."""
    seconds, size = {}, {}
    for count in counts:
        code = f"import json; from img_minimal.bench.growth import stream_pairs as s; print(json.dumps(s({count})))"
        here = Path(__file__).parent.parent.parent
        done = subprocess.run([sys.executable, "-c", code], cwd=here, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout)
        seconds[count], size[count] = row["seconds"], row["bytes"]
    return seconds, size


def line(title: str, curve: Curve, unit: str, factor: float = 1.0) -> str:
    """A row of the table: the values, and how much more the last costs than the first, beside how much more it is."""
    ends = list(curve)[0], list(curve)[-1]
    values = ", ".join(f"{n:,}: {value * factor:,.1f}" for n, value in curve.items())
    return f"| {title} | {values} | {unit} | x {ends[1] / ends[0]:.0f} | x {curve[ends[1]] / curve[ends[0]]:.1f} |"


def growth(device: torch.device, picture: str, rounds: int = 3) -> str:
    """Measure, draw, and give the table."""
    passes, lengths = aligner_curves(device, rounds)
    images, (pairs, memory) = drawing_curve(rounds), stream_curves()
    draw({"passes of the aligner": passes, "length of the guidance": lengths, "images at once": images,
          "pairs read and decoded": pairs}, memory, picture)  # fmt: skip
    lines = [
        "| by | cost | unit | more work | more cost |",
        "|---|---|---|---|---|",
        line("passes of the aligner, true size", passes, "ms", 1e3),
        line("length of the guidance, true size", lengths, "ms", 1e3),
        line("images of the twin at once", images, "ms", 1e3),
        line("pairs read and decoded", pairs, "s"),
        line("the same, memory at the most", memory, "MB", 1e-6),
    ]
    return "\n".join(lines) + f"\n\ndrawn in {picture}"


def draw(curves: dict[str, Curve], memory: Curve, path: str | Path) -> None:
    """Cost against amount, both on logarithmic axes, with what proportion would be; memory below its own axis."""
    import matplotlib.pyplot as plt

    from img_minimal.plots import BLUE, GREY, ORANGE, plain

    figure, axes = plt.subplots(1, 5, figsize=(17, 3.6), layout="constrained")
    for axis, (title, curve) in zip(axes, curves.items()):
        x, y = list(curve), list(curve.values())
        axis.loglog(x, y, "o-", color=BLUE, label="measured")
        axis.loglog(x, [y[0] * n / x[0] for n in x], ":", color=GREY, label="in proportion")
        axis.set(title=title, ylabel="seconds")
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter(plain)
            scale.set_minor_formatter("")
        axis.legend(fontsize=8)
    axes[-1].semilogx(list(memory), [size / 1e6 for size in memory.values()], "o-", color=ORANGE)
    axes[-1].set(title="memory of the stream", xlabel="pairs", ylabel="MB at the most")
    axes[-1].xaxis.set_major_formatter(plain)
    axes[-1].set_ylim(0, 1.3e-6 * max(memory.values()))
    figure.savefig(path, dpi=110)
    plt.close(figure)
