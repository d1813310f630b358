# %% [markdown]
"""What do the two preference terms do to a plain regression, and when does that pay?

The objective of img_minimal/preference.py, first on one sample of two elements, so that f(c) is a
point in the plane and the gradient an arrow; then on the twin; then on toy worlds.

    L_base = ||c_w - f||^2                                                                  Eq. 4
    D(a)   = ||a - f||^2 - ||a - f_ref||^2
    x      = -[ (D(c_w) - D(c_l)) + (D(c_w) - ||f_ref - f||^2) ]                Eqs. 5-7, 15-17
                   DPO                  SPIN
    L      = L_base + lambda * log(1 + exp(-x))

**Two pushes.** DPO's is away from the loser c_l: "be nearer to the winner than to the loser".
SPIN's is away from f_ref, the aligner's own earlier answer: "be better than you were". L_base alone
is a funnel into the winner c_w (upper row). The terms add a *uniform* wind, because f squared
cancels in x (2 - 1 - 1 = 0):

    -grad_f lambda log(1 + exp(-x)) = lambda sigmoid(-x) 2 (2 c_w - c_l - f_ref)

Its strength sigmoid(-x) is 1/2 where f is as good as f_ref (dashed, x = 0) and dies down beyond. A
refresh, f_ref <- f, puts the dashed line back under f.

**Where f comes to rest.** Let f_ref follow f, so that x = 0 and sigmoid(-x) = 1/2. Then funnel and
wind balance where

    2 (f - c_w) = lambda (2 c_w - c_l - f)
    f = c_w + lambda / (2 + lambda) (c_w - c_l)         = (2 c_w - c_l / 2) / 1.5 at lambda 1

DPO alone: f = c_w + lambda / 2 (c_w - c_l). SPIN alone: f = c_w. So the terms make the step
*longer* than the winner's: 3/2 and, with SPIN, 4/3 of it at lambda 1 (lower left). With the rule of
Eqs. 18, 19, f_ref stays behind. After real training the twin's steps are 1.33 times (DPO) and 1.16
times (DPO and SPIN) as long as those of L_base.

**When that pays.** The loss cannot know whether a longer step is a better one. Let c* be the ideal
tokens. The error of s times the step of L_base's aligner is a parabola in s, with its vertex at

    b* = <c* - c_l, f - c_l> / ||f - c_l||^2

so a step of s times the length is nearer than one of length 1 if b* > (1 + s) / 2: above 1.165 for
DPO's length, above 1.08 for that of both. b* is known before any preference term is trained. What
counts is what arrives in the image: with the tokens c' of the image that is drawn again,

    b* as drawn = <c* - c_l, f - c_l> / <c' - c_l, f - c_l>

A regression onto *exact* winners has b* near 1: it goes all the way it can know. On the twin, whose
injection was tuned, that holds as drawn, too, and a longer step is too long (lower middle).
If the injection is weak and constant, as in the paper, only a part of the step arrives, and b* is
far above the borders: then the terms pay by length alone, as a larger scale would.

**Toy worlds** (lower right) try the same number where pairs differ. A sample has mistakes and a
layout; h sees the mistakes through noise; an image is right if less than half of every mistake is
left. The terms pay where winners are only better than losers (half-way, or one mistake gone), where
labels are noisy, and where the injection is weak. They do not pay where winners are exact, nor,
against a guess of ours, where training was short: a regression that knows little takes short steps
on purpose, and b* stays 1. A *learned* judge is another matter: a linear scorer fitted to the pairs
likes the longer step in every world, whatever the oracle says.

The paper's pairs are two images of one prompt, of which people like one better. Such winners are
better and not exact, and two pictures differ in everything: averaged over pairs, places cancel, and
what remains is a direction that more of is better. That, a scale of .2 and a learned judge all
raise b*. The twin has exact winners, a tuned scale and an oracle.
"""

# %% Options
from common import begin, option, save, sheet, step

options, preset = begin(
    __doc__,
    oracle=True,
    prompts=option(128, "validation prompts that the twin draws", least=5, quick=12),
)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from img_minimal.evaluate.arms import Arms, print_lengths
from img_minimal.pipeline import IMG
from img_minimal.plots import BLUE, GREEN, GREY, ORANGE, PINK
from img_minimal.preference import ReferenceRefresh, best_length, preference_loss
from img_minimal.tiny.grammar import benchmark

grid, toy_steps = (12, 20) if options.quick else (60, 300)
# One sample (B 1, N 1, D 2). f starts off the line: an aligner serves many samples.
WINNER = torch.tensor([[[1, 0]]], dtype=torch.float64)
LOSER = torch.tensor([[[0, 0]]], dtype=torch.float64)
START = torch.tensor([[[0.25, 0.75]]], dtype=torch.float64)
OBJECTIVES = {
    "L_base": {"dpo": False, "spin": False},
    "L_base + DPO": {"dpo": True, "spin": False},
    "L_base + DPO + SPIN": {"dpo": True, "spin": True},
}
LENGTHS = {"L_base": 1.0, "L_base + DPO + SPIN": 1.16, "L_base + DPO": 1.33}  # after real training


