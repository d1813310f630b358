# %% [markdown]
"""Which part of IMG earns its place: the guidance, the two preference terms, lambda, the refresh, the passes?

In one line: the guidance does, in the paper's order; the preference terms do not here, because they carry f beyond the
winner, and a longer correction draws nothing better (tutorials/results.md says more).

The paper's Table 5 on the twin. Every row changes one thing of the same training and is trained from several seeds;
every aligner draws the same prompts again from the same seeds, and the exact oracle judges. Results of the shipped
recipe (110 K pairs, 6,000 steps, lambda 0) come with the repository (tutorials/08_ablations.json), so the chart takes
seconds; `--fresh` makes a shorter table anew, and goes on where it was stopped.

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
    preference_weight: float = option(0.0, "with --fresh: lambda of rows whose title does not say it", most=1000)
    only: str | None = option(None, "a group of rows: guidance, loss, lambda, refresh or passes")
    results: str = option(str(Path(common.__file__).with_name("08_ablations.json")), "without --fresh: results to show")


options = begin(Config, __doc__)
for name, least in (("prompts", 5), ("seeds", 1), ("steps", 1)):
    check(getattr(options, name) >= least, f"--{name} is {getattr(options, name)}, expected {least} or more")

from dataclasses import replace
from itertools import pairwise

from figures import ablations
from laboratory import MEASURED, Laboratory, Row, read_results, table, trainings

preset = oracle_preset(options)
preset = replace(preset, pairs=options.pairs or preset.pairs)

# %% 1. The rows: what each changes, and the paper's PickScore on SDXL where it has one
fresh = options.fresh or options.quick
settings = {name: getattr(options, name) for name in ("seed", "prompts", "seeds", "steps")}
settings |= dict(
    pairs=Path(preset.pairs).name, max_pairs=options.max_pairs, preference_weight=options.preference_weight
)
if options.quick:
    settings |= dict(prompts=5, seeds=1, steps=2, max_pairs=400)
results = {"settings": settings} if fresh else read_results(options.results)
settings = results["settings"]
FULL, weight = "finetuned MLLM", settings["preference_weight"]
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
    "λ 1, k 10": Row("refresh"),
    "λ 1, never": Row("refresh", refresh_after=1_000_000),
    "one pass": Row("passes", weight),
    "two passes": Row("passes", weight, passes=2),
    "three passes": Row("passes", weight, passes=3),
}
ROWS = {title: row for title, row in ROWS.items() if options.only in (None, row.group) or title == FULL}
check(len(ROWS) > 1, f"--only is {options.only!r}, expected one of: {', '.join(ablations.COLOURS)}")

# %% 2. Train, draw and judge them, or take those that the repository has
if fresh:
    folder = Path(options.output) / ("08_ablations-" + "-".join(str(value) for value in settings.values()))
    with step("train and draw"):
        results = Laboratory(preset, settings, folder).results(ROWS)
else:
    print(f"results from {options.results}; --fresh makes them anew")

# %% 3. The table: shares with intervals, each seed, and the paired difference to the full method
with step("intervals"):
    summary = table(results, ROWS, FULL)
described = "{prompts} test prompts, seed {seed}, {seeds} training seeds of {steps} steps on {pairs}".format(**settings)
described += (f", of which {n:,}" if (n := settings["max_pairs"]) else "") + f", λ {weight:g} unless said"
print(described)
print(f"{'':22} strict [95 %]          by seed             minus '{FULL}', paired      paper (PickScore)")
for title, row in summary.items():
    share = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**row["share"])
    difference = "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row["difference"])
    seeds = " ".join(f"{s:.3f}" for s in row["seeds"])
    print(f"{title:22} {share}   {seeds:18}  {difference:31} {ROWS[title].paper or ''}")
ORDER = ("none", "base model", "text embedding", "stock MLLM", FULL)
for worse, better in pairwise(title for title in ORDER if title in summary):
    step_up = table(results, {title: ROWS[title] for title in (worse, better)}, worse)[better]["difference"]
    print(f"{better} minus {worse}: " + "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**step_up))
if lacking := [title for title in ROWS if title not in summary]:
    print(f"not among these results: {', '.join(lacking)}")

# %% 4. What the preference terms did: ranges over the seeds, of the last thousand steps
shown = {title: ROWS[title] for title in summary if ROWS[title].group in ("loss", "refresh")}
if shown:
    print(f"\n{'':22} " + "".join(f"{name:18}" for name in MEASURED))
for title, ranges in trainings(results, shown).items():
    print(f"{title:22} " + "".join(f"{words:18}" for words in ranges))

# %% 5. The picture
figure = ablations.draw(summary, ROWS, "base model")
save(figure, options, "08_ablations", f"{preset.name}, {described}; one change at a time")
