# %% [markdown]
"""What do the two preference terms add to a plain regression, and what can go wrong with them?

The objective of img_minimal/preference.py on one sample of two elements, so that f(c) is a point in
the plane and the gradient an arrow. Needs no model (--model changes nothing).

    L_base = ||c_w - f||^2                                                                  Eq. 4
    D(a)   = ||a - f||^2 - ||a - f_ref||^2
    x      = -[ (D(c_w) - D(c_l)) + (D(c_w) - ||f_ref - f||^2) ]                Eqs. 5-7, 15-17
                   DPO                  SPIN
    L      = L_base + lambda * log(1 + exp(-x))

Two pushes. DPO's is away from the loser c_l: "be nearer to the winner than to the loser". SPIN's is
away from f_ref, the aligner's own earlier answer: "be better than you were". The winner pulls in
both, as in L_base.

Upper row, -grad L as f moves over the plane. L_base alone is a funnel into the winner c_w. The
preference terms add a *uniform* wind, because f squared cancels in x (2 - 1 - 1 = 0) and x is
affine in f:

    -grad_f lambda log(1 + exp(-x)) = lambda sigmoid(-x) grad x,    grad x = 2 (2 c_w - c_l - f_ref)

Its strength sigmoid(-x) is 1/2 where f is as good as f_ref (dashed, x = 0) and dies down beyond.

Lower row. Left: strength of the wind along a descent, with and without refreshes. Middle: how much
better than f_ref must f be until the wind dies? Summed over the 16 x 128 or 16 x 2048 elements of
image tokens, the slightest bit: l is a switch that only says "do not fall behind f_ref". Averaged,
it blows all the way, as if tokens had one element. Right: where that takes f. Setting the whole
gradient to zero,

    f - c_w = lambda sigmoid(-x) (2 c_w - c_l - f_ref)        (a sum; of a mean the same)

so f comes to rest *beyond* the winner, the farther the larger lambda, unless x is large there. This
is why the presets sum, and why lambda needs to be chosen anew for every choice of norm.

Why refresh at all? A refresh, f_ref <- f, puts the dashed line back under f: the wind blows again,
and in this picture it carries f farther beyond c_w than without. With one sample that is all harm:
L_base alone would have arrived. It is wanted where L_base does not arrive: an aligner serves many
samples at once, its error stays, and with an old f_ref the wind has long died on most of them. The
refresh keeps asking "better than you were" while there is something to gain. SPIN's push,
2 (c_w - f_ref), fades as f_ref nears c_w; DPO's, 2 (c_w - c_l), never does, and what remains of the
overshoot is its doing.
"""

# %% Options
from common import begin, save, sheet, step

options, _ = begin(__doc__)

import numpy as np
import torch
from torch import Tensor

from img_minimal.optimizer import warmup_constant_decay
from img_minimal.plots import BLUE, GREEN, GREY, PINK
from img_minimal.preference import ReferenceRefresh, preference_loss

steps, grid, n = (40, 12, 10) if options.quick else (400, 60, 300)
# One sample (B 1, N 1, D 2). c_w and c_l differ by 0.5 in the mean square, as image tokens of two
# pictures may. f starts off their line: an aligner serves many samples, and rarely answers c_l.
WINNER = torch.tensor([[[1, 0]]], dtype=torch.float64)
LOSER = torch.tensor([[[0, 0]]], dtype=torch.float64)
START = torch.tensor([[[0.25, 0.75]]], dtype=torch.float64)


# %% 1. x is affine in f: its second differences (x(f + d) - 2 x(f) + x(f - d)) / (2 |d|^2), which
# are 1 for a plain |f|^2, are 0
torch.manual_seed(options.seed)
points = torch.randn(5, n, 1, 16, 128, dtype=torch.float64)
second = []
with step("second differences"):
    for f, d, f_ref, c_w, c_l in zip(*points):
        x = []
        for point in (f - d, f, f + d):
            _, metrics = preference_loss(point, f_ref, c_w, c_l, norm="sum")
            x.append(metrics["margin"])
        second.append((x[0] - 2 * x[1] + x[2]) / (2 * d.square().sum()))
