"""What does a base model get wrong, and how much of it would another seed have mended?

The base model draws every prompt from four seeds, and the exact oracle (img_minimal/tiny/oracle.py) judges each image.
Shown: the share that is right by category, and for prompts with a colour-shape pair that no training data held; what a
new seed changes; a grid of failures in the oracle's words. About a minute.

IMG draws an image twice. So the first thing it has to beat is what anybody can do with a second drawing: take another
seed. With r_s in {0, 1} for "the image of seed s is right" and means over prompts,

    one seed      E[r_0]                        a new seed, whatever it brings: E[r_1], in expectation the same
    best of m     E[max(r_0, ..., r_(m-1))]     needs a judge who picks; here the oracle, which no user has
    mended        E[r_1 | r_0 = 0]              what a new seed does to the wrong images
    spoilt        E[1 - r_1 | r_0 = 1]          and to the right ones

A method that is tried on failures alone is credited with E[r_1 | r_0 = 0], although it may know nothing: part of what
looks like repair is luck that returns to the mean. Both ways have to be counted, on all prompts, as
img_minimal/evaluate/arms.py does. Look at where luck does not help: a category in which even the best of four is low.
"""

from dataclasses import dataclass

from common import Options, begin, option, oracle_preset, parse, run, save


@dataclass
class MisalignmentOptions(Options):
    """The command line."""

    prompts: int = option(400, "how many prompts of the test split")


if __name__ == "__main__":
    parse(MisalignmentOptions, __doc__)  # answers --help before torch is imported, which takes seconds

from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import SubFigure
from PIL.Image import Image

from img_minimal.backbones import Backbone
from img_minimal.evaluate.image_folder import FIRST_SEED, NEW_SEED
from img_minimal.evaluate.intervals import mean_interval
from img_minimal.load import load_backbone
from img_minimal.runtime.cli import check
from img_minimal.runtime.images import to_pil
from img_minimal.runtime.plots import BLUE, GREEN, GREY, ORANGE, PINK
from img_minimal.tiny.grammar import CATEGORIES, Prompt, benchmark
from img_minimal.tiny.oracle import Verdict, judge

SEEDS = 4  # images of every prompt
SHOWN = 8  # failures
HELD_OUT = "held-out pair"


@dataclass
class Drawn:
    """Images of the first seed, and what the oracle says of all: `right` (SEEDS, prompts)."""

    prompts: list[Prompt]
    pictures: list[Image]
    verdicts: list[Verdict]  # of the first seed
    right: np.ndarray

    @property
    def captions(self) -> list[str]:
        """The clusters of the bootstrap: images of one caption are not independent."""
        return [str(prompt) for prompt in self.prompts]

    @property
    def groups(self) -> dict[str, np.ndarray]:
        """Which prompts belong to which row: categories without a held-out pair, all of these, and those with one."""
        held_out = np.array([p.held_out for p in self.prompts])
        rows = {c: ~held_out & np.array([p.category == c for p in self.prompts]) for c in CATEGORIES}
        return rows | {"all of these": ~held_out, HELD_OUT: held_out}


def draw_and_judge(backbone: Backbone, prompts: list[Prompt], seed: int) -> Drawn:
    """Every prompt from SEEDS seeds: the evaluation's own for its base and its new seed, then further ones."""
    captions, verdicts, pictures = [str(p) for p in prompts], [], []
    for k in range(SEEDS):
        seeds = [FIRST_SEED * (seed + 1) + k * NEW_SEED + i for i in range(len(prompts))]
        images = backbone.draw(captions, seeds, progress=f"seed {k + 1} of {SEEDS}")
        verdicts.append(judge(images, prompts))
        pictures = pictures or to_pil(images)
    return Drawn(prompts, pictures, verdicts[0], np.array([[v.strict for v in row] for row in verdicts]))


def shares(drawn: Drawn) -> dict[str, dict]:
    """For every group: n, the share right from one seed with its interval, a new seed, best of two and of four."""
    table = {}
    for name, mask in drawn.groups.items():
        right = drawn.right[:, mask]
        table[name] = {
            "n": int(mask.sum()),
            "one": mean_interval(right[0], [c for c, m in zip(drawn.captions, mask) if m]),
            "new": right[1].mean(),
            "two": right[:2].any(0).mean(),
            "four": right.any(0).mean(),
        }
    return table


def print_shares(table: dict[str, dict], seed: int) -> None:
    """The table."""
    print(f"share of images that are right in everything (strict), 95 % intervals over captions, seed {seed}:")
    print(f"{'':15}   n   one seed              new seed  best of two  of four")
    for name, row in table.items():
        one = f"{row['one']['value']:.3f} [{row['one']['low']:.3f}, {row['one']['high']:.3f}]"
        print(f"{name:15} {row['n']:3d}   {one}   {row['new']:5.3f}     {row['two']:5.3f}        {row['four']:5.3f}")


def new_seed_effect(drawn: Drawn) -> dict[str, dict]:
    """What a new seed mends of the wrong images, spoils of the right ones, and changes over all of them."""
    first, second = drawn.right[:2]
    effect = {}
    for name, values, mask in (("mended", second, ~first), ("spoilt", ~second, first)):
        count = int((values & mask).sum())
        interval = mean_interval(values[mask], [c for c, m in zip(drawn.captions, mask) if m]) if mask.any() else None
        effect[name] = {"count": count, "of": int(mask.sum()), "interval": interval}
    effect["change"] = mean_interval(1.0 * second - first, drawn.captions)
    return effect


