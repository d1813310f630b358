# %% [markdown]
"""What happens between the first image and the second, and how often, how strongly and how many times should it?

Sampling step by step: initial image -> MLLM -> tokens -> aligned tokens -> second image, from the
same prompt and seed, with the seconds that each step takes. Then one setting at a time: passes of
the aligner (1 to 5), length of its correction, scale of the image tokens, the share of it that is
left at the last step, rounds (the second image is looked at again, up to four times). For each,
what became right and what became wrong, by the exact oracle. Then the budget curve: IMG takes two
drawings an image, and drafts, one look for several seeds, and correcting only what is wrong take
less; the base model could spend the same on more seeds, of which the MLLM picks one.

With G the base model, T the prompt, z the start noise, q a question about T, f the aligner, s the
scale:

    x_0 = G(T, z)                                 1  initial image
    h = MLLM(x_0, q),  c_0 = Resampler(CLIP(x_0)) 2  what is seen to be wrong; what the image is
    c_k = f(h, c_(k-1))                           3  k passes of the aligner, with the same h
                                                     (length: c_0 + a (c_1 - c_0), a times as far)
    x_1 = G(T, z; c_k, s)                         4  the same prompt and noise, and the tokens; over
                                                     the steps s goes linearly to its end
    x_r from x_(r-1) as x_1 from x_0              rounds: h and c_0 anew, of the latest image

h and c_0 are frozen: computed once, they serve every number of passes and scale. Look at both
colours of the bars: a setting that fixes more often breaks more, too, and its worth is the
difference, the black point. The length also says what the push of the preference terms could be worth: they carry f
beyond the winner (tutorial 05), and that is a longer correction. With --model sdxl there is no
oracle, and the pictures alone are shown. What the steps cost at SDXL's and FLUX's size is measured
by `python -m img_minimal.bench.true_size`, on a GPU.
"""  # noqa: E501

# %% Options
from common import bars, begin, curve, option, picture, save, sheet, step

help_text = "how many prompts of the test split"
options, preset = begin(__doc__, prompts=option(200, help_text, least=20, quick=10))

from textwrap import fill

import numpy as np

from img_minimal.evaluate.arms import FIRST_SEED
from img_minimal.evaluate.budget import Budget
from img_minimal.evaluate.intervals import paired_shares, said
from img_minimal.files import to_pil
from img_minimal.pipeline import IMG
from img_minimal.plots import GREEN, GREY, ORANGE
from img_minimal.tiny.grammar import benchmark
from img_minimal.tiny.oracle import judge

quick = options.quick
sampling = preset.sampling
judged = preset.world == "tiny"
captions = ["a red cube on top of a blue sphere", "three green apples and one banana on a table"]
if judged:
    prompts = benchmark(options.prompts, "test", options.seed)
    captions = [str(prompt) for prompt in prompts]
elif quick:
    captions = captions[:1]
count = len(captions)
first_seed = FIRST_SEED * (options.seed + 1)
seeds = list(range(first_seed, first_seed + count))
with step("load"):
    img = IMG(preset=preset)
backbone = img.backbone

# %% 1. x_0 = G(T, z): the initial images
with step("draw"):
    initial = backbone.draw(captions, seeds, progress="initial")
pictures = to_pil(initial)

# %% 2. h = MLLM(x_0, q) and c_0 = Resampler(CLIP(x_0)); an image's seed draws the phrasing q
with step("look"):
    h, mask = img.guidance(pictures, captions, seeds, progress="look")
    c_0 = backbone.tokens(pictures)

# %% 3. c_k = f(h, c_(k-1)): each pass goes on from the one before
c = [c_0]
with step("align"):
    for _ in range(3 if quick else 5):
        c.append(img.correct(c[-1], h, mask, passes=1))
corrected = c[img.passes]

# %% 4. x_1 = G(T, z; c_k, s): text attention + s * image attention, in every cross-attention
with step("draw again"):
    second = backbone.draw(captions, seeds, corrected, progress="second image")

# %% 5. One image on its way, with the shapes of what it becomes
with step("put in words"):
    [answer] = img.explain(pictures[:1], captions[:1], seeds[:1])
looked = int(mask[0].sum()), h.shape[-1]
moved = (c[1][0] - c_0[0]).norm() / c_0[0].norm()
differ = (second[0] - initial[0]).abs().mean()
print(f"""\
"{captions[0]}", seed {seeds[0]}
  1  initial image x_0          {tuple(initial[0].shape)}
  2  MLLM: {answer}
     guidance features h        {looked}; tokens c_0 {tuple(c_0[0].shape)}
  3  aligned tokens c_1 = f(h, c_0): ||c_1 - c_0|| / ||c_0|| = {moved:.2f}
  4  second image x_1, whose pixels differ by {differ:.3f} of their range""")

