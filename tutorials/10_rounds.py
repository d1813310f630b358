"""What does an aligner learn from pairs that it makes itself, and what goes wrong without a gate or without replay?

The shipped aligner draws training prompts again, the oracle says which image is better, and the aligner goes on from
there: x0 is the base's image, x1 IMG's from the same seed (img_minimal/data/rounds.py).

    x1 better: (c_l, c_w) = (x0, x1)     x0 better: (x1, x0)     both right: (x0, x0)     both wrong alike: dropped

    f_ref = f, then Eqs. 18 and 19 as ever, on a mixture: at least half of it original pairs (replay)
    the round counts if held-back prompts are drawn no worse and no more right images are broken (gate)

Three ways, the same prompts and seeds: with both, without the gate, without gate and replay. Look at three things: how
short the step |c_w - c_l| of its own pairs is beside that of the original ones; in which categories it wins, by a score
that moves although neither image is right; and what the error on original pairs does where none are replayed.
"""

from dataclasses import dataclass

from common import Options, begin, option, oracle_preset, parse, run, save


@dataclass
class RoundOptions(Options):
    """The command line."""

    rounds: int = option(2, "rounds after the shipped aligner", most=20)
    prompts: int = option(500, "training prompts that a round draws", most=100_000)
    steps: int = option(150, "training steps of a round", most=100_000)
    max_pairs: int = option(3000, "original pairs", most=10**9)
    judged: int = option(300, "prompts of the test split for the closing comparison", most=100_000)


if __name__ == "__main__":
    parse(RoundOptions, __doc__)  # answers --help before torch is imported, which takes seconds

from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import train as script
from img_minimal.aligner import ImplicitAligner
from img_minimal.evaluate.arms import Arms
from img_minimal.evaluate.intervals import mean_interval, paired_shares
from img_minimal.load import load_img, load_training_data
from img_minimal.presets import Preset
from img_minimal.rounds import RoundLog
from img_minimal.runtime.checkpoint import RunFolder
from img_minimal.runtime.plots import BLUE, GREY, ORANGE, PINK
from img_minimal.tiny.grammar import benchmark

WAYS = {
    "gate and replay": dict(gate=True, replay=0.5),
    "no gate": dict(gate=False, replay=0.5),
    "no gate, no replay": dict(gate=False, replay=0.0),
}
COLOURS = dict(zip(WAYS, (BLUE, ORANGE, PINK)))


def go_on(options: RoundOptions, preset: Preset, way: str) -> tuple[ImplicitAligner, list[dict]]:
    """Some rounds from the shipped aligner; the aligner that stands at the end, and the rows of the rounds."""
    cached = preset.cache_dir != "none"
    config = script.Config(
        model=options.model, seed=options.seed, rounds=options.rounds + 1, round_steps=options.steps,
        round_prompts=options.prompts, max_pairs=options.max_pairs, save_every=max(1, options.steps // 3),
        cache_dir=str(Path(options.output) / "10_rounds" / "features") if cached else None, **WAYS[way],
    )  # fmt: skip
    own = script.chosen_preset(config)
    data = load_training_data(own, "mllm", options.seed, 10.0)
    folder = Path(options.output) / "10_rounds" / way.replace(", ", "-").replace(" ", "-")
    run_folder = RunFolder.open(folder, {"config": asdict(config), "preset": asdict(own)}, False, True)
    run_folder.begin(0)
    print(f"\n{way}")
    aligner = script.train_rounds(config, own, run_folder, data, ImplicitAligner.from_file(preset.aligner))
    return aligner, RoundLog(folder / "rounds" / "metrics.jsonl").rows


def compare(arms: Arms, aligners: dict[str, ImplicitAligner]) -> dict[str, np.ndarray]:
    """Of every test prompt whether each aligner's image is right."""
    right = {}
    for name, aligner in aligners.items():
        arms.img.aligner = aligner.eval()
        arms.aligned(name, arms.img)
        right[name] = np.array([v.strict for v in arms.verdicts[name]])
    return right


def plot(axes: np.ndarray, rows: dict[str, list[dict]], right: dict[str, np.ndarray], captions: list[str]) -> None:
    """By round: the gate's numbers, size of the steps, error on original pairs, wins by category; the end's result."""
    panels = (("score", "held-back prompts right"), ("damage", "right before, wrong after"),
              ("validation_error", "error on held-back original pairs"))  # fmt: skip
    for axis, (name, title) in zip(axes.flat, panels):
        for way, table in rows.items():
            x = [row["round"] for row in table if name in row]
            axis.plot(x, [row[name] for row in table if name in row], "o-", color=COLOURS[way], label=way)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    steps, wins, end = axes.flat[3:]
    for way, table in rows.items():
        later = [row for row in table if row["round"]]
        steps.plot([r["round"] for r in later], [r["step_new"] for r in later], "o-", color=COLOURS[way], label=way)
    steps.axhline(later[0]["step_original"], color=GREY, linestyle="--", label="original pairs")
    steps.set(title="|c_w - c_l|: how far a pair asks to go", ylim=(0, None))
    steps.legend(fontsize=8)
    first = next(iter(rows.values()))[1]["wins_by_category"]
    wins.bar(list(first), list(first.values()), color=BLUE)
    wins.set_title("round 1: IMG's wins by category", fontsize=10)
    for k, (name, values) in enumerate(right.items()):
        share = mean_interval(values, captions)
        end.bar(k, share["value"], color=COLOURS.get(name, GREY))
        end.errorbar(k, share["value"], [[share["value"] - share["low"]], [share["high"] - share["value"]]], color="k")
    end.set_xticks(
        range(len(right)), [name.replace(", ", ",\n").replace(" and ", "\nand ") for name in right], fontsize=8
    )
    end.set(title="test prompts right, at the end", ylim=(0, 1))


def main() -> int:
    """Three ways, the comparison, the picture."""
    options = begin(RoundOptions, __doc__)
    if options.quick:
        options.rounds, options.prompts, options.steps, options.max_pairs, options.judged = 1, 24, 4, 60, 10
    preset = oracle_preset(options)
    aligners, rows = {"shipped": ImplicitAligner.from_file(preset.aligner)}, {}
    for way in WAYS:
        aligners[way], rows[way] = go_on(options, preset, way)
    arms = Arms(load_img(preset), benchmark(options.judged, "test", options.seed), options.seed)
    right = compare(arms, aligners)
    print(f"\n{options.judged} test prompts, base {np.mean([v.strict for v in arms.verdicts['base']]):.3f}")
    for name, values in right.items():
        pair = paired_shares(values, right["shipped"], arms.captions)["difference"]
        print(
            f"{name:20} {values.mean():.3f}, against shipped {{value:+.3f}} [{{low:+.3f}}, {{high:+.3f}}]".format(
                **pair
            )
        )
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained")
    plot(axes, rows, right, arms.captions)
    note = f"{preset.name}, seed {options.seed}: rounds of {options.prompts} prompts and {options.steps} steps"
    save(figure, options, "10_rounds", f"{note}; 95 % intervals over {options.judged} test prompts")
    return 0


if __name__ == "__main__":
    run(main)