def print_effect(effect: dict[str, dict]) -> None:
    """The new seed in three lines."""
    for name, before, after in (("mended", "wrong", "right"), ("spoilt", "right", "wrong")):
        part = effect[name]
        if part["interval"]:
            share = "{value:.0%} [{low:.0%}, {high:.0%}]".format(**part["interval"])
            print(f"a new seed makes {part['count']} of {part['of']} {before} images {after}: {share}")
    change = "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**effect["change"])
    print(f"over all prompts it changes the share by {change}: that, not what it mends, is its worth")


def failures(drawn: Drawn) -> list[tuple[int, str]]:
    """Prompts whose first image is wrong, with their group: the first of every group, then the second, ..."""
    groups = [(name, mask) for name, mask in drawn.groups.items() if name != "all of these"]
    wrong = [(np.flatnonzero(mask & ~drawn.right[0]), name) for name, mask in groups]
    turns = [(turn, place, k, name) for place, (part, name) in enumerate(wrong) for turn, k in enumerate(part)]
    chosen = sorted(sorted(turns)[:SHOWN], key=lambda item: item[1])
    return [(k, name) for _, _, k, name in chosen]


def plot_shares(axis: plt.Axes, table: dict[str, dict]) -> None:
    """A bar with its interval for one seed, marks for the rest."""
    places = np.arange(len(table)) + 0.5 * (np.arange(len(table)) >= len(CATEGORIES))  # totals stand apart
    one = [row["one"] for row in table.values()]
    value = np.array([o["value"] for o in one])
    error = np.array([value - [o["low"] for o in one], [o["high"] for o in one] - value])
    axis.barh(places, value, 0.62, color=BLUE, alpha=0.75, label="one seed, 95 % interval")
    axis.errorbar(value, places, xerr=error.clip(0), fmt="none", ecolor="black", capsize=3)
    marks = (("new", "x", PINK, "a new seed"), ("two", "D", ORANGE, "best of two*"), ("four", "*", GREEN, "of four*"))
    for key, marker, colour, label in marks:
        axis.plot([r[key] for r in table.values()], places, marker, color=colour, label=label,
                  markersize=11 if marker == "*" else 7, markeredgewidth=2.5 if marker == "x" else 0.5,
                  markeredgecolor=colour if marker == "x" else "black")  # fmt: skip
    axis.set_yticks(places, [f"{name} (n {row['n']})" for name, row in table.items()])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.03), xlabel="share of prompts whose image is right in everything")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(fontsize=9, ncols=4, loc="lower center", bbox_to_anchor=(0.35, 1.0), frameon=False, columnspacing=1)


def plot_effect(axis: plt.Axes, effect: dict[str, dict]) -> None:
    """Two stacked bars: wrong images and right ones, and what a new seed makes of them."""
    mended, spoilt = effect["mended"], effect["spoilt"]
    stacks = ((mended["count"], mended["of"] - mended["count"]), (spoilt["of"] - spoilt["count"], spoilt["count"]))
    for place, (right, wrong) in enumerate(stacks):
        for start, count, colour, label in ((0, right, GREEN, "right"), (right, wrong, GREY, "wrong")):
            axis.bar(place, count, 0.62, start, color=colour, alpha=0.75)
            if count:
                axis.text(place, start + count / 2, f"{count}\n{label}", ha="center", va="center", fontsize=10)
    axis.set_xticks((0, 1), ("first seed\nwrong", "first seed\nright"))
    axis.set_title("what a new seed\nmakes of them", fontsize=10)
    axis.set_ylabel("prompts")
    axis.spines[["top", "right"]].set_visible(False)


def plot_failures(figure: SubFigure, drawn: Drawn) -> None:
    """Images with their category, prompt, and the oracle's words."""
    figure.suptitle("Failures: category, prompt, and what the oracle says would mend the image", fontsize=11)
    axes = figure.subplots(2, SHOWN // 2).flat
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for (k, group), axis in zip(failures(drawn), figure.axes):
        axis.imshow(drawn.pictures[k], interpolation="nearest")
        axis.set_title(group, fontsize=10, color=BLUE, fontweight="bold", pad=3)
        words = fill(f'"{drawn.captions[k]}"', 30) + "\n" + fill(f"oracle: {drawn.verdicts[k].words}", 30)
        axis.set_xlabel(words, fontsize=9)


def main() -> None:
    """Draw, judge, print, picture."""
    options = begin(MisalignmentOptions, __doc__)
    preset = oracle_preset(options)
    check(options.prompts >= 20, f"--prompts is {options.prompts}, expected 20 or more: one of every kind")
    prompts = benchmark(20 if options.quick else options.prompts, "test", options.seed)
    drawn = draw_and_judge(load_backbone(preset), prompts, options.seed)
    table, effect = shares(drawn), new_seed_effect(drawn)
    print_shares(table, options.seed)
    print_effect(effect)
    figure = plt.figure(figsize=(10, 10.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4, 6.2))
    left, right = upper.subplots(1, 2, width_ratios=(3, 1))
    plot_shares(left, table)
    plot_effect(right, effect)
    plot_failures(lower, drawn)
    save(figure, options, "01_misalignment",
         f"{preset.name}, {len(prompts)} prompts of the test split, {SEEDS} seeds each, --seed {options.seed}; "
         "failures are the first of every kind, not chosen.\n* as picked by the oracle, which no user has. "
         "Held-out pairs, e.g. a blue triangle, are in no training data of any part.")  # fmt: skip


if __name__ == "__main__":
    run(main)
