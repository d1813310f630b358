"""Pictures people look at: before and after, grids of samples, training curves."""

import json
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - the backend must be chosen first
from PIL import Image  # noqa: E402

# Okabe and Ito's palette, safe for colour-blind readers.
BLUE, ORANGE, GREEN, GREY, PINK = "#0072B2", "#E69F00", "#009E73", "#7F7F7F", "#CC79A7"


def labelled_grid(
    rows: list[list[tuple[Image.Image, str]]], path: str | Path, title: str = "", caption: str = ""
) -> None:
    """Images with a text below each, row by row, saved as a PNG."""
    columns = max(len(row) for row in rows)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(2.7 * columns, 3.5 * len(rows) + 0.5), squeeze=False, layout="constrained"
    )
    for row, line in zip(rows, axes):
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for (image, text), axis in zip(row, line):
            axis.imshow(image, interpolation="nearest" if image.width < 256 else None)
            lines = [fill(line, 36) for line in text.splitlines()]
            axis.set_xlabel("\n".join(lines), fontsize=9)
    if title:
        figure.suptitle(fill(title, 36 * columns), fontsize=11)
    if caption:
        figure.supxlabel(fill(caption, 46 * columns), fontsize=8, color=GREY)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(metrics: Path, path: Path) -> None:
    """Four panels from metrics.jsonl: errors, preference, gradient norm, size of the correction."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    if not rows:
        return
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")

    def draw(axis: plt.Axes, name: str, label: str, colour: str, marker: str | None = None) -> None:
        points = [(row["step"], row[name]) for row in rows if name in row]
        smooth = 0.95 if marker is None else 0.0
        steps, values, mean = [], [], None
        for step, value in points:
            mean = value if mean is None else smooth * mean + (1 - smooth) * value
            steps.append(step)
            values.append(mean)
        axis.plot(steps, values, label=label, color=colour, marker=marker)

    draw(axes[0, 0], "error", "f, training", BLUE)
    draw(axes[0, 0], "reference_error", "f_ref, training", ORANGE)
    draw(axes[0, 0], "validation_error", "f, unseen prompts", GREEN, "o")
    draw(axes[0, 0], "identity_error", "doing nothing, unseen prompts", GREY, "x")
    axes[0, 0].set_ylabel("squared distance to c_w")
    draw(axes[0, 1], "implicit_accuracy", "implicit accuracy", BLUE)
    draw(axes[0, 1], "nearer", "losers moved nearer to c_w, unseen prompts", GREEN, "o")
    axes[0, 1].set_ylabel("share")
    draw(axes[1, 0], "gradient_norm", "gradient norm", BLUE)
    draw(axes[1, 1], "correction", "||f(c) - c_l||^2", BLUE)
    refreshes = axes[1, 1].twinx()
    refreshes.plot([r["step"] for r in rows], [r["refreshes"] for r in rows], color=PINK)
    refreshes.set_ylabel("refreshes of the reference", color=PINK)
    for axis in axes.flat:
        axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(path, dpi=110)
    plt.close(figure)
