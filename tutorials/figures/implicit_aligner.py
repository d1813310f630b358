"""The picture of tutorial 04."""

import math
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL.Image import Image, Resampling, fromarray
from torch import Tensor

from img_minimal.plots import BLUE, GREEN, GREY, ORANGE, PINK

KINDS = {"image patches": BLUE, "words of the question": ORANGE, "words of the prompt": GREEN,
         "after the prompt": PINK, "the tokens themselves": GREY}  # fmt: skip
Words = list[str | None]  # None at an image patch


def draw(
    prompts: list[str], picture: Image, painted: Tensor, sizes: list[float], again: list[Image], maps: Tensor,
    words: Words, columns: dict[str, list[int]], groups: dict[str, tuple[np.ndarray, dict]], label: str,
) -> Figure:  # fmt: skip
    """One image under several prompts; where its tokens look; sizes of the correction of many images."""
    figure = plt.figure(figsize=(10, 12.2), layout="constrained")
    rows = figure.add_gridspec(3, 1, height_ratios=[4.4, 3.3, 3.2], hspace=0.06)
    top, middle = rows[0].subgridspec(2, len(prompts)), rows[1].subgridspec(1, 2, width_ratios=[1, 2.2])
    bottom = rows[2].subgridspec(1, 2)
    axes = np.array([[figure.add_subplot(top[r, k]) for k in range(len(prompts))] for r in range(2)])
    draw_prompts(axes, prompts, picture, painted, sizes, again)
    draw_attention([figure.add_subplot(cell) for cell in middle], maps, words, columns)
    draw_shares(figure.add_subplot(bottom[0]), maps, columns)
    draw_sizes(figure.add_subplot(bottom[1]), groups, label)
    return figure


def glance(prompts: list[str], picture: Image, painted: Tensor, sizes: list[float], again: list[Image]) -> Figure:
    """The upper part alone."""
    figure, axes = plt.subplots(2, len(prompts), figsize=(10, 4.9), layout="constrained")
    draw_prompts(axes, prompts, picture, painted, sizes, again)
    return figure


def kinds(words: Words, without: Words, tokens: int) -> dict[str, list[int]]:
    """Columns of the attention weights (..., L + N) by what stands there.

    `words` are the L of the guidance, `without` those of the same question about nothing: what they do not share is
    the prompt.
    """
    ahead = next((k for k, (a, b) in enumerate(zip(words, without)) if a != b), len(without))
    behind = 0
    while behind < len(without) - ahead and words[-1 - behind] == without[-1 - behind]:
        behind += 1
    positions, end = range(len(words)), len(words) - behind
    patches = [k for k in positions if words[k] is None]
    asked = [k for k in positions[:ahead] if words[k] is not None]
    columns = [patches, asked, positions[ahead:end], positions[end:], range(len(words), len(words) + tokens)]
    return {name: list(column) for name, column in zip(KINDS, columns, strict=True)}


def draw_prompts(
    axes: np.ndarray, prompts: list[str], picture: Image, painted: Tensor, sizes: list[float], again: list[Image]
) -> None:
    """Row of corrections over the image, row of what is drawn with them; a column for each prompt."""
    top = painted.max().item()
    for k, (prompt, heat, size) in enumerate(zip(prompts, painted, sizes)):
        over(axes[0, k], picture, heat, top)
        axes[0, k].set_title(fill(f"“{prompt}”", 24) + f"\ncorrection {size:.2f}", fontsize=8.5)
        axes[1, k].imshow(again[k])
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("one image, and what\nf changes of it", fontsize=8.5)
    axes[1, 0].set_ylabel("drawn again with\nf(h, c)", fontsize=8.5)


def over(axis: plt.Axes, picture: Image, heat: Tensor, top: float) -> None:
    """A map (side, side) over a faded picture."""
    axis.imshow(picture, extent=(0, 1, 1, 0))
    smooth = fromarray(heat.numpy().astype(np.float32)).resize((64, 64), Resampling.BICUBIC)
    strength = np.clip(np.asarray(smooth) / top, 0, 1)
    axis.imshow(np.ones((64, 64, 3)), extent=(0, 1, 1, 0), alpha=0.55)
    axis.imshow(strength, extent=(0, 1, 1, 0), cmap="inferno_r", vmin=0, vmax=1, alpha=0.85 * strength**0.7)


