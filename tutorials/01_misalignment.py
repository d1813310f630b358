# %% [markdown]
"""What does a base model get wrong, and how much of it would a new seed have fixed?

The base model draws every prompt from four seeds, and the exact oracle
(img_minimal/tiny/oracle.py) judges each image. Shown: the share that is right, by category and for
prompts with a colour-shape pair that no training data held; the first failures in the oracle's
words. Printed, too: what a new seed changes.

IMG draws an image twice. So the first thing it has to beat is what anybody can do with a second
drawing: take another seed. With r_s in {0, 1} for "the image of seed s is right" and means over
prompts,

    one seed      E[r_0]                        a new seed: E[r_1], in expectation the same
    best of m     E[max(r_0, ..., r_(m-1))]     needs a judge who picks: here the oracle
    fixed         E[r_1 | r_0 = 0]              what a new seed does to the wrong images
    broken        E[1 - r_1 | r_0 = 1]          and to the right ones

A method that is tried on failures alone is credited with E[r_1 | r_0 = 0], although it may know
nothing: part of what looks like repair is luck that returns to the mean. Both directions have to be
counted, on all prompts, as img_minimal/evaluate/arms.py does. Look at where luck does not help: a
category in which even the best of four is low.
"""

# %% Options
from common import bars, begin, option, picture, save, sheet, step

help_text = "how many prompts of the test split"
options, preset = begin(__doc__, oracle=True, prompts=option(400, help_text, least=20, quick=20))

import numpy as np

from img_minimal.evaluate.arms import NEW_SEED, Arms
from img_minimal.evaluate.intervals import mean_interval, said
from img_minimal.pipeline import IMG
from img_minimal.plots import GREEN, ORANGE, PINK
from img_minimal.tiny.grammar import benchmark

SEEDS = 4  # images of every prompt

# %% 1. The base draws every prompt from four seeds: the evaluation's own two, then further ones
prompts = benchmark(options.prompts, "test", options.seed)
with step("load"):
    img = IMG(preset=preset)
with step("draw and judge"):
    arms = Arms(img, prompts, options.seed)
    for k in range(1, SEEDS):
        arms.draw(f"seed {k + 1} of {SEEDS}", offset=k * NEW_SEED)

# %% 2. The oracle says which are right in everything (strict): r_s for every seed and prompt
right = np.array(list(arms.marks("strict").values()), bool)  # (SEEDS, prompts)
captions = np.array(arms.captions)

# %% 3. By category: one seed, a new seed, best of two, best of four. The bootstrap draws captions,
# because images of one caption are not independent.
held_out = np.array([prompt.held_out for prompt in prompts])
groups = {}
for name, here in arms.categories().items():
    groups[name] = ~held_out & here
groups["all of these"] = ~held_out
groups["held-out pair"] = held_out
one_seed = {}
more_seeds = {"a new seed": [], "best of two*": [], "of four*": []}
print("share of images that are right in everything (strict), 95 % intervals over captions,")
print(f"{f'seed {options.seed}':15}   n   one seed              new seed  best of two  of four")
for group, here in groups.items():
    r = right[:, here]
    count = here.sum()
    one = mean_interval(r[0], captions[here])
    new = r[1].mean()
    two = r[:2].any(0).mean()
    four = r.any(0).mean()
    print(f"{group:15} {count:3d}   {said(one)}   {new:.3f}     {two:.3f}        {four:.3f}")
    one_seed[f"{group} (n {count})"] = one
    for shares, share in zip(more_seeds.values(), (new, two, four)):
        shares.append(share)

# %% 4. What a new seed fixes of the wrong images, and breaks of the right ones
first, second = right[:2]
for before, here, after, changed in (
    ("wrong", ~first, "right", second),
    ("right", first, "wrong", ~second),
):
    if here.any():
        share = said(mean_interval(changed[here], captions[here]), ".0%")
        counts = f"{sum(changed[here])} of {sum(here)}"
        print(f"a new seed makes {counts} {before} images {after}: {share}")
change = said(mean_interval(1.0 * second - first, captions), "+.3f")
print(f"over all prompts it changes the share by {change}: that, not what it fixes, is its worth")

# %% 5. The picture: shares, and the first failures of every group, not chosen
figure, ([shares], *rows) = sheet(12, (4, [1]), (3.4, [1] * 6), (3.4, [1] * 6))
bars(shares, one_seed, lying=True, label="one seed, 95 % interval")
looks = (PINK, "X"), (ORANGE, "D"), (GREEN, "*")
for (label, values), (colour, mark) in zip(more_seeds.items(), looks):
    at = range(len(values))
    shares.plot(values, at, mark, color=colour, ms=10, mec="black", label=label)
shares.set_xlabel("share of prompts whose image is right in everything")
shares.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)

del groups["all of these"]
axes = iter(np.concatenate(rows))
for group, here in groups.items():
    for k in np.flatnonzero(here & ~first)[:2]:
        words = arms.verdicts["base"][k].words
        picture(next(axes), arms.pictures[k], group, f'"{captions[k]}"\noracle: {words}')
caption = (
    f"{len(prompts)} prompts of the test split, {SEEDS} seeds each; failures (category, prompt, "
    "what is to be changed) are the first of every kind, not chosen. * as picked by the oracle, "
    "which no user has. Held-out pairs, e.g. a blue triangle, are in no training data of any part."
)
save(figure, options, "01_misalignment", caption)
