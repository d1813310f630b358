# %% [markdown]
"""What happens while an aligner is trained, and what do the curves of a healthy run look like?

One short training with train.py's own code, twice: once without a break, and once with a Ctrl-C halfway and --resume.
Frozen features of the preset's pairs come first, once. (--model sdxl: one GPU; it has no feature cache, so the models
are loaded for each of the three starts.)

One step of the loop, and the curve that each line of it leaves in metrics.jsonl:

    f(c), f_ref(c)                  of a batch; error ||c_w - f||^2 and reference_error ||c_w - f_ref||^2 (Eq. 4)
    x = -[2 D(c_w) - D(c_l) - ||f_ref - f||^2]       implicit_accuracy: the share of samples with x > 0 (Eqs. 5-7)
    loss = ||c_w - f||^2 + lambda log(1 + exp(-x))   gradient_norm: of this, before it is clipped to 1
    k wins in a row, error < reference_error: f_ref <- f                     refreshes (Eqs. 18, 19)

and now and then, on prompts that are never trained on: validation_error, identity_error (that of changing nothing, as
an untrained aligner does), and nearer, the share of losers that f moves nearer to c_w.

A checkpoint holds weights, reference, both optimisers' moments, schedule, refresh counter, random state and the place
in the data. The proof that nothing is missing: every number after the break is the number of the run without one.
"""

# %% Options
from dataclasses import asdict, dataclass, fields

from common import Options, begin, check, option, save, step


@dataclass
class Config(Options):
    """Flags of this tutorial; --quick has its own, small numbers."""

    steps: int = option(600, "training steps of a run")
    pairs: str | None = option(None, "preference pairs in Pick-a-Pic's columns; default: the preset's")
    max_pairs: int = option(10_000, "use only so many pairs, 0 for all")


options = begin(Config, __doc__)

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from figures import training_curves
from figures.training_curves import Curves

import train as script
from img_minimal.hub.weights import read_weights
from img_minimal.flags import ModelFlags
from img_minimal.presets import find_preset
from img_minimal.run import RunFolder

# %% 1. A run is `python train.py` with these options
settings = dict(steps=options.steps, max_pairs=options.max_pairs, save_every=max(1, options.steps // 12))
if options.quick:
    settings = dict(steps=24, max_pairs=60, save_every=4, batch_size=8, refresh_after=3)
folder, cached = Path(options.output) / "06_training", find_preset(options.model).cache_dir != "none"


def train(name: str, resume: bool = False) -> Path:
    """`python train.py` or, with `resume`, `python train.py --resume`; returns the run folder."""
    config = script.Config(
        model=options.model, seed=options.seed, pairs=options.pairs, output_dir=str(folder / name), resume=resume,
        overwrite=not resume, eval_prompts=0, cache_dir=str(folder / "features") if cached else None, **settings,
        **{field.name: getattr(options, field.name) for field in fields(ModelFlags)},
    )  # fmt: skip
    preset = script.chosen_preset(config)
    run = RunFolder.open(config.output_dir, {"config": asdict(config), "preset": asdict(preset)}, resume, not resume)
    if not resume:
        (run.path / "metrics.jsonl").unlink(missing_ok=True)  # of an earlier tutorial
    script.train_aligner(config, preset, run)
    return run.path


def rows_of(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl, one row a step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


print("1. a run without a break")
with step("features and a run"):
    whole = train("whole")
rows = rows_of(whole)
described = json.loads((whole / "config.json").read_text())
preset, k = described["preset"], described["config"]["refresh_after"]
check(len(rows) == preset["train_steps"], f"stopped in {whole}; start the tutorial anew to see it whole")

# %% 2. The same, with a Ctrl-C halfway


@contextmanager
def control_c(metrics: Path, after: int) -> Iterator[None]:
    """Within the block, do what a user's Ctrl-C does as soon as `metrics` has so many rows."""
    left = threading.Event()

    def watch() -> None:
        while not left.wait(0.02):
            if metrics.exists() and metrics.read_text().count("\n") >= after:
                os.kill(os.getpid(), signal.SIGINT)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        left.set()
        watcher.join()


print("2. the same, with a Ctrl-C halfway")
(folder / "resumed" / "metrics.jsonl").unlink(missing_ok=True)  # the watcher must not take it for this one's
with step("half a run"), control_c(folder / "resumed" / "metrics.jsonl", len(rows) // 2):
    train("resumed")
stopped = len(rows_of(folder / "resumed"))

# %% 3. It goes on with --resume
print(f"   stopped after step {stopped}; going on with --resume")
with step("resumed"):
    resumed = rows_of(train("resumed", resume=True))

# %% 4. Every number of both runs, and the final weights
pairs = [(a[name], b[name]) for a, b in zip(rows, resumed, strict=True) for name in a.keys() & b.keys()]
differing, largest = sum(a != b for a, b in pairs), max(abs(a - b) for a, b in pairs)
first, second = (read_weights(folder / name / "aligner.safetensors") for name in ("whole", "resumed"))
equal = all(torch.equal(first[name], second[name]) for name in first | second)
verdict = [
    f"stopped after step {stopped} of {len(rows)}",
    f"{len(pairs):,} numbers compared, {differing} differ" + (f" (by {largest:.1e} at most)" if differing else ""),
    f"final weights bitwise equal: {'yes' if equal else 'no'}",
]

# %% 5. The curves of a healthy run, with what is to be read off each
figure, found = training_curves.draw(Curves(rows), preset["norm"], k, Curves(resumed), stopped, verdict)
for line in found:
    print(line)
save(
    figure, options, "06_training",
    f"{preset['name']}: {preset['train_steps']} steps of {preset['batch_size']} on {preset['max_pairs'] or 'all'} "
    f"pairs, lambda {preset['preference_weight']:g}, seed {options.seed}. Lines: running mean over "
    f"{Curves(rows).window} steps; pale: every step. Unseen: one prompt in ten. Boxes: computed from this run.",
)  # fmt: skip
