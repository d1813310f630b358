# %% [markdown]
"""What does an aligner learn from pairs that it makes itself, and what goes wrong without a gate or without replay?

The shipped aligner draws training prompts again, the oracle says which image is better, and the
aligner goes on from there: x0 is the base's image, x1 IMG's from the same seed
(img_minimal/rounds.py).

    x1 better: (c_l, c_w) = (x0, x1)            both right: (x0, x0)
    x0 better: (c_l, c_w) = (x1, x0)            both wrong alike: dropped

    f_ref = f, then Eqs. 18 and 19 as ever, on a mixture: at least half of it original pairs (replay)
    the round counts if held-back prompts get no worse and no more right images break (gate)

Three ways, the same prompts and seeds: with both, without the gate, without gate and replay. Look
at two things: how long the step |c_w - c_l| of its own pairs is compared with that of the original
ones, and what the error on original pairs does where none are replayed.
"""  # noqa: E501

# %% Options
from common import bars, begin, option, save, sheet, step

judged_help = "prompts of the test split for the closing comparison"
options, preset = begin(
    __doc__,
    oracle=True,
    rounds=option(2, "rounds after the shipped aligner", most=20, quick=1),
    prompts=option(500, "training prompts that a round draws", most=100_000, quick=12),
    steps=option(150, "training steps of a round", most=100_000, quick=4),
    max_pairs=option(3000, "original pairs", most=10**9, quick=60),
    judged=option(300, judged_help, most=100_000, quick=10),
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

top = Path(options.output) / "10_rounds"
seed = options.seed
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

# %% 1. Three ways to go on from the shipped aligner
WAYS = {
    "gate and replay": {"gate": True, "replay": 0.5},
    "no gate": {"gate": False, "replay": 0.5},
    "no gate, no replay": {"gate": False, "replay": 0.0},
}
precision = Precision.named(preset.models.dtype, best_device())
train_round = partial(train, precision=precision)
shipped = ImplicitAligner.from_file(preset.sampling.aligner)
aligners = {"shipped": shipped}
logs = {}
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

# %% 2. All of them on the same test prompts and seeds
right = {}
with step("compare"):
    arms = Arms(IMG(preset=preset), benchmark(options.judged, "test", seed), seed)
    for name, aligner in aligners.items():
        arms.img.aligner = aligner.eval()
        arms.aligned("img", arms.img)
        right[name] = arms.marks("strict")["img"]
print(f"\n{options.judged} test prompts, base {arms.marks('strict')['base'].mean():.3f}")
shares = {}
for name, values in right.items():
    shares[name] = mean_interval(values, arms.captions)
    change = paired_shares(values, right["shipped"], arms.captions)["difference"]
    print(f"{name:20} {values.mean():.3f}, against shipped {said(change, '+.3f')}")

# %% 3. The picture: the gate's numbers, the error and the step by round; the end's result
figure, (upper, (steps, end)) = sheet(14, (3.7, [1] * 3), (3.7, [1, 2]))
panels = {
    "score": "held-back prompts right",
    "damage": "right before, wrong after",
    "validation_error": "error on held-back original pairs",
    "step_new": "|c_w - c_l|: how far a pair asks to go",
}
colours = (BLUE, ORANGE, PINK)
for axis, (name, title) in zip((*upper, steps), panels.items()):
    for colour, (way, rows) in zip(colours, logs.items()):
        known = [row for row in rows if name in row]
        x = [str(row["round"]) for row in known]
        axis.plot(x, [row[name] for row in known], "o-", color=colour, label=way)
    axis.set(title=title, xlabel="round")
first = logs["gate and replay"][1]
steps.axhline(first["step_original"], color=GREY, ls="--", label="original pairs")
for axis in (*upper, steps):
    axis.legend()
bars(end, shares, color=(GREY, *colours))
end.set(title="test prompts right, at the end", ylim=(0, 1.05))
caption = (
    f"rounds of {options.prompts} prompts and {options.steps} steps; 95 % intervals over "
    f"{options.judged} test prompts"
)
save(figure, options, "10_rounds", caption)