second = torch.stack(second)
print(f"second differences of x / 2 |d|^2, {n} random points f and steps d of 16 x 128, float64,")
print(f"seed {options.seed}: mean {second.mean():+.6f}, largest {second.abs().max():.1e}")

# %% 2. The gradient as a field over the plane, for L_base, with DPO, with both
OBJECTIVES = {
    "L_base": {"dpo": False, "spin": False},
    "L_base + DPO": {"dpo": True, "spin": False},
    "L_base + DPO + SPIN": {"dpo": True, "spin": True},
}


def downhill(
    f: Tensor, f_ref: Tensor, c_w: Tensor, c_l: Tensor, **objective
) -> tuple[Tensor, dict]:
    """Compute -grad L at every f (B, N, D), each a sample of its own, and the loss's metrics."""
    f = f.detach().requires_grad_()
    points = [point.expand_as(f) for point in (f_ref, c_w, c_l)]
    loss, metrics = preference_loss(f, *points, **objective)
    (gradient,) = torch.autograd.grad(loss * len(f), f)  # the loss averages over samples
    return -gradient, metrics


# %% 3. Gradient descent, with and without refreshes
def descend(k: int, rate: float, copies: int = 1, norm: str = "sum", **objective) -> tuple:
    """Descend from START, with refreshes after `k` wins in a row; the rate decays as in training.

    `copies` repeats the points to D = 2 * copies elements. A mean's gradient is multiplied by D, so
    that L_base alone goes the same way whatever D and `norm` are. Returns where f went (steps + 1,
    2), sigmoid(-x) on the way (steps,), and the steps after which f_ref was set.
    """
    f, c_w, c_l = [point.repeat(1, 1, copies) for point in (START, WINNER, LOSER)]
    f_ref = f
    refresh = ReferenceRefresh(k)
    factor = warmup_constant_decay(steps, warmup=1, hold=0.4, floor=0.02)
    if norm == "mean":
        rate = rate * f.numel()
    path, margins, references = [f], [], [0]
    for number in range(steps):
        direction, metrics = downhill(f, f_ref, c_w, c_l, norm=norm, **objective)
        f = f + rate * factor(number) * direction
        path.append(f)
        margins.append(metrics["margin"])
        if refresh.update(metrics["error"], metrics["reference_error"]):
            f_ref = f
            references.append(number + 1)
    return torch.cat(path)[:, 0, :2], torch.sigmoid(-torch.stack(margins)), references


NEVER = steps + 1
with step("descents"):
    path, strength, references = descend(10, rate=0.02)
    path_never, strength_never, _ = descend(NEVER, rate=0.02)
refreshed = f"{len(references) - 1} refreshes"
for name, way, wind in (
    ("never refreshed", path_never, strength_never),
    (refreshed, path, strength),
):
    beyond = f"f ends {way[-1, 0] - 1:+.2f} beyond c_w"
    print(f"{name:16} {beyond}; strength of the wind there {wind[-1]:.2f}")

# %% 4. Sum or mean: sigmoid(-x) on the way from f_ref = c_l to c_w
share = torch.cat([torch.zeros(1), torch.logspace(-5, 0, 6 * grid)]).double()
winds = {}
print("on the way from f_ref = c_l to c_w, x grows in proportion, from 0:")
for name, copies, norm in (
    ("sum of 16 x 2048", 16 * 1024, "sum"),
    ("sum of 16 x 128", 16 * 64, "sum"),
    ("sum of 2", 1, "sum"),
    ("mean of any number", 16 * 64, "mean"),
):
    with step("winds"):
        c_w, c_l = WINNER.repeat(1, 1, copies), LOSER.repeat(1, 1, copies)
        _, metrics = preference_loss(c_w, c_l, c_w, c_l, norm=norm)
    x = metrics["margin"]
    winds[name] = wind = torch.sigmoid(-x * share)
    below = share[wind < 0.01]
    dies = f"after {below[0]:.2%} of the way" if len(below) else "never"
    print(f"  {name:19s} x at c_w {x:8.1f}, sigmoid(-x) there {wind[-1]:.2f}, below 0.01 {dies}")

