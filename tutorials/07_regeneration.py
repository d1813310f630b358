# %% [markdown]
"""What happens between the first image and the second, and how often, how strongly and how many times should it?

Sampling step by step: initial image -> MLLM -> tokens -> aligned tokens -> second image, from the same prompt and seed,
with the seconds that each step takes. Then one setting at a time: passes of the aligner (1 to 5), length of its
correction, scale of the image tokens, the share of it that is left at the last step, rounds (the second image is looked
at again, up to four times).
For each, what became right and what became wrong, by the exact oracle, against controls: another seed, the better of
two seeds, and a second drawing with the image's own tokens.

With G the base model, T the prompt, z the start noise, q a question about T, f the aligner, s the scale:

    x_0 = G(T, z)                                        1  initial image
    h = MLLM(x_0, q),  c_0 = Resampler(CLIP(x_0))        2  what is seen to be wrong; what the image is
    c_k = f(h, c_(k-1))                                  3  k passes of the aligner, with the same h
                                                            (length: c_0 + a (c_1 - c_0) in its place, a times as far)
    x_1 = G(T, z; c_k, s)                                4  the same prompt and noise, and the tokens beside the text;
                                                            over the steps s goes linearly to its end, a share of it
    x_r from x_(r-1) as x_1 from x_0                        rounds: h and c_0 are computed anew, of the latest image

h and c_0 are frozen: computed once, they serve every number of passes and scale. Look at both colours of the bars: a
setting that fixes more often breaks more, too, and its worth is the difference. The length also says what the push of
the preference terms could be worth: they carry f beyond the winner (tutorial 05), and that is a longer correction. With
--model sdxl there is no oracle, and the pictures alone are shown. What the steps cost at SDXL's and FLUX's size is
computed, and printed at the end.
"""

# %% Options
from dataclasses import dataclass

from common import Options, begin, check, chosen_preset, option, save, step


@dataclass
class Config(Options):
    """The command line."""

    prompts: int = option(200, "how many prompts of the test split")


options = begin(Config, __doc__)
check(options.prompts >= 20, f"--prompts is {options.prompts}, expected 20 or more")

import numpy as np
from figures import regeneration
from torch import Tensor

from img_minimal.bench.sampling import true_size_table
from img_minimal.evaluate.arms import TITLES, Arms
from img_minimal.evaluate.compare import FIRST_SEED
from img_minimal.evaluate.intervals import paired_shares, win_rate
from img_minimal.load import load_img
from img_minimal.files import to_pil
from img_minimal.tiny.grammar import CATEGORIES, benchmark
from img_minimal.tiny.oracle import judge

preset = chosen_preset(options)
with step("load"):
    img = load_img(preset)
judged = preset.world == "tiny"
if judged:
    prompts = benchmark(10 if options.quick else options.prompts, "test", options.seed)
    captions = [str(prompt) for prompt in prompts]
else:
    captions = ["a red cube on top of a blue sphere", "three green apples and one banana on a table"]
    captions = captions[: 1 if options.quick else None]
seeds = [FIRST_SEED * (options.seed + 1) + k for k in range(len(captions))]

# %% 1. x_0 = G(T, z): the initial images
with step("draw"):
    initial = img.backbone.draw(captions, seeds, progress="initial")
pictures = to_pil(initial)

# %% 2. h = MLLM(x_0, q) and c_0 = Resampler(CLIP(x_0)); an image's seed draws the phrasing q
with step("look"):
    h, mask = img.guidance(pictures, captions, seeds, progress="look")
    c_0 = img.backbone.tokens(pictures)

# %% 3. c_k = f(h, c_(k-1)): each pass goes on from the one before
PASSES = range(1, 4 if options.quick else 6)
c = [c_0]
with step("align"):
    for _ in PASSES:
        c.append(img.correct(c[-1], h, mask, passes=1))

# %% 4. x_1 = G(T, z; c_1, s): text attention + s * image attention, in every cross-attention
images: dict[tuple[str, float], Tensor] = {}
with step("draw again"):
    images["passes", img.passes] = img.backbone.draw(captions, seeds, c[img.passes], progress="second image")
second = images["passes", img.passes]

# %% 5. One image on its way, with the shapes of what it becomes
with step("put in words"):
    [answer] = img.explain(pictures[:1], captions[:1], seeds[:1])
moved = ((c[1][0] - c_0[0]).norm() / c_0[0].norm()).item()
print(f'"{captions[0]}", seed {seeds[0]}')
print(f"  1  initial image x_0          {tuple(initial[0].shape)}")
print(f"  2  MLLM: {answer}")
print(f"     guidance features h        {(int(mask[0].sum()), h.shape[-1])}; tokens c_0 {tuple(c_0[0].shape)}")
print(f"  3  aligned tokens c_1 = f(h, c_0): ||c_1 - c_0|| / ||c_0|| = {moved:.2f}")
print(f"  4  second image x_1, whose pixels differ by {(second[0] - initial[0]).abs().mean():.3f} of their range")

