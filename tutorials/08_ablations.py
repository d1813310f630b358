# %% [markdown]
"""Which part of IMG earns its place: the guidance, the two preference terms, lambda, the refresh, the passes?

In one line: the guidance does, in the paper's order; the preference terms do not here, because they
carry f beyond the winner, and a longer correction draws nothing better (tutorials/results.md says
more).

The paper's Table 5 on the twin. Every row changes one thing of the same training and is trained
from several seeds; every aligner draws the same prompts again from the same seeds, and the exact
oracle judges. Results of the shipped recipe (110 K pairs, 6,000 steps, lambda 0) come with the
repository (tutorials/08_ablations.json), so the chart takes seconds; `--fresh` makes a shorter
table anew, and goes on where it was stopped.

With L_base = ||c_w - f||^2 and the preference term l(-[a DPO + b SPIN]) of preference.py the rows
are

    guidance h      none: f(h, c_l) = c_l; the prompt's text embedding; the stock MLLM; the
                    finetuned MLLM
    loss            L_base (lambda 0); a = 1, b = 0; a = b = 1
    lambda          0, 0.5, 1, 2
    refresh         f becomes f_ref after k = 10 wins in a row, or never
    passes          f applied once, twice, three times at sampling

A row's value is the share of images that are right in everything, the mean over seeds; its interval
is a bootstrap over captions, with all seeds of a caption together; a dot is one training seed.
Differences to the row "finetuned MLLM" are paired. Look at the dots first: rows whose dots overlap
have no order.
"""  # noqa: E501

# %% Options
from common import ROOT, bars, begin, check, option, save, sheet, step

from img_minimal.plots import BLUE, GREEN, GREY, ORANGE, PINK, read_rows

COLOURS = {"guidance": BLUE, "loss": ORANGE, "lambda": GREEN, "refresh": PINK, "passes": GREY}
options, preset = begin(
    __doc__,
    oracle=True,
    fresh=option(False, "train and draw anew, instead of showing the repository's results"),
    prompts=option(512, "with --fresh: prompts of the test split", least=5, quick=5),
    seeds=option(3, "with --fresh: training seeds", least=1, quick=1),
    steps=option(1000, "with --fresh: training steps of every aligner", least=1, quick=2),
    pairs=option(None, "with --fresh: preference pairs; default: the preset's"),
    max_pairs=option(0, "with --fresh: use only so many pairs, 0 for all", quick=400),
    preference_weight=option(0.0, "with --fresh: lambda unless a title says it", most=1000),
    only=option("all", "a group of rows", choices=["all", *COLOURS]),
    results=option(str(ROOT / "tutorials" / "08_ablations.json"), "without --fresh: results"),
)

import json
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from itertools import pairwise, product
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

# %% 1. The rows: what each changes, and the paper's PickScore on SDXL where it has one
SETTINGS = ("seed", "prompts", "seeds", "steps", "pairs", "max_pairs", "preference_weight")
MEASURED = ("gradient_norm", "margin", "correction", "refreshes", "validation_error")


def read_results(path: str | Path) -> dict:
    """Read a results.json of this tutorial. Raises UserError for another file."""

    def inspect(file: dict) -> None:
        for name in SETTINGS:
            file["settings"][name]
        file["right"].keys()
        file["training"].keys()

    advice = "expected a results.json of this tutorial's --fresh"
    return read_json(path, dict, advice, inspect=inspect)


fresh = options.fresh or options.quick
pairs = options.pairs or preset.data.pairs
if fresh:
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings["pairs"] = Path(pairs).name
    results = {"settings": settings, "right": {}, "training": {}}
else:
    print(f"results from {options.results}; --fresh makes them anew")
    results = read_results(options.results)
    settings = results["settings"]
weight = settings["preference_weight"]
seeds = range(settings["seeds"])
prompts = benchmark(settings["prompts"], "test", settings["seed"])


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
    "text embedding": Row("guidance", 22.38, weight, guidance="text"),
    "stock MLLM": Row("guidance", 22.59, weight, guidance="stock"),
    FULL: Row("guidance", 22.74, weight),
    "L_base": Row("loss", 22.56, weight=0.0),
    "L_base + DPO": Row("loss", 22.65, spin=False),
    "L_base + DPO + SPIN": Row("loss", 22.74),
    "λ 0": Row("lambda", 22.56, weight=0.0),
    "λ 0.5": Row("lambda", 22.56, weight=0.5),
    "λ 1": Row("lambda", 22.74),
    "λ 2": Row("lambda", 22.5, weight=2.0),
    "λ 1, k 10": Row("refresh"),
    "λ 1, never": Row("refresh", refresh_after=1_000_000),
    "one pass": Row("passes", weight=weight),
    "two passes": Row("passes", weight=weight, passes=2),
    "three passes": Row("passes", weight=weight, passes=3),
}
if options.only != "all":
    ROWS = {t: row for t, row in ROWS.items() if row.group == options.only or t == FULL}

# %% 2. Train, draw and judge what the folder lacks
folder = Path(options.output) / f"08_ablations-{'-'.join(map(str, settings.values()))}"
precision = Precision.named(preset.models.dtype, best_device())
preset = preset.changed(
    ("data", "training"),
    pairs=pairs,
    max_pairs=settings["max_pairs"],
    steps=settings["steps"],
    save_every=settings["steps"],
)


@cache
def draw_base() -> Arms:
    """Draw and judge the base's images of all prompts."""
    return Arms(IMG(preset=preset), prompts, settings["seed"])


