"""What rounds give: the aligner of each round of some runs on the same prompts and seeds of the test split.

    python train.py --rounds 3 --seed 0 --output-dir outputs/rounds-0          and so on for other seeds
    python -m img_minimal.evaluate.by_round outputs/rounds-0 outputs/rounds-1 outputs/rounds-2 --prompts 512

Each run is evaluated with a seed of its own; differences to round 0 are paired over prompts, and their interval comes
from a bootstrap over captions of all runs together. Rounds that the gate refused are evaluated, too, and marked.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py --rounds")
    made.add_argument("--model", default="tiny-sdxl", help="which model they were trained for (default: tiny-sdxl)")
    made.add_argument("--prompts", type=int, default=512, help="test prompts for each run (default: 512)")
    made.add_argument("--json", help="also write the results to this file")
    return made


def main() -> int:
    """Draw, judge, print."""
    options = parser().parse_args()
    import numpy as np

    from img_minimal.aligner import ImplicitAligner
    from img_minimal.evaluate.arms import Arms
    from img_minimal.evaluate.intervals import mean_interval
    from img_minimal.load import load_img
    from img_minimal.presets import find_preset
    from img_minimal.runtime.atomic import write_whole
    from img_minimal.runtime.cli import check, quiet_libraries, writable_file
    from img_minimal.tiny.grammar import benchmark

    preset = find_preset(options.model)
    check(preset.world == "tiny", f"--model {options.model}: only twins have the oracle that this needs")
    check(options.prompts >= 5, f"--prompts is {options.prompts}, expected 5 or more")
    writable_file(options.json, "--json")
    logs = []
    for run in options.runs:
        log = Path(run) / "rounds" / "metrics.jsonl"
        logs.append([json.loads(line) for line in log.read_text().splitlines()] if log.exists() else [])
        check(len(logs[-1]) > 1, f"{run}: holds no run with later rounds; train one with --rounds 2 or more")
    quiet_libraries()
    count = min(map(len, logs))
    right: list[list] = [[] for _ in range(count)]  # by round: of every prompt of every run
    damage: list[list] = [[] for _ in range(count)]
    captions: list[str] = []
    for seed, run in enumerate(options.runs):
        first = Path(run) / "rounds" / "0" / "aligner.safetensors"
        img = load_img(replace(preset, aligner=str(first)))
        arms = Arms(img, benchmark(options.prompts, "test", seed), seed)
        captions += arms.captions
        base = [v.strict for v in arms.verdicts["base"]]
        for k in range(count):
            img.aligner = ImplicitAligner.from_file(Path(run) / "rounds" / str(k) / "aligner.safetensors").eval()
            arms.aligned("img", img)
            now = [v.strict for v in arms.verdicts["img"]]
            right[k] += now
            damage[k] += [before and not after for before, after in zip(base, now)]
    n, results = options.prompts, []
    print(f"{len(options.runs)} runs, {n} test prompts each\nround  strict by run" + " " * (8 * len(logs) - 9), end="")
    print("mean   minus round 0 [95 %]       damage  new pairs' step (original)  kept")
    for k in range(count):
        shares = [sum(right[k][s * n : (s + 1) * n]) / n for s in range(len(logs))]
        gain = mean_interval(1.0 * np.array(right[k]) - np.array(right[0]), captions)
        steps = [rows[k].get("step_new") for rows in logs]
        results.append({
            "round": k, "strict": shares, "difference": gain, "damage": sum(damage[k]) / len(damage[k]),
            "step_new": steps, "kept": [rows[k]["kept"] for rows in logs],
        })  # fmt: skip
        step = "-" if None in steps else f"{sum(steps) / len(steps):.2f} ({logs[0][k]['step_original']:.2f})"
        print(
            f"{k:>5}  "
            + "".join(f"{share:<8.3f}" for share in shares)
            + f"{sum(shares) / len(shares):.3f}  {{value:+.3f}} [{{low:+.3f}}, {{high:+.3f}}]   ".format(**gain)
            + f"{results[-1]['damage']:.3f}   {step:<24}  "
            + " ".join("yes" if kept else "no" for kept in results[-1]["kept"])
        )
    if options.json:
        write_whole(options.json, json.dumps({"prompts": n, "runs": len(logs), "rounds": results}, indent=1))
    return 0


if __name__ == "__main__":
    from img_minimal.runtime.cli import run

    run(main)
