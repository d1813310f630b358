# %% [markdown]
"""What do the two preference terms add to a plain regression, and what can go wrong with them?

The objective of img_minimal/preference.py on one sample of two elements, so that f(c) is a point in the plane and
the gradient an arrow. Needs no model (--model changes nothing).

    L_base = ||c_w - f||^2                                                                  Eq. 4
    D(a)   = ||a - f||^2 - ||a - f_ref||^2
    x      = -[ (D(c_w) - D(c_l)) + (D(c_w) - ||f_ref - f||^2) ]                            Eqs. 5-7, 15-17
                   DPO                  SPIN
    L      = L_base + lambda * log(1 + exp(-x))

Two pushes. DPO's is away from the loser c_l: "be nearer to the winner than to the loser". SPIN's is away from f_ref,
the aligner's own earlier answer: "be better than you were". The winner pulls in both, as in L_base.

Upper row, -grad L as f moves over the plane. L_base alone is a funnel into the winner c_w. The preference terms add a
*uniform* wind, because f squared cancels in x (2 - 1 - 1 = 0) and x is affine in f:

    -grad_f lambda log(1 + exp(-x)) = lambda * sigmoid(-x) * grad x,    grad x = 2 (2 c_w - c_l - f_ref)

Its strength sigmoid(-x) is 1/2 where f is as good as f_ref (dashed line, x = 0) and dies down beyond.

Lower row. Left: strength of the wind along a descent, with and without refreshes. Middle: how much better than f_ref
must f be until the wind dies? Summed over the 16 x 128 or 16 x 2048 elements of image tokens, the slightest bit: l is a
switch that only says "do not fall behind f_ref". Averaged, it blows all the way, as if tokens had one element. Right:
where that takes f. Setting the whole gradient to zero,

    f - c_w = lambda * sigmoid(-x) * (2 c_w - c_l - f_ref)        (a sum; of a mean the same)

so f comes to rest *beyond* the winner, the farther the larger lambda, unless x is large there. This is why the presets
sum, and why lambda needs to be chosen anew for every choice of norm.

Why refresh at all? A refresh, f_ref <- f, puts the dashed line back under f: the wind blows again, and in this picture
it carries f farther beyond c_w than without. With one sample that is all harm: L_base alone would have arrived. It is
wanted where L_base does not arrive: an aligner serves many samples at once, its error stays, and with an old f_ref the
wind has long died on most of them. The refresh keeps asking "better than you were" while there is something to gain.
SPIN's push, 2 (c_w - f_ref), fades as f_ref nears c_w; DPO's, 2 (c_w - c_l), never does, and what remains of the
overshoot is its doing.
"""

# %% Options
from common import Options, begin, save, step

options = begin(Options, __doc__)

from collections.abc import Callable
from dataclasses import dataclass

import torch
from figures import preference_objective
from torch import Tensor

from img_minimal.preference import ReferenceRefresh, preference_loss, squared_distance
from img_minimal.optimizer import warmup_constant_decay

steps, grid, n = (40, 12, 10) if options.quick else (400, 60, 300)
# One sample (B 1, N 1, D 2). c_w and c_l differ by 0.5 in the mean square, as image tokens of two pictures may.
# f starts off their line: an aligner serves many samples, and rarely answers exactly c_l.
WINNER, LOSER, START = (torch.tensor([[point]], dtype=torch.float64) for point in ([1, 0], [0, 0], [0.25, 0.75]))


def margin(f: Tensor, reference: Tensor, winner: Tensor, loser: Tensor, norm: str) -> Tensor:
    """x of each sample (B,): the loss function's metric is a mean over samples, so they come one by one."""
    samples = zip(*(point.split(1) for point in (f, reference, winner, loser)))
    return torch.stack([preference_loss(*sample, norm=norm)[1]["margin"] for sample in samples])


# %% 1. x is affine in f. Second differences (q(f + d) - 2 q(f) + q(f - d)) / (2 |d|^2) give the factor of the square in
# each of its terms: -2, +1, +1, and of all together 0.
points = torch.randn(5, n, 16, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(options.seed))
f, d, reference, winner, loser = points
terms: dict[str, Callable[[Tensor], Tensor]] = {
    "-2 ||c_w - f||^2": lambda f: -2 * squared_distance(winner, f, "sum"),
    "+  ||c_l - f||^2": lambda f: squared_distance(loser, f, "sum"),
    "+  ||f_ref - f||^2": lambda f: squared_distance(reference, f, "sum"),
    "x, all of it": lambda f: margin(f, reference, winner, loser, "sum"),
}
print(f"second differences / 2 |d|^2, {n} random points f and steps d of 16 x 128, float64, seed {options.seed}:")
with step("second differences"):
    for name, term in terms.items():
        second = (term(f + d) - 2 * term(f) + term(f - d)) / (2 * d.square().flatten(1).sum(1))
        print(f"  {name:19s} mean {second.mean().item():+.6f}, largest {second.abs().max().item():.1e}")

# %% 2. The gradient as a field over the plane, for L_base, with DPO, with both


def downhill(f: Tensor, reference: Tensor, winner: Tensor, loser: Tensor, **objective) -> tuple[Tensor, dict]:
    """-grad L at every f of (B, N, D), each a sample of its own, and the loss function's metrics."""
    f = f.detach().requires_grad_()
    others = (point.expand_as(f) for point in (reference, winner, loser))
    loss, metrics = preference_loss(f, *others, **objective)
    (gradient,) = torch.autograd.grad(loss * len(f), f)  # the loss averages over samples
    return -gradient, metrics


OBJECTIVES = {
    "L_base": dict(dpo=False, spin=False),
    "L_base + DPO": dict(dpo=True, spin=False),
    "L_base + DPO + SPIN": dict(dpo=True, spin=True),
}


