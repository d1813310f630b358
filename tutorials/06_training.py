# %% [markdown]
"""What happens while an aligner is trained, and what do the curves of a healthy run look like?

One short training with train.py's own code, twice: once without a break, and once with a Ctrl-C
halfway and --resume. Frozen features of the preset's pairs come first, once. (--model sdxl: one
GPU; it has no feature cache, so the models are loaded for each of the three starts.)

One step of the loop, and the curve that each line of it leaves in metrics.jsonl:

    f(c), f_ref(c) of a batch        error ||c_w - f||^2, reference_error ||c_w - f_ref||^2 (Eq. 4)
    x = -[2 D(c_w) - D(c_l) - ||f_ref - f||^2]       implicit_accuracy: share with x > 0 (Eqs. 5-7)
    loss = ||c_w - f||^2 + lambda log(1 + exp(-x))   gradient_norm, before it is clipped to 1
    k wins in a row, error < reference_error: f_ref <- f                    refreshes (Eqs. 18, 19)

and now and then, on prompts that are never trained on: validation_error, identity_error (that of
changing nothing, as an untrained aligner does), and nearer, the share of losers that f moves nearer
to c_w. Errors are means over elements; in the loss the preset sums distances over elements.

A checkpoint holds weights, reference, the optimiser's moments, schedule, refresh counter, random
state and the position in the data. The proof that nothing is missing: every number after the break
is the number of the run without one.
"""

# %% Options
from common import begin, check, option, save, sheet, step

options, preset = begin(
    __doc__,
    steps=option(600, "training steps of a run", least=1, quick=24),
    pairs=option(None, "preference pairs in Pick-a-Pic's columns; default: the preset's"),
    max_pairs=option(10_000, "use only so many pairs, 0 for all", quick=60),
)

import os
import signal
import time
from pathlib import Path
from textwrap import fill
from threading import Thread

import numpy as np
import torch

import train
from img_minimal.hub.weights import read_weights
from img_minimal.plots import BLUE, GREEN, GREY, ORANGE, PINK, read_rows
from img_minimal.run import Run

