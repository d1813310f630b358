"""Which part of IMG earns its place: the guidance, the two preference terms, lambda, the refresh, the passes?

The paper's Table 5 on the twin. Every row changes one thing of the same short training and is trained from three seeds;
every aligner draws the same prompts again from the same seeds, and the exact oracle judges. The results of the whole
table come with the repository (tutorials/08_ablations.json), so the chart takes seconds; `--fresh` makes them anew in
about an hour on two cores, and goes on where it was stopped.

With L_base = ||c_w - f||^2 and the preference term l(-[a DPO + b SPIN]) of img_minimal/preference.py the rows are

    guidance h      none: f(h, c_l) = c_l; the prompt's text embedding; the stock MLLM; the finetuned MLLM
    loss            L_base (lambda 0); a = 1, b = 0; a = b = 1
    lambda          0, 0.5, 1, 2
    refresh         f becomes f_ref after k = 10 wins in a row, or never
    passes          f applied once, twice, three times at sampling

A row's value is the share of images that are right in everything, the mean over seeds; its interval is a bootstrap over
captions, with all seeds of a caption together; a dot is one training seed. Differences to the row "finetuned MLLM" are
paired. Look at the dots first: rows whose dots overlap have no order.
"""

from dataclasses import dataclass

from common import Options, begin, option, oracle_preset, parse, run, save


@dataclass
class AblationOptions(Options):
    """The command line."""

    fresh: bool = option(False, "train and draw anew, instead of showing the results that come with the repository")
    prompts: int = option(512, "with --fresh: how many prompts of the test split")
    seeds: int = option(3, "with --fresh: training seeds")
    steps: int = option(1000, "with --fresh: training steps of every aligner")


if __name__ == "__main__":
    parse(AblationOptions, __doc__)  # answers --help before torch is imported, which takes seconds

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor
from tqdm import tqdm

from img_minimal.aligner import ImplicitAligner, align
from img_minimal.data.batches import Batches
from img_minimal.data.sources import CachedData
from img_minimal.evaluate.arms import Arms
from img_minimal.evaluate.intervals import mean_interval
from img_minimal.load import load_guide, load_img, load_training_data
from img_minimal.mllm import guidance_features
from img_minimal.presets import Preset
from img_minimal.runtime.atomic import write_whole
from img_minimal.runtime.cli import check
from img_minimal.runtime.plots import BLUE, GREEN, GREY, ORANGE, PINK
from img_minimal.tiny.grammar import benchmark
from img_minimal.training import Trainer
from train import train

SHIPPED = Path(__file__).with_suffix(".json")
NONE, BASE, FULL = "none", "base model", "finetuned MLLM"


@dataclass(frozen=True)
class Row:
    """One row of the table: what it changes, and the paper's PickScore on SDXL where it has one."""

    group: str
    guidance: str = "mllm"
    weight: float = 1.0
    dpo: bool = True
    spin: bool = True
    refresh_after: int = 10
    passes: int = 1
    paper: float | None = None

    @property
    def aligner(self) -> str:
        """Rows that differ in sampling only share an aligner."""
        parts = "".join(name for name in ("dpo", "spin") if getattr(self, name) and self.weight)
        return f"{self.guidance}-{self.weight}-{parts or 'base'}-{self.refresh_after}"


ROWS = {
    NONE: Row("guidance", guidance="none", paper=22.22),
    BASE: Row("guidance", guidance="base", paper=22.34),
    "text embedding": Row("guidance", guidance="text", paper=22.38),
    "stock MLLM": Row("guidance", guidance="stock", paper=22.59),
    FULL: Row("guidance", paper=22.74),
    "L_base": Row("loss", weight=0.0, paper=22.56),
    "L_base + DPO": Row("loss", spin=False, paper=22.65),
    "L_base + DPO + SPIN": Row("loss", paper=22.74),
    "λ 0": Row("lambda", weight=0.0, paper=22.56),
    "λ 0.5": Row("lambda", weight=0.5, paper=22.56),
    "λ 1": Row("lambda", paper=22.74),
    "λ 2": Row("lambda", weight=2.0, paper=22.50),
    "k 10": Row("refresh"),
    "never": Row("refresh", refresh_after=1_000_000),
    "one pass": Row("passes"),
    "two passes": Row("passes", passes=2),
    "three passes": Row("passes", passes=3),
}
COLOURS = {"guidance": BLUE, "loss": ORANGE, "lambda": GREEN, "refresh": PINK, "passes": GREY}


