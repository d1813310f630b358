# %% [markdown]
"""What does an aligner learn from pairs that it makes itself, and what goes wrong without a gate or without replay?

The shipped aligner draws training prompts again, the oracle says which image is better, and the aligner goes on from
there: x0 is the base's image, x1 IMG's from the same seed (img_minimal/rounds.py).

    x1 better: (c_l, c_w) = (x0, x1)     x0 better: (x1, x0)     both right: (x0, x0)     both wrong alike: dropped

    f_ref = f, then Eqs. 18 and 19 as ever, on a mixture: at least half of it original pairs (replay)
    the round counts if held-back prompts are drawn no worse and no more right images are broken (gate)

Three ways, the same prompts and seeds: with both, without the gate, without gate and replay. Look at three things: how
long the step |c_w - c_l| of its own pairs is beside that of the original ones; in which categories it wins, by a score
that moves although neither image is right; and what the error on original pairs does where none are replayed.
"""

# %% Options
from dataclasses import dataclass

from common import Options, begin, option, oracle_preset, save, step


@dataclass
class Config(Options):
    """The command line."""

    rounds: int = option(2, "rounds after the shipped aligner", most=20)
    prompts: int = option(500, "training prompts that a round draws", most=100_000)
    steps: int = option(150, "training steps of a round", most=100_000)
    max_pairs: int = option(3000, "original pairs", most=10**9)
    judged: int = option(300, "prompts of the test split for the closing comparison", most=100_000)


options = begin(Config, __doc__)
if options.quick:
    options.rounds, options.prompts, options.steps, options.max_pairs, options.judged = 1, 12, 4, 60, 10

from dataclasses import asdict
from pathlib import Path

import numpy as np
from figures import rounds

import train as script
from img_minimal import rounds as method
from img_minimal.aligner import ImplicitAligner
from img_minimal.evaluate.arms import Arms
from img_minimal.evaluate.intervals import mean_interval, paired_shares
from img_minimal.load import load_img, load_training_data
from img_minimal.rounds import RoundLog
from img_minimal.run import RunFolder
from img_minimal.tiny.grammar import benchmark

preset = oracle_preset(options)
if options.quick:
    method.GATE_PROMPTS = 8

# %% 1. Three ways to go on from the shipped aligner
WAYS = {
    "gate and replay": dict(gate=True, replay=0.5),
    "no gate": dict(gate=False, replay=0.5),
    "no gate, no replay": dict(gate=False, replay=0.0),
}
aligners, logs = {"shipped": ImplicitAligner.from_file(preset.aligner)}, {}
top = Path(options.output) / "10_rounds"
for way, switches in WAYS.items():
    print(f"\n{way}")
    config = script.Config(
        model=options.model, seed=options.seed, rounds=options.rounds + 1, round_steps=options.steps,
        round_prompts=options.prompts, max_pairs=options.max_pairs, save_every=max(1, options.steps // 3),
        cache_dir=str(top / "features") if preset.cache_dir != "none" else None, **switches,
    )  # fmt: skip
    own, folder = script.chosen_preset(config), top / way.replace(", ", "-").replace(" ", "-")
    with step(f"rounds, {way}"):
        data = load_training_data(own, "mllm", options.seed, 10.0)
        run = RunFolder.open(folder, {"config": asdict(config), "preset": asdict(own)}, False, True)
        run.begin(0)
        start = ImplicitAligner.from_file(preset.aligner)
        aligners[way] = script.train_rounds(config, own, run, data, start)
    logs[way] = RoundLog(folder / "rounds" / "metrics.jsonl").rows

# %% 2. All of them on the same test prompts and seeds
with step("compare"):
    arms = Arms(load_img(preset), benchmark(options.judged, "test", options.seed), options.seed)
    right = {}
    for name, aligner in aligners.items():
        arms.img.aligner = aligner.eval()
        arms.aligned(name, arms.img)
        right[name] = np.array([v.strict for v in arms.verdicts[name]])
shares = {name: mean_interval(values, arms.captions) for name, values in right.items()}
print(f"\n{options.judged} test prompts, base {np.mean([v.strict for v in arms.verdicts['base']]):.3f}")
for name, values in right.items():
    pair = paired_shares(values, right["shipped"], arms.captions)["difference"]
    print(f"{name:20} {values.mean():.3f}, against shipped {{value:+.3f}} [{{low:+.3f}}, {{high:+.3f}}]".format(**pair))

# %% 3. The picture
note = f"{preset.name}, seed {options.seed}: rounds of {options.prompts} prompts and {options.steps} steps"
caption = f"{note}; 95 % intervals over {options.judged} test prompts"
save(rounds.draw(logs, shares), options, "10_rounds", caption)