# %% 1. A run is `python train.py` with these options
folder = Path(options.output) / "06_training"
training = preset.training
k = 10
batch_size = training.batch_size
save_every = max(1, options.steps // 12)
if options.quick:
    batch_size, save_every, k = 8, 4, 3
cache = preset.data.cache_dir
preset = preset.changed(
    ("data", "training"),
    steps=options.steps,
    batch_size=batch_size,
    save_every=save_every,
    pairs=options.pairs or preset.data.pairs,
    max_pairs=options.max_pairs,
    preference_weight=1.0,  # the whole objective has more curves
    cache_dir=cache if cache == "none" else str(folder / "features"),
)


def run(name: str, resume: bool = False) -> Run:
    """Run `python train.py` or, with `resume`, `python train.py --resume`."""
    config = train.Config(
        model=options.model,
        seed=options.seed,
        output_dir=str(folder / name),
        resume=resume,
        overwrite=not resume,
        refresh_after=k,
        eval_prompts=0,
    )
    return train.start(config, preset)


print("1. a run without a break")
with step("features and a run"):
    whole = run("whole")
check(not whole.stopped, f"stopped in {whole.path}; start the tutorial anew to see it whole")
rows = read_rows(whole.metrics)

# %% 2. The same, with a Ctrl-C halfway
log = folder / "resumed" / "metrics.jsonl"
log.unlink(missing_ok=True)  # an earlier run's rows must not be taken for this one's


def interrupt() -> None:
    """Do what Ctrl-C does, as soon as half of the rows are written."""
    while len(read_rows(log)) < len(rows) // 2:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


print("2. the same, with a Ctrl-C halfway")
Thread(target=interrupt, daemon=True).start()
with step("half a run"):
    run("resumed")
stopped = len(read_rows(log))

# %% 3. It goes on with --resume
print(f"   stopped after step {stopped}; going on with --resume")
with step("resumed"):
    run("resumed", resume=True)
resumed = read_rows(log)

# %% 4. Every number of both runs, and the final weights
compared = differ = 0
for row, other in zip(rows, resumed, strict=True):
    for name in row.keys() & other.keys():
        compared += 1
        differ += row[name] != other[name]
weights = read_weights(folder / "whole" / "aligner.safetensors")
others = read_weights(folder / "resumed" / "aligner.safetensors")
equal = all(torch.equal(weights[name], others[name]) for name in weights)
verdict = (
    f"stopped after step {stopped} of {len(rows)}",
    f"{compared:,} numbers compared, {differ} differ",
    f"final weights bitwise equal: {'yes' if equal else 'no'}",
)

# %% 5. The curves of a healthy run, with what is to be read off each
figure, (upper, lower) = sheet(15, (4.4, [1] * 3), (4.4, [1] * 3))
steps = np.arange(len(rows)) + 1
window = max(1, len(rows) // 20)


def values(name: str) -> np.ndarray:
    """Return one number of all rows that have it."""
    return np.array([row[name] for row in rows if name in row])


def draw(axis, name: str, colour: str) -> None:
    """Draw a number of every step, pale, and its means over a twentieth of the run."""
    y = values(name)
    mean = np.convolve(y, np.ones(window) / window, mode="valid")
    axis.plot(steps, y, color=colour, alpha=0.2)
    axis.plot(steps[window - 1 :], mean, color=colour, label=name)


def explain(axis, title: str, unit: str, how_to_read: str, *found: str) -> None:
    """Write above a panel, and print, how to read it and what is found in this run."""
    words = "\n".join([title, fill(how_to_read, 44), *found])
    axis.set(title=words, xlabel="step", ylabel=unit)
    print(f"{title}: {'; '.join(found)}. Look for: {how_to_read}")


def change(first: float, last: float) -> str:
    """Describe how a number has changed."""
    return f"{first:.3g} to {last:.3g}, ratio {last / first:.2f}"


unit = "squared distance to c_w, mean over elements"
error = values("error")
draw(upper[0], "reference_error", BLUE)
draw(upper[0], "error", ORANGE)
how = "f runs ahead, f_ref is brought up to it again and again"
found = f"f: {change(error[:window].mean(), error[-window:].mean())}"
ahead = f"f ahead of f_ref in {(error < values('reference_error')).mean():.0%} of steps"
explain(upper[0], "Error on training batches", unit, how, found, ahead)

how = "below grey; rises while the left one falls: too few pairs"
found = ["no prompt was set aside"]
unseen = values("validation_error")
if len(unseen):
    untrained = values("identity_error")[0]
    saved = [row["step"] for row in rows if "nearer" in row]
    upper[1].plot([0, *saved], [untrained, *unseen], "o-", color=GREEN, label="f, unseen prompts")
    upper[1].axhline(untrained, ls="--", color=GREY, label="changing nothing")
    nearer = values("nearer")[-1]
    found = [change(untrained, unseen[-1]), f"losers moved nearer to c_w: {nearer:.0%}"]
explain(upper[1], "Error on unseen prompts", unit, how, *found)

accuracy = values("implicit_accuracy")
draw(upper[2], "implicit_accuracy", BLUE)
upper[2].axhline(0.5, color=GREY, ls="--")
how = "above 1/2; 0 just after a refresh, when f is f_ref (x = 0)"
found = f"step 1: {accuracy[0]:.2f}; last twentieth: {accuracy[-window:].mean():.2f}"
explain(upper[2], "Implicit accuracy", "share of the batch with x > 0", how, found)

refreshes = values("refreshes")
lower[0].plot(steps, refreshes, color=PINK)
lower[0].plot(steps, steps / (k + 1), "--", color=GREY)  # after a refresh no one can win
how = "dashed: the most there can be, one in k + 1 steps"
explain(lower[0], "Refreshes", "so far", how, f"{refreshes[-1]:.0f} refreshes, k = {k}")

norms = values("gradient_norm")
draw(lower[1], "gradient_norm", BLUE)
lower[1].axhline(1, color="black", ls="--")
lower[1].set_yscale("log")
lower[1].yaxis.set_major_formatter("{x:g}")  # formulas are switched off
how = "no lonely spikes; what is above the dashed line is clipped to 1"
found = f"clipped in {(norms > 1).mean():.0%} of steps"
largest = f"largest / median: {norms.max() / np.median(norms):.1f}"
explain(lower[1], "Gradient norm", "logarithmic", how, found, largest)

loss = [row["loss"] for row in resumed]
lower[2].plot(steps, values("loss"), color=ORANGE, alpha=0.5, lw=5, label="whole run")
lower[2].plot(steps, loss, color=GREEN, lw=1, label="stopped and resumed")
lower[2].axvline(stopped + 0.5, color="black", ls="--")
how = "the thin line lies on the thick one, to the last digit"
explain(lower[2], "Stopped and resumed", "loss", how, *verdict)
for axis in (upper[0], upper[1], lower[2]):
    axis.legend()
    axis.set_ylim(0, 1.2 * axis.get_ylim()[1])
caption = (
    f"{options.steps} steps of {batch_size} on {options.max_pairs or 'all'} pairs, lambda "
    f"{training.preference_weight:g}. Lines: running mean over {window} steps; pale: every step. "
    "Unseen: one prompt in ten. Above the panels: what to look for, and what this run has."
)
save(figure, options, "06_training", caption)