class Laboratory:
    """Trains and judges rows; every aligner and every result is kept below `folder`."""

    def __init__(self, preset: Preset, options: AblationOptions, folder: Path):
        self.options, self.folder = options, folder
        self.preset = replace(preset, max_pairs=400 if options.quick else 0, train_steps=options.steps)
        self.data: tuple[str, CachedData] | None = None
        self.looks: dict[str, tuple[Tensor, Tensor]] = {}

    @cached_property
    def arms(self) -> Arms:
        """The base's images of all prompts."""
        prompts = benchmark(self.options.prompts, "test", self.options.seed)
        return Arms(load_img(self.preset), prompts, self.options.seed)

    def features(self, guidance: str) -> CachedData:
        """Frozen features of the training pairs, those of one guidance at a time."""
        if self.data is None or self.data[0] != guidance:
            self.data = guidance, load_training_data(self.preset, guidance, self.options.seed, cache_gb=70.0)
        return self.data[1]

    def aligner(self, row: Row, seed: int) -> ImplicitAligner:
        """Trained now, or in an earlier call."""
        folder = self.folder / f"{row.aligner}-seed{seed}"
        if not (folder / "aligner.safetensors").exists():
            folder.mkdir(parents=True, exist_ok=True)
            preset, data = replace(self.preset, preference_weight=row.weight), self.features(row.guidance)
            trainer = Trainer.new(preset, data.widths, row.refresh_after, seed)
            batches = Batches(data.parts, preset.batch_size, seed)
            train(trainer, batches, data.unseen, preset, folder, steps=preset.train_steps, dpo=row.dpo,
                  spin=row.spin, save_every=preset.train_steps)  # fmt: skip
            trainer.aligner.save(folder / "aligner.safetensors")
        return ImplicitAligner.from_file(folder / "aligner.safetensors").eval()

    def guidance(self, kind: str) -> tuple[Tensor, Tensor]:
        """h and mask of the base's images, by this kind of guidance."""
        if kind not in self.looks:
            arms = self.arms
            guide = arms.img.guide if kind == "mllm" else load_guide(self.preset, kind, arms.img.backbone)
            self.looks[kind] = guidance_features(guide, arms.pictures, arms.captions, arms.seeds)
        return self.looks[kind]

    def right(self, row: Row, seed: int) -> list[int]:
        """Of every prompt whether this row's image is right (1) or not (0)."""
        if row.guidance != "base":
            tokens = self.arms.own
            if row.guidance != "none":
                tokens = align(self.aligner(row, seed), tokens, *self.guidance(row.guidance), row.passes)
            self.arms.second_pass("row", tokens)
        return [int(v.strict) for v in self.arms.verdicts["base" if row.guidance == "base" else "row"]]


def key(row: Row, seed: int) -> str:
    """A result's name: rows that are the same by another title share it; what is not trained has one seed."""
    return row.guidance if row.guidance in ("none", "base") else f"{row.aligner}-passes{row.passes}-seed{seed}"


def compute(preset: Preset, options: AblationOptions) -> dict:
    """All results, those of an earlier call with the same settings included."""
    names = ("seed", "prompts", "seeds", "steps")
    settings = {name: getattr(options, name) for name in names} | {"pairs": Path(preset.pairs).name}
    folder = Path(options.output) / ("08_ablations-" + "-".join(str(v) for v in settings.values()))
    laboratory, file = Laboratory(preset, options, folder), folder / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"settings": settings, "right": {}}
    work = {key(row, seed): (row, seed) for seed in range(options.seeds) for row in ROWS.values()}
    for name, (row, seed) in tqdm(sorted(work.items(), key=lambda item: item[1][0].guidance), desc="rows"):
        if name not in results["right"]:
            results["right"][name] = "".join(map(str, laboratory.right(row, seed)))
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(results, indent=1) + "\n")
    return results


