"""What happens while an aligner is trained, and what do the curves of a healthy run look like?

One short training with train.py's own code, twice: once without a break, and once with a Ctrl-C halfway and --resume.
Frozen features of the preset's pairs come first, once. About five minutes on two free cores (--model sdxl: one GPU; it
has no feature cache, so the models are loaded for each of the three starts).

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

from dataclasses import dataclass

from common import ModelFlags, Options, begin, option, parse, run, save


@dataclass
class TrainingOptions(Options):
    """Flags of this tutorial; --quick has its own, small numbers."""

    steps: int = option(600, "training steps of a run")
    pairs: str | None = option(None, "preference pairs in Pick-a-Pic's columns; default: the preset's")
    max_pairs: int | None = option(None, "use only so many pairs, 0 for all; default: the preset's")


if __name__ == "__main__":
    parse(TrainingOptions, __doc__)  # answers --help before torch is imported, which takes seconds

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import train as script
from img_minimal.files.weights import read_weights
from img_minimal.presets import find_preset
from img_minimal.runtime.checkpoint import RunFolder
from img_minimal.runtime.cli import check
from img_minimal.runtime.plots import BLUE, GREEN, GREY, ORANGE, PINK

plt.rcParams["text.parse_math"] = True  # labels are formulas here, and no prompt is drawn


def configuration(options: TrainingOptions, name: str, resume: bool) -> script.Config:
    """The command line of train.py that this run would have."""
    folder, cached = Path(options.output) / "06_training", find_preset(options.model).cache_dir != "none"
    settings = dict(steps=options.steps, max_pairs=options.max_pairs, save_every=max(1, options.steps // 12))
    if options.quick:
        settings = dict(steps=24, max_pairs=60, save_every=4, batch_size=8, refresh_after=3)
    return script.Config(
        model=options.model, seed=options.seed, pairs=options.pairs, output_dir=str(folder / name), resume=resume,
        overwrite=not resume, eval_prompts=0, cache_dir=str(folder / "features") if cached else None, **settings,
        **{field.name: getattr(options, field.name) for field in fields(ModelFlags)},
    )  # fmt: skip


@contextmanager
def control_c(metrics: Path, rows: int) -> Iterator[None]:
    """Within the block, do what a user's Ctrl-C does as soon as `metrics` has so many rows."""
    left = threading.Event()

    def watch() -> None:
        while not left.wait(0.02):
            if metrics.exists() and metrics.read_text().count("\n") >= rows:
                os.kill(os.getpid(), signal.SIGINT)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        left.set()
        watcher.join()


def train_once(options: TrainingOptions, name: str, resume: bool = False, break_after: int | None = None) -> Path:
    """`python train.py` or, with `resume`, `python train.py --resume`; returns the run folder."""
    config = configuration(options, name, resume)
    preset = script.chosen_preset(config)
    folder = RunFolder.open(config.output_dir, {"config": asdict(config), "preset": asdict(preset)}, resume, not resume)
    metrics = folder.path / "metrics.jsonl"
    if not resume:
        metrics.unlink(missing_ok=True)  # of an earlier tutorial: the watcher must not take it for this one's
    with control_c(metrics, break_after or preset.train_steps + 1):
        script.train_aligner(config, preset, folder)
    stopped = len(rows_of(folder.path)) < preset.train_steps
    check(not stopped or break_after is not None, f"stopped in {folder.path}; start the tutorial anew to see it whole")
    return folder.path


