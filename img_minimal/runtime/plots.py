"""Pictures people look at: before and after, grids of samples, training curves."""

import json
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - the backend must be chosen first
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from img_minimal.runtime.cli import printable  # noqa: E402

plt.rcParams["text.parse_math"] = False  # prompts and answers are no formulas, whatever dollars they hold
# Okabe and Ito's palette, safe for colour-blind readers.
BLUE, ORANGE, GREEN, GREY, PINK = COLOURS = "#0072B2", "#E69F00", "#009E73", "#7F7F7F", "#CC79A7"


def plain(value: float, _: int | None = None) -> str:
    """A number on a logarithmic axis, as it is: matplotlib would write a formula, and formulas are off."""
    return f"{value:g}"


def labelled_grid(
    rows: list[list[tuple[Image.Image, str]]], path: str | Path, title: str = "", caption: str = ""
) -> None:
    """Images with a text below each, row by row, saved as a PNG."""
    columns = max(len(row) for row in rows)
    texts = [["\n".join(fill(line, 36) for line in printable(text).splitlines()) for _, text in row] for row in rows]
    heights = [max(3.5, 2.7 + 0.16 * max(text.count("\n") + 1 for text in line)) for line in texts]  # inches
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(2.7 * columns, sum(heights) + 0.5), squeeze=False, layout="constrained",
        height_ratios=heights,
    )  # fmt: skip
    for row, words, line in zip(rows, texts, axes):
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for (image, _), text, axis in zip(row, words, line):
            axis.imshow(image, interpolation="nearest" if image.width < 256 else None)
            axis.set_xlabel(text, fontsize=9)
    if title:
        figure.suptitle(fill(printable(title), 36 * columns), fontsize=11)
    if caption:
        figure.supxlabel(fill(printable(caption), 46 * columns), fontsize=8, color=GREY)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def worded_rows(rows: list[tuple[list[Image.Image], str]], path: str | Path, title: str) -> None:
    """Rows of images, each with its words to the right."""
    columns = max(len(images) for images, _ in rows)
    figure, axes = plt.subplots(
        len(rows), columns + 1, figsize=(2.2 * columns + 4.6, 2.3 * len(rows) + 0.4), squeeze=False,
        width_ratios=[*[2.2] * columns, 4.6], layout="constrained",
    )  # fmt: skip
    for (images, words), line in zip(rows, axes):
        for axis in line:
            axis.set_axis_off()
        for image, axis in zip(images, line):
            axis.imshow(image, interpolation="nearest" if image.width < 256 else None)
        lines = [fill(line, 58) for line in printable(words).splitlines()]
        line[-1].text(0, 0.5, "\n".join(lines), fontsize=9, va="center", transform=line[-1].transAxes)
    figure.suptitle(printable(title), fontsize=10, color=GREY)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pairs_grid(pairs: list[list[tuple[Image.Image, str]]], path: str | Path, caption: str) -> None:
    """Before and after, three pairs of labelled images to a row; nothing if there are none."""
    rows = [[cell for pair in pairs[k : k + 3] for cell in pair] for k in range(0, len(pairs), 3)]
    if rows:
        labelled_grid(rows, path, caption=caption)