# %% 5. Where f comes to rest, by lambda and norm
LAMBDAS = (0, 0.5, 1, 2, 8)
rests = {}
print(f"end of f after {steps} steps, in |c_w - c_l| beyond c_w, by lambda:")
print(f"  {'lambda':27}", *[f"{weight:>6}" for weight in LAMBDAS])
for name, settings in (
    ("mean, refreshed", {"norm": "mean", "k": 10}),
    ("mean, never refreshed", {"norm": "mean", "k": NEVER}),
    ("sum of 2, refreshed", {"norm": "sum", "k": 10}),
    ("sum of 16 x 128, refreshed", {"norm": "sum", "k": 10, "copies": 16 * 64}),
):
    rests[name] = []
    for weight in LAMBDAS:
        with step("descents"):
            way, _, _ = descend(rate=0.05, weight=weight, **settings)
        rests[name].append(way[-1, 0].item() - 1)
    print(f"  {name:27}", *[f"{beyond:+6.2f}" for beyond in rests[name]])

# %% 6. The picture: fields above, of f_ref = START; descents, winds and ends below
figure, (upper, (left, middle, right)) = sheet(15, (4.5, [1] * 3), (4.2, [1] * 3))
X, Y = np.meshgrid(np.linspace(-0.75, 2.05, grid), np.linspace(-1.05, 1.25, grid))
plane = torch.tensor(np.stack([X, Y], -1)).view(-1, 1, 2)
plane = torch.cat([plane, START])
for axis, (name, objective) in zip(upper, OBJECTIVES.items()):
    total, _ = downhill(plane, START, WINNER, LOSER, norm="sum", **objective)
    wind = total - 2 * (WINNER - plane)  # what the preference terms add
    *sizes, at_start = wind.norm(dim=-1)[:, 0]
    sizes = np.reshape(sizes, X.shape)
    across, up = total[:-1, 0].numpy().T
    axis.contourf(X, Y, sizes, levels=25, cmap="Oranges", vmin=0, vmax=7)
    axis.streamplot(X, Y, across.reshape(X.shape), up.reshape(X.shape), color=BLUE, density=0.75)
    points = {GREEN: WINNER}
    if name != "L_base":  # which knows c_w alone
        axis.contour(X, Y, sizes, levels=[at_start], colors="black", linestyles="--")
        points |= {GREY: LOSER, PINK: START}
    for colour, point in points.items():
        axis.plot(*point[0, 0], "o", color=colour, ms=11, mec="white")
    axis.set(title=name, xlabel="first element of f", ylabel="second element", aspect="equal")
axis.plot(*path.T, color="black")
axis.plot(*path[references].T, "o", color=PINK, ms=5)
left.plot(strength, label=refreshed)
left.plot(strength_never, color=GREY, label="never refreshed")
left.vlines(references[1:], 0, 0.6, color=PINK)
left.axhline(0.5, color="black", ls="--")
left.set(
    title="A refresh brings the wind back",
    xlabel="step of gradient descent (pink: f_ref <- f)",
    ylabel="σ(-x), strength of the wind",
)
for name, wind in winds.items():
    middle.semilogx(share[1:], wind[1:], label=name)
middle.xaxis.set_major_formatter("{x:g}")  # formulas are switched off
middle.set(
    title="Sum or mean: when does the wind die?",
    xlabel="share of the way from f_ref to c_w (logarithmic)",
    ylabel="σ(-x)",
)
for name, beyond in rests.items():
    right.plot(beyond, "o-", label=name)
right.axhline(1, color=GREY, ls="--", label="as wrong as c_l was")
right.set_xticks(range(len(LAMBDAS)), LAMBDAS)
right.set(title="What a large λ breaks", xlabel="λ", ylabel="end of f beyond c_w, in |c_w - c_l|")
for axis in (left, middle, right):
    axis.legend()
caption = (
    "Blue: -grad L, where f goes; orange: wind, the strength of the preference terms; dashed: x = "
    "0, f as good as f_ref; green c_w, grey c_l, pink f_ref; black: the descent with refreshes. "
    f"One sample of 2 elements; fields with the sum of 2 and lambda 1; {steps} steps of gradient "
    "descent; nothing drawn is random. Repeating the two elements gives 16 x 128 and 16 x 2048."
)
save(figure, options, "05_preference_objective", caption)