def rows_of(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl, one row a step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def differences(whole: list[dict], resumed: list[dict]) -> tuple[int, int, float]:
    """Numbers that both runs logged, how many differ, and by how much at most."""
    pairs = [(a[name], b[name]) for a, b in zip(whole, resumed, strict=True) for name in a.keys() & b.keys()]
    return len(pairs), sum(a != b for a, b in pairs), max(abs(a - b) for a, b in pairs)


class Curves:
    """The rows of a run as arrays, and what is to be read off them."""

    def __init__(self, rows: list[dict[str, float]]):
        self.rows = rows
        self.steps = self("step")
        self.window = max(1, len(rows) // 20)
        self.refreshed = self.steps[1:][np.diff(self("refreshes")) > 0]

    def __call__(self, name: str) -> np.ndarray:
        return np.array([row[name] for row in self.rows if name in row])

    def smooth(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps, and the mean over a twentieth of the run that ends there."""
        mean = np.convolve(self(name), np.ones(self.window) / self.window, mode="valid")
        return self.steps[self.window - 1 :], mean

    def ends(self, name: str) -> tuple[float, float]:
        """Mean over the first and over the last twentieth."""
        return self(name)[: self.window].mean(), self(name)[-self.window :].mean()

    def around_refreshes(self, name: str) -> tuple[float, float]:
        """Mean in the steps that end with a refresh, and in the second step after (in the first f is f_ref)."""
        at = self.refreshed - 1
        return self(name)[at].mean(), self(name)[at[at + 2 < len(self.rows)] + 2].mean()


def draw_line(axis: plt.Axes, curves: Curves, name: str, label: str, colour: str) -> None:
    """Every step, pale, and the running mean over it."""
    axis.plot(curves.steps, curves(name), color=colour, alpha=0.2, linewidth=0.8)
    axis.plot(*curves.smooth(name), color=colour, linewidth=2, label=label)


def finish(axis: plt.Axes, title: str, how_to_read: str, found: list[str], x: float, y: float) -> None:
    """Title, how to read the panel, and in a box at (x, y) what the numbers of this run are; prints the same."""
    axis.set_title(f"{title}\n", fontsize=13)
    axis.text(0.5, 1.025, how_to_read, transform=axis.transAxes, ha="center", fontsize=10, color="#505050")
    box = dict(facecolor="#FFF6DD", edgecolor=ORANGE, boxstyle="round,pad=0.4")
    text = dict(fontsize=10.5, va="center", ha="center", zorder=9, bbox=box)
    axis.text(x, y, "\n".join(found), transform=axis.transAxes, **text)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("step")
    print(f"{title}: {'; '.join(found)}. Look for: {how_to_read}".translate(str.maketrans("", "", "${}")))


def draw_errors(axis: plt.Axes, curves: Curves, norm: str) -> None:
    """Errors of f and f_ref; in the inset f's lead in the first tenth of the run, a sawtooth if refreshes come."""
    draw_line(axis, curves, "reference_error", "$f_{ref}$", ORANGE)
    draw_line(axis, curves, "error", "f", BLUE)
    axis.set(ylabel=f"squared distance to $c_w$ ({norm} over elements)", ylim=(0, None))
    axis.legend(loc="lower left", fontsize=10)
    lead = 100 * (1 - curves("error") / curves("reference_error"))
    few = max(12, len(lead) // 10)
    inset = axis.inset_axes((0.5, 0.6, 0.48, 0.28))
    inset.plot(curves.steps[:few], lead[:few], color=BLUE)
    for step in curves.refreshed[curves.refreshed <= few]:
        inset.axvline(step, color=PINK, linewidth=1)
    inset.set_title("lead of f over $f_{ref}$, %; pink: refresh", fontsize=9.5)
    inset.tick_params(labelsize=9)
    first, last = curves.ends("error")
    found = [
        f"f: {first:.3g} to {last:.3g}, ratio {last / first:.2f}",
        f"f ahead of $f_{{ref}}$ in {(lead > 0).mean():.0%} of steps",
    ]
    finish(
        axis,
        "Error on training batches",
        "f runs ahead, $f_{ref}$ is brought up to it again and again",
        found,
        0.66,
        0.1,
    )


def draw_unseen(axis: plt.Axes, curves: Curves) -> None:
    """Error on prompts that are set aside; it starts at that of changing nothing, which an untrained aligner does."""
    found, identity = ["no prompt was set aside"], curves("identity_error")
    if len(identity):
        error, nearer = np.append(identity[:1], curves("validation_error")), curves("nearer")
        steps = [0] + [row["step"] for row in curves.rows if "nearer" in row]
        axis.plot(steps, error, "o-", color=GREEN, linewidth=2, label="f, unseen prompts")
        axis.axhline(identity[0], linestyle="--", color=GREY, label="changing nothing")
        axis.set_ylim(0, 1.12 * error.max())
        axis.legend(loc="lower left", fontsize=10)
        best = error.argmin()
        found = [
            f"{error[0]:.3g} to {error[-1]:.3g}, ratio {error[-1] / error[0]:.2f}",
            f"lowest at step {steps[best]}: ratio {error[best] / error[0]:.2f}",
            f"losers moved nearer to $c_w$: {nearer[-1]:.0%}",
        ]
    axis.set_ylabel("squared distance to $c_w$ (mean over elements)")
    finish(
        axis, "Error on unseen prompts", "below grey; rises while the left one falls: too few pairs", found, 0.5, 0.4
    )


def draw_accuracy(axis: plt.Axes, curves: Curves) -> None:
    """Share of samples that prefer c_w to c_l and to f_ref(c), relative to f_ref."""
    draw_line(axis, curves, "implicit_accuracy", "share of samples with x > 0", BLUE)
    axis.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
    axis.set(ylabel="share of the batch with x > 0", ylim=(-0.02, 1.05))
    accuracy = curves("implicit_accuracy")
    found = [f"step 1: {accuracy[0]:.2f}; last twentieth: {curves.ends('implicit_accuracy')[1]:.2f}"]
    if len(curves.refreshed):
        before, after = curves.around_refreshes("implicit_accuracy")
        found.append(f"before a refresh {before:.2f}, two steps after {after:.2f}")
    finish(axis, "Implicit accuracy", "above ½; 0 just after a refresh, when f is $f_{ref}$ (x = 0)", found, 0.5, 0.14)


def draw_refreshes(axis: plt.Axes, curves: Curves, k: int) -> None:
    """How often k wins in a row came."""
    axis.step(curves.steps, curves("refreshes"), color=PINK, linewidth=2, where="post")
    axis.plot(curves.steps, curves.steps / (k + 1), "--", color=GREY, linewidth=1)  # after a refresh no one can win
    count, early = len(curves.refreshed), int((curves.refreshed <= len(curves.rows) / 2).sum())
    axis.set(ylabel="refreshes of $f_{ref}$ so far", ylim=(0, max(1.15 * count, 3)))
    found = [f"{count} refreshes, k = {k}", f"{early} in the first half, {count - early} in the second"]
    finish(axis, "Refreshes", "dashed: the most there can be, one in k + 1 steps", found, 0.62, 0.2)


def draw_gradient(axis: plt.Axes, curves: Curves) -> None:
    """Norm of the gradient of all parameters, before it is clipped."""
    draw_line(axis, curves, "gradient_norm", "gradient norm", BLUE)
    axis.axhline(1, color="black", linestyle="--", linewidth=1)
    norms = curves("gradient_norm")
    axis.set(yscale="log", ylabel="norm (logarithmic)", ylim=(min(0.5, norms.min() / 2), 2 * norms.max()))
    found = [f"clipped in {(norms > 1).mean():.0%} of steps", f"largest / median: {norms.max() / np.median(norms):.1f}"]
    finish(axis, "Gradient norm", "no lonely spikes; what is above the dashed line is clipped to 1", found, 0.5, 0.3)


def draw_resumed(axis: plt.Axes, whole: Curves, resumed: Curves, stopped: int, equal: bool) -> None:
    """The loss of both runs around the break, and the verdict on all of their numbers."""
    near = abs(whole.steps - stopped) <= 30
    axis.plot(whole.steps[near], whole("loss")[near], color="#F5D08A", linewidth=7, label="without a break")
    for part, colour, label in (
        (whole.steps <= stopped, BLUE, "until Ctrl-C"),
        (whole.steps > stopped, GREEN, "resumed"),
    ):
        axis.plot(resumed.steps[part & near], resumed("loss")[part & near], ".-", color=colour, label=label)
    axis.axvline(stopped + 0.5, color="black", linestyle="--", linewidth=1)
    low, high = axis.get_ylim()
    axis.set(ylabel="loss", ylim=(low - 0.55 * (high - low), high + 0.2 * (high - low)))
    axis.legend(loc="upper center", fontsize=9.5, ncols=3, columnspacing=1)
    numbers, differing, largest = differences(whole.rows, resumed.rows)
    found = [
        f"stopped after step {stopped} of {len(whole.rows)}",
        f"{numbers:,} numbers compared, {differing} differ" + (f" (by {largest:.1e} at most)" if differing else ""),
        f"final weights bitwise equal: {'yes' if equal else 'no'}",
    ]
    finish(axis, "Stopped and resumed", "the thin line lies on the thick one, to the last digit", found, 0.5, 0.15)


def main() -> None:
    """Two trainings, six panels."""
    options = begin(TrainingOptions, __doc__)
    config = configuration(options, "whole", False)
    preset = script.chosen_preset(config)
    print("1. a run without a break")
    whole = train_once(options, "whole")
    print("2. the same, with a Ctrl-C halfway")
    train_once(options, "resumed", break_after=preset.train_steps // 2)
    stopped = len(rows_of(whole.parent / "resumed"))
    print(f"   stopped after step {stopped}; going on with --resume")
    resumed = train_once(options, "resumed", resume=True)
    first, second = (read_weights(folder / "aligner.safetensors") for folder in (whole, resumed))
    equal = all(torch.equal(first[name], second[name]) for name in first | second)

    curves = Curves(rows_of(whole))
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.8), layout="constrained")
    draw_errors(axes[0, 0], curves, preset.norm)
    draw_unseen(axes[0, 1], curves)
    draw_accuracy(axes[0, 2], curves)
    draw_refreshes(axes[1, 0], curves, config.refresh_after)
    draw_gradient(axes[1, 1], curves)
    draw_resumed(axes[1, 2], curves, Curves(rows_of(resumed)), stopped, equal)
    save(
        figure, options, "06_training",
        f"{preset.name}: {preset.train_steps} steps of {preset.batch_size} on {preset.max_pairs or 'all'} pairs, "
        f"lambda {preset.preference_weight:g}, seed {options.seed}. Lines: running mean over {curves.window} steps; "
        "pale: every step. Unseen: one prompt in ten. Boxes: computed from this run.",
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