@lru_cache(maxsize=1)  # features of one guidance at a time
def prepare(guidance: str) -> tuple:
    """Open the training pairs' features, the same for all training seeds, and a guided IMG."""
    data = load_training_data(preset, guidance, settings["seed"], 70.0, Ranks())
    return data, IMG(draw_base().img.backbone, preset=preset, guidance=guidance)


def train_row(row: Row, seed: int, path: Path) -> None:
    """Train a row's aligner with train.py's own loop, and save it."""
    data, _ = prepare(row.guidance)
    recipe = replace(preset.training, preference_weight=row.weight)
    run = Run(path, asdict(row), resume=(path / "checkpoint.pt").exists())
    terms = {"spin": row.spin, "refresh_after": row.refresh_after}
    aligner = train(run, data, recipe, precision, seed=seed, **terms)
    if run.stopped:
        raise KeyboardInterrupt
    aligner.save(path / "aligner.safetensors")


def measure(metrics: Path) -> dict[str, float]:
    """Return means over the last thousand steps of a training, and how often f_ref was set."""
    log = read_rows(metrics)[-1000:]
    means = {"refreshes": float(log[-1]["refreshes"])}
    for name in MEASURED:
        values = [row[name] for row in log if name in row]
        if values:
            means.setdefault(name, round(float(np.mean(values)), 5))
    return means


def judge_row(row: Row, seed: int) -> np.ndarray:
    """Train a row's aligner unless an earlier call has; return which of its images are right."""
    arms = draw_base()
    arm = row.guidance
    if arm == "none":
        arms.draw(arm, arms.own)
    elif arm != "base":
        path = folder / row.aligner(seed)
        file = path / "aligner.safetensors"
        if not file.exists():
            train_row(row, seed, path)
        results["training"][path.name] = measure(path / "metrics.jsonl")
        _, img = prepare(arm)
        img.aligner = ImplicitAligner.from_file(file).eval()
        img.passes = row.passes
        arms.aligned(arm, img)
    return arms.marks("strict")[arm]


if fresh:
    folder.mkdir(parents=True, exist_ok=True)
    made = asdict(preset.models) | {"name": preset.name, "pairs": pairs}
    for name, value in made.items():
        made[name] = identity(value)
    check_provenance(folder / "made_with.json", made, "choose another --output")
    file = folder / "results.json"
    if file.exists():
        results = read_results(file)
    with step("train and draw"):
        for row, seed in product(ROWS.values(), seeds):
            if row.result(seed) not in results["right"]:
                right = judge_row(row, seed)
                results["right"][row.result(seed)] = "".join(map(str, right.astype(int)))
                write_whole(file, json.dumps(results, indent=1) + "\n")

# %% 3. The table: shares with intervals, each seed, and the paired difference to the full method
clusters = [str(prompt) for prompt in prompts] * len(seeds)
right = {}
for title, row in ROWS.items():
    strings = [results["right"].get(row.result(seed)) for seed in seeds]
    if None not in strings:
        right[title] = np.array([list(string) for string in strings]).astype(float)  # (seeds, n)
check(FULL in right, f"the results lack the row {FULL!r}, which others are compared with")


def minus(better: str, worse: str) -> str:
    """Compute the paired difference of two rows."""
    return said(mean_interval((right[better] - right[worse]).ravel(), clusters), "+.3f")


described = (
    "{prompts} test prompts, seed {seed}, {seeds} training seeds of {steps} steps on {pairs}, "
    "max_pairs {max_pairs}, λ {preference_weight:g} unless said"
).format(**settings)
print(described)
heads = f"by seed             minus '{FULL}', paired      paper (PickScore)"
print(f"{'':22} strict [95 %]          {heads}")
shares = {}
for title, values in right.items():
    with step("intervals"):
        shares[title] = mean_interval(values.ravel(), clusters)
    each = " ".join(f"{share:.3f}" for share in values.mean(1))
    paper = ROWS[title].paper or ""
    print(f"{title:22} {said(shares[title])}   {each:18}  {minus(title, FULL):31} {paper}")
order = [title for title in right if ROWS[title].group == "guidance"]
for worse, better in pairwise(order):
    print(f"{better} minus {worse}: {minus(better, worse)}")
lacking = [title for title in ROWS if title not in right]
if lacking:
    print(f"not among these results: {', '.join(lacking)}")

# %% 4. What the preference terms did: ranges over the seeds, of the last thousand steps
shown = [title for title in right if ROWS[title].group in ("loss", "refresh")]
if shown:
    print(f"\n{'':22}", *[f"{name:17}" for name in MEASURED])
for title in shown:
    runs = [results["training"].get(ROWS[title].aligner(seed), {}) for seed in seeds]
    line = f"{title:22}"
    for name in MEASURED:
        values = sorted(run[name] for run in runs if name in run)
        ends = [f"{value:.4g}" for value in values[:1] + values[-1:]]
        line += f" {' to '.join(dict.fromkeys(ends)):17}"
    print(line)

# %% 5. The picture
figure, [[axis]] = sheet(10, (7.6, [1]))
bars(axis, shares, lying=True, color=[COLOURS[ROWS[title].group] for title in shares])
for k, (title, values) in enumerate(right.items()):
    axis.plot(values.mean(1), [k] * len(seeds), "ko", mfc="white")
    axis.text(0.01, k, ROWS[title].paper or "", va="center", color="white")
axis.set(
    title="the twin; in the bars the paper's PickScore on SDXL",
    xlabel="share right in everything (bar: mean, 95 % interval; dots: training seeds)",
)
save(figure, options, "08_ablations", f"{described}; one change at a time")
