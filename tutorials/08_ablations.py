# %% [markdown]
"""# Which part of IMG earns its place: the guidance, the two preference terms, lambda, the refresh, the passes?

The paper's Table 5 on the twin. Every row changes one thing of the same training
([06](06_training.py)) and is trained from several seeds. Every aligner draws the same prompts from
the same seeds, and the exact oracle judges. With L_base = ||c_w - f||^2 and the preference term
l(-[a DPO + b SPIN]) ([05](05_preference_objective.py)) the rows are

    guidance h      none: the image is drawn again with its own tokens, f(h, c_l) = c_l; base model:
                    it is not drawn again; the prompt's text embedding; the MLLM before (stock) and
                    after it was finetuned ([02](02_mllm_analysis.py))
    loss            L_base (lambda 0); a = 1, b = 0; a = b = 1
    lambda          0, 0.5, 1, 2
    refresh         f becomes f_ref after k = 10 wins in a row, or never
    passes          f applied once, twice, three times at sampling

Not as in the paper: its score is PickScore, ours the share of images that are right in everything
(strict). Its reference row has lambda 1, ours 0. And each row is drawn in two ways: with the twin's
scale, which falls over the steps and was chosen on validation prompts, and with a weak and constant
one as in the paper. (The paper's is .2; ours, .3, was not chosen by a score.)

In full: a minute, because the results come with the repository. `--fresh` makes them anew, for each
of eight aligners and three seeds in about five minutes on two cores, and goes on where it was
stopped.
"""

# %%
from common import HERE, bars, begin, check, option, save, sheet, step

from img_minimal.plots import BLUE, GREEN, GREY, ORANGE, PINK, read_rows

COLOURS = {"guidance": BLUE, "loss": ORANGE, "lambda": GREEN, "refresh": PINK, "passes": GREY}
options, preset = begin(
    __doc__,
    oracle=True,
    fresh=option(False, "train and draw anew, instead of showing the repository's results"),
    prompts=option(512, "with --fresh: prompts of the test split", least=5),
    seeds=option(3, "with --fresh: training seeds", least=1),
    steps=option(1000, "with --fresh: training steps of every aligner", least=1),
    batch_size=option(64, "with --fresh: samples per step", least=1),
    pairs=option(None, "with --fresh: preference pairs; default: the preset's"),
    max_pairs=option(8192, "with --fresh: use only so many pairs, 0 for all"),
    only=option("all", "a group of rows", choices=["all", *COLOURS]),
    results=option(None, "without --fresh: a results.json; default: the repository's"),
)
options.quick = False  # the repository's results take no longer

import json
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cache, lru_cache
from itertools import pairwise, product
from operator import itemgetter
from pathlib import Path

import numpy as np

from img_minimal.aligner import ImplicitAligner
from img_minimal.data.load import load_training_data
from img_minimal.devices import Precision, best_device
from img_minimal.evaluate.arms import Arms
from img_minimal.evaluate.intervals import mean_interval, said
from img_minimal.files import check_provenance, identity, read_json, write_whole
from img_minimal.pipeline import IMG
from img_minimal.run import Ranks, Run
from img_minimal.tiny.grammar import benchmark
from train import train

# %% [markdown]
# ## 1. The rows: what each changes, and the paper's PickScore on SDXL where it has one

# %%
SETTINGS = ("seed", "prompts", "seeds", "steps", "batch_size", "pairs", "max_pairs")
MEASURED = ("gradient_norm", "margin", "correction", "refreshes", "validation_error")
PARTS = ("right", "best_length", "training")
VALIDATION = 128  # prompts that the prediction is made on
INJECTIONS = {"falling scale": {}, "weak, constant scale": {"scale": 0.3, "scale_end": 1.0}}
# How long these rows' corrections are, relative to L_base's: measured with the shipped recipe.
LENGTHS = {"L_base + DPO + SPIN": 1.16, "L_base + DPO": 1.33}


@dataclass(frozen=True)
class Row:
    """One row of the table.

    `guidance` is "mllm", "stock" or "text"; "none" draws again with the image's own tokens, "base"
    does not draw again.
    """

    group: str
    paper: float | None = None
    weight: float = 1.0
    guidance: str = "mllm"
    spin: bool = True
    refresh_after: int = 10
    passes: int = 1

    def aligner(self, seed: int) -> str:
        """Name the aligner; rows that only differ in sampling share it."""
        terms = "dpo" + "spin" * self.spin if self.weight else "base"
        return f"{self.guidance}-{self.weight}-{terms}-{self.refresh_after}-seed{seed}"

    def result(self, seed: int) -> str:
        """Name the result; what is not trained has one for all seeds."""
        if self.guidance in ("none", "base"):
            return self.guidance
        return self.aligner(seed).replace("seed", f"passes{self.passes}-seed")


