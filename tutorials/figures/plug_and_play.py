"""The picture of tutorial 09."""

from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL.Image import Image

from img_minimal.plots import BLUE, GREEN, GREY, ORANGE
from img_minimal.tiny.grammar import CATEGORIES

CELLS = {"base": GREY, "base + IMG": BLUE, "DPO": ORANGE, "DPO + IMG": GREEN}
SHOWN = 5  # prompts


def draw(
    captions: list[str], images: dict[str, list[Image]], strict: dict[str, np.ndarray], shares: dict[str, dict],
    by_category: dict[str, list[float]],
) -> Figure:  # fmt: skip
    """Shares of the four cells above, the same prompts in all four below."""
    figure = plt.figure(figsize=(10, 11.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(3, 8))
    draw_shares(upper.subplots(1, 2, width_ratios=(1, 2)), shares, by_category)
    draw_images(lower.subplots(4, SHOWN), captions, images, strict)
    return figure


def draw_shares(axes: np.ndarray, shares: dict[str, dict], by_category: dict[str, list[float]]) -> None:
    """Four bars with intervals, and the same by category."""
    for k, (name, share) in enumerate(shares.items()):
        error = [[share["value"] - share["low"]], [share["high"] - share["value"]]]
        axes[0].bar(k, share["value"], 0.7, color=CELLS[name], alpha=0.8)
        axes[0].errorbar(k, share["value"], yerr=error, color="black", capsize=4)
        places = np.arange(len(CATEGORIES)) + 0.2 * (k - 1.5)
        axes[1].bar(places, by_category[name], 0.19, color=CELLS[name], alpha=0.8, label=name)
    axes[0].set_xticks(range(len(shares)), [name.replace(" + ", "\n+ ") for name in shares])
    axes[0].set(ylim=(0, 1), ylabel="share right in everything")
    axes[1].set_xticks(range(len(CATEGORIES)), CATEGORIES)
    axes[1].set(ylim=(0, 1.02), title="by category")
    axes[1].legend(fontsize=9, ncols=4, loc="upper right", frameon=False)
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)


def draw_images(
    axes: np.ndarray, captions: list[str], images: dict[str, list[Image]], strict: dict[str, np.ndarray]
) -> None:
    """The first prompts that base and DPO both draw wrong: a row for each cell."""
    wrong = np.flatnonzero(~strict["base"] & ~strict["DPO"])[:SHOWN]
    for row, name in zip(axes, images):
        row[0].set_ylabel(name, fontsize=10)
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, k in zip(row, wrong):
            axis.imshow(images[name][k], interpolation="nearest")
            right = strict[name][k]
            axis.set_xlabel("right" if right else "wrong", color=GREEN if right else GREY, fontsize=9)
    for axis, k in zip(axes[0], wrong):
        axis.set_title(fill(captions[k], 24), fontsize=9)
