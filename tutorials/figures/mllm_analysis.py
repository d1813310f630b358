"""The picture of tutorial 02."""

from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL.Image import Image

from img_minimal.evaluate.intervals import mean_interval
from img_minimal.plots import BLUE, GREEN, GREY, ORANGE

SHOWN = 5  # images with their answers
COLOURS = {"text alone": GREY, "stock MLLM": ORANGE, "finetuned MLLM": BLUE}
PAPER = {"stock MLLM": 0.423, "finetuned MLLM": 0.763}


def draw(marks: dict, found: dict, answers: list[tuple[Image, str, dict[str, str]]]) -> Figure:
    """The exam and the probes above, images with what was said about them below."""
    figure = plt.figure(figsize=(10, 8.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4, 4.4), hspace=0.04)
    draw_marks(upper.subplots(1, 2, width_ratios=(1, 2.4)), marks, found)
    draw_answers(lower.subplots(1, SHOWN), answers)
    return figure


def bars(axis: plt.Axes, places: np.ndarray, values: list[dict], colours: list[str]) -> None:
    """Bars with intervals."""
    value = np.array([v["value"] for v in values])
    error = np.array([value - [v["low"] for v in values], [v["high"] for v in values] - value]).clip(0)
    axis.bar(places, value, 0.75, color=colours, alpha=0.8)
    axis.errorbar(places, value, yerr=error, fmt="none", ecolor="black", capsize=4)


def draw_marks(axes: np.ndarray, marks: dict, found: dict) -> None:
    """The exam on the left, the probes on the right."""
    exact = [mean_interval(part["exact"], [str(k) for k in range(len(part["exact"]))]) for part in marks.values()]
    bars(axes[0], np.arange(2), exact, [COLOURS[name] for name in marks])
    axes[0].plot(range(2), [PAPER[name] for name in marks], "D", color="black", label="the paper, judged by people")
    axes[0].set_xticks(range(2), [name.replace(" ", "\n") for name in marks])
    axes[0].set(ylim=(0, 1), ylabel="instructions right", title="in words")
    axes[0].legend(fontsize=8)
    for k, title in enumerate(("any two images", "two drawings of one prompt")):
        bars(axes[1], np.arange(3) + 3.6 * k, [m[k] for m in found.values()], [COLOURS[name] for name in found])
        axes[1].text(1 + 3.6 * k, 1.02, title, ha="center", fontsize=9)
    places = [*range(3), *(np.arange(3) + 3.6)]
    axes[1].set_xticks(places, [name.replace(" ", "\n") for name in found] * 2, fontsize=8)
    axes[1].axhline(0.5, color="black", ls=":", lw=1)
    axes[1].set(
        ylim=(0.4, 1.08), ylabel="right image above wrong (.5: chance)", title="in hidden states, by a linear probe"
    )


def draw_answers(axes: np.ndarray, answers: list[tuple[Image, str, dict[str, str]]]) -> None:
    """Images with their prompt above, and below who said what."""
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, (picture, caption, said) in zip(axes, answers):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(fill(caption, 24), fontsize=9, color=GREEN)
        lines = [fill(f"{who}: {words}", 30) for who, words in said.items()]
        axis.set_xlabel("\n".join(lines), fontsize=8, loc="left")