# %% 1. The gradient over the plane, and where it comes to rest
def downhill(f: Tensor, **terms: bool) -> Tensor:
    """Compute -grad L at every f (B, 1, 2), each a sample of its own."""
    f = f.detach().requires_grad_()
    points = [point.expand_as(f) for point in (START, WINNER, LOSER)]
    loss, _ = preference_loss(f, *points, norm="sum", **terms)
    (gradient,) = torch.autograd.grad(loss * len(f), f)  # the loss averages over samples
    return -gradient


LAMBDAS = np.linspace(0, 4, 50)
DERIVED = {"L_base + DPO": lambda w: 1 + w / 2, "L_base + DPO + SPIN": lambda w: 1 + w / (2 + w)}
for title, derived in DERIVED.items():
    print(f"{title}, λ 1: a step of {derived(1):.2f} lengths, {LENGTHS[title]} after training")

# %% 2. b* of the shipped aligner, for the twin's wrong images, as tokens and as drawn
img = IMG(preset=preset)
INJECTIONS = {"as tuned": {}, "weak, constant": {"scale": 0.3, "scale_end": 1.0}}
prompts = benchmark(options.prompts, "validation", options.seed)
with step("draw"):
    arms = Arms(img, prompts, options.seed)
    tokens = img.align(arms.base, arms.captions, arms.seeds)
    twin = {"tokens": arms.best_lengths(tokens)}
    for name, scales in INJECTIONS.items():
        with img.drawing(**scales):
            twin[name] = arms.best_lengths(tokens, arms.draw(name, tokens))
print(
    f"b* of {preset.name}, {options.prompts} validation prompts; a length s pays above (1 + s)/2:"
)
for name, lengths in twin.items():
    print_lengths(name, lengths)

