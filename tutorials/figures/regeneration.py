"""The picture of tutorial 07."""

from collections.abc import Sequence
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from img_minimal.presets import Preset
from img_minimal.files import to_pil
from img_minimal.plots import BLUE, GREEN, GREY, ORANGE, PINK

CONTROLS = {
    "new_seed": "new seed",
    "best_of_two_mllm": "best of two,\nMLLM picks",
    "best_of_two_oracle": "best of two,\noracle picks*",
    "no_guidance": "own tokens",
    "perfect_tokens": "tokens of a\nright image*",
}
AXES = {
    "passes": "passes of the aligner",
    "length": "length of its correction",
    "scale": "scale of the tokens",
    "scale_end": "share of it at the last step",
    "rounds": "rounds of looking, drawing",
}


def draw(
    titles: dict[int, str], initial: Tensor, correction: Tensor, images: dict, table: dict, preset: Preset
) -> Figure:
    """A row of images for each number in `titles`, and below, where there is an oracle, every setting's worth."""
    heights = [1.85] * len(titles) + [5.5] * bool(table)
    figure = plt.figure(figsize=(13.5, sum(heights) + 0.4), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    columns = strip(initial, correction, images, table, preset)
    for part, (k, title) in zip(parts, titles.items()):
        draw_row(part, title, k, columns, heads=part is parts[0])
    if table:
        draw_settings(parts[-1], table, preset)
    return figure


def strip(initial: Tensor, correction: Tensor, images: dict, table: dict, preset: Preset) -> dict[str, tuple]:
    """Initial image, correction, some passes, lowest and highest scale, a constant one, some rounds.

    Each is (images or sizes of the correction of each token, which of them are right or None).
    """
    of = {kind: sorted(value for name, value in images if name == kind) for kind in AXES}
    settings = [("passes", k) for k in of["passes"][::2]] + [("scale", of["scale"][0]), ("scale", of["scale"][-1])]
    settings += [("scale_end", 1.0), ("rounds", 2)] + [("rounds", r) for r in of["rounds"][3:]]
    sizes = correction.norm(dim=-1)  # (B, N)
    side = int(sizes.shape[1] ** 0.5)
    sizes = sizes.unflatten(1, (side, side)) if side**2 == sizes.shape[1] else sizes[:, None]
    columns = {"initial": (initial, table["base"]["right"] if table else None), "correction": (sizes, None)}
    for setting in settings:
        head = "{} {:g}".format(*setting) + (" = IMG" if setting == ("passes", preset.passes) else "")
        columns[head] = (images[setting], table[setting]["right"] if table else None)
    return columns


def draw_row(figure: SubFigure, title: str, k: int, columns: dict[str, tuple], heads: bool) -> None:
    """Image k in every column."""
    figure.suptitle(fill(title, 125), fontsize=9.5, x=0.01, ha="left")
    for axis, (head, (values, right)) in zip(figure.subplots(1, len(columns)), columns.items()):
        if values.ndim == 4:
            axis.imshow(to_pil(values[k : k + 1])[0], interpolation="nearest")
        else:
            axis.imshow(values[k], cmap="Blues", vmin=0, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(head if heads else "", fontsize=9)
        axis.spines[:].set(color=GREY, linewidth=1)
        if right is not None:
            colour = GREEN if right[k] else ORANGE
            axis.spines[:].set(color=colour, linewidth=3)
            axis.set_xlabel("right" if right[k] else "wrong", fontsize=9, color=colour, fontweight="bold", labelpad=2)


def draw_settings(figure: SubFigure, table: dict, preset: Preset) -> None:
    """Upper row: strict share minus the base's, with intervals. Lower row: what was fixed and what was broken."""
    axes = figure.subplots(2, 6, sharey="row", sharex="col", width_ratios=(5, 4, 4, 4, 4, 4.6), height_ratios=(3, 2))
    marks = (preset.passes, 1, preset.scale, preset.scale_end, 1)
    for (upper, lower), (kind, label), mark in zip(axes.T, AXES.items(), marks):
        x = sorted(value for name, value in (key for key in table if not isinstance(key, str)) if name == kind)
        draw_pair(upper, lower, x, [table[kind, value] for value in x], 0.6 * (x[1] - x[0]), "o-", BLUE)
        upper.axvline(mark, color=PINK, linestyle=":", label="IMG's setting")
        ticks = x if x[0] < 0.1 else [0, *x]
        lower.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=9)
        lower.set_xlabel(label)
    upper, lower = axes[:, -1]
    draw_pair(upper, lower, range(len(CONTROLS)), [table[name] for name in CONTROLS], 0.6, "s", "black")
    lower.set_xticks(range(len(CONTROLS)), CONTROLS.values(), rotation=60, ha="right", rotation_mode="anchor",
                     fontsize=8)  # fmt: skip
    upper.set_title("controls", fontsize=10)
    base = table["base"]["share"]["value"]
    axes[0, 0].set_ylabel(f"strict share minus base's ({base:.2f})")
    axes[1, 0].set_ylabel("prompts: fixed (up),\nbroken (down)")
    axes[0, 0].legend(fontsize=8, loc="lower right")


def draw_pair(
    upper: plt.Axes, lower: plt.Axes, x: Sequence[float], rows: list[dict], width: float, mark: str, colour: str
) -> None:
    """Differences with their intervals above, counts of fixed and broken below."""
    value, low, high = (np.array([row["difference"][key] for row in rows]) for key in ("value", "low", "high"))
    upper.errorbar(x, value, yerr=(value - low, high - value), fmt=mark, color=colour, capsize=3)
    upper.axhline(0, color=GREY, linewidth=1)
    upper.grid(axis="y", alpha=0.3)
    for key, sign, shade in (("fixed", 1, GREEN), ("broken", -1, ORANGE)):
        counts = [row[key] for row in rows]
        lower.bar(x, [sign * count for count in counts], width, color=shade, alpha=0.85)
        for place, count in zip(x, counts):
            lower.text(place, sign * count, count, ha="center", va="bottom" if sign > 0 else "top", fontsize=8)
    lower.axhline(0, color=GREY, linewidth=1)
    lower.margins(y=0.2)
