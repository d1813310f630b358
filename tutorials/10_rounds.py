# %% [markdown]
"""# What does an aligner learn from pairs that it makes itself, and what goes wrong without a gate or without replay?

In a *round* the aligner makes its own pairs and learns from them (img_minimal/rounds.py). The base
model draws training prompts, x0, and IMG draws them again from the same seeds, x1. The oracle says
which image is better:

    x1 better: (c_l, c_w) = (x0, x1)            both right: (x0, x0)
    x0 better: (c_l, c_w) = (x1, x0)            both wrong alike: dropped

From there the shipped aligner is trained on. Two things guard it. *Replay*: at least half of what
it is trained on are original pairs. The *gate*: a round counts only if held-back prompts get no
worse and no more right images break. Here it is done in three ways, on the same prompts and seeds:
with both, without the gate, without gate and replay.

Not as in the paper: it refreshes the reference f_ref ([05](05_preference_objective.py)), but never
the pairs.

In full: about seven minutes on two cores.
"""

# %%
from common import bars, begin, option, save, sheet, step

judged_help = "prompts of the test split for the closing comparison"
options, preset = begin(
    __doc__,
    oracle=True,
    rounds=option(2, "rounds after the shipped aligner", most=20, quick=1),
    prompts=option(200, "training prompts that a round draws", most=100_000, quick=12),
    steps=option(150, "training steps of a round", most=100_000, quick=4),
    max_pairs=option(1000, "original pairs", most=10**9, quick=60),
    judged=option(200, judged_help, most=100_000, quick=10),
)

from dataclasses import asdict
from functools import partial
from pathlib import Path

from img_minimal import rounds
from img_minimal.aligner import ImplicitAligner
from img_minimal.data.load import load_training_data
from img_minimal.devices import Precision, best_device
from img_minimal.evaluate.arms import Arms
from img_minimal.evaluate.intervals import mean_interval, paired_shares, said
from img_minimal.pipeline import IMG
from img_minimal.plots import BLUE, GREY, ORANGE, PINK, read_rows
from img_minimal.run import Run
from img_minimal.tiny.grammar import benchmark
from train import train

# %% [markdown]
# ## 1. Three ways to go on from the shipped aligner

# %%
top, seed = Path(options.output) / "10_rounds", options.seed
preset = preset.changed(
    ("data", "training"),
    round_steps=options.steps,
    round_prompts=options.prompts,
    max_pairs=options.max_pairs,
    save_every=max(1, options.steps // 3),
    cache_dir=str(top / "features"),
)
if options.quick:
    rounds.GATE_PROMPTS = 8
WAYS = {
    "gate and replay": {"gate": True, "replay": 0.5},
    "no gate": {"gate": False, "replay": 0.5},
    "no gate, no replay": {"gate": False, "replay": 0.0},
}
precision = Precision.named(preset.models.dtype, best_device())
train_round = partial(train, precision=precision)
shipped = ImplicitAligner.from_file(preset.sampling.aligner)
aligners, logs = {"shipped": shipped}, {}
for way, switches in WAYS.items():
    print(f"\n{way}")
    with step(f"rounds, {way}"):
        settings = switches | {"seed": seed, "preset": asdict(preset)}
        run = Run(top / way.replace(", ", "-").replace(" ", "-"), settings, overwrite=True)
        run.restore({}, 0)  # clears the rounds of an earlier call
        data = load_training_data(preset, "mllm", seed, 10.0, run.ranks)
        count = options.rounds + 1
        aligners[way] = rounds.train_rounds(
            preset, run, data, shipped, train_round, rounds=count, seed=seed, **switches
        )
    logs[way] = read_rows(run.path / "rounds" / "metrics.jsonl")

# %% [markdown]
# ## 2. All of them on the same test prompts and seeds

# %%
right, shares, changes = {}, {}, {}
with step("compare"):
    arms = Arms(IMG(preset=preset), benchmark(options.judged, "test", seed), seed)
    for name, aligner in aligners.items():
        arms.img.aligner = aligner.eval()
        arms.aligned("img", arms.img)
        right[name] = arms.marks("strict")["img"]
print(f"{options.judged} test prompts, base {arms.marks('strict')['base'].mean():.3f}")
for name, values in right.items():
    shares[name] = mean_interval(values, arms.captions)
    change = paired_shares(values, right["shipped"], arms.captions)["difference"]
    changes[name] = said(change, "+.3f")
    print(f"{name:20} {said(shares[name])}, against shipped {changes[name]}")

# %% [markdown]
# ## 3. The picture: what each round measured, and the comparison at the end
#
# Look at how far the aligner's own pairs ask it to go, |c_w - c_l|, compared with the original
# ones, and at the error on original pairs where none are replayed. All axes begin at 0: a line that
# looks flat has hardly moved.
#
# What this means for training is told in [Results](results.md#rounds).

# %%
figure, (upper, lower) = sheet(9.5, (2.9, [1] * 3), (2.9, [1] * 2))
panels = {
    "score": "share of held-back prompts right",
    "damage": "share right before, wrong after",
    "validation_error": "error on unseen original pairs",
    "step_new": "|c_w - c_l| of its own pairs",
}
for axis, (name, label) in zip((*upper, *lower), panels.items()):
    for colour, (way, rows) in zip((BLUE, ORANGE, PINK), logs.items()):
        known = [row for row in rows if name in row]
        x = [str(row["round"]) for row in known]
        axis.plot(x, [row[name] for row in known], "o-", color=colour, label=way)
    axis.set(xlabel="round (0: the shipped aligner)", ylabel=label)
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
steps, end = lower
first = logs["gate and replay"][1]
steps.axhline(first["step_original"], color=GREY, ls="--", label="original pairs")
steps.set_ylim(0, 1.2 * first["step_original"])
steps.legend(loc="lower left")
upper[0].set_ylim(0, 1)
bars(end, shares, color=(GREY, BLUE, ORANGE, PINK))
end.set(ylabel="share of test prompts right", ylim=(0, 1))
caption = (
    f"rounds of {options.prompts} prompts and {options.steps} steps. Bars: {options.judged} test "
    "prompts at the end, with 95 % intervals."
)
told = [f"{changes[way]} ({way})" for way in WAYS]
conclusion = f"After {options.rounds} rounds the share that is right has changed by "
save(figure, options, "10_rounds", caption, f"{conclusion}{', '.join(told)}.")
