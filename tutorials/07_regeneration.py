# %% [markdown]
"""# What happens between the first image and the second, and how often, how strongly and how many times should it?

With G the base model, T the prompt, z the start noise, q a question about T, f the aligner
([04](04_implicit_aligner.py)), s the scale of the image tokens ([03](03_image_prompt.py)):

    x_0 = G(T, z)                                 1  initial image
    h = MLLM(x_0, q),  c_0 = Resampler(CLIP(x_0)) 2  what is seen to be wrong; what the image is
    c_k = f(h, c_(k-1))                           3  k passes of the aligner, with the same h
    x_1 = G(T, z; c_k, s)                         4  the same prompt and noise, and the tokens

Steps 1 to 4 come first, then one image on its way, then other settings of steps 3 and 4, one at a
time, and last what cheaper ways to the second image cost.

Not as in the paper: it makes three passes at a constant scale of 0.2; the twin makes one, and its
scale falls from 1.6 to 0.08, which validation prompts chose. The paper shows rounds in pictures,
and has no numbers for rounds, passes or scale.

In full: about five minutes on two cores. What the steps cost at SDXL's and FLUX's size is measured by
`python -m img_minimal.bench.true_size`, on a GPU.
"""

# %%
from common import begin, curve, option, picture, save, sheet, step

help_text = "how many prompts of the test split"
prompts_option = option(100, help_text, least=20, quick=10)
options, preset = begin(__doc__, oracle=True, prompts=prompts_option)

import numpy as np

from img_minimal.evaluate.arms import Arms
from img_minimal.evaluate.budget import Budget
from img_minimal.evaluate.intervals import paired_shares, said
from img_minimal.files import to_pil
from img_minimal.pipeline import IMG
from img_minimal.plots import BLUE, GREEN, GREY, ORANGE, PINK
from img_minimal.tiny.grammar import benchmark

quick = options.quick
sampling = preset.sampling
prompts = benchmark(options.prompts, "test", options.seed)
with step("load"):
    img = IMG(preset=preset)

# %% [markdown]
# ## 1. x_0 = G(T, z): the initial images
#
# `Arms` draws the same prompts from the same seeds again and again, and the oracle judges.

# %%
with step("draw"):
    arms = Arms(img, prompts, options.seed)
captions, seeds, initial = arms.captions, arms.seeds, arms.base
count = len(captions)

# %% [markdown]
# ## 2. h = MLLM(x_0, q) and c_0 = Resampler(CLIP(x_0))
#
# An image's seed draws the phrasing of the question q. Both h and c_0 are frozen: computed once,
# they serve every number of passes and every scale.

# %%
with step("look"):
    h, mask = img.guidance(arms.pictures, captions, seeds, progress="look")
    c_0 = img.backbone.tokens(arms.pictures)

# %% [markdown]
# ## 3. c_k = f(h, c_(k-1)): each pass goes on from the one before

# %%
c = [c_0]
with step("align"):
    for _ in range(3 if quick else 5):
        c.append(img.correct(c[-1], h, mask, passes=1))
corrected = c[img.passes]

# %% [markdown]
# ## 4. x_1 = G(T, z; c_k, s)
#
# In every cross-attention, text attention + s * image attention; s goes linearly over the steps
# from `scale` to the share `scale_end` of it.

# %%
with step("draw again"):
    second = arms.draw("second", corrected)

# %% [markdown]
# ## 5. One image on its way: the first that the oracle finds wrong

# %%
walk = np.argmin(arms.marks("strict")["base"])
with step("put in words"):
    [answer] = img.explain([arms.pictures[walk]], [captions[walk]], [seeds[walk]])
moved = (c[1][walk] - c_0[walk]).norm() / c_0[walk].norm()
differ = (second[walk] - initial[walk]).abs().mean()
print(f"""\
"{captions[walk]}", seed {seeds[walk]}
  1  initial image x_0          {tuple(initial.shape[1:])}, {arms.verdicts["base"][walk].words}
  2  MLLM: {answer}
     guidance features h        {tuple(h.shape[1:])}; tokens c_0 {tuple(c_0.shape[1:])}
  3  aligned tokens c_1 = f(h, c_0): ||c_1 - c_0|| / ||c_0|| = {moved:.2f}
  4  second image x_1, whose pixels differ by {differ:.3f} of their range""")

# %% [markdown]
# ## 6. Other settings, one at a time, from the same h and c_0
#
# - `passes`: k, the applications of the aligner.
# - `length`: the tokens are c_0 + a (c_k - c_0), a correction of a times the length. It says what
#   the push of the preference terms could be worth: they carry f beyond the winner
#   ([05](05_preference_objective.py)), and that is a longer correction.
# - `scale`, `scale_end`: s at the first step, and the share of it that is left at the last.
# - `rounds`: x_r from x_(r-1) as x_1 from x_0, with h and c_0 of the latest image.
#
# What a setting fixes and what it breaks are counted against the initial images. Look at both: one
# that fixes more often breaks more, too, and its worth is the difference.

