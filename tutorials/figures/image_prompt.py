"""The picture of tutorial 03."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL.Image import Image
from torch import Tensor

from img_minimal.plots import BLUE, GREY, ORANGE


def draw(
    prompts: tuple[str, str], pictures: list[Image], alone: list[Image], scales: tuple[float, ...],
    exchanged: list[list[Image]], heard: dict[str, list[dict]], sizes: list[dict], weights: list[Tensor],
) -> Figure:  # fmt: skip
    """The exchange above; below who is heard by scale, both branches by layer, and where two tokens are heard."""
    figure = plt.figure(figsize=(11, 8.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4, 4))
    draw_exchange(upper.subplots(2, 2 + len(scales)), prompts, pictures, alone, scales, exchanged)
    left, middle, right = lower.subfigures(1, 3, width_ratios=(4, 4, 1.5))
    draw_heard(left.subplots(), scales, heard)
    draw_branches(middle.subplots(), sizes)
    draw_places(right.subplots(2, 1), weights)
    return figure


def show(axis: plt.Axes, image: Image, title: str = "", colour: str = "black") -> None:
    """An image without ticks."""
    axis.imshow(image, interpolation="nearest" if image.width < 256 else None)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9, color=colour)


def draw_exchange(axes: np.ndarray, prompts: tuple, pictures: list, alone: list, scales: tuple, exchanged: list):
    """Two rows: an image, its reconstruction, and the other prompt at growing scales of its tokens."""
    for k, row in enumerate(axes):
        show(row[0], pictures[k], "image", BLUE)
        row[0].set_ylabel(f"tokens of\n“{prompts[k]}”", fontsize=8)
        show(row[1], alone[k], "its tokens,\nno words", BLUE)
        for axis, scale, images in zip(row[2:], scales, exchanged):
            show(axis, images[k], f"s = {scale}")
        row[2].set_ylabel(f"text:\n“{prompts[1 - k]}”", fontsize=8)


def draw_heard(axis: plt.Axes, scales: tuple, heard: dict[str, list[dict]]) -> None:
    """Who is heard, by scale."""
    lines = (("text", BLUE, "text is satisfied"), ("tokens", ORANGE, "tokens' image is satisfied"),
             ("rest", GREY, "rest: distance to the tokens' image"))  # fmt: skip
    for name, colour, label in lines:
        if heard[name]:
            value, low, high = ([row[key] for row in heard[name]] for key in ("value", "low", "high"))
            axis.plot(scales, value, "o-", color=colour, label=label)
            axis.fill_between(scales, low, high, color=colour, alpha=0.2, lw=0)
    axis.set(xlabel="scale s of the image tokens", ylabel="share, or ratio", ylim=(0, None))
    axis.legend(fontsize=8)
    axis.set_title("text asks for one thing, tokens for another", fontsize=10)


def draw_branches(axis: plt.Axes, sizes: list[dict]) -> None:
    """A pair of bars for each cross-attention."""
    place = np.arange(len(sizes))
    for k, (name, colour) in enumerate((("text", BLUE), ("image", ORANGE))):
        axis.bar(place + 0.4 * k - 0.2, [s[name] for s in sizes], 0.4, color=colour, label=f"A_{name}, before s")
    axis.set(
        xlabel="cross-attention, in the order of the pass",
        ylabel="root mean square",
        xticks=place[:: max(1, len(place) // 10)],
    )
    axis.margins(y=0.2)  # room for the legend above the bars
    axis.legend(fontsize=8, ncols=2, loc="upper right")
    axis.set_title("the two branches beside each other", fontsize=10)


def draw_places(axes: np.ndarray, weights: list[Tensor]) -> None:
    """Where in the latents the two most concentrated tokens are heard, in the most selective of the finest layers."""
    finest = max(len(w) for w in weights)
    chosen = max((w for w in weights if len(w) == finest), key=lambda w: w.std(0).max())
    side = int(finest**0.5)
    for axis, token in zip(axes, chosen.std(0).argsort(descending=True)):
        axis.imshow(chosen[:, token].reshape(side, side), cmap="inferno_r", vmin=0)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"token {int(token)} is\nheard here", fontsize=9)
