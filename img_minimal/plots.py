"""Draw sheets of images with captions, and training curves.

python -m img_minimal.plots outputs/train outputs/other    curves of several runs, overlaid
python -m img_minimal.plots outputs/train --only error nearer --tensorboard outputs/board
"""

import argparse
import io
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate, chain, cycle, product
from pathlib import Path
from textwrap import fill
from types import ModuleType
from typing import Any

from PIL import Image

from img_minimal.cli import PICTURES, check, printable, run, warn, writable_file

# Okabe and Ito's palette, safe for colour-blind readers.
BLUE, ORANGE, GREEN, GREY, PINK = COLOURS = "#0072B2", "#E69F00", "#009E73", "#7F7F7F", "#CC79A7"
LARGEST_NUMBER = 1e300  # infinities and what matplotlib cannot scale are beyond it
Cell = tuple[Image.Image | None, str]
# Panels by title: of an aligner's training, an MLLM's finetuning, and rounds.
ALIGNER = {
    "distance to c_w, mean over elements": (
        "error",
        "reference_error",
        "validation_error",
        "identity_error",
    ),
    "share": ("implicit_accuracy", "nearer"),
    "gradient norm": ("gradient_norm",),
    "||f(c) - c_l||^2, mean over elements": ("correction",),
    "refreshes of the reference": ("refreshes",),
}
DETECTOR = {
    "cross-entropy of the instruction": ("loss",),
    "share of held-out triplets": ("exact", "decided", "always_edit"),
}
ROUNDS = {
    "score": ("score",),
    "kept by the gate": ("kept",),
    "damage: right before, wrong after": ("damage",),
    "pairs": ("pairs", "img_better", "base_better", "both_right"),
    "|c_w - c_l|": ("step_original", "step_new"),
    "error on held-back original pairs": ("validation_error",),
}


def pyplot() -> ModuleType:
    """Import matplotlib without a window, and without formulas: prompts may hold dollars."""
    # A notebook's programs inherit the name of its backend, which this Python may not have.
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib.pyplot as plt

    plt.rcParams |= {"text.parse_math": False, "figure.constrained_layout.use": True}
    return plt


def sheet(
    rows: list[list[Cell]],
    path: str | Path,
    title: str = "",
    caption: str = "",
    heads: Sequence[str] = (),
) -> None:
    """Save rows of images with a text below each; a cell without an image shows its text alone.

    `heads` stand above the first columns.
    """
    plt, columns, heights = pyplot(), max(map(len, rows)), []
    for row in rows:
        height = 2.8  # inches, of an image
        for image, text in row:
            lines = len(_wrap(text, 36).splitlines())
            height = max(height, (0.3 if image is None else 2.9) + 0.16 * lines)
        heights.append(height)
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(2.7 * columns, sum(heights) + 0.5),
        squeeze=False,
        height_ratios=heights,
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for row, line in zip(rows, axes):
        for (image, text), axis in zip(row, line):
            if image is None:
                axis.text(0, 0.5, _wrap(text, 36), fontsize=9, va="center")
            else:
                axis.imshow(image, interpolation="nearest" if image.width < 256 else None)
                axis.set_xlabel(_wrap(text, 36), fontsize=9)
    for axis, head in zip(axes[0], heads):
        axis.set_title(head, fontsize=12)
    figure.suptitle(_wrap(title, 36 * columns), fontsize=11)
    figure.supxlabel(_wrap(caption, 46 * columns), fontsize=8, color=GREY)
    _save(figure, path, 120)


def _save(figure: Any, path: str | Path, dpi: int) -> None:
    from img_minimal.files import write_whole  # imports torch, which --help does without

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format=Path(path).suffix[1:] or "png")
    write_whole(path, buffer.getvalue())
    pyplot().close(figure)


def _wrap(text: str, width: int) -> str:
    return "\n".join(fill(line, width) for line in printable(text).splitlines())


