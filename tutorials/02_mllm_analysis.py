# %% [markdown]
"""# What does the MLLM see, does finetuning teach it, and do its hidden states know more than the prompt?

IMG asks a multimodal language model (MLLM) about the first image: "How to make the image match the
prompt: ...?" It never reads the answer. The guidance h is the last hidden states of image and
question, before any answer. But words can be marked, so they are looked at first (1); then a linear
probe tells what the states know (2 to 4).

The *stock* MLLM is the one before it was finetuned: on triplets of an image, a prompt and the edit
instruction between them, as InstructPix2Pix has them.

Not as in the paper: there, GPT-4 compared an answer's meaning with the true instruction, and
finetuning took LLaVA from 42.3 % to 76.3 %. Here an answer counts if it is worded exactly. The
stock MLLM never learnt the form of these instructions and can hardly hit the wording, whatever it
sees: its share is not the paper's 42.3 %, and only the finetuned one's compares with the 76.3 %.
What the stock MLLM sees, the probe tells.

In full: about three minutes on two cores.
"""

# %%
from common import bars, begin, option, picture, ranking_interval, save, sheet, step

help_text = "how many prompts the probe is about, each drawn four times"
options, preset = begin(__doc__, oracle=True, prompts=option(250, help_text, least=20, quick=20))

import random
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from img_minimal.backbone import open_backbone
from img_minimal.data.pairs import triplet_stream
from img_minimal.detector import MAX_HELD_OUT, Detector
from img_minimal.evaluate.intervals import bootstrap_ratio, mean_interval, said
from img_minimal.files import to_pil
from img_minimal.hub.parts import open_guide
from img_minimal.mllm import MLLM, guidance_features, padded
from img_minimal.plots import BLUE, GREY, ORANGE
from img_minimal.tiny.grammar import benchmark
from img_minimal.tiny.oracle import judge

models, seed = preset.models, options.seed
MLLMS = {"stock MLLM": models.stock_mllm, "finetuned MLLM": models.mllm}

# %% [markdown]
# ## 1. In words: an exam on triplets that finetuning held out
#
# Marked are two things: instructions worded exactly, and the decision between an edit and
# "nothing", for an image that is right.

# %%
exact = {}
with step("exam"):
    [table] = triplet_stream(preset.data.triplets).chunks()
    held_out = table.items[-MAX_HELD_OUT:]  # the table's last
    if options.quick:
        held_out = held_out[:20]
    numbers = [str(k) for k in range(len(held_out))]
    for name, path in MLLMS.items():
        grades = Detector(MLLM.from_pretrained(path)).grades(held_out, 0, 64)
        exact[name] = mean_interval(np.array(grades["exact"]), numbers)
        decided = mean_interval(np.array(grades["decided"]), numbers)
        print(f"{name:15} worded exactly {said(exact[name])}, edit or nothing {said(decided)}")
    always = np.mean(grades["always_edit"])
    print(f"n {len(numbers)}; who always says 'edit' decides {always:.3f} of them rightly")

# %% [markdown]
# ## 2. Images for the probe, and their features
#
# Every prompt is drawn four times, each from a seed of its own. Three guides look at the images:
# the text encoder alone, which sees no image, the stock MLLM and the finetuned one.

# %%
DRAWN = 4  # images of each prompt
with step("load"):
    backbone = open_backbone(preset)
    guides = {"text alone": open_guide(models, "text", backbone)}
    for name, path in MLLMS.items():
        guides[name] = open_guide(replace(models, mllm=path), "mllm", backbone)
prompts = np.repeat(benchmark(options.prompts, "validation", seed), DRAWN)
captions = np.array(list(map(str, prompts)))
count = len(prompts)
with step("draw"):
    seeds = list(range(seed + 1000, seed + 1000 + count))
    images = backbone.draw(captions.tolist(), seeds, progress="images")
pictures = to_pil(images)
verdicts = judge(images, prompts)
right = np.array([verdict.strict for verdict in verdicts])  # in everything: what is to be found out
x = {}
with step("look"):
    for name, guide in guides.items():
        questions = range(seed, seed + count)
        look = guidance_features(guide, pictures, captions.tolist(), questions, progress=name)
        h, mask = padded(*look)  # (B, L, H), (B, L)
        h, lengths = h.float() * mask[..., None], mask.sum(1)
        last = h[torch.arange(count), lengths - 1]
        x[name] = torch.cat([h.sum(1) / lengths[:, None], last], dim=1).double()