# %% 6. Other settings, one at a time, from the same h and c_0; rounds look at the latest image anew
SETTINGS = {
    "passes": range(1, len(c)),
    "length": (0.5, 1, 1.5, 2),
    "scale": [sampling.scale * factor for factor in (0.5, 1, 1.5, 2)],
    "scale_end": sorted({sampling.scale_end, 0.25, 0.5, 1}),
    "rounds": range(1, 3 if quick else 5),
}
OWN = {
    "passes": img.passes,
    "length": 1,
    "scale": sampling.scale,
    "scale_end": sampling.scale_end,
    "rounds": 1,
}
images = {}
with step("other settings"):
    for kind, values in SETTINGS.items():
        for value in values:
            name = f"{kind} {value:g}"
            if value == OWN[kind]:
                images[name] = second
                continue
            tokens = corrected
            changes = {}
            if kind == "passes":
                tokens = c[value]
            elif kind == "length":
                tokens = c_0 + value * (corrected - c_0)
            elif kind == "rounds":
                later = [seed + value - 1 for seed in seeds]
                tokens = img.align(images[f"rounds {value - 1}"], captions, later)
            else:
                changes = {kind: value}
            images[name] = backbone.draw(captions, seeds, tokens, progress=name, **changes)

# %% 7. Every setting against the base: what was fixed and what broken; then the budget curve
table, strict, budget = {}, {}, {}
if judged:
    for name, drawn in {"base": initial, **images}.items():
        strict[name] = np.array([verdict.strict for verdict in judge(drawn, prompts)])
        row = table[name] = paired_shares(strict[name], strict["base"], captions)
        change = f"{said(row['difference'], '+.3f')}, {row['fixed']} fixed, {row['broken']} broken"
        print(f"{name:14} {said(row['share'])}, minus base {change}")
    with step("budget"):
        budget = dict(Budget(img, prompts[: 1 if quick else None], options.seed).rows())

# %% 8. The picture: some images in many settings, chosen by a rule, and what each setting is worth
if judged:
    kinds, wrong = np.array([prompt.category for prompt in prompts]), ~strict["base"]
    rules = {
        "the first position that the base draws wrong": (kinds == "position") & wrong,
        "the first complex that the base draws wrong": (kinds == "complex") & wrong,
        "the first right one that IMG breaks": strict["base"] > strict[f"passes {img.passes}"],
    }
    shown = {}
    for why, here in rules.items():
        for k in np.flatnonzero(here)[:1]:
            shown[k] = f" ({why})"
else:
    shown = dict.fromkeys(range(count), "")
columns = {"base": initial}
scales = f"scale {sampling.scale / 2:g}", f"scale {sampling.scale * 2:g}"
for name in ("passes 1", "passes 3", *scales, "scale_end 1", "rounds 2"):
    columns[name] = images[name]
blocks = [(1.9, [1] * len(columns))] * len(shown)
if judged:
    blocks += [(4, [1] * 5), (5, [3, 2])]
figure, rows = sheet(13.5, *blocks)
for axes, (k, why) in zip(rows, shown.items()):
    [answer] = img.explain([pictures[k]], [captions[k]], [seeds[k]])
    words = f'"{captions[k]}"{why}  MLLM of the initial image: {answer}'
    axes[0].figure.suptitle(fill(words, 150), fontsize=9, x=0.01, ha="left")
    for axis, (name, drawn) in zip(axes, columns.items()):
        below = ""
        if judged:
            below = "right" if strict[name][k] else "wrong"
        picture(axis, to_pil(drawn[k : k + 1])[0], name, below)

if judged:
    for axis, (kind, values) in zip(rows[-2], SETTINGS.items()):
        worth = {f"{value:g}": table[f"{kind} {value:g}"] for value in values}
        axis.sharey(rows[-2][0])
        fixed = [row["fixed"] / count for row in worth.values()]
        broken = [-row["broken"] / count for row in worth.values()]
        difference = [row["difference"] for row in worth.values()]
        axis.bar(worth.keys(), fixed, color=GREEN, label="fixed")
        axis.bar(worth.keys(), broken, color=ORANGE, label="broken")
        curve(axis, worth.keys(), difference, fmt="o", color="black", label="difference")
        axis.axhline(0, color=GREY)
        axis.set_title(kind)
    rows[-2][0].set_ylabel(f"share of images (base right: {strict['base'].mean():.2f})")
    rows[-2][-1].legend()
    names, points = rows[-1]
    bars(names, {name: row["share"] for name, row in budget.items()}, lying=True)
    for k, row in enumerate(budget.values()):
        points.plot(row["drawings"], row["share"]["value"], marker=f"${k}$", ms=12)
    points.set(xlabel="drawings an image", ylabel="share of right images")
own = ", ".join(f"{kind} {value:g}" for kind, value in OWN.items())
caption = f"n {count}; IMG's own setting: {own}"
save(figure, options, "07_regeneration", caption)
