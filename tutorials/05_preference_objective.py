"""What do the two preference terms add to a plain regression, and what can go wrong with them?

The objective of img_minimal/preference.py on one sample of two elements, so that f(c) is a point in the plane and
the gradient an arrow. Needs no model (--model changes nothing); about twenty seconds.

    L_base = ||c_w - f||^2                                                                  Eq. 4
    D(a)   = ||a - f||^2 - ||a - f_ref||^2
    x      = -[ (D(c_w) - D(c_l)) + (D(c_w) - ||f_ref - f||^2) ]                            Eqs. 5-7, 15-17
                   DPO                  SPIN
    L      = L_base + lambda * log(1 + exp(-x))

Upper row, -grad L as f moves over the plane. L_base alone is a funnel into the winner c_w. The preference terms add a
*uniform* wind, because f squared cancels in x (2 - 1 - 1 = 0) and x is affine in f:

    -grad_f lambda log(1 + exp(-x)) = lambda * sigmoid(-x) * grad x,    grad x = 2 (2 c_w - c_l - f_ref)

with DPO away from c_l, with SPIN away from f_ref, too. Its strength sigmoid(-x) is 1/2 where f is as good as f_ref
(dashed line, x = 0) and dies down beyond. A refresh, f_ref <- f, puts the line back under f: the wind blows again.

Lower row. Left: strength of the wind along a descent, with and without refreshes. Middle: how much better than f_ref
must f be until the wind dies? Summed over the 16 x 128 or 16 x 2048 elements of image tokens, the slightest bit: l is a
switch that only says "do not fall behind f_ref". Averaged, it blows all the way, as if tokens had one element. Right:
where that takes f. Setting the whole gradient to zero,

    f - c_w = lambda * sigmoid(-x) * (2 c_w - c_l - f_ref)        (a sum; of a mean the same)

so f comes to rest *beyond* the winner, the farther the larger lambda, unless x is large there. This is why the presets
sum, and why lambda needs to be chosen anew for every choice of norm.
"""

from common import Options, begin, parse, run, save

if __name__ == "__main__":
    parse(Options, __doc__)  # answers --help before torch is imported, which takes seconds

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from matplotlib.lines import Line2D
from torch import Tensor

from img_minimal.preference import ReferenceRefresh, preference_loss, squared_distance
from img_minimal.runtime.optimizer import warmup_constant_decay
from img_minimal.runtime.plots import BLUE, GREEN, GREY, ORANGE, PINK

plt.rcParams["text.parse_math"] = True  # labels are formulas here, and no prompt is drawn
# One sample (B 1, N 1, D 2). c_w and c_l differ by 0.5 in the mean square, as image tokens of two pictures may.
# f starts off their line: an aligner serves many samples, and rarely answers exactly c_l.
WINNER, LOSER, START = (torch.tensor([[point]], dtype=torch.float64) for point in ([1, 0], [0, 0], [0.25, 0.75]))
LAMBDAS = (0, 0.5, 1, 2, 8)
OBJECTIVES = {
    "L_base": dict(dpo=False, spin=False),
    "L_base + DPO": dict(dpo=True, spin=False),
    "L_base + DPO + SPIN": dict(dpo=True, spin=True),
}


def downhill(f: Tensor, reference: Tensor, winner: Tensor, loser: Tensor, **objective) -> tuple[Tensor, dict]:
    """-grad L at every f of (B, N, D), each a sample of its own, and the loss function's metrics."""
    f = f.detach().requires_grad_()
    others = (point.expand_as(f) for point in (reference, winner, loser))
    loss, metrics = preference_loss(f, *others, **objective)
    (gradient,) = torch.autograd.grad(loss * len(f), f)  # the loss averages over samples
    return -gradient, metrics


@dataclass
class Descent:
    """Where f went (steps + 1, 2), the wind's sigmoid(-x) on the way (steps,), and f_ref with the step it was set."""

    path: Tensor
    strength: Tensor
    references: list[tuple[int, Tensor]]