# %% 3. Toy worlds: b* is measured with λ 0, and says what the terms will do
MISTAKES, LAYOUT, LEFT = 6, 10, 0.5
WORLDS = {
    "exact winners": {},
    "weak injection": {"arrives": 0.5},
    "winners half-way": {"gone": 0.5},
    "one mistake gone": {"gone": "one"},
    "a fifth of labels flipped": {"flipped": 0.2},
    "short training": {"steps": toy_steps // 10},
}


def samples(n: int, gone: float | str = 1.0, flipped: float = 0.0) -> tuple[Tensor, ...]:
    """Draw h (n, MISTAKES), and c_l, c_w and c* (n, 1, D), each mistakes before layout."""
    mistakes = (torch.rand(n, MISTAKES) < 0.35).float()
    h = mistakes + 0.3 * torch.randn(n, MISTAKES)
    share = gone
    if gone == "one":
        share = F.one_hot((torch.rand(n, MISTAKES) * mistakes).argmax(1), MISTAKES)
    c_l = torch.cat([mistakes, torch.randn(n, LAYOUT)], 1)
    c_w, ideal = c_l - F.pad(share * mistakes, (0, LAYOUT)), c_l - F.pad(mistakes, (0, LAYOUT))
    flip = (torch.rand(n) < flipped)[:, None]
    c_l, c_w = torch.where(flip, c_w, c_l), torch.where(flip, c_l, c_w)
    return h, c_l[:, None], c_w[:, None], ideal[:, None]


def fit(objective: str, steps: int = toy_steps, **world) -> nn.Module:
    """Train f(h, c) = c + network(h) with refreshes, and return the network."""
    torch.manual_seed(options.seed)
    network, earlier = [
        nn.Sequential(nn.Linear(MISTAKES, 64), nn.GELU(), nn.Linear(64, MISTAKES + LAYOUT))
        for _ in range(2)
    ]
    for values in network[2].parameters():
        nn.init.zeros_(values)  # as the aligner, it starts at the identity
    earlier.load_state_dict(network.state_dict())
    rule, optimizer = ReferenceRefresh(10), torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(steps):
        h, c_l, c_w, _ = samples(64, **world)
        f, f_ref = c_l + network(h)[:, None], c_l + earlier(h)[:, None]
        loss, metrics = preference_loss(f, f_ref, c_w, c_l, norm="sum", **OBJECTIVES[objective])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rule.update(metrics["error"], metrics["reference_error"]):
            earlier.load_state_dict(network.state_dict())
    return network


@torch.no_grad()
def judge(network: nn.Module, arrives: float, scorer: Tensor, **world) -> tuple[float, ...]:
    """Return share right, b* as drawn, size of a step, and the learned judge's score."""
    torch.manual_seed(options.seed + 1)
    h, c_l, _, ideal = samples(4000, **world)
    f = c_l + network(h)[:, None]
    drawn = c_l + arrives * (f - c_l)
    top, bottom = best_length(f, c_l, ideal, drawn)
    left = (drawn - ideal)[:, 0, :MISTAKES].abs()
    right = (left < LEFT).all(1).float().mean()
    size, score = (f - c_l).norm(), ((drawn - c_l)[:, 0] @ scorer).mean()
    return right.item(), (top.sum() / bottom.sum()).item(), size.item(), score.item()


points = []
print(f"toy worlds, {toy_steps} steps of 64, seed {options.seed}: share right by the oracle")
print(f"{'':26} {'b*':>5} {'L_base':>7}  DPO: length, border, right (learned judge); DPO + SPIN")
for name, world in WORLDS.items():
    world = {"arrives": 1.0} | world
    arrives, length = world.pop("arrives"), world.pop("steps", toy_steps)
    with step("toy worlds"):
        _, c_l, c_w, _ = samples(4000, **world)
        scorer = (c_w - c_l)[:, 0].mean(0)  # the direction that tells winners from losers
        judged = {}
        for objective in OBJECTIVES:
            judged[objective] = judge(fit(objective, length, **world), arrives, scorer, **world)
    right, best, size, score = judged.pop("L_base")
    line = f"{name:26} {best:5.2f} {right:7.3f}"
    for objective, (other_right, _, other_size, other_score) in judged.items():
        border = (1 + other_size / size) / 2
        points.append((objective, name, best - border, other_right - right))
        line += f"  {other_size / size:5.2f}  {border:5.2f}  {other_right:.3f}"
        line += f" ({other_score / score:.2f})"
    print(line)

# %% 4. The picture: fields above; rests, parabolas of the twin and toy worlds below
figure, (upper, (left, middle, right)) = sheet(15, (4.5, [1] * 3), (4.2, [1] * 3))
X, Y = np.meshgrid(np.linspace(-0.75, 2.05, grid), np.linspace(-1.05, 1.25, grid))
plane = torch.tensor(np.stack([X, Y], -1)).view(-1, 1, 2)
plane = torch.cat([plane, START])
for axis, (name, objective) in zip(upper, OBJECTIVES.items()):
    total = downhill(plane, **objective)
    wind = total - 2 * (WINNER - plane)  # what the preference terms add
    *sizes, at_start = wind.norm(dim=-1)[:, 0]
    sizes = np.reshape(sizes, X.shape)
    across, up = total[:-1, 0].numpy().T
    axis.contourf(X, Y, sizes, levels=25, cmap="Oranges", vmin=0, vmax=7)
    axis.streamplot(X, Y, across.reshape(X.shape), up.reshape(X.shape), color=BLUE, density=0.75)
    marks = {GREEN: (WINNER, "c_w")}
    if name in DERIVED:
        axis.contour(X, Y, sizes, levels=[at_start], colors="black", linestyles="--")
        marks |= {GREY: (LOSER, "c_l"), PINK: (START, "f_ref")}
        axis.plot(DERIVED[name](1), 0, "k*", ms=13)
    for colour, (point, label) in marks.items():
        axis.plot(*point[0, 0], "o", color=colour, ms=11, mec="white")
        axis.annotate(label, point[0, 0], xytext=(5, 7), textcoords="offset points")
    axis.set(title=name, xlabel="first element of f", ylabel="second element", aspect="equal")
for (title, derived), colour in zip(DERIVED.items(), (ORANGE, PINK)):
    left.plot(LAMBDAS, derived(LAMBDAS), color=colour, label=title)
    left.plot(1, LENGTHS[title], "o", color=colour, label="the twin, after training")
left.axhline(1, color=GREEN, label="L_base")
left.set(title="Where f comes to rest", xlabel="λ", ylabel="length of the step, in steps of L_base")
s = np.linspace(0, 2, 50)
for name, colour in zip(INJECTIONS, (BLUE, GREEN)):
    if "all" in twin[name]:
        best = twin[name]["all"]["value"]
        middle.plot(s, (1 - s / best) ** 2, color=colour, label=f"{name}: b* {best:.2f}")
for name, length in LENGTHS.items():
    middle.axvline(length, color=GREY, ls=":")
    middle.text(length, 1.02, name, rotation=90, va="top", ha="right", fontsize=7)
middle.set(
    title="The twin: is a longer step a better one?",
    xlabel="length of the step, in steps of L_base's aligner",
    ylabel="error left along the step (0: none, 1: all)",
    ylim=(0, 1.05),
)
for objective, colour in zip(DERIVED, (ORANGE, PINK)):
    chosen = [point for point in points if point[0] == objective]
    right.plot([p[2] for p in chosen], [p[3] for p in chosen], "o", color=colour, label=objective)
for objective, name, x, gain in points:
    if objective == "L_base + DPO":
        right.annotate(name, (x, gain), xytext=(4, 4), textcoords="offset points", fontsize=7)
right.axhline(0, color=GREY)
right.axvline(0, color=GREY)
right.set(
    title="Toy worlds", xlabel="b* minus the border (1 + s) / 2", ylabel="gain in share right"
)
for axis in (left, middle, right):
    axis.legend()
caption = (
    "Blue: -grad L, where f goes; orange: strength of the preference terms, the wind; dashed: x = "
    "0, f as good as f_ref; star: where f rests if f_ref follows, beyond the winner. Below: the "
    f"step's length by λ; the twin's error by length, {options.prompts} validation prompts; toy "
    "worlds: the terms pay right of the line, where b* is above the border."
)
save(figure, options, "05_preference_objective", caption)