FULL = "finetuned MLLM"
ROWS = {
    "none": Row("guidance", 22.22, guidance="none"),
    "base model": Row("guidance", 22.34, guidance="base"),
    "text embedding": Row("guidance", 22.38, weight=0.0, guidance="text"),
    "stock MLLM": Row("guidance", 22.59, weight=0.0, guidance="stock"),
    FULL: Row("guidance", 22.74, weight=0.0),
    "L_base": Row("loss", 22.56, weight=0.0),
    "L_base + DPO": Row("loss", 22.65, spin=False),
    "L_base + DPO + SPIN": Row("loss", 22.74),
    "λ 0": Row("lambda", 22.56, weight=0.0),
    "λ 0.5": Row("lambda", 22.56, weight=0.5),
    "λ 1": Row("lambda", 22.74),
    "λ 2": Row("lambda", 22.5, weight=2.0),
    "λ 1, k 10": Row("refresh"),
    "λ 1, never": Row("refresh", refresh_after=1_000_000),
    "one pass": Row("passes", weight=0.0),
    "two passes": Row("passes", weight=0.0, passes=2),
    "three passes": Row("passes", weight=0.0, passes=3),
}
if options.only != "all":
    ROWS = {t: row for t, row in ROWS.items() if row.group == options.only or t == FULL}


# %% [markdown]
# ## 2. Results: of the repository, or of a folder that `--fresh` fills, one file for each aligner


# %%
def read_results(path: Path) -> dict:
    """Read a results.json of this tutorial. Raises UserError for another file."""

    def inspect(file: dict) -> None:
        itemgetter(*SETTINGS)(file["settings"])
        for part in PARTS:
            file[part].keys()

    advice = "expected a results.json of this tutorial's --fresh"
    return read_json(path, dict, advice, inspect=inspect)


pairs = options.pairs or preset.data.pairs
settings = {name: getattr(options, name) for name in SETTINGS} | {"pairs": Path(pairs).name}
folder = Path(options.output) / f"08_ablations-{'-'.join(map(str, settings.values()))}"
precision = Precision.named(preset.models.dtype, best_device())
preset = preset.changed(
    ("data", "training"),
    pairs=pairs,
    max_pairs=settings["max_pairs"],
    steps=settings["steps"],
    batch_size=settings["batch_size"],
    save_every=settings["steps"],
)


# %% [markdown]
# ## 3. `--fresh`: train, draw and judge what the folder lacks
#
# The preference terms lengthen the correction, and whether that pays is one number that is known
# before any of their rows is trained: b*, the best multiple of the correction of L_base alone
# ([05](05_preference_objective.py)). So b* is measured on validation prompts, after the first
# training, and what follows for the other rows is written down before they are drawn.


# %%
@cache
def draw_base(split: str) -> Arms:
    """Draw and judge the base's images of all prompts of a split."""
    number = settings["prompts"] if split == "test" else min(VALIDATION, settings["prompts"])
    prompts = benchmark(number, split, settings["seed"])
    return Arms(IMG(preset=preset), prompts, settings["seed"])


@lru_cache(maxsize=1)  # features of one guidance at a time
def prepare(guidance: str) -> tuple:
    """Open the training pairs' features, the same for all training seeds, and a guided IMG."""
    data = load_training_data(preset, guidance, settings["seed"], 70.0, Ranks())
    return data, IMG(draw_base("test").img.backbone, preset=preset, guidance=guidance)


def trained(row: Row, seed: int) -> IMG:
    """Train a row's aligner with train.py's own loop, unless an earlier call has, and open it."""
    path = folder / row.aligner(seed)
    file = path / "aligner.safetensors"
    data, img = prepare(row.guidance)
    if not file.exists():
        recipe = replace(preset.training, preference_weight=row.weight)
        run = Run(path, asdict(row), resume=(path / "checkpoint.pt").exists())
        terms = {"spin": row.spin, "refresh_after": row.refresh_after}
        aligner = train(run, data, recipe, precision, seed=seed, **terms)
        if run.stopped:
            raise KeyboardInterrupt
        aligner.save(file)
    img.aligner = ImplicitAligner.from_file(file).eval()
    img.passes = row.passes
    return img


def measure(metrics: Path) -> dict[str, float]:
    """Return means over the last thousand steps of a training, and how often f_ref was set."""
    log = read_rows(metrics)[-1000:]
    means = {}
    for name in MEASURED:
        if values := [row[name] for row in log if name in row]:
            means[name] = round(float(np.mean(values)), 5)
    return means | {"refreshes": float(log[-1]["refreshes"])}