def curves(
    runs: dict[str, list[dict]],
    panels: dict[str, tuple[str, ...]],
    path: str | Path,
    x: str = "step",
) -> None:
    """Save one panel per title with the numbers named for it, of every run; nothing without data.

    Numbers that most rows have are smoothed, but no counters; numbers that few rows have are
    marked.
    """
    plt, shown = pyplot(), defaultdict(list)
    for title, names in panels.items():
        for label, name in product(runs, names):
            if points := line(runs[label], x, name):
                shown[title].append((f"{name.replace('_', ' ')} {label}", *points))
    if not shown:
        return
    lines, columns = -(-len(shown) // 3), min(3, len(shown))
    size = (4.2 * columns, 2.9 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for (title, drawn), axis in zip(shown.items(), axes.flat):
        for colour, (label, steps, values, look) in zip(cycle(COLOURS), drawn):
            axis.plot(steps, values, look, color=colour, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x, fontsize=8)
        axis.legend(fontsize=8)
    _save(figure, path, 110)


def line(rows: list[dict], x: str, name: str) -> tuple[list, list, str] | None:
    """Return the steps and values of a number, and how to draw them; None without any."""
    points = [(row[x], row[name]) for row in rows if name in row]
    if not points:
        return None
    steps, values = map(list, zip(*points))
    if 2 * len(points) < len(rows) or len(rows) < 50:
        return steps, values, "o-"
    # Whole numbers count something, and a mean of counts is none.
    if not all(isinstance(value, int) for value in values):
        values = list(accumulate(values, lambda mean, value: 0.95 * mean + 0.05 * value))
    return steps, values, "-"


def read_rows(path: Path) -> list[dict]:
    """Read the numbers in the rows of a .jsonl file that have a number of `step` or `round`.

    Damaged rows are left out: the last may be cut. So are numbers too large to compute with.
    """
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, AttributeError, RecursionError):
            row = {}
            for name, value in json.loads(line).items():
                if isinstance(value, int | float) and abs(value) < LARGEST_NUMBER:
                    row[name] = value
            if type(row.get("step", row.get("round"))) is int:
                rows.append(row)
    return rows


def read_metrics(folder: str) -> list[dict]:
    """Read a run's log, warning about damaged rows. Raises UserError if there are no rows."""
    path = Path(folder) / "metrics.jsonl"
    rows = read_rows(path)
    check(rows, f"{path}: not there, or without rows yet; name the folder of a run")
    damaged = len(path.read_text(errors="replace").splitlines()) - len(rows)
    if damaged:
        warn(f"{path}: {damaged} damaged rows are left out")
    return rows


def main() -> int:
    """Read the logs and save the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="run folders")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="numbers to draw (default: all)")
    output = "outputs/curves.png"
    parser.add_argument("--output", default=output, help=f"picture file (default: {output})")
    text = "also write the numbers to this folder for TensorBoard"
    parser.add_argument("--tensorboard", metavar="FOLDER", help=text)
    options = parser.parse_args()
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    writable_file(options.output, "--output", PICTURES)
    runs = {str(Path(folder)): read_metrics(folder) for folder in options.runs}
    known = dict.fromkeys(name for row in chain(*runs.values()) for name in row)
    del known["step"]
    check(known, "no run has a number beside its step yet")
    names = options.only or known
    unknown = " ".join(name for name in names if name not in known)
    check(not unknown, f"--only {unknown}: no run has that; they have {', '.join(known)}")
    curves(runs, {name.replace("_", " "): (name,) for name in names}, options.output)
    print(f"saved to {options.output}")
    if options.tensorboard:
        write_tensorboard(runs, options.tensorboard)
        print(f"written; look with: tensorboard --logdir {options.tensorboard}")
    return 0


def write_tensorboard(runs: dict[str, list[dict]], folder: str) -> None:
    """Write every number of every run as a scalar. Raises UserError without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        check(False, "--tensorboard needs the package tensorboard: pip install tensorboard")
    for label, rows in runs.items():
        with SummaryWriter(str(Path(folder) / Path(label).name)) as writer:
            for row in rows:
                for name, value in row.items():
                    if name != "step":
                        writer.add_scalar(name, value, row["step"])


if __name__ == "__main__":
    run(main)
