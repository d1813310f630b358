# %% [markdown]
"""# What do the two preference terms do to a plain regression, and when does that pay?

The aligner's answer f is trained on pairs of images of one prompt, in image tokens: from those of
the loser, c_l, to those of the winner, c_w. f_ref is the answer of an earlier copy of the aligner.

    L_base = ||c_w - f||^2                                                                  Eq. 4
    D(a)   = ||a - f||^2 - ||a - f_ref||^2
    x      = -[ (D(c_w) - D(c_l)) + (D(c_w) - ||f_ref - f||^2) ]                Eqs. 5-7, 15-17
                   DPO                  SPIN
    L      = L_base + lambda * log(1 + exp(-x))

**Why two terms.** DPO compares with the *data*: be nearer to the winner than to the loser, and more
so than f_ref. Once that is so by far, its loss is spent. SPIN (self-play) compares with the
aligner *itself*: be nearer to the winner than your own earlier answer. Its opponent grows: when f
has been nearer to c_w than f_ref for k = 10 iterations in a row, f is copied into f_ref (Eqs. 18,
19). An aligner starts as "change nothing", so f_ref = c_l until the first copy: until then, SPIN's
pair is DPO's pair.

Not as in the paper: it trains with lambda 1 and reports that each term adds PickScore. The twins
train with lambda 0, because of what this lesson measures. The paper does not say whether its
squared norms are sums or means; here they are sums.

In full: about a minute on two cores.
"""

# %%
from common import HERE, begin, check, option, save, sheet, step

help_text = "validation prompts that the twin draws"
options, preset = begin(__doc__, oracle=True, prompts=option(128, help_text, least=12, quick=12))

import json

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from img_minimal.evaluate.arms import Arms, print_lengths
from img_minimal.evaluate.intervals import said
from img_minimal.pipeline import IMG
from img_minimal.plots import BLUE, GREEN, GREY, ORANGE, PINK
from img_minimal.preference import ReferenceRefresh, best_length, preference_loss
from img_minimal.tiny.grammar import benchmark

OBJECTIVES = {
    "L_base": {"dpo": False, "spin": False},
    "L_base + DPO": {"dpo": True, "spin": False},
    "L_base + DPO + SPIN": {"dpo": True, "spin": True},
}
LOOKS = dict(zip(OBJECTIVES, (GREEN, ORANGE, PINK)))

# %% [markdown]
# ## 1. Two pushes, and where they come to rest
#
# One sample of two elements, so that f is a point in the plane. L_base alone is a funnel into the
# winner. The terms add a wind, *uniform* over the plane, because f squared cancels in x
# (2 - 1 - 1 = 0). It has two parts, both of the strength sigmoid(-x):
#
#     -grad_f lambda log(1 + exp(-x)) = lambda sigmoid(-x) 2 [ (c_w - c_l) + (c_w - f_ref) ]
#                                                               DPO           SPIN
#
# DPO pushes away from the loser wherever f is. SPIN pushes away from the earlier answer, and ends
# where that was the winner. Let f_ref follow f at once, so that x = 0 and sigmoid(-x) = 1/2. Then
# funnel and wind balance where 2 (f - c_w) = lambda (2 c_w - c_l - f):
#
#     DPO and SPIN    f = c_w + lambda / (2 + lambda) (c_w - c_l)      4/3 of the step at lambda 1
#     DPO alone       f = c_w + lambda / 2 (c_w - c_l)                 3/2
#     SPIN alone      f = c_w                                          1
#
# So the terms make the step from c_l *longer* than the winner's; SPIN reins DPO in. Here gradient
# descent on the library's loss finds the same points.

# %%
LOSER, WINNER, START = torch.tensor([[0, 0], [1, 0], [0.25, 0.75]], dtype=torch.float64)
paths = {}
for objective, terms in OBJECTIVES.items():
    path = [START]  # off the line from loser to winner: an aligner serves many samples
    for _ in range(400):
        f = path[-1].view(1, 1, 2).requires_grad_()
        pair = WINNER.view(1, 1, 2), LOSER.view(1, 1, 2)
        loss, _ = preference_loss(f, f, *pair, norm="sum", **terms)  # f_ref follows f
        (gradient,) = torch.autograd.grad(loss, f)
        path.append((f - 0.02 * gradient).detach().view(2))
    paths[objective] = torch.stack(path).T
    print(f"{objective}: f comes to rest at {path[-1][0]:.2f} of the way from loser to winner")