def draw_attention(axes: list[plt.Axes], maps: Tensor, words: Words, columns: dict[str, list[int]]) -> None:
    """Image patches and words that each token looks at, in the layer that looks most at the prompt."""
    layer = int(maps[:, :, columns["words of the prompt"]].sum(-1).mean(-1).argmax())
    side = math.isqrt(len(columns["image patches"]))
    patches = maps[layer][:, columns["image patches"]].unflatten(-1, (side, side))
    axes[0].imshow(mosaic(patches / patches.amax((1, 2), keepdim=True)), cmap="inferno_r")
    axes[0].set(xticks=[], yticks=[])
    axes[0].set_title(
        f"… at the {side} x {side} patches of the image\n(a square for each token, its own scale)", fontsize=9
    )
    asked = list(range(max(columns["image patches"]) + 1, len(words)))
    shown = axes[1].imshow(maps[layer][:, asked], cmap="inferno_r", aspect="auto", vmin=0)
    axes[1].set_xticks(range(len(asked)), [words[k] for k in asked], rotation=60, ha="right", fontsize=8.5,
                       rotation_mode="anchor")  # fmt: skip
    for text, k in zip(axes[1].get_xticklabels(), asked):
        text.set_color(GREEN if k in columns["words of the prompt"] else "black")
    axes[1].set_ylabel("image token")
    axes[1].set_title(f"… at the words of the question (layer {layer + 1}; green: the prompt)", fontsize=9)
    axes[1].figure.colorbar(shown, ax=axes[1], label="attention, mean over heads", pad=0.01)


def mosaic(maps: Tensor) -> Tensor:
    """N maps (N, side, side) in rows and columns, one blank line between them: one map of all."""
    across = math.ceil(len(maps) ** 0.5)
    padded = torch.nn.functional.pad(maps, (0, 1, 0, 1), value=float("nan"))
    blank = torch.full((across * math.ceil(len(maps) / across) - len(maps), *padded.shape[1:]), float("nan"))
    rows = torch.cat([padded, blank]).unflatten(0, (-1, across))
    return rows.transpose(1, 2).flatten(2).flatten(0, 1)[:-1, :-1]


def draw_shares(axis: plt.Axes, maps: Tensor, columns: dict[str, list[int]]) -> None:
    """A bar for each layer: how its attention is divided."""
    left = np.zeros(len(maps))
    for name, colour in KINDS.items():
        share = maps[:, :, columns[name]].sum(-1).mean(-1).numpy()
        axis.barh(np.arange(len(maps)) + 1, share, left=left, color=colour, label=name)
        left += share
    axis.set(xlim=(0, 1), yticks=range(1, len(maps) + 1), xlabel="share of attention, mean over tokens", ylabel="layer")
    axis.invert_yaxis()
    axis.legend(fontsize=7.5, ncols=2, loc="lower center", bbox_to_anchor=(0.45, 1.0), frameon=False)


def draw_sizes(axis: plt.Axes, groups: dict[str, tuple[np.ndarray, dict]], label: str) -> None:
    """Points and mean with its interval for each group."""
    noise = np.random.default_rng(0)
    for x, (values, mean) in enumerate(groups.values()):
        axis.scatter(x + noise.uniform(-0.3, 0.3, len(values)), values, s=9, color=BLUE, alpha=0.45, lw=0)
        axis.plot([x - 0.38, x + 0.38], [mean["value"]] * 2, color=ORANGE, lw=2.5)
        axis.fill_between([x - 0.38, x + 0.38], mean["low"], mean["high"], color=ORANGE, alpha=0.3, lw=0)
    axis.set_xticks(range(len(groups)), [f"{name}\nn {len(values)}" for name, (values, _) in groups.items()])
    axis.set(xlabel=label, ylabel="‖f(h, c) − c‖  (1: another picture)")
    axis.set_ylim(bottom=0)