# %%
SETTINGS = {
    "passes": range(1, len(c)),
    "length": (0.5, 1, 1.5, 2),
    "scale": [sampling.scale * factor for factor in (0.5, 1, 1.5, 2)],
    "scale_end": sorted({sampling.scale_end, 0.25, 0.5, 1}),
    "rounds": range(1, 3 if quick else 5),
}
images = {"base": initial}
for kind, values in SETTINGS.items():
    for value in values:
        name, tokens, changes = f"{kind} {value:g}", corrected, {}
        if kind == "passes":
            tokens = c[value]
        elif kind == "length":
            tokens = c_0 + value * (corrected - c_0)
        elif kind != "rounds":
            changes = {kind: value}
        elif value > 1:
            later = [seed + value - 1 for seed in seeds]
            tokens = img.align(images[f"rounds {value - 1}"], captions, later)
        with step("other settings"), img.drawing(**changes):
            images[name] = arms.draw(name, tokens)

table, strict = {}, arms.marks("strict")
for name in images:
    row = table[name] = paired_shares(strict[name], strict["base"], captions)
    change = f"{said(row['difference'], '+.3f')}, {row['fixed']} fixed, {row['broken']} broken"
    print(f"{name:14} {said(row['share'])}, minus base {change}")

# %% [markdown]
# ## 7. The budget: what a second image costs
#
# IMG takes two drawings an image. *Drafts*, first images of fewer steps that only the MLLM sees,
# one look that serves several seeds, and correcting only what the MLLM finds wrong take less. The
# base model could spend the same on more seeds, of which the MLLM picks one.

# %%
budget = {}
with step("budget"):
    for name, row in Budget(img, prompts[: 1 if quick else None], options.seed).rows():
        budget[name] = row["drawings"], row["share"]["value"]
        print(f"{name:48} {row['drawings']:.2f} drawings, right {said(row['share'])}")

# %% [markdown]
# ## 8. The picture
#
# It goes on with which part of the method earns its place: [08, ablations](08_ablations.py). More
# prompts, and what to choose: [Results](results.md#what-an-image-costs).

# %%
own = f"passes {img.passes}"
rules = {walk: "the first that the base draws wrong"}
for k in np.flatnonzero(strict["base"] > strict[own])[:1]:
    rules[k] = "the first right one that IMG breaks"
figure, (*rows, charts, [points]) = sheet(
    9.5, *[(1.75, [1] * 7)] * len(rules), (2.9, [1] * 5), (3.4, [1])
)
scales = f"scale {sampling.scale / 2:g}", f"scale {sampling.scale * 2:g}"
columns = ("base", "passes 1", "passes 3", *scales, "scale_end 1", "rounds 2")
for row, (k, rule) in zip(rows, rules.items()):
    row[0].figure.suptitle(f'"{captions[k]}", seed {seeds[k]}, {rule}', fontsize=9)
    for axis, name in zip(row, columns):
        mark = "right" if strict[name][k] else "wrong"
        picture(axis, to_pil(images[name][k : k + 1])[0], name, mark)

for axis, (kind, values) in zip(charts, SETTINGS.items()):
    names = [f"{value:g}" for value in values]
    worth = [table[f"{kind} {name}"] for name in names]
    axis.sharey(charts[0])
    axis.bar(names, [row["fixed"] / count for row in worth], color=GREEN, label="fixed")
    axis.bar(names, [-row["broken"] / count for row in worth], color=ORANGE, label="broken")
    difference = [row["difference"] for row in worth]
    curve(axis, names, difference, fmt="o", color="black", label="difference")
    axis.set_title(kind)
charts[0].set_ylabel("share of all images")
charts[2].legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.08), frameon=False)

others = set(budget)
ways = "one look for four", "drafts", "only what is wrong", "IMG", "base model, best of 2, of 4"
for way, colour in zip(ways, (PINK, ORANGE, GREEN, BLUE, GREY)):
    names = {name for name in others if way in name} or others
    others = others - names
    points.plot(*zip(*sorted(budget[name] for name in names)), "o-", color=colour, label=way)
points.set(xlabel="drawings an image", ylabel="share right in everything", title="budget")
points.legend(loc="lower right")
caption = (
    f"n {count}, all from the same seeds; IMG's own setting: {own}, length 1, scale "
    f"{sampling.scale:g}, scale_end {sampling.scale_end:g}, rounds 1. Bars: what was wrong before "
    "and is right after (fixed, up), and the reverse (broken, down); points: their difference, "
    "with 95 % intervals. Of two points of one budget, one is the better of first and second "
    "image, as picked by the MLLM."
)
drawings, share = budget["IMG, only what is wrong"]
conclusion = (
    f"IMG fixes {table[own]['fixed']} and breaks {table[own]['broken']} of {count} images "
    f"({said(table[own]['difference'], '+.3f')}). Correcting only what the MLLM finds wrong takes "
    f"{drawings:.2f} drawings an image, and {share:.3f} are right instead of "
    f"{budget['IMG'][1]:.3f}."
)
save(figure, options, "07_regeneration", caption, conclusion)
