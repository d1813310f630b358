# %% [markdown]
"""How does the Implicit Aligner decide what to change in an image prompt, and how much?

    f(h, c) = c + zero_linear(norm_out(proj_out(x))),   x = layers(c, proj_in(h))    (Figs. 9, 10)

h are the MLLM's last hidden states: one for each patch of the image, one for each word of the
question. c are the image's own tokens. `zero_linear` starts at zero, so f starts as "keep the image
as it is". Shown here:

1. one image under a right and several wrong prompts: ||f(h, c) - c|| of each token, painted where
   the Resampler reads it, and what the base draws with the corrected tokens;
2. identity at the start, and why it learns all the same: only zero_linear gets a gradient in the
   first step, all the rest from the second on, when zero_linear is no longer zero;
3. where each token looks in each layer, softmax(q k / sqrt(d)): at the image patches, the words of
   the question, or the other tokens. A word's state has read the image before it, so "looks at the
   word 'purple'" means "asks what the MLLM thought when it read 'purple' after seeing this image";
4. size of the correction against the number of edits that the oracle asks for or, without an
   oracle, an image under its own prompt against the same image under another image's prompt.

Sizes are in units of the distance between the tokens of two images (the median over pairs), so 1
means "as far as another picture". One pass of the aligner.
"""

# %% Options
from common import bars, begin, option, picture, save, sheet, step

help_text = "how many images are drawn for the size of the correction"
options, preset = begin(__doc__, images=option(128, help_text, least=8, quick=8))

import math

import numpy as np
import torch
from einops import rearrange
from torch.linalg import matrix_norm

from img_minimal.aligner import ImplicitAligner
from img_minimal.evaluate.intervals import mean_interval, said
from img_minimal.files import to_pil
from img_minimal.pipeline import IMG
from img_minimal.plots import BLUE, GREEN, ORANGE
from img_minimal.tiny.edits import correct
from img_minimal.tiny.grammar import CATEGORIES, benchmark, parse
from img_minimal.tiny.oracle import judge

RIGHT = "a red circle and a blue square"
WRONG = (  # the first is the one whose attention is shown
    "a purple circle and a blue square",
    "a red triangle and a blue square",
    "a red circle, a blue square and a yellow cross",
    "three orange triangles",
)
seed = options.seed
with step("load"):
    img = IMG(preset=preset)

# %% 1. Images of validation prompts, their tokens c, and the unit in which corrections are measured
count = options.images
captions = [str(prompt) for prompt in benchmark(count, "validation", seed)]
seeds = list(range(seed, seed + count))
with step("draw"):
    images = img.backbone.draw(captions, seeds, progress="images")
c = img.backbone.tokens(to_pil(images))

unit = matrix_norm(c - c.roll(1, 0)).median().item()

# %% 2. One image under right and wrong prompts: of eight the one that the MLLM is most content with
eight, eight_seeds = [RIGHT] * 8, list(range(seed, seed + 8))
with step("draw"):
    drawn = img.backbone.draw(eight, eight_seeds, progress="eight images of one prompt")
with step("look"):
    best = int(np.argmax(img.satisfaction(to_pil(drawn), eight, eight_seeds)))
image = to_pil(drawn)[best]
own = img.backbone.tokens([image])
prompts = [RIGHT, *WRONG]
with step("align"):
    aligned = img.align([image] * len(prompts), prompts, [seed] * len(prompts), passes=1)
with step("draw again"):
    again = img.backbone.draw(prompts, [seed + best] * len(prompts), aligned)

# %% 3. How far each token was moved, painted where the Resampler reads that token
moved = (aligned - own).norm(dim=-1) / unit  # (prompts, N)
token_maps = img.backbone.image_prompt.token_maps([image])[0].cpu()  # (N, side, side)
painted = (torch.einsum("pn,nxy->pxy", moved, token_maps) / token_maps.sum(0)).numpy()
sizes_here = (matrix_norm(aligned - own) / unit).tolist()
for prompt, size in zip(prompts, sizes_here):
    print(f"  one image of {RIGHT!r}, correction under {prompt!r}: {size:.2f}  (n 1)")

# %% 4. Where the tokens looked while they were corrected for the first wrong prompt
h, _ = img.guidance([image], WRONG[:1], [seed])
img.turns.bring(img.aligner)
device = next(img.aligner.parameters()).device
layers = []
with torch.no_grad():
    img.aligner(h.to(device).float(), own.to(device), maps=layers)
attention = torch.stack(layers).mean(2)[:, 0].cpu().numpy()  # (depth, N, L + N), mean over heads

# The columns are the words of the question, None at image patches, and then the tokens themselves.
# What a question about this prompt has more than one about nothing is the prompt.
words = img.guide.words(image, img.guide.question(WRONG[0], seed))
without = img.guide.words(image, img.guide.question("", seed))
start = [word == other for word, other in zip(words, without)].index(False)
end = start + len(words) - len(without)
kind = np.array(["words of the question"] * len(words) + ["the tokens themselves"] * own.shape[1])
kind[[k for k, word in enumerate(words) if word is None]] = "image patches"
kind[start:end] = "words of the prompt"
kind[end : len(words)] = "after the prompt"

# %% 5. A fresh aligner: f(h, c) = c, and where the gradient of ||target - f(h, c)||^2 arrives in
# two steps of SGD
training = preset.training
sizes = training.depth, training.heads, training.head_dim
fresh = ImplicitAligner(img.aligner.width, img.aligner.guidance_width, *sizes)
h, _ = img.guidance(to_pil(images[:1]), captions[:1], [seed])
source, target = c[:1], c[1:2]
with torch.no_grad():
    change = (fresh(h, source, passes=3) - source).abs().max()
