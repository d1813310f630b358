"""Begin and end a tutorial: flags, clock, and the shapes that its pictures are made of.

A tutorial is a script to be read from top to bottom, and a notebook: `jupytext --to notebook
tutorials/01_misalignment.py` makes one, and editors know the marks, too. Its cells:

    # %% [markdown]      the head, a docstring: "# Question?", what differs from the paper, the cost
    # %%                 code; nothing else stands on a mark's line, because notebooks drop it
    # %% [markdown]      the head of a section; the last one says where it goes on
    # ## 1. Title
    # text

Each tutorial saves one picture, and its conclusion with computed numbers is the picture's title.
"""

import sys
from contextlib import AbstractContextManager
from dataclasses import make_dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

NOTEBOOK = "ipykernel" in sys.modules
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # so that a tutorial runs from anywhere

from img_minimal import cli
from img_minimal.cli import check, option  # noqa: F401 - scripts import it from here
from img_minimal.evaluate.intervals import Interval, draw_clusters, with_interval
from img_minimal.plots import COLOURS, pyplot
from img_minimal.presets import PRESETS, Models, Preset, find_preset

FLAGS = {
    "model": option("tiny-sdxl", "which models", choices=list(PRESETS)),
    "seed": option(0, "draws the prompts and numbers the images"),
    "quick": option(False, "the same lines on a few samples: only shows that it runs"),
    "output": option("outputs/tutorials", "folder for the picture"),
}
LOOK = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "errorbar.capsize": 3,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
}
_clock: Any = None  # set by `begin`: importing it takes seconds, and --help should not wait


def begin(doc: str, oracle: bool = False, **flags: Any) -> tuple[Any, Preset]:
    """Read the command line, print the question, and check that the picture can be written.

    `flags` are this tutorial's own, made by `option`, some with another value for `quick` mode.
    Returns the options and the preset that they choose. A notebook gets the defaults. With
    `oracle`, raises UserError for models whose images the exact oracle cannot judge.
    """
    global _clock
    doc = doc.removeprefix("# ")
    fields = []
    for name, flag in (FLAGS | flags).items():
        kind = str | None if flag.default is None else type(flag.default)
        fields.append((name, kind, flag))
    cli.install_error_hook()
    argv = [] if NOTEBOOK else None
    options, changes = cli.parse(make_dataclass("Options", fields), doc, Models, argv=argv)
    preset = find_preset(options.model).changed(**changes)
    check(
        preset.world == "tiny" or not oracle,
        f"this tutorial needs the exact oracle, which cannot judge images of {preset.name}; for "
        f"real images, see python -m img_minimal.evaluate --model {preset.name} --prompt-file",
    )
    cli.writable_folder(options.output)
    cli.quiet_libraries()
    from img_minimal.files import Clock

    _clock = Clock()
    if not NOTEBOOK:  # whose head shows it
        print(doc.splitlines()[0])
    if options.quick:
        print("quick mode: too few samples to mean anything")
        for name, flag in flags.items():
            if "quick" in flag.metadata:
                setattr(options, name, flag.metadata["quick"])
    return options, preset


def step(name: str) -> AbstractContextManager[None]:
    """Count the time within this context for a step; `save` prints the shares of all steps."""
    return _clock(name)


def sheet(width: float, *rows: tuple[float, list[float]]) -> tuple[Any, list]:
    """Make a figure of rows of axes, each of a height in inches, with relative widths of its axes.

    Returns the figure and an array of axes for each row.
    """
    plt = pyplot()
    plt.rcParams |= LOOK | {"axes.prop_cycle": plt.cycler(color=COLOURS)}
    heights = [height for height, _ in rows]
    figure = plt.figure(figsize=(width, sum(heights)))
    parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)
    axes = []
    for part, (_, widths) in zip(parts.flat, rows):
        [row] = part.subplots(1, len(widths), squeeze=False, width_ratios=widths)
        axes.append(row)
    return figure, axes


def bars(axis, intervals: dict[str, dict], lying: bool = False, **look) -> None:
    """Draw a bar with its interval for each name, standing or lying, at 0, 1, 2, ..."""
    value, error = spread(intervals.values())
    at = range(len(value))
    if lying:
        axis.barh(at, value, 0.65, xerr=error, alpha=0.8, **look)
        axis.set_yticks(at, intervals)
        axis.invert_yaxis()
    else:
        axis.bar(at, value, 0.65, yerr=error, alpha=0.8, **look)
        axis.set_xticks(at, [fill(name, 10) for name in intervals])


def curve(axis, x, intervals: list[dict], **look) -> None:
    """Draw a line, or points, with intervals."""
    value, error = spread(intervals)
    axis.errorbar(x, value, yerr=error, **look)


def spread(intervals) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of n intervals (n,), and how far these reach below and above (2, n)."""
    value, low, high = np.array([[row["value"], row["low"], row["high"]] for row in intervals]).T
    return value, np.clip([value - low, high - value], 0, None)


def ranking_interval(scores: np.ndarray, right: np.ndarray, clusters: list[str]) -> Interval:
    """Compute how often a right image scores above a wrong one, a tie counting half; (n,) each.

    This is the area under the ROC curve, with its interval as in `bootstrap_ratio`; NaN unless
    there are both kinds.
    """
    above = (1 + np.sign(np.subtract.outer(scores, scores))) / 2  # 1 where row above column
    index, drawn = draw_clusters(clusters, 2000)

    def area(times: np.ndarray) -> np.ndarray:
        ours, theirs = times * right, times * (1 - right)
        return ((ours @ above) * theirs).sum(-1) / (ours.sum(-1) * theirs.sum(-1))

    with np.errstate(invalid="ignore", divide="ignore"):  # of images as often as they are drawn
        return with_interval(area(np.ones(len(scores))), area(drawn[:, index]))


def picture(axis, image, above: str = "", below: str = "", **look) -> None:
    """Show an image without ticks, with words above and below it."""
    axis.imshow(image, interpolation="nearest", **look)
    axis.set(xticks=[], yticks=[])
    axis.set_title(wrapped(above, 22), fontsize=8)
    axis.set_xlabel(wrapped(below, 24), fontsize=8)
    axis.spines[:].set_visible(False)


def wrapped(text: str, width: int) -> str:
    """Wrap each line of a text."""
    return "\n".join(fill(line, width) for line in text.splitlines())


def save(figure, options, name: str, caption: str, conclusion: str = "") -> None:
    """Save the figure between conclusion and caption, which states the sample size.

    Prints what the steps cost, and the conclusion.
    """
    width = figure.get_figwidth()
    figure.suptitle(wrapped(conclusion, int(12 * width)), fontsize=10, weight="bold")
    caption = f"{options.model}, --seed {options.seed}: {caption}"
    if options.quick:
        caption = f"QUICK MODE, too few samples to mean anything. {caption}"
    figure.supxlabel(wrapped(caption, int(15 * width)), fontsize=9)
    for axis in figure.axes:
        if not axis.has_data():
            axis.set_axis_off()
    path = Path(options.output) / f"{name}.png"
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
    print(f"{_clock}\nsaved to {path}")
    print(f"\n{wrapped(conclusion, 100)}")
    if NOTEBOOK:
        from IPython.display import Image, display

        display(Image(path))