# %% 6. Other settings, one at a time, from the same h and c_0; rounds look at the latest image anew
LENGTHS = (0.5, 1.0, 1.5, 2.0)
SCALES = [preset.scale * factor for factor in (0.5, 1.0, 1.5, 2.0)]
ENDS = sorted({preset.scale_end, 0.25, 0.5, 1.0})
ROUNDS = range(1, 3 if options.quick else 5)
with step("other settings"):
    for k in PASSES:
        if k != img.passes:
            images["passes", k] = img.backbone.draw(captions, seeds, c[k], progress=f"passes {k}")
    for a in LENGTHS:
        longer = c_0 + a * (c[img.passes] - c_0)
        images["length", a] = second if a == 1 else img.backbone.draw(captions, seeds, longer, progress=f"length {a:g}")
    for field, values in (("scale", SCALES), ("scale_end", ENDS)):
        for value in values:
            own = value == getattr(preset, field)
            title = f"{field} {value:g}"
            images[field, value] = (
                second if own else img.backbone.draw(captions, seeds, c[img.passes], progress=title, **{field: value})
            )
    images["rounds", 1] = second
    for r in ROUNDS[1:]:
        tokens = img.align(images["rounds", r - 1], captions, [seed + r - 1 for seed in seeds])
        images["rounds", r] = img.backbone.draw(captions, seeds, tokens, progress=f"rounds {r}")

# %% 7. Controls, and every setting against the base: which are right, what was fixed and what broken, win rate
table: dict = {}
if judged:
    with step("controls"):
        arms = Arms(img, prompts, options.seed)
        arms.controls()
    verdicts = {name: arms.verdicts[name] for name in ("base", *regeneration.CONTROLS)}
    verdicts |= {setting: judge(drawn, prompts) for setting, drawn in images.items()}
    strict = {name: np.array([v.strict for v in said]) for name, said in verdicts.items()}
    soft = {name: np.array([v.soft for v in said]) for name, said in verdicts.items()}
    print(f"\n{'95 % intervals over captions':40} strict                minus base               fixed  broken  wins*")
    for name in verdicts:
        wins = win_rate(soft[name], soft["base"], captions)
        table[name] = row = paired_shares(strict[name], strict["base"], captions) | {"right": strict[name]}
        line = f"{TITLES[name] if isinstance(name, str) else '{} {:g}'.format(*name):40} "
        line += "{value:.3f} [{low:.3f}, {high:.3f}]  ".format(**row["share"])
        if name != "base":
            line += "{value:+.3f} [{low:+.3f}, {high:+.3f}]  ".format(**row["difference"])
            line += f"{row['fixed']:5d}  {row['broken']:6d}  {wins['value']:.2f} of {wins['decided']}"
        print(line)
    print("* against the base on the soft score, without ties\n")

    before, after = strict["base"], strict["passes", img.passes]
    print("the preset's own setting, by category:")
    for category in CATEGORIES:
        here = np.array([p.category == category for p in prompts])
        wrong, right = here & ~before, here & before
        fixed, broken = (wrong & after).sum(), (right & ~after).sum()
        print(f"  {category:9} fixed {fixed:2d} of {wrong.sum():2d} wrong, broke {broken:2d} of {right.sum():2d} right")

# %% 8. The picture: some images in many settings, chosen by a rule, and the table
rows = dict.fromkeys(range(len(captions)), "")
if judged:
    rows = {}
    for category in ("position", "complex"):
        wrong = [k for k, p in enumerate(prompts) if p.category == category and not before[k]]
        rows |= dict.fromkeys(wrong[:1], f"the first {category} that the base draws wrong")
    rows |= {int(k): "the first right one that IMG breaks" for k in np.flatnonzero(before & ~after)[:1]}
with step("put in words"):
    answers = img.explain([pictures[k] for k in rows], [captions[k] for k in rows], [seeds[k] for k in rows])
titles = [
    f'"{captions[k]}"' + (f" ({why})" if why else "") + f"  MLLM of the initial image: {answer}"
    for (k, why), answer in zip(rows.items(), answers)
]
figure = regeneration.draw(dict(zip(rows, titles)), initial, c[1] - c_0, images, table, preset)
save(figure, options, "07_regeneration", f"{preset.name}, n {len(captions)}")

# %% 9. What the steps cost at true size: operations of one image, counted without a download or a weight
if not options.quick:
    for model in ("sdxl", "flux"):
        print(f"\n{true_size_table(model, 'llava-13b')}")