# %% [markdown]
# ## 2. How long the steps are after real training
#
# By Eqs. 18 and 19, f_ref stays behind f, so the terms push less than that. The ablations of
# [08](08_ablations.py) trained three aligners with each objective. Their logs hold the mean
# ||f - c_l||^2; its root, in units of L_base's, is the length of the step.

# %%
RUNS = dict(zip(OBJECTIVES, ("0.0-base", "1.0-dpo", "1.0-dpospin")))
results = json.loads((HERE / "08_ablations.json").read_text())
squares, shares = {}, {}
for objective, run in RUNS.items():
    seeds = [f"mllm-{run}-10-passes1-seed{seed}" for seed in range(3)]
    squares[objective] = np.mean([results["training"][seed]["correction"] for seed in seeds])
    marks = "".join(results["right"][seed]["falling scale"] for seed in seeds)
    shares[objective] = marks.count("1") / len(marks)
lengths, gains = {}, {}
for name in OBJECTIVES:
    lengths[name] = (squares[name] / squares["L_base"]) ** 0.5
    gains[name] = shares[name] - shares["L_base"]
    print(f"{name}: length {lengths[name]:.2f}, share right minus L_base's {gains[name]:+.3f}")

# %% [markdown]
# ## 3. b*: is a longer step a better one?
#
# The loss cannot know. Let c* be the ideal tokens, here those of a correct picture. The error of s
# times the step of L_base's aligner is a parabola in s, with its lowest point at
#
#     b* = <c* - c_l, f - c_l> / ||f - c_l||^2
#
# so a step of s times the length is nearer to c* than one of length 1 exactly if b* is above the
# border (1 + s) / 2. b* is known before any preference term is trained. What counts is what arrives
# in the image: with c' for the tokens of the image that is drawn again,
#
#     b* as drawn = <c* - c_l, f - c_l> / <c' - c_l, f - c_l>
#
# A regression onto *exact* winners has b* near 1: it goes all the way that it can know. On the
# twin, whose injection was tuned, that holds as drawn, too. Where the injection is weak and
# constant, as in the paper, only a part of the step arrives, and b* is far above the borders: the
# terms would pay by length alone, as a larger scale would.

# %%
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
check(twin["tokens"], "no image is wrong, so there is nothing to correct; raise --prompts")
print(f"b* of {preset.name}, {options.prompts} validation prompts")
for name, measured in twin.items():
    print_lengths(name, measured)


def longer(s, b: float):
    """Compute the error of s times the step minus that of the step, in units of c_l's."""
    return (1 - s / b) ** 2 - (1 - 1 / b) ** 2


# %% [markdown]
# ## 4. Toy worlds: b* is measured with lambda 0, and says what the terms will do
#
# A sample has mistakes and a layout; h sees the mistakes through noise; an image is right if less
# than half of every mistake is left. The terms pay where winners are only better than losers
# (half-way, or one mistake gone), where labels are noisy, and where the injection is weak. They do
# not pay where winners are exact, nor, against a guess of ours, where training was short: a
# regression that knows little takes short steps on purpose, and b* stays 1.
#
# A *learned* judge is another matter: a linear scorer fitted to the pairs likes the longer step in
# every world, whatever the oracle says. Its score is printed as a multiple of that for L_base.
#
# The paper's pairs are two images of one prompt, of which people like one better. Such winners are
# better and not exact, and two pictures differ in everything: averaged over pairs, places cancel,
# and what remains is a direction that more of is better. That, a scale of 0.2 and a learned judge
# all raise b*. The twin has exact winners, a tuned scale and an oracle.

