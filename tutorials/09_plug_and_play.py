# %% [markdown]
"""Does an aligner that was trained for one model also help a finetuned variant of it, without retraining?

tiny-sdxl-dpo is tiny-sdxl after Diffusion-DPO on the preference pairs: its UNet has changed, its
image prompt has not. Its own images are shown to the same MLLM, aligned by the same aligner, and
drawn again. Shown: the four cells (base, + IMG, DPO, DPO + IMG), every difference paired over
prompts and seeds, and the four images of a few prompts.

Why it can work: f maps tokens to tokens. Both c and f(h, c) live in the space of the IP-Adapter's
Resampler, and a UNet meets them only through the keys and values of its image branch (sdxl.py),

    Attention(Q, K_text, V_text) + scale * Attention(Q, f(h, c) W_k, f(h, c) W_v)

where W_k and W_v belong to the adapter. A finetuned UNet asks with other queries Q, but is answered
in the same words.

Look at two things: whether IMG adds to DPO as it does to the base, and whether both together beat
either alone.
"""  # noqa: E501

# %% Options
from common import bars, begin, check, option, picture, save, sheet, step

prompts_help = "how many prompts of the test split"
options, preset = begin(__doc__, oracle=True, prompts=option(300, prompts_help, least=10, quick=10))

import numpy as np

from img_minimal.backbone import open_backbone
from img_minimal.evaluate.arms import Arms
from img_minimal.evaluate.intervals import (
    mean_interval,
    paired_shares,
    said,
    said_wins,
    win_rate,
)
from img_minimal.files import to_pil
from img_minimal.pipeline import IMG
from img_minimal.plots import BLUE, GREEN, GREY, ORANGE
from img_minimal.presets import PRESETS
from img_minimal.tiny.grammar import benchmark

other = f"{preset.name}-dpo"
advice = f"there is no {other} to plug the aligner into; use tiny-sdxl"
check(other in PRESETS, f"--model {preset.name}: {advice}")
prompts = benchmark(options.prompts, "test", options.seed)

# %% 1. The base and its IMG
with step("base + IMG"):
    img = IMG(preset=preset)
    base = Arms(img, prompts, options.seed)
    base_again = base.aligned("img", img)

# %% 2. The same MLLM and aligner around the finetuned UNet: neither ever saw it
with step("DPO + IMG"):
    finetuned = open_backbone(preset.changed(unet=PRESETS[other].models.unet))
    plugged = IMG(finetuned, img.guide, img.aligner)
    dpo = Arms(plugged, prompts, options.seed)
    dpo_again = dpo.aligned("img", plugged)


# %% 3. The four cells, and position by itself, which the base gets wrong most often
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

# %% 4. Their differences, on the same prompts and seeds
for ours, theirs in (
    ("base + IMG", "base"),
    ("DPO", "base"),
    ("DPO + IMG", "DPO"),
    ("DPO + IMG", "base + IMG"),
):
    pair = paired_shares(strict[ours], strict[theirs], captions)
    wins = win_rate(soft[ours], soft[theirs], captions)
    print(
        f"{ours:>10} minus {theirs:10} {said(pair['difference'], '+.3f')}  ",
        f"fixed {pair['fixed']}, broken {pair['broken']};",
        f"wins {said_wins(wins)} that differ",
    )

# %% 5. The picture: the cells, and the first prompts that both models draw wrong, not chosen
drawn = [base.pictures, to_pil(base_again), dpo.pictures, to_pil(dpo_again)]
figure, ([chart], *rows) = sheet(10, (2.8, [1]), *[(2.6, [1] * 5)] * 4)
bars(chart, shares, color=(GREY, BLUE, ORANGE, GREEN))
chart.set(ylim=(0, 1.05), ylabel="share right in everything")
wrong = np.flatnonzero((strict["base"] == 0) & (strict["DPO"] == 0))
for row, pictures, (name, right) in zip(rows, drawn, strict.items()):
    row[0].set_ylabel(name)
    for axis, k in zip(row, wrong):
        picture(axis, pictures[k], captions[k], "right" if right[k] else "wrong")
caption = (
    f"{len(prompts)} prompts of the test split, the same seeds in all cells; images: the first "
    "prompts that both models draw wrong, not chosen. Neither aligner nor MLLM ever saw the DPO "
    "model."
)
save(figure, options, "09_plug_and_play", caption)