# %% [markdown]
# ## 3. In hidden states: a linear probe for "right"
#
# The probe is logistic regression on x = [mean of h, last h], standardised:
#
#     P(right | x) = sigmoid(w x + b),   w, b = argmin  mean loss + (ridge / 2) ||w||^2
#
# Half of the prompts teach it, the others test it.


# %%
def probe(x: Tensor, ridge: float = 0.01) -> np.ndarray:
    """Learn w and b from the images that teach; score all images: (B, 2 H) -> w x + b, (B,)."""
    x = (x - x[teach].mean(0)) / (x[teach].std(0) + 1e-6)
    target = torch.from_numpy(right[teach]).double()
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(x[teach] @ w + b, target)
        value = value + ridge / 2 * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (x @ w + b).detach().numpy()


names = sorted(set(captions))
teach = np.isin(captions, random.Random(seed).sample(names, len(names) // 2))
with step("probe"):
    scores = {name: probe(x[name]) for name in guides}

# %% [markdown]
# ## 4. The probe's marks on the other half
#
# The first mark is the area under the ROC curve: how often a right image scores above a wrong one;
# 0.5 is chance. The text knows which prompts are hard, which is worth something here. But only who
# has seen the image can tell two drawings of one prompt apart. So the second mark counts such pairs
# only, and for text it is chance by construction.

# %%
test, right_test = captions[~teach], right[~teach]


def same_prompt(scores: np.ndarray) -> dict[str, float]:
    """Compute the share of pairs, a right and a wrong image of one prompt, in the right order."""
    pairs = (test[:, None] == test) & right_test[:, None] & ~right_test  # (right, wrong)
    ordered = pairs * (1 + np.sign(scores[:, None] - scores)) / 2  # a tie counts half
    return bootstrap_ratio(ordered.sum(1), pairs.sum(1), test)


any_two, one_prompt = {}, {}
print(f"a linear probe for 'right' on unseen prompts, {count} images, {right.mean():.0%} right:")
for name in guides:
    any_two[name] = ranking_interval(scores[name][~teach], right_test, test)
    one_prompt[name] = same_prompt(scores[name][~teach])
    print(f"{name:15} any two {said(any_two[name])}, of one prompt {said(one_prompt[name])}")

# %% [markdown]
# ## 5. The picture: the marks, and words about the first wrong images and the first right one
#
# It goes on with what such a guide can change, the image prompt:
# [03, image prompt](03_image_prompt.py).

# %%
figure, ((words, left, middle), row) = sheet(9.5, (3.4, [1, 1.3, 1.3]), (3.4, [1] * 5))
colours = GREY, ORANGE, BLUE
bars(words, exact, color=colours[1:])
words.set(ylabel="instructions worded exactly", title="in words")
bars(left, any_two, color=colours)
left.set(ylabel="right image above wrong", title="in hidden states: any two images")
bars(middle, one_prompt, color=colours)
middle.set(title="two drawings of one prompt")
for axis in (left, middle):
    axis.axhline(0.5, color="black", ls=":")
first = np.arange(count) % DRAWN == 0
shown = [*np.flatnonzero(first & ~right)[:4], *np.flatnonzero(first & right)[:1]]
with step("put in words"):
    for axis, k in zip(row, shown):
        below = ""
        for name in MLLMS:
            [answer] = guides[name].explain([pictures[k]], [captions[k]], [seed + int(k)])
            below += f"{name.split()[0]}: {answer}\n"
        picture(axis, pictures[k], captions[k], f"{below}oracle: {verdicts[k].words}")
caption = (
    f"words: {len(held_out)} held-out triplets, of which the stock MLLM never learnt the wording; "
    f"probes: {count} images of {len(names)} prompts, dotted: chance; images: the first four wrong "
    "ones and the first right one, not chosen"
)
parts = [f"{name} {said(mark, '.2f')}" for name, mark in one_prompt.items()]
conclusion = (
    "Which of two drawings of one prompt is the right one, the hidden states know in this share "
    f"of the cases: {', '.join(parts)}; chance is 0.50."
)
save(figure, options, "02_mllm_analysis", caption, conclusion)