def curves(metrics: Path, path: Path) -> None:
    """Four panels from an aligner's metrics.jsonl: errors, preference, gradient norm, size of the correction."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    if not rows:
        return
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    line(axes[0, 0], rows, "error", "f, training", BLUE)
    line(axes[0, 0], rows, "reference_error", "f_ref, training", ORANGE)
    axes[0, 0].set_ylabel("distance to c_w, as in the loss")
    unseen = axes[0, 0].twinx()  # always a mean over elements, whatever norm the loss has
    line(unseen, rows, "validation_error", "f, unseen prompts", GREEN, "o")
    line(unseen, rows, "identity_error", "doing nothing, unseen prompts", GREY, "x")
    unseen.set_ylim(bottom=0)
    unseen.set_ylabel("mean over elements, unseen prompts")
    unseen.legend(fontsize=8, loc="lower left")
    line(axes[0, 1], rows, "implicit_accuracy", "implicit accuracy", BLUE)
    line(axes[0, 1], rows, "nearer", "losers moved nearer to c_w, unseen prompts", GREEN, "o")
    axes[0, 1].set_ylabel("share")
    line(axes[1, 0], rows, "gradient_norm", "gradient norm", BLUE)
    line(axes[1, 1], rows, "correction", "||f(c) - c_l||^2", BLUE)
    refreshes = axes[1, 1].twinx()
    refreshes.plot([r["step"] for r in rows], [r["refreshes"] for r in rows], color=PINK)
    refreshes.set_ylabel("refreshes of the reference", color=PINK)
    _save(figure, axes, path)


def round_curves(rows: list[dict], path: Path) -> None:
    """Six panels over the rounds of a training: gate, damage, pairs, their categories, their step size, corrections."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True, layout="constrained")
    x = [row["round"] for row in rows]
    panels = (
        ("score", ["score"]), ("damage: right before, wrong after", ["damage"]),
        ("pairs", ["pairs", "img_better", "base_better", "both_right"]), ("IMG's wins by category", []),
        ("|c_w - c_l|", ["step_original", "step_new"]), ("held-back original pairs", ["validation_error"]),
    )  # fmt: skip
    for axis, (title, names) in zip(axes.flat, panels):
        for name, colour in zip(names, (BLUE, ORANGE, GREEN, PINK)):
            axis.plot(x, [row.get(name, np.nan) for row in rows], "o-", color=colour, label=name.replace("_", " "))
        axis.set_title(title, fontsize=10)
    kinds = sorted({kind for row in rows for kind in row.get("wins_by_category", {})})
    for kind, colour in zip(kinds, (BLUE, ORANGE, GREEN, PINK, GREY)):
        wins = [row["wins_by_category"].get(kind, 0) if "wins_by_category" in row else np.nan for row in rows]
        axes[1, 0].plot(x, wins, "o-", color=colour, label=kind)
    for row in rows:
        if not row["kept"]:
            axes[0, 0].annotate(
                "not kept", (row["round"], row["score"]), (0, 6), textcoords="offset points", ha="center"
            )
    for axis in axes.flat:
        axis.legend(fontsize=8)
        axis.set_xticks(x)
    for axis in axes[1]:
        axis.set_xlabel("round")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def detector_curves(metrics: Path, path: Path) -> None:
    """Two panels from the metrics.jsonl of a finetuned MLLM: loss of the answers, accuracy on held-out triplets."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    if not rows:
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), squeeze=False, layout="constrained")
    line(axes[0, 0], rows, "loss", "cross-entropy of the instruction, training", BLUE)
    line(axes[0, 1], rows, "exact", "instruction worded exactly", GREEN, "o")
    line(axes[0, 1], rows, "decided", "edit or nothing, decided rightly", BLUE, "o")
    line(axes[0, 1], rows, "always_edit", "always an edit", GREY, "x")
    axes[0, 1].set_ylabel("share of held-out triplets")
    _save(figure, axes, path)


def line(axis: plt.Axes, rows: list[dict], name: str, label: str, colour: str, marker: str | None = None) -> None:
    """One metric over the steps; smoothed, unless it has markers."""
    smooth = 0.95 if marker is None else 0.0
    steps, values, mean = [], [], None
    for row in rows:
        if name in row:
            mean = row[name] if mean is None else smooth * mean + (1 - smooth) * row[name]
            steps.append(row["step"])
            values.append(mean)
    axis.plot(steps, values, label=label, color=colour, marker=marker)


def _save(figure: plt.Figure, axes: np.ndarray, path: Path) -> None:
    for axis in axes.flat:
        axis.legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.savefig(path, dpi=110)
    plt.close(figure)
