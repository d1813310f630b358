"""The picture of tutorial 06: six panels, each with how to read it, and in a box what this run's numbers are."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from img_minimal.plots import BLUE, GREEN, GREY, ORANGE, PINK, plain


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


def draw(
    curves: Curves, norm: str, k: int, resumed: Curves, stopped: int, verdict: list[str]
) -> tuple[Figure, list[str]]:
    """The figure, and its boxes as lines of text; `k`: wins in a row until a refresh."""
    with plt.rc_context({"text.parse_math": True}):  # labels are formulas, and no prompt is drawn
        figure, axes = plt.subplots(2, 3, figsize=(15, 8.8), layout="constrained")
        found = [
            draw_errors(axes[0, 0], curves, norm),
            draw_unseen(axes[0, 1], curves),
            draw_accuracy(axes[0, 2], curves),
            draw_refreshes(axes[1, 0], curves, k),
            draw_gradient(axes[1, 1], curves),
            draw_resumed(axes[1, 2], curves, resumed, stopped, verdict),
        ]
    return figure, found


def draw_line(axis: plt.Axes, curves: Curves, name: str, label: str, colour: str) -> None:
    """Every step, pale, and the running mean over it."""
    axis.plot(curves.steps, curves(name), color=colour, alpha=0.2, linewidth=0.8)
    axis.plot(*curves.smooth(name), color=colour, linewidth=2, label=label)


def finish(axis: plt.Axes, title: str, how_to_read: str, found: list[str], x: float, y: float) -> str:
    """Title, how to read the panel, and in a box at (x, y) what the numbers of this run are; gives the same in text."""
    axis.set_title(f"{title}\n", fontsize=13)
    axis.text(0.5, 1.025, how_to_read, transform=axis.transAxes, ha="center", fontsize=10, color="#505050")
    box = dict(facecolor="#FFF6DD", edgecolor=ORANGE, boxstyle="round,pad=0.4")
    text = dict(fontsize=10.5, va="center", ha="center", zorder=9, bbox=box)
    axis.text(x, y, "\n".join(found), transform=axis.transAxes, **text)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("step")
    return f"{title}: {'; '.join(found)}. Look for: {how_to_read}".translate(str.maketrans("", "", "${}"))


def draw_errors(axis: plt.Axes, curves: Curves, norm: str) -> str:
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
    how = "f runs ahead, $f_{ref}$ is brought up to it again and again"
    return finish(axis, "Error on training batches", how, found, 0.66, 0.1)


def draw_unseen(axis: plt.Axes, curves: Curves) -> str:
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
    how = "below grey; rises while the left one falls: too few pairs"
    return finish(axis, "Error on unseen prompts", how, found, 0.5, 0.4)


def draw_accuracy(axis: plt.Axes, curves: Curves) -> str:
    """Share of samples that prefer c_w to c_l and to f_ref(c), relative to f_ref."""
    draw_line(axis, curves, "implicit_accuracy", "share of samples with x > 0", BLUE)
    axis.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
    axis.set(ylabel="share of the batch with x > 0", ylim=(-0.02, 1.05))
    accuracy = curves("implicit_accuracy")
    found = [f"step 1: {accuracy[0]:.2f}; last twentieth: {curves.ends('implicit_accuracy')[1]:.2f}"]
    if len(curves.refreshed):
        before, after = curves.around_refreshes("implicit_accuracy")
        found.append(f"before a refresh {before:.2f}, two steps after {after:.2f}")
    how = "above ½; 0 just after a refresh, when f is $f_{ref}$ (x = 0)"
    return finish(axis, "Implicit accuracy", how, found, 0.5, 0.14)


def draw_refreshes(axis: plt.Axes, curves: Curves, k: int) -> str:
    """How often k wins in a row came."""
    axis.step(curves.steps, curves("refreshes"), color=PINK, linewidth=2, where="post")
    axis.plot(curves.steps, curves.steps / (k + 1), "--", color=GREY, linewidth=1)  # after a refresh no one can win
    count, early = len(curves.refreshed), int((curves.refreshed <= len(curves.rows) / 2).sum())
    axis.set(ylabel="refreshes of $f_{ref}$ so far", ylim=(0, max(1.15 * count, 3)))
    found = [f"{count} refreshes, k = {k}", f"{early} in the first half, {count - early} in the second"]
    return finish(axis, "Refreshes", "dashed: the most there can be, one in k + 1 steps", found, 0.62, 0.2)


def draw_gradient(axis: plt.Axes, curves: Curves) -> str:
    """Norm of the gradient of all parameters, before it is clipped."""
    draw_line(axis, curves, "gradient_norm", "gradient norm", BLUE)
    axis.axhline(1, color="black", linestyle="--", linewidth=1)
    norms = curves("gradient_norm")
    axis.set(yscale="log", ylabel="norm (logarithmic)", ylim=(min(0.5, norms.min() / 2), 2 * norms.max()))
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter("")
    found = [f"clipped in {(norms > 1).mean():.0%} of steps", f"largest / median: {norms.max() / np.median(norms):.1f}"]
    how = "no lonely spikes; what is above the dashed line is clipped to 1"
    return finish(axis, "Gradient norm", how, found, 0.5, 0.3)


def draw_resumed(axis: plt.Axes, whole: Curves, resumed: Curves, stopped: int, verdict: list[str]) -> str:
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
    return finish(
        axis, "Stopped and resumed", "the thin line lies on the thick one, to the last digit", verdict, 0.5, 0.15
    )