def marks(arms: Arms, name: str) -> str:
    """Write which images of an arm are right, as "1101..."."""
    return "".join(str(int(mark)) for mark in arms.marks("strict")[name])


def draw_both_ways(arms: Arms, img: IMG | None) -> dict[str, dict]:
    """Draw again in both ways: which images are right, and b* as drawn.

    Without `img` the tokens are the images' own.
    """
    drawn = {"right": {}, "best_length": {}}
    tokens = img.align(arms.base, arms.captions, arms.seeds) if img else arms.own
    for name, scales in INJECTIONS.items():
        with arms.img.drawing(**scales):
            images = arms.draw(name, tokens)
        drawn["right"][name] = marks(arms, name)
        if img:
            drawn["best_length"][name] = arms.best_lengths(tokens, images).get("all")
    return drawn


def predict() -> None:
    """Write down what b* of L_base's aligner, on validation prompts, says about the other rows."""
    drawn = draw_both_ways(draw_base("validation"), trained(ROWS[FULL], 0))
    note = {"written": f"{datetime.now():%Y-%m-%d %H:%M}", "best_length": drawn["best_length"]}
    for name, best in drawn["best_length"].items():
        for title, length in LENGTHS.items() if best else ():
            border = (1 + length) / 2
            side = "above" if best["value"] > border else "below"
            note[f"{title}, {name}"] = f"b* {said(best, '.2f')} is {side} {border:.3f}"
    write_whole(folder / "prediction.json", json.dumps(note, indent=1) + "\n")


def judge_row(row: Row, seed: int) -> dict:
    """Train a row's aligner unless an earlier call has; judge what it draws."""
    arms = draw_base("test")
    if row.guidance == "base":
        return {"right": dict.fromkeys(INJECTIONS, marks(arms, "base"))}
    if row.guidance == "none":
        return draw_both_ways(arms, None)
    drawn = draw_both_ways(arms, trained(row, seed))
    return drawn | {"training": measure(folder / row.aligner(seed) / "metrics.jsonl")}


def make_results() -> Path:
    """Fill the folder, and gather its results in one file, the path of which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    made = asdict(preset.models) | {"name": preset.name, "pairs": pairs}
    for name, value in made.items():
        made[name] = identity(value)
    note = folder / "made_with.json"
    check_provenance(note, made, "choose another --output", note.exists())
    prediction = folder / "prediction.json"
    if not prediction.exists():
        predict()
    results = {"settings": settings, "prediction": read_json(prediction, dict, "delete it")}
    for part in PARTS:
        results[part] = {}
    for seed, row in product(range(settings["seeds"]), ROWS.values()):
        file = folder / f"{row.result(seed)}.json"
        if not file.exists():
            write_whole(file, json.dumps(judge_row(row, seed), indent=1) + "\n")
    for file in sorted(folder.glob("*-seed*.json")) + [folder / "none.json", folder / "base.json"]:
        if file.exists():
            for part, values in read_json(file, dict, "delete it").items():
                results[part][file.stem] = values
    whole = folder / "results.json"
    write_whole(whole, json.dumps(results, indent=1) + "\n")
    return whole


if options.fresh:
    with step("train and draw"):
        files = [make_results()]
elif options.results:
    files = [Path(options.results)]
else:
    files = sorted(HERE.glob("08_ablations*.json"))


# %% [markdown]
# ## 4. The tables
#
# A row's value is the mean over its training seeds; its interval is a bootstrap over captions, with
# all seeds of a caption together. Differences to the row "finetuned MLLM" (lambda 0) are *paired*:
# of the same prompts and seeds, so that what is hard for both does not count. Look at the seeds
# first: rows whose seeds overlap have no order. b* is that of a row's own aligner (seed 0), as
# drawn, for the test images that the base model gets wrong.


# %%
def gather(results: dict, injection: str) -> dict[str, dict[int, np.ndarray]]:
    """Collect which images (n,) each seed of each row got right."""
    right = {}
    for title, seed in product(ROWS, range(results["settings"]["seeds"])):
        marks = results["right"].get(ROWS[title].result(seed), {}).get(injection)
        if marks:
            right.setdefault(title, {})[seed] = np.array(list(marks)).astype(float)
    return right


def minus(better: dict, worse: dict, captions: list[str]) -> tuple[dict, list[float]]:
    """Compute the paired difference of two rows over the seeds that both have, and each seed's."""
    gains = [better[seed] - worse[seed] for seed in better if seed in worse]
    interval = mean_interval(np.concatenate(gains), captions * len(gains))
    return interval, [gain.mean() for gain in gains]


