# %% [markdown]
"""# Does an aligner that was trained for one model also help a finetuned variant of it, without retraining?

tiny-sdxl-dpo is tiny-sdxl after Diffusion-DPO, which finetunes a UNet so that it draws the winners
of preference pairs more readily than the losers. Its UNet has changed, its image prompt has not.
Its own images are shown to the same MLLM, aligned by the same aligner, and drawn again.

Why it can work: f maps tokens to tokens. Both c and f(h, c) live in the space of the IP-Adapter's
Resampler, and a UNet meets them only through the keys and values of its image branch
([03](03_image_prompt.py)),

    Attention(Q, K_text, V_text) + scale * Attention(Q, f(h, c) W_k, f(h, c) W_v)

where W_k and W_v belong to the adapter. A finetuned UNet asks with other queries Q, but is answered
in the same words.

Not as in the paper: there SDXL-DPO was trained on people's choices, here the DPO model on the
twin's exact pairs. By the score HPSv2 its IMG wins 87.2 % of the comparisons with SDXL, and 82.6 %
of those with SDXL-DPO.

In full: about 2 minutes on two cores.
"""

# %%
from common import bars, begin, check, option, picture, save, sheet, step

prompts_help = "how many prompts of the test split"
options, preset = begin(__doc__, oracle=True, prompts=option(300, prompts_help, least=10, quick=10))

import numpy as np

from img_minimal.backbone import open_backbone
from img_minimal.evaluate.arms import Arms
from img_minimal.evaluate.intervals import mean_interval, paired_shares, said, said_wins, win_rate
from img_minimal.files import to_pil
from img_minimal.pipeline import IMG
from img_minimal.plots import BLUE, GREEN, GREY, ORANGE
from img_minimal.presets import PRESETS
from img_minimal.tiny.grammar import benchmark

other = f"{preset.name}-dpo"
advice = f"there is no {other} to plug the aligner into; use tiny-sdxl"
check(other in PRESETS, f"--model {preset.name}: {advice}")
prompts = benchmark(options.prompts, "test", options.seed)
# %% [markdown]
# ## 1. The base model and its IMG

# %%
with step("base + IMG"):
    img = IMG(preset=preset)
    base = Arms(img, prompts, options.seed)
    base_again = base.aligned("img", img)
# %% [markdown]
# ## 2. The same MLLM and aligner around the finetuned UNet: neither ever saw it

# %%
with step("DPO + IMG"):
    finetuned = open_backbone(preset.changed(unet=PRESETS[other].models.unet))
    plugged = IMG(finetuned, img.guide, img.aligner)
    dpo = Arms(plugged, prompts, options.seed)
    dpo_again = dpo.aligned("img", plugged)

# %% [markdown]
# ## 3. The four cells, and position by itself, which the base model gets wrong most often
#
# *Strict*: everything in the image is right; *soft*: the average share of a prompt that is right.

# %%
strict, soft = {}, {}
for name, arms in (("base", base), ("DPO", dpo)):
    for cell, arm in ((name, "base"), (f"{name} + IMG", "img")):
        strict[cell] = arms.marks("strict")[arm]
        soft[cell] = arms.marks("soft")[arm]
captions = base.captions
position = base.categories()["position"]
shares = {}
print(f"{'':11} strict [95 %]          soft   position")
for name, right in strict.items():
    shares[name] = mean_interval(right, captions)
    means = f"{soft[name].mean():.3f}  {right[position].mean():8.2f}"
    print(f"{name:11} {said(shares[name])}   {means}")
# %% [markdown]
# ## 4. Their differences, on the same prompts and seeds
#
# *Wins* compare soft scores where these differ.

# %%
changes = {}
for ours, theirs in (
    ("base + IMG", "base"),
    ("DPO", "base"),
    ("DPO + IMG", "DPO"),
    ("DPO + IMG", "base + IMG"),
):
    pair = paired_shares(strict[ours], strict[theirs], captions)
    wins = win_rate(soft[ours], soft[theirs], captions)
    change = changes[ours, theirs] = said(pair["difference"], "+.3f")
    words = f"{change}  fixed {pair['fixed']}, broken {pair['broken']}"
    print(f"{ours:>10} minus {theirs:10} {words}; wins {said_wins(wins)} that differ")

# %% [markdown]
# ## 5. The picture: the cells, and the first prompts that both models draw wrong, not chosen
#
# It goes on with pairs that the aligner makes itself: [10, rounds](10_rounds.py).

# %%
drawn = [base.pictures, to_pil(base_again), dpo.pictures, to_pil(dpo_again)]
figure, ([chart], *rows) = sheet(9, (2.4, [1]), (2.6, [1] * 5), *[(2, [1] * 5)] * 3)
bars(chart, shares, color=(GREY, BLUE, ORANGE, GREEN))
chart.set(ylim=(0, 1), ylabel="share right in everything")
wrong = np.flatnonzero((strict["base"] == 0) & (strict["DPO"] == 0))
for row, pictures, (name, right) in zip(rows, drawn, strict.items()):
    row[0].set_ylabel(name)
    for axis, k in zip(row, wrong):
        above = captions[k] if row is rows[0] else ""
        picture(axis, pictures[k], above, "right" if right[k] else "wrong")
caption = (
    f"{len(prompts)} prompts of the test split, the same seeds in all cells, 95 % intervals; "
    "images: the first prompts that both models draw wrong, not chosen."
)
conclusion = (
    f"IMG changes the share that is right by {changes['base + IMG', 'base']} with the base model "
    f"and by {changes['DPO + IMG', 'DPO']} with the DPO model, which aligner and MLLM never saw."
)
save(figure, options, "09_plug_and_play", caption, conclusion)