def descend(start: Tensor, k: int, steps: int, rate: float, copies: int = 1, norm: str = "sum", **more) -> Descent:
    """Gradient descent on f with refreshes after `k` wins in a row (0: never), the rate decaying as in training.

    `copies` repeats the points to D = 2 * copies elements. A mean's gradient is multiplied by D, so that L_base alone
    goes the same way whatever D and `norm` are.
    """
    f, reference, winner, loser = (point.repeat(1, 1, copies) for point in (start, start, WINNER, LOSER))
    rule, factor = ReferenceRefresh(k or steps + 1), warmup_constant_decay(steps, warmup=1, hold=0.4, floor=0.02)
    path, strength, references = [f], [], [(0, start[0, 0])]
    for step in range(steps):
        direction, metrics = downhill(f, reference, winner, loser, norm=norm, **more)
        f = f + rate * factor(step) * direction * (f.numel() if norm == "mean" else 1)
        path.append(f)
        strength.append(torch.sigmoid(-metrics["margin"]))
        if rule.update(metrics["error"].item(), metrics["reference_error"].item()):
            reference = f
            references.append((step + 1, f[0, 0, :2]))
    return Descent(torch.cat(path)[:, 0, :2], torch.stack(strength), references)


def argument(f: Tensor, reference: Tensor, winner: Tensor, loser: Tensor, norm: str) -> Tensor:
    """x of each sample (B,): the loss function's metric is a mean over samples, so they come one by one."""
    samples = zip(*(point.split(1) for point in (f, reference, winner, loser)))
    return torch.stack([preference_loss(*sample, norm=norm)[1]["margin"] for sample in samples])


def print_second_differences(seed: int, n: int) -> None:
    """(q(f + d) - 2 q(f) + q(f - d)) / (2 |d|^2) of each term of x, on random points: the factor of its square."""
    noise = torch.Generator().manual_seed(seed)
    points = torch.randn(5, n, 16, 128, dtype=torch.float64, generator=noise)
    f, step, reference, winner, loser = points
    terms = {
        "-2 ||c_w - f||^2": lambda f: -2 * squared_distance(winner, f, "sum"),
        "+  ||c_l - f||^2": lambda f: squared_distance(loser, f, "sum"),
        "+  ||f_ref - f||^2": lambda f: squared_distance(reference, f, "sum"),
        "x, all of it": lambda f: argument(f, reference, winner, loser, "sum"),
    }
    print(f"second differences / 2 |d|^2, {n} random points f and steps d of 16 x 128, float64, seed {seed}:")
    for name, term in terms.items():
        second = (term(f + step) - 2 * term(f) + term(f - step)) / (2 * step.square().flatten(1).sum(1))
        print(f"  {name:19s} mean {second.mean().item():+.6f}, largest {second.abs().max().item():.1e}")


def field(points: Tensor, reference: Tensor, **objective) -> tuple[Tensor, Tensor]:
    """-grad L at points (B, 1, 2), and the share of it that is the preference terms'."""
    total = downhill(points, reference, WINNER, LOSER, norm="sum", **objective)[0]
    return total, total - downhill(points, reference, WINNER, LOSER, norm="sum", **OBJECTIVES["L_base"])[0]