print(f"a fresh aligner: max |f(h, c) - c| = {change:.1g} after three passes")
for name in ("first", "second"):
    fresh.zero_grad()
    (target - fresh(h, source)).square().sum().backward()
    reached = sum(p.numel() for p in fresh.parameters() if p.grad.any())
    share = reached / sum(p.numel() for p in fresh.parameters())
    print(f"share of its parameters that the gradient reaches in the {name} step: {share:.3f}")
    torch.optim.SGD(fresh.parameters(), lr=1e-3).step()

# %% 6. Many images, each under its own prompt and under that of another image of its category
others = captions[len(CATEGORIES) :] + captions[: len(CATEGORIES)]
judged = preset.world == "tiny"
label = "edits that the oracle asks for" if judged else "whose prompt it is compared with"
sizes, names = [], []
for wanted, whose in ((captions, "its own prompt"), (others, "another image's")):
    with step("look and align"):
        f = img.align(images, wanted, seeds, passes=1)
    sizes.append(matrix_norm(f - c).numpy() / unit)
    if judged:
        parsed = [parse(prompt) for prompt in wanted]
        for verdict, prompt in zip(judge(images, parsed), parsed):
            edits = len(correct(verdict.found, prompt)[0])
            names.append(str(edits) if edits < 3 else "3 or more")
    else:
        names += [whose] * count
difference = said(mean_interval(sizes[1] - sizes[0], captions), "+.2f")
difference += f" (n {count}, paired)"
print(f"size under another prompt of its category minus under its own: {difference}")
groups, means = {}, {}
for name in sorted(set(names)):
    here = np.array(names) == name
    groups[name] = values = np.concatenate(sizes)[here]
    mean = mean_interval(values, np.array(captions * 2)[here])
    print(f"  {label} {name:>16}: {said(mean, '.2f')}  (n {len(values)})")
    means[f"{name} (n {len(values)})"] = mean


# %% 7. The picture: above, what f changes of the image, and what is drawn with that
def draw_prompts(above: np.ndarray, below: np.ndarray) -> None:
    """Paint corrections over the faded image, and show the images that they lead to."""
    most, area = painted.max(), (0, 1, 1, 0)
    for k, picture_again in enumerate(to_pil(again)):
        strength = painted[k] / most
        title = f'"{prompts[k]}"\ncorrection {sizes_here[k]:.2f}'
        picture(above[k], image, title, extent=area, alpha=0.45)
        look = {"cmap": "inferno_r", "vmin": 0, "vmax": 1, "interpolation": "bicubic"}
        above[k].imshow(strength, extent=area, alpha=0.85 * strength**0.7, **look)
        picture(below[k], picture_again)
    above[0].set_ylabel("one image, and what\nf changes of it")
    below[0].set_ylabel("drawn again with\nf(h, c)")


blocks = [([2.5, 2.2], [1] * len(prompts)), ([3.3], [1, 2.2]), ([3.2], [1, 1])]
figure, (above, below, (left, right), (lower, last)) = sheet(10, *blocks)
draw_prompts(above, below)

# How attention is divided, and all of it in the layer that looks most at the prompt.
shares = {}
for name in dict.fromkeys(kind):
    shares[name] = attention[:, :, kind == name].sum(-1).mean(-1)
layer = shares["words of the prompt"].argmax()
patches = attention[layer][:, kind == "image patches"]
patches = patches / patches.max(1, keepdims=True)
side, across = math.isqrt(patches.shape[1]), math.isqrt(len(patches))
squares = np.pad(patches.reshape(-1, side, side), [(0, 0), (0, 1), (0, 1)], constant_values=np.nan)
mosaic = rearrange(squares, "(a b) h w -> (a h) (b w)", a=across)
title = f"... at the {side} x {side} patches of the image\na square for each token, its own scale"
picture(left, mosaic, cmap="inferno_r")
left.set_title(title)
asked = np.flatnonzero(kind[: len(words)] != "image patches")
shown = right.imshow(attention[layer][:, asked], cmap="inferno_r", aspect="auto", vmin=0)
right.set_xticks(range(len(asked)), [words[k] for k in asked], rotation=60, ha="right")
for text, k in zip(right.get_xticklabels(), asked):
    text.set_color(GREEN if start <= k < end else "black")
title = f"... at the words of the question (layer {layer + 1}; green: the prompt)"
right.set(title=title, ylabel="image token")
right.figure.colorbar(shown, ax=right, label="attention, mean over heads", pad=0.01)
depth, ends = np.arange(len(attention)) + 1, 0
for name, share in shares.items():
    lower.barh(depth, share, left=ends, label=name)
    ends = ends + share
lower.set(xlim=(0, 1), yticks=depth, ylabel="layer", xlabel="share of attention, mean over tokens")
lower.invert_yaxis()
lower.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.45, 1.0), frameon=False)

bars(last, means, color=ORANGE)
for x, values in enumerate(groups.values()):
    last.plot([x] * len(values), values, "o", ms=3, color=BLUE)
last.set(xlabel=label, ylabel="||f(h, c) - c||  (1: another picture)")
caption = (
    f"above: one image of {RIGHT!r} (seed {seed + best}, of eight the one that the MLLM likes "
    f"best); below right: n {count} images, each under its own prompt and under another's; bars: "
    "mean and its 95 % interval over captions"
)
save(figure, options, "04_implicit_aligner", caption)

# %% 8. Its upper part alone: IMG at a glance
glance, rows = sheet(10, blocks[0])
draw_prompts(*rows)
caption = "one image under five prompts, one seed; the first prompt is right"
save(glance, options, "at-a-glance", caption)
