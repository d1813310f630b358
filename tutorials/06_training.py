# %% [markdown]
"""# What happens while an aligner is trained, and what do the curves of a healthy run look like?

`python train.py` is run twice: once without a break, and once with a Ctrl-C halfway and `--resume`.
The aligner f ([04](04_implicit_aligner.py)) learns from preference pairs: c_l and c_w are the image
tokens of a pair's loser and winner, and f = f(h, c_l) is pulled towards c_w. Its *reference* f_ref
is an earlier copy of it, which it has to beat ([05](05_preference_objective.py)). One step of the
loop, and the curve that each line of it leaves in metrics.jsonl:

    f, f_ref of a batch              error ||c_w - f||^2, reference_error ||c_w - f_ref||^2 (Eq. 4)
    x = -[2 D(c_w) - D(c_l) - ||f_ref - f||^2]       implicit_accuracy: share with x > 0 (Eqs. 5-7)
    loss = ||c_w - f||^2 + lambda log(1 + exp(-x))   gradient_norm, before it is clipped to 1
    k wins in a row, error < reference_error: f_ref <- f                    refreshes (Eqs. 18, 19)

and now and then, on prompts that are never trained on: validation_error, identity_error (that of
changing nothing, as an untrained aligner does), and nearer, the share of losers that f moves nearer
to c_w. Logged errors are means over the elements of the tokens.

Not as in the paper: Muon instead of AdamW, a learning rate that decays, batches of 64 instead of 8,
and clipping, of which the paper says nothing. The preset's lambda is 0; here it is the paper's 1,
because the whole objective has more curves.

In full: about 5 minutes on two cores. (--model sdxl: one GPU; it has no feature cache, so the
models are loaded for each of the three starts.)
"""

# %%
from common import begin, check, option, save, sheet, step

options, preset = begin(
    __doc__,
    steps=option(400, "training steps of a run", least=1, quick=24),
    pairs=option(None, "preference pairs in Pick-a-Pic's columns; default: the preset's"),
    max_pairs=option(6000, "use only so many pairs, 0 for all", quick=60),
)

import os
import signal
import time
from pathlib import Path
from threading import Thread

import numpy as np
import torch

import train
from img_minimal.hub.weights import read_weights
from img_minimal.plots import BLUE, GREEN, GREY, ORANGE, PINK, read_rows
from img_minimal.run import Run

# %% [markdown]
# ## 1. A run is `python train.py` with these options
#
# The features h, c_l and c_w of all pairs are frozen: they are computed first, once for both runs.