def table(results: dict) -> dict[str, dict]:
    """For every row: the share right with its interval, of each seed, and the paired difference to the full method."""
    settings, rows = results["settings"], {}
    captions = [str(p) for p in benchmark(settings["prompts"], "test", settings["seed"])]

    def right(row: Row) -> np.ndarray:
        return np.array([[int(x) for x in results["right"][key(row, s)]] for s in range(settings["seeds"])])

    full = right(ROWS[FULL])
    for title, row in ROWS.items():
        ours, clusters = right(row), captions * settings["seeds"]
        rows[title] = {
            "share": mean_interval(ours.ravel(), clusters),
            "seeds": ours.mean(1),
            "difference": mean_interval((ours - full).ravel(), clusters),
        }
    return rows


def print_table(rows: dict[str, dict], settings: dict) -> None:
    """The table."""
    print("{prompts} test prompts x {seeds} training seeds, {steps} steps each, on {pairs}".format(**settings))
    print(f"{'':22} strict [95 %]          by seed             minus '{FULL}', paired      paper (PickScore)")
    for title, row in rows.items():
        share = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**row["share"])
        difference = "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row["difference"])
        seeds = " ".join(f"{s:.3f}" for s in row["seeds"])
        print(f"{title:22} {share}   {seeds:18}  {difference:31} {ROWS[title].paper or ''}")


def chart(rows: dict[str, dict]) -> plt.Figure:
    """Ours on the left, the paper's numbers on the right, a colour for each group."""
    figure, (ours, paper) = plt.subplots(1, 2, figsize=(10, 7.6), width_ratios=(3, 1.6), layout="constrained")
    groups = list(COLOURS)
    places = np.array([k + 0.7 * groups.index(ROWS[title].group) for k, title in enumerate(rows)])
    for place, (title, row) in zip(places, rows.items()):
        value, colour = row["share"]["value"], COLOURS[ROWS[title].group]
        error = [[value - row["share"]["low"]], [row["share"]["high"] - value]]
        ours.barh(place, value, 0.7, color=colour, alpha=0.6)
        ours.errorbar(value, place, xerr=error, color="black", capsize=3, lw=1)
        if len(set(row["seeds"])) > 1:
            ours.plot(row["seeds"], [place] * len(row["seeds"]), "o", color=colour, markeredgecolor="black", ms=5)
        if ROWS[title].paper:
            paper.barh(place, ROWS[title].paper, 0.7, color=colour, alpha=0.6)
            paper.text(ROWS[title].paper + 0.01, place, f"{ROWS[title].paper:.2f}", va="center", fontsize=9)
    ours.axvline(rows[BASE]["share"]["value"], color="black", ls=":", lw=1)
    ours.set_yticks(places, list(rows))
    ours.set(xlim=(0, None), xlabel="share right in everything (bar: mean, 95 % interval; dots: training seeds)")
    ours.set_title("the twin (dotted: base model)", fontsize=11)
    paper.axvline(ROWS[BASE].paper, color="black", ls=":", lw=1)
    paper.set(yticks=[], xlim=(22, 22.9), ylim=ours.get_ylim(), xlabel="PickScore (axis starts at 22)")
    paper.set_title("the paper, SDXL", fontsize=11)
    for axis in (ours, paper):
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Compute or read, print, draw."""
    options = begin(AblationOptions, __doc__)
    preset = oracle_preset(options)
    for name, least in (("prompts", 5), ("seeds", 1), ("steps", 1)):
        check(getattr(options, name) >= least, f"--{name} is {getattr(options, name)}, expected {least} or more")
    if options.quick:
        options.fresh, options.prompts, options.seeds, options.steps = True, 5, 1, 2
    if options.fresh or not SHIPPED.exists():
        results = compute(preset, options)
    else:
        results = json.loads(SHIPPED.read_text())
        print(f"results from {SHIPPED}; --fresh makes them anew")
    rows, settings = table(results), results["settings"]
    print_table(rows, settings)
    caption = "{prompts} test prompts, seed {seed}, {seeds} training seeds of {steps} steps on {pairs}".format(
        **settings
    )
    save(chart(rows), options, "08_ablations", f"{preset.name}, {caption}; one change at a time")


if __name__ == "__main__":
    run(main)