def draw_field(axis: plt.Axes, reference: Tensor, title: str, grid: int, end: Tensor, **objective) -> None:
    """Streamlines of -grad L; colour is the length of what the preference terms add; dashed is x = 0."""
    x, y = (torch.linspace(*ends, grid, dtype=torch.float64) for ends in ((-0.75, 2.05), (-1.05, 1.25)))
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 1, 2)
    total, blown = (part.view(grid, grid, 2) for part in field(points, reference, **objective))
    wind = blown.norm(dim=-1)
    axis.contourf(x, y, wind, levels=torch.linspace(0, 5, 26).numpy(), cmap="Oranges", vmin=0, vmax=7, extend="max")
    if wind.max() > 0:
        half = field(reference, reference, **objective)[1].norm().item()  # x = 0 there, and all along its line
        axis.contour(x, y, wind, levels=[half], colors="black", linestyles="--", linewidths=1.2)
    u, v = total.unbind(-1)
    speed = (u**2 + v**2).sqrt()
    axis.streamplot(
        x.numpy(), y.numpy(), u.numpy(), v.numpy(), color=BLUE, density=0.75, arrowsize=1.1,
        linewidth=(0.5 + 0.35 * speed.clamp(max=6)).numpy(),
    )  # fmt: skip
    marks = [(WINNER, GREEN, "$c_w$", (-4, -24))]
    if wind.max() > 0:  # L_base knows c_w alone
        marks += [(LOSER, GREY, "$c_l$", (0, 9)), (reference, PINK, "$f_{ref}$", (7, 9))]
    for point, colour, name, offset in marks:
        axis.plot(*point[0, 0], "o", color=colour, markersize=11, markeredgecolor="white", zorder=5)
        axis.annotate(
            name, point[0, 0], offset, textcoords="offset points", fontsize=14, ha="center", zorder=6,
            bbox=dict(facecolor="white", alpha=0.8, edgecolor="none", pad=0.6),
        )  # fmt: skip
    axis.plot(*end, "*", color="black", markersize=15, markeredgecolor="white", zorder=7)
    axis.set(title=title, xlabel="first element of f", aspect="equal", xlim=(-0.75, 2.05), ylim=(-1.05, 1.25))


def draw_ends(axis: plt.Axes, steps: int) -> None:
    """For each lambda and norm, how far beyond c_w, along c_w - c_l, f ends; prints the same."""
    runs = [
        ("mean, refreshed", dict(norm="mean", k=10), ORANGE, "o-"),
        ("mean, never refreshed", dict(norm="mean", k=0), ORANGE, "o:"),
        ("sum of 2, refreshed", dict(norm="sum", k=10), PINK, "s-"),
        ("sum of 16 x 128, refreshed", dict(norm="sum", copies=16 * 64, k=10), BLUE, "s-"),
    ]
    print(f"end of f after {steps} steps, in |c_w - c_l| beyond c_w (the farthest it was; squared error, c_l's is 1):")
    print(f"  {'lambda':27s}" + "".join(f"{weight:^23}" for weight in LAMBDAS))
    for name, settings, colour, style in runs:
        descents = [descend(START, steps=steps, rate=0.05, weight=weight, **settings) for weight in LAMBDAS]
        ends = torch.stack([d.path[-1] for d in descents])
        beyond, errors = (ends[:, 0] - 1).round(decimals=3) + 0.0, (ends - WINNER[0, 0]).square().sum(1)
        axis.plot(range(len(LAMBDAS)), beyond, style, color=colour, label=name)
        farthest = [max(0.0, d.path[:, 0].max().item() - 1) for d in descents]
        print(f"  {name:27s}" + "".join(f" {b:+.2f} ({f:+.2f}; {e:.3f}) " for b, f, e in zip(beyond, farthest, errors)))
    axis.axhline(1, color=GREY, linewidth=1, linestyle="--")
    axis.annotate("as wrong as $c_l$ was", (0, 1), (0, -15), textcoords="offset points", color=GREY, fontsize=11)
    axis.set_xticks(range(len(LAMBDAS)), map(str, LAMBDAS))
    axis.set(xlabel=r"$\lambda$", ylabel=r"end of f beyond $c_w$, in $|c_w - c_l|$", ylim=(-0.08, 1.75))
    axis.set_title("What a large λ breaks")
    axis.legend(fontsize=11, loc="upper left")


