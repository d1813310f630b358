# %% [markdown]
"""What does a base model get wrong, and how much of it would a new seed have fixed?

The base model draws every prompt from four seeds, and the exact oracle (img_minimal/tiny/oracle.py) judges each image.
Shown: the share that is right by category, and for prompts with a colour-shape pair that no training data held; what a
new seed changes; a grid of failures in the oracle's words.

IMG draws an image twice. So the first thing it has to beat is what anybody can do with a second drawing: take another
seed. With r_s in {0, 1} for "the image of seed s is right" and means over prompts,

    one seed      E[r_0]                        a new seed, whatever it brings: E[r_1], in expectation the same
    best of m     E[max(r_0, ..., r_(m-1))]     needs a judge who picks; here the oracle, which no user has
    fixed         E[r_1 | r_0 = 0]              what a new seed does to the wrong images
    broken        E[1 - r_1 | r_0 = 1]          and to the right ones

A method that is tried on failures alone is credited with E[r_1 | r_0 = 0], although it may know nothing: part of what
looks like repair is luck that returns to the mean. Both ways have to be counted, on all prompts, as
img_minimal/evaluate/arms.py does. Look at where luck does not help: a category in which even the best of four is low.
"""

# %% Options
from dataclasses import dataclass

from common import Options, begin, check, option, oracle_preset, save, step


@dataclass
class Config(Options):
    """The command line."""

    prompts: int = option(400, "how many prompts of the test split")


options = begin(Config, __doc__)
check(options.prompts >= 20, f"--prompts is {options.prompts}, expected 20 or more: one of every kind")

import numpy as np
from figures import misalignment

from img_minimal.evaluate.compare import FIRST_SEED, NEW_SEED
from img_minimal.evaluate.intervals import mean_interval
from img_minimal.load import load_backbone
from img_minimal.files import to_pil
from img_minimal.tiny.grammar import CATEGORIES, benchmark
from img_minimal.tiny.oracle import judge

SEEDS = 4  # images of every prompt
preset = oracle_preset(options)

# %% 1. The base draws every prompt from four seeds: the evaluation's own two, then further ones
prompts = benchmark(20 if options.quick else options.prompts, "test", options.seed)
captions = [str(prompt) for prompt in prompts]
with step("load"):
    backbone = load_backbone(preset)
drawn = []
with step("draw"):
    for k in range(SEEDS):
        seeds = [FIRST_SEED * (options.seed + 1) + k * NEW_SEED + i for i in range(len(prompts))]
        drawn.append(backbone.draw(captions, seeds, progress=f"seed {k + 1} of {SEEDS}"))

# %% 2. The oracle says which are right in everything (strict): r_s for every seed and prompt
with step("judge"):
    verdicts = [judge(images, prompts) for images in drawn]
right = np.array([[verdict.strict for verdict in row] for row in verdicts])  # (SEEDS, prompts)

# %% 3. By category: one seed, a new seed, best of two, best of four. Captions are the clusters of the bootstrap,
# because images of one caption are not independent.
held_out = np.array([prompt.held_out for prompt in prompts])
groups = {c: ~held_out & np.array([p.category == c for p in prompts]) for c in CATEGORIES}
groups |= {"all of these": ~held_out, "held-out pair": held_out}


def interval(values: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """The mean over some prompts, with its 95 % interval."""
    return mean_interval(values[mask], [caption for caption, chosen in zip(captions, mask) if chosen])


shares = {}
print(f"share of images that are right in everything (strict), 95 % intervals over captions, seed {options.seed}:")
print(f"{'':15}   n   one seed              new seed  best of two  of four")
for name, mask in groups.items():
    r = right[:, mask]
    shares[name] = row = {
        "n": int(mask.sum()), "one": interval(right[0], mask),
        "new": r[1].mean(), "two": r[:2].any(0).mean(), "four": r.any(0).mean(),
    }  # fmt: skip
    one = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**row["one"])
    print(f"{name:15} {row['n']:3d}   {one}   {row['new']:5.3f}     {row['two']:5.3f}        {row['four']:5.3f}")

# %% 4. What a new seed fixes of the wrong images, and breaks of the right ones
first, second = right[:2]
for before, mask, after, changed in (("wrong", ~first, "right", second), ("right", first, "wrong", ~second)):
    if mask.any():
        share = "{value:.0%} [{low:.0%}, {high:.0%}]".format(**interval(changed, mask))
        print(f"a new seed makes {(changed & mask).sum()} of {mask.sum()} {before} images {after}: {share}")
change = "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**mean_interval(1.0 * second - first, captions))
print(f"over all prompts it changes the share by {change}: that, not what it fixes, is its worth")

# %% 5. The picture: shares, the new seed, and the first failures of every group, not chosen
failures = misalignment.first_failures(groups, right[0])
figure = misalignment.draw(shares, right, to_pil(drawn[0]), captions, verdicts[0], failures)
save(figure, options, "01_misalignment",
     f"{preset.name}, {len(prompts)} prompts of the test split, {SEEDS} seeds each, --seed {options.seed}; "
     "failures are the first of every kind, not chosen.\n* as picked by the oracle, which no user has. "
     "Held-out pairs, e.g. a blue triangle, are in no training data of any part.")  # fmt: skip
