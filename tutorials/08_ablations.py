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
    only=option(None, "a group of rows: guidance, loss, lambda, refresh or passes"),
    results=option(str(ROOT / "tutorials" / "08_ablations.json"), "without --fresh: results"),
)

import json
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path

import numpy as np

import train
from img_minimal.evaluate.arms import Arms
from img_minimal.evaluate.intervals import mean_interval, said
from img_minimal.files import check_provenance, identity, read_json, write_whole
from img_minimal.pipeline import IMG
from img_minimal.plots import BLUE, GREEN, GREY, ORANGE, PINK, read_rows
from img_minimal.tiny.grammar import benchmark

# %% 1. The rows: what each changes, and the paper's PickScore on SDXL where it has one
SETTINGS = ("seed", "prompts", "seeds", "steps", "pairs", "max_pairs", "preference_weight")
MEASURED = ("gradient_norm", "margin", "correction", "refreshes", "validation_error")


def read_results(path: str | Path) -> dict:
    """Read a results.json of this tutorial. Raises UserError for another file."""

    def look(file: dict) -> None:
        for name in SETTINGS:
            file["settings"][name], file["right"].keys(), file["training"].keys()

    return read_json(path, dict, "expected a results.json of this tutorial's --fresh", inspect=look)


fresh, pairs = options.fresh or options.quick, options.pairs or preset.data.pairs
if fresh:
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings["pairs"] = Path(pairs).name
    results = {"settings": settings, "right": {}, "training": {}}
else:
    print(f"results from {options.results}; --fresh makes them anew")
    results = read_results(options.results)
    settings = results["settings"]
preset = preset.changed(
    ("data", "training"),
    pairs=pairs,
    max_pairs=settings["max_pairs"],
    steps=settings["steps"],
    save_every=settings["steps"],
)
weight, seeds = settings["preference_weight"], range(settings["seeds"])
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
COLOURS = {"guidance": BLUE, "loss": ORANGE, "lambda": GREEN, "refresh": PINK, "passes": GREY}
known = ", ".join(COLOURS)
check(options.only in (None, *COLOURS), f"--only is {options.only!r}, expected one of: {known}")
if options.only:
    ROWS = {t: row for t, row in ROWS.items() if row.group == options.only or t == FULL}

# %% 2. Train, draw and judge what the folder lacks
folder = Path(options.output) / f"08_ablations-{'-'.join(map(str, settings.values()))}"


def train_row(row: Row, seed: int) -> Path:
    """Train a row's aligner as `python train.py` does, or use an earlier one; return its folder."""
    path = folder / row.aligner(seed)
    if not (path / "aligner.safetensors").exists():
        config = train.Config(
            model=options.model,
            seed=seed,
            guidance=row.guidance,
            spin=row.spin,
            refresh_after=row.refresh_after,
            output_dir=str(path),
            resume=(path / "checkpoint.pt").exists(),
            eval_prompts=0,
        )
        run = train.start(config, preset.changed(("training",), preference_weight=row.weight))
        if run.stopped:
            raise KeyboardInterrupt
    return path


def measure(path: Path) -> dict[str, float]:
    """Return means over the last thousand steps of a training, and how often f_ref was set."""
    means, log = {}, read_rows(path / "metrics.jsonl")[-1000:]
    for name in MEASURED:
        values = [row[name] for row in log if name in row]
        if values:
            value = values[-1] if name == "refreshes" else sum(values) / len(values)
            means[name] = round(float(value), 5)
    return means


if fresh:
    folder.mkdir(parents=True, exist_ok=True)
    made = asdict(preset.models) | {"name": preset.name, "pairs": preset.data.pairs}
    made = {name: identity(value) for name, value in made.items()}
    check_provenance(folder / "made_with.json", made, "choose another --output")
    file = folder / "results.json"
    if file.exists():
        results = read_results(file)
    with step("train and draw"):
        arms = None
        for row, seed in product(ROWS.values(), seeds):
            if row.result(seed) in results["right"]:
                continue
            arms = arms or Arms(IMG(preset=preset), prompts, settings["seed"])
            if row.guidance == "none":
                arms.draw("none", arms.own)
            elif row.guidance != "base":
                path = train_row(row, seed)
                results["training"][path.name] = measure(path)
                aligner, sampling = path / "aligner.safetensors", preset.changed(passes=row.passes)
                guided = {"guidance": row.guidance, "preset": sampling}
                img = IMG(arms.img.backbone, aligner=aligner, **guided)
                arms.aligned(row.guidance, img)
            strict = [str(int(verdict.strict)) for verdict in arms.verdicts[row.guidance]]
            results["right"][row.result(seed)] = "".join(strict)
            write_whole(file, json.dumps(results, indent=1) + "\n")

# %% 3. The table: shares with intervals, each seed, and the paired difference to the full method
clusters, right = [str(prompt) for prompt in prompts] * len(seeds), {}
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
order = [t for t in ("none", "base model", "text embedding", "stock MLLM", FULL) if t in right]
for worse, better in pairwise(order):
    print(f"{better} minus {worse}: {minus(better, worse)}")
lacking = [title for title in ROWS if title not in right]
if lacking:
    print(f"not among these results: {', '.join(lacking)}")

# %% 4. What the preference terms did: ranges over the seeds, of the last thousand steps
shown = [title for title in right if ROWS[title].group in ("loss", "refresh")]
if shown:
    print(f"\n{'':22} " + "".join(f"{name:18}" for name in MEASURED))
for title in shown:
    runs = [results["training"].get(ROWS[title].aligner(seed), {}) for seed in seeds]
    line = f"{title:22} "
    for name in MEASURED:
        values = sorted(run[name] for run in runs if name in run)
        ends = dict.fromkeys(f"{value:.4g}" for value in values[:1] + values[-1:])
        line += f"{' to '.join(ends):18}"
    print(line)

# %% 5. The picture
figure, ((ours, paper),) = sheet(10, ([7.6], [3, 1.6]))
at, colours, scores = [], [], []
for k, (title, values) in enumerate(right.items()):
    row = ROWS[title]
    at.append(k + 0.7 * list(COLOURS).index(row.group))  # groups stand apart
    colours.append(COLOURS[row.group])
    scores.append(row.paper or 0)
    ours.plot(values.mean(1), [at[-1]] * len(seeds), "o", color=colours[-1], mec="black", zorder=3)
bars(ours, shares, at, lying=True, color=colours)
paper.bar_label(paper.barh(at, scores, 0.65, color=colours, alpha=0.8), fmt="%.2f")
if "base model" in right:
    ours.axvline(shares["base model"]["value"], color="black", ls=":", lw=1)
    paper.axvline(ROWS["base model"].paper, color="black", ls=":", lw=1)
ours.set(
    title="the twin (dotted: base model)",
    xlabel="share right in everything (bar: mean, 95 % interval; dots: training seeds)",
)
paper.set(
    title="the paper, SDXL",
    xlabel="PickScore (axis starts at 22)",
    xlim=(22, 22.9),
    ylim=ours.get_ylim(),
    yticks=[],
)
save(figure, options, "08_ablations", f"{described}; one change at a time")