def draw_strength(axis: plt.Axes, grid: int) -> None:
    """sigmoid(-x) on the way from f_ref = c_l to c_w, for sums over more and more elements and for the mean."""
    way = torch.cat([torch.zeros(1), torch.logspace(-5, 0, 6 * grid)]).double()
    curves = [
        ("sum of 16 x 2048", 16 * 1024, "sum", GREEN),
        ("sum of 16 x 128", 16 * 64, "sum", BLUE),
        ("sum of 2", 1, "sum", PINK),
        ("mean of any number", 16 * 64, "mean", ORANGE),
    ]
    print("on the way from f_ref = c_l to c_w, x grows in proportion, from 0:")
    for name, copies, norm, colour in curves:
        winner, loser = (point.repeat(len(way), 1, copies) for point in (WINNER, LOSER))
        x = argument(loser + way[:, None, None] * (winner - loser), loser, winner, loser, norm)
        strength = torch.sigmoid(-x)
        axis.semilogx(way[1:], strength[1:], color=colour, linewidth=2, label=name)
        below = (strength < 0.01).nonzero()
        dies = f"below 0.01 after {way[below[0]].item():.2%} of the way" if len(below) else "never below 0.01"
        print(f"  {name:19s} x at c_w {x[-1].item():8.1f}, sigmoid(-x) there {strength[-1].item():.2f}, {dies}")
    axis.set(xlabel="share of the way from $f_{ref}$ to $c_w$ (logarithmic)", ylabel="σ(-x)", ylim=(0, 0.72))
    axis.set_title("Sum or mean: when does the wind die?")
    axis.legend(fontsize=11, loc="upper center", ncols=2)


def draw_descents(axis: plt.Axes, refreshed: Descent, never: Descent) -> None:
    """Strength of the wind over the steps of two descents."""
    axis.plot(never.strength, color=GREY, linewidth=2, label=f"never refreshed (last {never.strength[-1]:.2f})")
    count = len(refreshed.references) - 1
    label = f"{count} refreshes (last {refreshed.strength[-1]:.2f})"
    axis.plot(refreshed.strength, color=BLUE, linewidth=2, label=label)
    for step, _ in refreshed.references[1:]:
        axis.axvline(step, color=PINK, linewidth=0.8, zorder=0)
    axis.axhline(0.5, color="black", linewidth=1, linestyle="--")
    axis.set(xlabel="step of gradient descent (pink: $f_{ref} ← f$)", ylabel="σ(-x), strength of the wind")
    axis.set(ylim=(0, 0.62), xlim=(0, len(never.strength)))
    axis.set_title("A refresh brings the wind back")
    axis.legend(fontsize=11, loc="lower right")


def main() -> None:
    """Numbers, then the picture."""
    options = begin(Options, __doc__)
    steps, grid, n = (40, 12, 10) if options.quick else (400, 60, 300)
    print_second_differences(options.seed, n)
    plt.rcParams["font.size"] = 12
    figure = plt.figure(figsize=(15, 8.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1))
    fields, below = upper.subplots(1, 4, sharey=True), lower.subplots(1, 3)

    refreshed, never = (descend(START, k, steps, rate=0.02) for k in (10, 0))
    for axis, (name, parts) in zip(fields, OBJECTIVES.items()):
        end = descend(START, 0, steps, rate=0.05, **parts).path[-1]
        draw_field(axis, START, name, grid, end, **parts)
    last = refreshed.references[-1][1].view(1, 1, 2)
    draw_field(fields[3], last, f"... after {len(refreshed.references) - 1} refreshes", grid, refreshed.path[-1])
    fields[3].plot(*refreshed.path.T, color="black", linewidth=2)
    fields[3].plot(*torch.stack([r for _, r in refreshed.references]).T, "o", color=PINK, markersize=5, zorder=4)
    fields[0].set_ylabel("second element of f")

    draw_descents(below[0], refreshed, never)
    draw_strength(below[1], grid)
    draw_ends(below[2], steps)
    handles = [
        Line2D([], [], color=BLUE, label="-∇L: where f goes"),
        Line2D([], [], color="#FDAE6B", linewidth=8, label="wind: strength of the preference terms"),
        Line2D([], [], color="black", linestyle="--", label="x = 0: f as good as $f_{ref}$"),
        Line2D([], [], color="black", marker="*", linestyle="", markersize=13, label="where f comes to rest"),
    ]
    upper.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=12, frameon=False)
    for axis in below:
        axis.spines[["top", "right"]].set_visible(False)
    save(
        figure, options, "05_preference_objective",
        f"One sample of 2 elements; fields with the sum of 2 and lambda 1; {steps} steps of gradient descent; nothing "
        "drawn is random. Repeating the two elements gives 16 x 128 and 16 x 2048.",
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
