# %% [markdown]
"""Does an aligner that was trained for one model also help a finetuned variant of it, without retraining?

tiny-sdxl-dpo is tiny-sdxl after Diffusion-DPO on the preference pairs: its UNet has changed, its image prompt has not.
Its own images are shown to the same MLLM, aligned by the same aligner, and drawn again. Shown: the four cells (base,
+ IMG, DPO, DPO + IMG), every difference paired over prompts and seeds, and the four images of a few prompts.

Why it can work: f maps tokens to tokens. Both c and f(h, c) live in the space of the IP-Adapter's Resampler, and a UNet
meets them only through the keys and values of its image branch,

    Attention(Q, K_text, V_text) + scale * Attention(Q, f(h, c) W_k, f(h, c) W_v)      (backbones/sdxl/injection.py)

where W_k and W_v belong to the adapter. A finetuned UNet asks with other queries Q, but is answered in the same words.

Look at two things: whether IMG adds to DPO as it does to the base, and whether both together beat either alone.
"""

# %% Options
from dataclasses import dataclass

from common import Options, begin, check, option, oracle_preset, save, step


@dataclass
class Config(Options):
    """The command line."""

    prompts: int = option(300, "how many prompts of the test split")


options = begin(Config, __doc__)
check(options.prompts >= 10, f"--prompts is {options.prompts}, expected 10 or more")

import numpy as np
from figures import plug_and_play

from img_minimal.evaluate.arms import Arms
from img_minimal.evaluate.intervals import mean_interval, paired_shares, win_rate
from img_minimal.load import load_backbone, load_img
from img_minimal.pipeline import IMG
from img_minimal.presets import PRESETS, find_preset
from img_minimal.files import to_pil
from img_minimal.tiny.grammar import CATEGORIES, benchmark

preset = oracle_preset(options)
other = f"{preset.name}-dpo"
check(other in PRESETS, f"--model {preset.name}: there is no {other} to plug the aligner into; use tiny-sdxl")
prompts = benchmark(10 if options.quick else options.prompts, "test", options.seed)
captions = [str(prompt) for prompt in prompts]

# %% 1. The base and its IMG
with step("load"):
    img = load_img(preset)
with step("base + IMG"):
    base = Arms(img, prompts, options.seed)
    base_second = base.aligned("img", img)

# %% 2. The same MLLM and aligner around the finetuned UNet: neither ever saw it
with step("load"):
    finetuned = load_backbone(options.applied_to(find_preset(other)))
    plugged = IMG(finetuned, img.guide, img.aligner, img.passes, img.mllm_batch)
with step("DPO + IMG"):
    dpo = Arms(plugged, prompts, options.seed)
    dpo_second = dpo.aligned("img", plugged)

# %% 3. The four cells
verdicts = {
    "base": base.verdicts["base"], "base + IMG": base.verdicts["img"],
    "DPO": dpo.verdicts["base"], "DPO + IMG": dpo.verdicts["img"],
}  # fmt: skip
strict = {name: np.array([v.strict for v in said]) for name, said in verdicts.items()}
soft = {name: np.array([v.soft for v in said]) for name, said in verdicts.items()}
kinds = np.array([prompt.category for prompt in prompts])
by_category = {name: [right[kinds == category].mean() for category in CATEGORIES] for name, right in strict.items()}
shares = {name: mean_interval(right, captions) for name, right in strict.items()}
print(f"{'':11} strict [95 %]          soft   " + " ".join(f"{c:>9}" for c in CATEGORIES))
for name, share in shares.items():
    interval = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**share)
    categories = " ".join(f"{value:9.2f}" for value in by_category[name])
    print(f"{name:11} {interval}   {soft[name].mean():.3f}  {categories}")

# %% 4. Their differences, on the same prompts and seeds
for ours, theirs in (("base + IMG", "base"), ("DPO", "base"), ("DPO + IMG", "DPO"), ("DPO + IMG", "base + IMG")):
    pair = paired_shares(strict[ours], strict[theirs], captions)
    wins = win_rate(soft[ours], soft[theirs], captions)
    print(
        f"{ours:>10} minus {theirs:10} {{value:+.3f}} [{{low:+.3f}}, {{high:+.3f}}]".format(**pair["difference"]),
        f"  fixed {pair['fixed']}, broken {pair['broken']};",
        "wins {value:.2f} [{low:.2f}, {high:.2f}] of {decided} that differ".format(**wins),
    )

# %% 5. The picture
images = dict(zip(verdicts, (base.pictures, to_pil(base_second), dpo.pictures, to_pil(dpo_second))))
caption = (
    f"{len(prompts)} prompts of the test split, --seed {options.seed}, the same seeds in all cells; images: the "
    "first prompts that both models draw wrong,\nnot chosen. Neither aligner nor MLLM ever saw the DPO model."
)
save(plug_and_play.draw(captions, images, strict, shares, by_category), options, "09_plug_and_play", caption)