# %%
STEPS = 20 if options.quick else 300
MISTAKES, LAYOUT, LEFT = 6, 10, 0.5
WORLDS = {
    "exact winners": {},
    "weak injection": {"arrives": 0.5},
    "winners half-way": {"gone": 0.5},
    "one mistake gone": {"gone": "one"},
    "a fifth of labels flipped": {"flipped": 0.2},
    "short training": {"steps": STEPS // 10},
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


def fit(objective: str, steps: int = STEPS, **world) -> nn.Module:
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


points = {"L_base + DPO": [], "L_base + DPO + SPIN": []}
print(f"toy worlds, {STEPS} steps of 64")
for name, world in WORLDS.items():
    arrives, length = world.pop("arrives", 1.0), world.pop("steps", STEPS)
    with step("toy worlds"):
        _, c_l, c_w, _ = samples(4000, **world)
        scorer = (c_w - c_l)[:, 0].mean(0)  # the direction that tells winners from losers
        judged = {}
        for objective in OBJECTIVES:
            judged[objective] = judge(fit(objective, length, **world), arrives, scorer, **world)
    right, best, size, score = judged["L_base"]
    print(f"{name}: b* {best:.2f}, L_base right {right:.3f}")
    for objective, worlds in points.items():
        other_right, _, other_size, other_score = judged[objective]
        s = other_size / size
        border = (1 + s) / 2
        worlds.append((name, best - border, other_right - right))
        numbers = s, border, other_right, other_score / score
        print(
            "  {}: length {:.2f}, border {:.2f}, right {:.3f}, judge {:.2f}".format(
                objective, *numbers
            )
        )

# %% [markdown]
# ## 5. The picture: the pushes, the lengths, b*, and when the terms pay
#
# It goes on with a real training and its curves: [06, training](06_training.py).

# %%
figure, ((plane, error), [pays]) = sheet(9, (3.8, [1, 1]), (3, [1]))
for point, name in ((LOSER, "c_l"), (WINNER, "c_w"), (START, "f at first")):
    plane.plot(*point, "o", color=GREY)
    plane.annotate(name, point, (-6, 7), textcoords="offset points", ha="right")
for objective, path in paths.items():
    plane.plot(*path, color=LOOKS[objective], label=objective)
    plane.plot(*path[:, -1], "*", color=LOOKS[objective], ms=15, mec="black")
origin = torch.tensor([0.8, 0.95])
for push, name in ((WINNER - LOSER, "DPO"), (WINNER - START, "SPIN")):
    look = {"arrowstyle": "<-", "lw": 2}
    plane.annotate(f"{name}'s push", origin, origin + 0.4 * push, va="center", arrowprops=look)
plane.legend(loc="lower right")
plane.set(
    title="Two pushes, and where f comes to rest (stars)",
    xlabel="first element",
    ylabel="second element",
    aspect="equal",
    xlim=(-0.4, 1.9),
    ylim=(-0.75, 1.15),
)

s = np.linspace(0.6, 1.6, 50)
for name, style in zip(INJECTIONS, ("-", "--")):
    best = twin[name]["all"]["value"]
    label = f"injection {name}: b* {best:.2f}"
    error.plot(s, longer(s, best), style, color=BLUE, label=label)
    for objective, length in lengths.items():
        error.plot(length, longer(length, best), "o", color=LOOKS[objective], ms=9)
best = twin["as tuned"]["all"]["value"]
error.axvline(best, color=BLUE, ls=":")
error.text(best, 0.17, " b*", color=BLUE)
error.axhspan(-0.2, 0, color=GREEN, alpha=0.1)
error.legend(loc="lower left")
error.set(
    title="The twin: below 0 a longer step pays",
    xlabel="length s of the step, in steps of L_base",
    ylabel="its error minus that of s = 1",
    ylim=(-0.2, 0.2),
)

for objective, worlds in points.items():
    look = {"color": LOOKS[objective], "ms": 8}
    for name, ahead, gain in worlds:
        pays.plot(ahead, gain, "o", **look)
        if objective == "L_base + DPO":
            pays.annotate(name, (ahead, gain), (7, 3), textcoords="offset points", fontsize=8)
    pays.plot(best - (1 + lengths[objective]) / 2, gains[objective], "D", mec="black", **look)
pays.axhline(0, color=GREY)
pays.axvline(0, color=GREY)
pays.set(
    title="When the terms pay: toy worlds, and the twin (diamonds)",
    xlabel="b* minus the border (1 + s) / 2",
    ylabel="gain in share right",
)
caption = (
    "left: f_ref follows f; right: the twin's wrong images of "
    f"{options.prompts} validation prompts, dots: the lengths of the three objectives; below: "
    "right of the line b* is above the border; the twin's gains are those of the ablations (08)"
)
said_best, both = said(twin["as tuned"]["all"], ".2f"), "L_base + DPO + SPIN"
conclusion = (
    f"The two terms make the twin's step {lengths[both]:.2f} times as long, which pays for b* "
    f"above {(1 + lengths[both]) / 2:.2f}; its b* is {said_best}, and they change the share that "
    f"is right by {gains[both]:+.3f}."
)
save(figure, options, "05_preference_objective", caption, conclusion)