def field(points: Tensor, reference: Tensor, **objective) -> tuple[Tensor, Tensor]:
    """-grad L at points (B, 1, 2), and the share of it that is the preference terms'."""
    total = downhill(points, reference, WINNER, LOSER, norm="sum", **objective)[0]
    return total, total - downhill(points, reference, WINNER, LOSER, norm="sum", **OBJECTIVES["L_base"])[0]


# %% 3. Gradient descent, with and without refreshes


@dataclass
class Descent:
    """Where f went (steps + 1, 2), the wind's sigmoid(-x) on the way (steps,), and f_ref with the step it was set."""

    path: Tensor
    strength: Tensor
    references: list[tuple[int, Tensor]]


def descend(k: int, rate: float, copies: int = 1, norm: str = "sum", **more) -> Descent:
    """Gradient descent on f with refreshes after `k` wins in a row (0: never), the rate decaying as in training.

    `copies` repeats the points to D = 2 * copies elements. A mean's gradient is multiplied by D, so that L_base alone
    goes the same way whatever D and `norm` are.
    """
    f, reference, winner, loser = (point.repeat(1, 1, copies) for point in (START, START, WINNER, LOSER))
    rule, factor = ReferenceRefresh(k or steps + 1), warmup_constant_decay(steps, warmup=1, hold=0.4, floor=0.02)
    path, strength, references = [f], [], [(0, START[0, 0])]
    for number in range(steps):
        direction, metrics = downhill(f, reference, winner, loser, norm=norm, **more)
        f = f + rate * factor(number) * direction * (f.numel() if norm == "mean" else 1)
        path.append(f)
        strength.append(torch.sigmoid(-metrics["margin"]))
        if rule.update(metrics["error"].item(), metrics["reference_error"].item()):
            reference = f
            references.append((number + 1, f[0, 0, :2]))
    return Descent(torch.cat(path)[:, 0, :2], torch.stack(strength), references)


with step("descents"):
    refreshed, never = descend(10, rate=0.02), descend(0, rate=0.02)
    ends = {name: descend(0, rate=0.05, **parts).path[-1] for name, parts in OBJECTIVES.items()}
for name, run in (("never refreshed", never), (f"{len(refreshed.references) - 1} refreshes", refreshed)):
    print(f"{name:16} f ends {run.path[-1][0] - 1:+.2f} beyond c_w; strength of the wind there {run.strength[-1]:.2f}")

# %% 4. Sum or mean: sigmoid(-x) on the way from f_ref = c_l to c_w
way = torch.cat([torch.zeros(1), torch.logspace(-5, 0, 6 * grid)]).double()
winds = {}
print("on the way from f_ref = c_l to c_w, x grows in proportion, from 0:")
for name, copies, norm in (
    ("sum of 16 x 2048", 16 * 1024, "sum"), ("sum of 16 x 128", 16 * 64, "sum"), ("sum of 2", 1, "sum"),
    ("mean of any number", 16 * 64, "mean"),
):  # fmt: skip
    with step("winds"):
        winner, loser = (point.repeat(len(way), 1, copies) for point in (WINNER, LOSER))
        x = margin(loser + way[:, None, None] * (winner - loser), loser, winner, loser, norm)
    winds[name] = torch.sigmoid(-x)
    below = (winds[name] < 0.01).nonzero()
    dies = f"below 0.01 after {way[below[0]].item():.2%} of the way" if len(below) else "never below 0.01"
    print(f"  {name:19s} x at c_w {x[-1].item():8.1f}, sigmoid(-x) there {winds[name][-1].item():.2f}, {dies}")

# %% 5. Where f comes to rest, by lambda and norm
LAMBDAS = (0, 0.5, 1, 2, 8)
resting = {}
print(f"end of f after {steps} steps, in |c_w - c_l| beyond c_w (the farthest it was; squared error, c_l's is 1):")
print(f"  {'lambda':27s}" + "".join(f"{weight:^23}" for weight in LAMBDAS))
for name, settings in (
    ("mean, refreshed", dict(norm="mean", k=10)), ("mean, never refreshed", dict(norm="mean", k=0)),
    ("sum of 2, refreshed", dict(norm="sum", k=10)),
    ("sum of 16 x 128, refreshed", dict(norm="sum", copies=16 * 64, k=10)),
):  # fmt: skip
    with step("descents"):
        runs = [descend(rate=0.05, weight=weight, **settings) for weight in LAMBDAS]
    last = torch.stack([run.path[-1] for run in runs])
    resting[name] = (last[:, 0] - 1).round(decimals=3) + 0.0
    farthest = [max(0.0, run.path[:, 0].max().item() - 1) for run in runs]
    errors = (last - WINNER[0, 0]).square().sum(1)
    cells = (f" {b:+.2f} ({far:+.2f}; {e:.3f}) " for b, far, e in zip(resting[name], farthest, errors))
    print(f"  {name:27s}" + "".join(cells))

# %% 6. The picture
with step("picture"):
    fields = [(name, START, ends[name], parts) for name, parts in OBJECTIVES.items()]
    latest = refreshed.references[-1][1].view(1, 1, 2)
    fields.append((f"... after {len(refreshed.references) - 1} refreshes", latest, refreshed.path[-1], {}))
    figure = preference_objective.draw(
        fields, field, grid, (WINNER, LOSER), refreshed, never, way, winds, LAMBDAS, resting
    )
save(
    figure, options, "05_preference_objective",
    f"One sample of 2 elements; fields with the sum of 2 and lambda 1; {steps} steps of gradient descent; nothing "
    "drawn is random. Repeating the two elements gives 16 x 128 and 16 x 2048.",
)  # fmt: skip
