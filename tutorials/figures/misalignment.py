"""The picture of tutorial 01."""

from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure, SubFigure
from PIL.Image import Image

from img_minimal.plots import BLUE, GREEN, GREY, ORANGE, PINK
from img_minimal.tiny.oracle import Verdict

SHOWN = 8  # failures
Failures = list[tuple[int, str]]  # number of the prompt, its group


def draw(
    shares: dict[str, dict], right: np.ndarray, pictures: list[Image], captions: list[str], verdicts: list[Verdict],
    failures: Failures,
) -> Figure:  # fmt: skip
    """Shares by group, what a new seed makes of the first one's images, and failures with the oracle's words."""
    figure = plt.figure(figsize=(10, 10.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4, 6.2))
    left, middle = upper.subplots(1, 2, width_ratios=(3, 1))
    draw_shares(left, shares)
    draw_new_seed(middle, *right[:2])
    draw_failures(lower, pictures, captions, verdicts, failures)
    return figure


def first_failures(groups: dict[str, np.ndarray], right: np.ndarray) -> Failures:
    """Prompts whose first image is wrong: the first of every group, then the second, and so on."""
    wrong = [(np.flatnonzero(mask & ~right), name) for name, mask in groups.items() if name != "all of these"]
    turns = [(turn, place, k, name) for place, (part, name) in enumerate(wrong) for turn, k in enumerate(part)]
    chosen = sorted(sorted(turns)[:SHOWN], key=lambda item: item[1])
    return [(k, name) for _, _, k, name in chosen]


def draw_shares(axis: plt.Axes, shares: dict[str, dict]) -> None:
    """A bar with its interval for one seed, marks for the rest; the two totals stand apart."""
    places = np.arange(len(shares)) + 0.5 * (np.arange(len(shares)) >= len(shares) - 2)
    one = [row["one"] for row in shares.values()]
    value = np.array([o["value"] for o in one])
    error = np.array([value - [o["low"] for o in one], [o["high"] for o in one] - value])
    axis.barh(places, value, 0.62, color=BLUE, alpha=0.75, label="one seed, 95 % interval")
    axis.errorbar(value, places, xerr=error.clip(0), fmt="none", ecolor="black", capsize=3)
    marks = (("new", "x", PINK, "a new seed"), ("two", "D", ORANGE, "best of two*"), ("four", "*", GREEN, "of four*"))
    for key, marker, colour, label in marks:
        axis.plot([r[key] for r in shares.values()], places, marker, color=colour, label=label,
                  markersize=11 if marker == "*" else 7, markeredgewidth=2.5 if marker == "x" else 0.5,
                  markeredgecolor=colour if marker == "x" else "black")  # fmt: skip
    axis.set_yticks(places, [f"{name} (n {row['n']})" for name, row in shares.items()])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.03), xlabel="share of prompts whose image is right in everything")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(fontsize=9, ncols=4, loc="lower center", bbox_to_anchor=(0.35, 1.0), frameon=False, columnspacing=1)


def draw_new_seed(axis: plt.Axes, first: np.ndarray, second: np.ndarray) -> None:
    """Two stacked bars: wrong images and right ones, and what a new seed makes of them."""
    for place, chosen in enumerate((~first, first)):
        right = int((second & chosen).sum())
        wrong = int(chosen.sum()) - right
        stack = ((right, GREEN, "right"), (wrong, GREY, "wrong"))
        for start, (count, colour, label) in zip((0, right), stack):
            axis.bar(place, count, 0.62, start, color=colour, alpha=0.75)
            if count:
                axis.text(place, start + count / 2, f"{count}\n{label}", ha="center", va="center", fontsize=10)
    axis.set_xticks((0, 1), ("first seed\nwrong", "first seed\nright"))
    axis.set_title("what a new seed\nmakes of them", fontsize=10)
    axis.set_ylabel("prompts")
    axis.spines[["top", "right"]].set_visible(False)


def draw_failures(
    figure: SubFigure, pictures: list[Image], captions: list[str], verdicts: list[Verdict], failures: Failures
) -> None:
    """Images with their category, prompt, and the oracle's words."""
    figure.suptitle("Failures: category, prompt, and what the oracle says is to be changed", fontsize=11)
    for axis in figure.subplots(2, SHOWN // 2).flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for (k, group), axis in zip(failures, figure.axes):
        axis.imshow(pictures[k], interpolation="nearest")
        axis.set_title(group, fontsize=10, color=BLUE, fontweight="bold", pad=3)
        words = fill(f'"{captions[k]}"', 30) + "\n" + fill(f"oracle: {verdicts[k].words}", 30)
        axis.set_xlabel(words, fontsize=9)