# %%
folder = Path(options.output) / "06_training"
batch_size, save_every, k = preset.training.batch_size, max(1, options.steps // 12), 10
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
    preference_weight=1.0,
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


with step("features and a run"):
    whole = run("whole")
check(not whole.stopped, f"stopped in {whole.path}; start the tutorial anew to see it whole")
rows = read_rows(whole.metrics)

# %% [markdown]
# ## 2. The same, with a Ctrl-C halfway, and resumed
#
# A checkpoint holds weights, reference, the optimiser's moments, schedule, refresh counter, random
# state and the position in the data. If nothing is missing in it, then every number after the break
# is that of the run without one, to the last digit, and so are the final weights.

# %%
log = folder / "resumed" / "metrics.jsonl"
log.unlink(missing_ok=True)  # an earlier run's rows must not be taken for this one's


def interrupt() -> None:
    """Do what Ctrl-C does, as soon as half of the rows are written."""
    while len(read_rows(log)) < len(rows) // 2:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


Thread(target=interrupt, daemon=True).start()
with step("half a run"):
    run("resumed")
stopped = len(read_rows(log))
with step("resumed"):
    run("resumed", resume=True)
resumed = read_rows(log)

compared = differ = 0
for row, other in zip(rows, resumed, strict=True):
    for name in row.keys() & other.keys():
        compared += 1
        differ += row[name] != other[name]
weights, others = (
    read_weights(folder / name / "aligner.safetensors") for name in ("whole", "resumed")
)
equal = all(torch.equal(weights[name], others[name]) for name in weights)
print(
    f"stopped after step {stopped} of {len(rows)}: {compared:,} numbers compared, {differ} differ"
)
print(f"final weights bitwise equal: {'yes' if equal else 'no'}")

# %% [markdown]
# ## 3. The curves of a healthy run
#
# - *Errors* fall, f's a little before f_ref's, which is brought up to it again and again. On unseen
#   prompts the error stays below that of changing nothing; where it rises while the other falls,
#   there are too few pairs.
# - *Implicit accuracy* is above 1/2. It is 0 just after a refresh (a mark at the bottom), when f is
#   f_ref and x = 0. There can be at most one refresh in k + 1 steps, and they become rare.
# - *The gradient is clipped in every step*, and that is healthy. The loss is a sum over all
#   elements of the tokens, so the norm of its gradient is in the hundreds, and clipping divides by
#   this norm. But Muon and AdamW divide by the gradient's size anyway: how far a step goes is up to
#   the learning rate. What clipping changes is the average over steps, the momentum, in which a
#   batch with large errors then counts no more than others. Unhealthy are lonely spikes, and a norm
#   that grows while the error does not fall.
#
# It goes on with what the trained aligner does in sampling: [07, regeneration](07_regeneration.py).

# %%
figure, (upper, lower) = sheet(9.5, (3.2, [1, 1]), (3.2, [1, 1]))
(errors, shares), (norms, losses) = upper, lower
steps = np.arange(len(rows)) + 1
window = max(1, len(rows) // 20)


def values(name: str) -> np.ndarray:
    """Return one number of all rows that have it."""
    return np.array([row[name] for row in rows if name in row])


def draw(axis, name: str, colour: str, label: str) -> np.ndarray:
    """Draw a number of every step, pale, and its means over a twentieth of the run."""
    y = values(name)
    mean = np.convolve(y, np.ones(window) / window, mode="valid")
    axis.plot(steps, y, color=colour, alpha=0.2)
    axis.plot(steps[window - 1 :], mean, color=colour, label=label)
    return mean


draw(errors, "reference_error", BLUE, "f_ref, training batches")
error = draw(errors, "error", ORANGE, "f, training batches")
print(f"error on training batches: {error[0]:.3f} to {error[-1]:.3f}")
unseen = values("validation_error")
if len(unseen):
    untrained = values("identity_error")[0]
    saved = [row["step"] for row in rows if "nearer" in row]
    errors.plot([0, *saved], [untrained, *unseen], "o-", color=GREEN, label="f, unseen prompts")
    errors.axhline(untrained, ls="--", color=GREY, label="changing nothing, unseen prompts")
    print(f"error on unseen prompts: {untrained:.3f} to {unseen[-1]:.3f};", end=" ")
    print(f"{values('nearer')[-1]:.0%} of the losers are moved nearer to c_w")
errors.set(title="errors", ylabel="squared distance to c_w, mean", ylim=(0, None))

accuracy = draw(shares, "implicit_accuracy", BLUE, "f prefers the winner")
refreshes = values("refreshes")
refreshed = steps[np.diff(refreshes, prepend=0) > 0]
shares.plot(
    refreshed, 0 * refreshed - 0.05, "|", color=PINK, label=f"refresh ({refreshes[-1]:.0f})"
)
shares.axhline(0.5, color=GREY, ls="--")
shares.set(title="implicit accuracy", ylabel="share of the batch with x > 0")
print(f"implicit accuracy at last: {accuracy[-1]:.2f}; {refreshes[-1]:.0f} refreshes, k = {k}")

norm = values("gradient_norm")
draw(norms, "gradient_norm", BLUE, "before clipping")
norms.axhline(1, color="black", ls="--", label="clipped to")
norms.set(title="gradient norm", yscale="log", ylabel="logarithmic")
norms.yaxis.set_major_formatter("{x:g}")  # formulas are switched off
largest = norm.max() / np.median(norm)
print(f"clipped in {(norm > 1).mean():.0%} of steps; largest / median norm: {largest:.1f}")

again = [row["loss"] for row in resumed]
losses.plot(steps, values("loss"), color=ORANGE, alpha=0.5, lw=5, label="whole run")
losses.plot(steps, again, color=GREEN, lw=1, label="stopped and resumed")
losses.axvline(stopped + 0.5, color="black", ls="--", label="Ctrl-C")
losses.set(title="loss of both runs", ylabel="sum of squares, and preference", ylim=(0, None))
for axis in (*upper, *lower):
    axis.set_xlabel("step")
    axis.legend(loc="lower left" if axis is errors else "best")
caption = (
    f"{options.steps} steps of {batch_size} on {options.max_pairs or 'all'} pairs, lambda 1. "
    f"Lines: means over {window} steps; pale: every step. Unseen: one prompt in ten."
)
conclusion = (
    f"Stopped after step {stopped} of {len(rows)} and resumed, a run differs in {differ} of "
    f"{compared:,} logged numbers from one without a break"
)
if len(unseen):
    conclusion += f"; its error on unseen prompts went from {untrained:.3f} to {unseen[-1]:.3f}"
save(figure, options, "06_training", caption, f"{conclusion}.")
