"""Does an aligner that was trained for one model also help a finetuned variant of it, without retraining?

tiny-sdxl-dpo is tiny-sdxl after Diffusion-DPO on the preference pairs: its UNet has changed, its image prompt has not.
Its own images are shown to the same MLLM, aligned by the same aligner, and drawn again. Shown: the four cells (base,
+ IMG, DPO, DPO + IMG), every difference paired over prompts and seeds, and the four images of a few prompts. Two
minutes.

Why it can work: f maps tokens to tokens. Both c and f(h, c) live in the space of the IP-Adapter's Resampler, and a UNet
meets them only through the keys and values of its image branch,

    Attention(Q, K_text, V_text) + scale * Attention(Q, f(h, c) W_k, f(h, c) W_v)      (backbones/sdxl/injection.py)

where W_k and W_v belong to the adapter. A finetuned UNet asks with other queries Q, but is answered in the same words.

Look at two things: whether IMG adds to DPO as it does to the base, and whether both together beat either alone.
"""

from dataclasses import dataclass

from common import Options, begin, option, oracle_preset, parse, run, save


@dataclass
class PlugOptions(Options):
    """The command line."""

    prompts: int = option(300, "how many prompts of the test split")


if __name__ == "__main__":
    parse(PlugOptions, __doc__)  # answers --help before torch is imported, which takes seconds

from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np

from img_minimal.evaluate.arms import Arms
from img_minimal.evaluate.intervals import mean_interval, paired_shares, win_rate
from img_minimal.load import load_backbone, load_img
from img_minimal.pipeline import IMG
from img_minimal.presets import PRESETS, find_preset
from img_minimal.runtime.cli import check
from img_minimal.runtime.errors import UserError
from img_minimal.runtime.images import to_pil
from img_minimal.runtime.plots import BLUE, GREEN, GREY, ORANGE
from img_minimal.tiny.grammar import CATEGORIES, Prompt, benchmark

CELLS = {"base": GREY, "base + IMG": BLUE, "DPO": ORANGE, "DPO + IMG": GREEN}
DIFFERENCES = (("base + IMG", "base"), ("DPO", "base"), ("DPO + IMG", "DPO"), ("DPO + IMG", "base + IMG"))
SHOWN = 5  # prompts


@dataclass
class Cell:
    """One of the four: its images, and of every image whether all is right, and the share that is."""

    images: list
    strict: np.ndarray
    soft: np.ndarray


def two_cells(img: IMG, prompts: list[Prompt], seed: int, name: str) -> dict[str, Cell]:
    """A model alone, and with IMG."""
    arms = Arms(img, prompts, seed)
    second = arms.aligned("img", img)
    cells = {}
    for title, arm, images in ((name, "base", arms.pictures), (f"{name} + IMG", "img", to_pil(second))):
        verdicts = arms.verdicts[arm]
        cells[title] = Cell(images, np.array([v.strict for v in verdicts]), np.array([v.soft for v in verdicts]))
    return cells


def print_cells(cells: dict[str, Cell], prompts: list[Prompt]) -> None:
    """The table, and the paired differences."""
    captions = [str(p) for p in prompts]
    print(f"{'':11} strict [95 %]          soft   " + " ".join(f"{c:>9}" for c in CATEGORIES))
    for name, cell in cells.items():
        share = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**mean_interval(cell.strict, captions))
        by = (cell.strict[np.array([p.category == c for p in prompts])].mean() for c in CATEGORIES)
        print(f"{name:11} {share}   {cell.soft.mean():.3f}  " + " ".join(f"{v:9.2f}" for v in by))
    for ours, theirs in DIFFERENCES:
        pair = paired_shares(cells[ours].strict, cells[theirs].strict, captions)
        wins = win_rate(cells[ours].soft, cells[theirs].soft, captions)
        print(
            f"{ours:>10} minus {theirs:10} {{value:+.3f}} [{{low:+.3f}}, {{high:+.3f}}]".format(**pair["difference"]),
            f"  mended {pair['mended']}, spoilt {pair['spoilt']};",
            "wins {value:.2f} [{low:.2f}, {high:.2f}] of {decided} that differ".format(**wins),
        )


def plot_shares(axes: np.ndarray, cells: dict[str, Cell], prompts: list[Prompt]) -> None:
    """Four bars with intervals, and the same by category."""
    captions = [str(p) for p in prompts]
    for k, (name, cell) in enumerate(cells.items()):
        share = mean_interval(cell.strict, captions)
        error = [[share["value"] - share["low"]], [share["high"] - share["value"]]]
        axes[0].bar(k, share["value"], 0.7, color=CELLS[name], alpha=0.8)
        axes[0].errorbar(k, share["value"], yerr=error, color="black", capsize=4)
        by = [cell.strict[np.array([p.category == c for p in prompts])].mean() for c in CATEGORIES]
        axes[1].bar(np.arange(len(by)) + 0.2 * (k - 1.5), by, 0.19, color=CELLS[name], alpha=0.8, label=name)
    axes[0].set_xticks(range(len(cells)), [name.replace(" + ", "\n+ ") for name in cells])
    axes[0].set(ylim=(0, 1), ylabel="share right in everything")
    axes[1].set_xticks(range(len(CATEGORIES)), CATEGORIES)
    axes[1].set(ylim=(0, 1.02), title="by category")
    axes[1].legend(fontsize=9, ncols=4, loc="upper right", frameon=False)
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)


def plot_images(axes: np.ndarray, cells: dict[str, Cell], prompts: list[Prompt]) -> None:
    """The first prompts that base and DPO both draw wrong: a row for each cell."""
    wrong = np.flatnonzero(~cells["base"].strict & ~cells["DPO"].strict)[:SHOWN]
    for row, (name, cell) in zip(axes, cells.items()):
        row[0].set_ylabel(name, fontsize=10)
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, k in zip(row, wrong):
            axis.imshow(cell.images[k], interpolation="nearest")
            axis.set_xlabel("right" if cell.strict[k] else "wrong", color=GREEN if cell.strict[k] else GREY, fontsize=9)
    for axis, k in zip(axes[0], wrong):
        axis.set_title(fill(str(prompts[k]), 24), fontsize=9)


def main() -> None:
    """Four cells, two tables, one picture."""
    options = begin(PlugOptions, __doc__)
    preset = oracle_preset(options)
    if f"{preset.name}-dpo" not in PRESETS:
        raise UserError(f"--model {preset.name}: there is no {preset.name}-dpo to plug the aligner into; use tiny-sdxl")
    check(options.prompts >= 10, f"--prompts is {options.prompts}, expected 10 or more")
    prompts = benchmark(10 if options.quick else options.prompts, "test", options.seed)
    img = load_img(preset)
    cells = two_cells(img, prompts, options.seed, "base")
    finetuned = load_backbone(options.applied_to(find_preset(f"{preset.name}-dpo")))
    cells |= two_cells(IMG(finetuned, img.guide, img.aligner, img.passes, img.mllm_batch), prompts, options.seed, "DPO")
    print_cells(cells, prompts)

    figure = plt.figure(figsize=(10, 11.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(3, 8))
    plot_shares(upper.subplots(1, 2, width_ratios=(1, 2)), cells, prompts)
    plot_images(lower.subplots(4, SHOWN), cells, prompts)
    caption = (
        f"{len(prompts)} prompts of the test split, --seed {options.seed}, the same seeds in all cells; images: the "
        "first prompts that both models draw wrong,\nnot chosen. Neither aligner nor MLLM ever saw the DPO model."
    )
    save(figure, options, "09_plug_and_play", caption)


if __name__ == "__main__":
    run(main)