def print_table(right: dict, results: dict, injection: str) -> dict[str, tuple]:
    """Print a table; return each row's difference to the reference row, and each seed's."""
    settings = results["settings"]
    captions = list(map(str, benchmark(settings["prompts"], "test", settings["seed"])))
    said_settings = [f"{name} {value}" for name, value in settings.items()]
    print(f"\n{injection}, test prompts; {', '.join(said_settings)}, λ 0 unless said")
    heads = f"by seed             minus '{FULL}', paired   b*                  paper (PickScore)"
    print(f"{'':22} strict [95 %]          {heads}")
    differences = {}
    for title, seeds in right.items():
        share = mean_interval(np.concatenate(list(seeds.values())), captions * len(seeds))
        difference, _ = differences[title] = minus(seeds, right[FULL], captions)
        each = " ".join(f"{marks.mean():.3f}" for marks in seeds.values())
        best = results["best_length"].get(ROWS[title].result(0), {}).get(injection)
        best_said = said(best, ".2f") if best else ""
        cells = f"{said(share)}   {each:18}  {said(difference, '+.3f'):29} {best_said:18}"
        print(f"{title:22} {cells}  {ROWS[title].paper or ''}")
    order = [title for title in right if ROWS[title].group == "guidance"]
    for worse, better in pairwise(order):
        gain, _ = minus(right[better], right[worse], captions)
        print(f"{better} minus {worse}: {said(gain, '+.3f')}")
    if lacking := ROWS.keys() - right:
        print(f"not among these results: {', '.join(sorted(lacking))}")
    return differences


tables = {}
for file in files:
    results = read_results(file)
    print(f"\nresults from {file}" + "; --fresh makes them anew" * (not options.fresh))
    settings = results["settings"]
    for injection in INJECTIONS:
        right = gather(results, injection)
        if FULL in right:
            name = f"{injection},\n{settings['steps']} steps of {settings['batch_size']}"
            with step("intervals"):
                tables[name] = print_table(right, results, injection)
    for name, value in results.get("prediction", {}).items():
        if name != "best_length":
            print(f"before the rows were drawn: {name}: {value}")
check(tables, f"the results lack the row {FULL!r}, which others are compared with")

# %% [markdown]
# ## 5. What the preference terms did
#
# Ranges over the seeds, of the last thousand steps: the norm of the gradient, the mean of x, the
# squared length of the correction, how often f_ref was set, and the error on unseen prompts.

# %%
for results in map(read_results, files):
    print(f"{'':22}", *[f"{name:17}" for name in MEASURED])
    for title, row in ROWS.items():
        names = map(row.result, range(results["settings"]["seeds"]))
        runs = [results["training"].get(name, {}) for name in names]
        line = f"{title:22}"
        for name in MEASURED:
            values = sorted(run[name] for run in runs if name in run)
            ends = dict.fromkeys(f"{value:.4g}" for value in values[:1] + values[-1:])
            line += f" {' to '.join(ends):17}"
        if any(runs) and row.group in ("loss", "lambda", "refresh"):
            print(line)

# %% [markdown]
# ## 6. The picture: paired differences to the reference row
#
# It goes on with another model under the same aligner: [09, plug and play](09_plug_and_play.py).
# What follows from the tables is told in [Results](results.md#ablations).

# %%
figure, charts = sheet(9.5, *[(4, [1])] * len(tables))
for [chart], (name, differences) in zip(charts, tables.items()):
    shown = {}
    for title in differences:
        shown.setdefault(ROWS[title].result(0), title)  # of the same aligners the first title
    intervals = {title: differences[title][0] for title in shown.values()}
    colours = [COLOURS[ROWS[title].group] for title in intervals]
    bars(chart, intervals, lying=True, color=colours)
    for k, title in enumerate(intervals):
        seeds = differences[title][1]
        chart.plot(seeds, [k] * len(seeds), "ko", mfc="white", ms=5)
    chart.axvline(0, color="black", lw=1)
    chart.set(title=name, xlabel=f"share right in everything, minus that of the row {FULL!r}")
differences = next(iter(tables.values()))
told = []
for title in ("base model", "L_base + DPO + SPIN", "three passes"):
    if title in differences:
        told.append(f"{title} {said(differences[title][0], '+.3f')}")
caption = (
    f"paired differences on {settings['prompts']} test prompts; L_base, λ 0 and one pass are the "
    "row at 0, λ 1 is L_base + DPO + SPIN. Bars: means over training seeds, with 95 % intervals; "
    "circles: single training seeds; colours: what is changed, one thing at a time."
)
conclusion = f"Minus the row {FULL!r} (L_base, one pass), in the share that is right: "
save(figure, options, "08_ablations", caption, f"{conclusion}{'; '.join(told)}.")
