# %% [markdown]
"""Which part of IMG earns its place: the guidance, the two preference terms, lambda, the refresh, the passes?

In one line: at this length every trained aligner beats none, the finetuned MLLM guides better than the stock one but
not better than text, and rows of loss, lambda, refresh and passes do not differ. With more pairs and steps the
finetuned MLLM is ahead of text, too (tutorials/results.md).

The paper's Table 5 on the twin. Every row changes one thing of the same short training and is trained from several
seeds; every aligner draws the same prompts again from the same seeds, and the exact oracle judges. The results of the
whole table come with the repository (tutorials/08_ablations.json), so the chart takes seconds; `--fresh` makes them
anew, and goes on where it was stopped.

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

# %% Options
from dataclasses import dataclass
from pathlib import Path

import common
from common import Options, begin, check, option, oracle_preset, save, step


@dataclass
class Config(Options):
    """The command line."""

    fresh: bool = option(False, "train and draw anew, instead of showing the results that come with the repository")
    prompts: int = option(512, "with --fresh: how many prompts of the test split")
    seeds: int = option(3, "with --fresh: training seeds")
    steps: int = option(1000, "with --fresh: training steps of every aligner")
    pairs: str | None = option(None, "with --fresh: preference pairs; default: the preset's")
    max_pairs: int = option(0, "with --fresh: use only so many pairs, 0 for all")
    preference_weight: float = option(1.0, "with --fresh: lambda of the rows that do not vary it", most=1000)
    only: str | None = option(None, "a group of rows: guidance, loss, lambda, refresh or passes")
    results: str = option(str(Path(common.__file__).with_name("08_ablations.json")), "without --fresh: results to show")


options = begin(Config, __doc__)
for name, least in (("prompts", 5), ("seeds", 1), ("steps", 1)):
    check(getattr(options, name) >= least, f"--{name} is {getattr(options, name)}, expected {least} or more")

import json
from dataclasses import replace

from figures import ablations
from laboratory import Laboratory, Row, table

preset = oracle_preset(options)
preset = replace(preset, pairs=options.pairs or preset.pairs)

# %% 1. The rows: what each changes, and the paper's PickScore on SDXL where it has one
FULL, weight = "finetuned MLLM", options.preference_weight
ROWS = {
    "none": Row("guidance", guidance="none", paper=22.22),
    "base model": Row("guidance", guidance="base", paper=22.34),
    "text embedding": Row("guidance", weight, guidance="text", paper=22.38),
    "stock MLLM": Row("guidance", weight, guidance="stock", paper=22.59),
    FULL: Row("guidance", weight, paper=22.74),
    "L_base": Row("loss", weight=0.0, paper=22.56),
    "L_base + DPO": Row("loss", spin=False, paper=22.65),
    "L_base + DPO + SPIN": Row("loss", paper=22.74),
    "λ 0": Row("lambda", weight=0.0, paper=22.56),
    "λ 0.5": Row("lambda", weight=0.5, paper=22.56),
    "λ 1": Row("lambda", paper=22.74),
    "λ 2": Row("lambda", weight=2.0, paper=22.50),
    "k 10": Row("refresh", weight),
    "never": Row("refresh", weight, refresh_after=1_000_000),
    "one pass": Row("passes", weight),
    "two passes": Row("passes", weight, passes=2),
    "three passes": Row("passes", weight, passes=3),
}
ROWS = {title: row for title, row in ROWS.items() if options.only in (None, row.group) or title == FULL}
check(len(ROWS) > 1, f"--only is {options.only!r}, expected one of: {', '.join(ablations.COLOURS)}")

# %% 2. Train, draw and judge them, or read what the repository has
settings = {name: getattr(options, name) for name in ("seed", "prompts", "seeds", "steps")}
settings |= {"pairs": Path(preset.pairs).name, "max_pairs": options.max_pairs}
if options.quick:
    settings |= dict(prompts=5, seeds=1, steps=2, max_pairs=400)
if options.fresh or options.quick:
    folder = Path(options.output) / ("08_ablations-" + "-".join(str(value) for value in settings.values()))
    with step("train and draw"):
        results = Laboratory(preset, settings, folder).results(ROWS)
else:
    results = json.loads(Path(options.results).read_text())
    print(f"results from {options.results}; --fresh makes them anew")

# %% 3. The table: shares with intervals, each seed, and the paired difference to the full method
with step("intervals"):
    summary = table(results, ROWS, FULL)
described = "{prompts} test prompts, seed {seed}, {seeds} training seeds of {steps} steps on {pairs}".format(
    **results["settings"]
) + (f", of which {n:,}" if (n := results["settings"].get("max_pairs")) else "")
print(described)
print(f"{'':22} strict [95 %]          by seed             minus '{FULL}', paired      paper (PickScore)")
for title, row in summary.items():
    share = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**row["share"])
    difference = "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row["difference"])
    seeds = " ".join(f"{s:.3f}" for s in row["seeds"])
    print(f"{title:22} {share}   {seeds:18}  {difference:31} {ROWS[title].paper or ''}")

# %% 4. The picture
figure = ablations.draw(summary, ROWS, "base model")
save(figure, options, "08_ablations", f"{preset.name}, {described}; one change at a time")
