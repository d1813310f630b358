# %% [markdown]
"""How does the Implicit Aligner decide what to change in an image prompt, and how much?

    f(h, c) = c + zero_linear(norm_out(proj_out(x))),   x = layers(c, proj_in(h))            (Figs. 9 and 10)

h are the MLLM's last hidden states: one for each patch of the image, one for each word of the question. c are the
image's own tokens. `zero_linear` starts at zero, so f starts as "keep the image as it is". Shown here:

1. one image under a right and several wrong prompts: which tokens are corrected, ||f(h, c) - c|| for each, painted
   where the Resampler reads that token, and what the base draws with the corrected tokens;
2. identity at the start, and why it learns all the same: only zero_linear gets a gradient in the first step, all the
   rest from the second on, when zero_linear is no longer zero;
3. where each token looks, softmax(q k / sqrt(d)), in each layer: at the image patches, at the words of the question,
   or at the other tokens. A word's state has read the image before it, so "looks at the word 'purple'" means "asks
   what the MLLM thought when it read 'purple' after having seen this image";
4. size of the correction against how misaligned the image is: the number of edits that the oracle asks for. Where
   there is no oracle, an image under its own prompt against the same image under another image's prompt.

Sizes are in units of the distance between the tokens of two images (the median over pairs), so 1 means "as far as
another picture". One pass of the aligner.
"""

# %% Options
from dataclasses import dataclass

from common import Options, begin, check, chosen_preset, option, save, step


@dataclass
class Config(Options):
    """The command line."""

    images: int = option(128, "how many images are drawn for the size of the correction")


options = begin(Config, __doc__)
check(options.images >= 8, f"--images is {options.images}, expected 8 or more")

import numpy as np
import torch
from figures import implicit_aligner
from torch import Tensor

from img_minimal.aligner import ImplicitAligner
from img_minimal.evaluate.intervals import mean_interval
from img_minimal.load import load_img
from img_minimal.files import to_pil
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
preset, seed = chosen_preset(options), options.seed
with step("load"):
    img = load_img(preset)

# %% 1. Images of validation prompts, their tokens c, and the unit in which corrections are measured
count = 8 if options.quick else options.images
captions = [str(prompt) for prompt in benchmark(count, "validation", seed)]
with step("draw"):
    images = img.backbone.draw(captions, list(range(seed, seed + count)), progress="images")
c = img.backbone.tokens(to_pil(images))


def size_of(correction: Tensor) -> Tensor:
    """||f(h, c) - c||, over tokens and channels: (B, N, D) -> (B,)."""
    return correction.float().square().sum((-2, -1)).sqrt()


unit = size_of(c - c.roll(1, 0)).median().item()  # the distance between two images

# %% 2. One image, of eight of RIGHT the one that the MLLM is most content with, under right and wrong prompts
with step("draw"):
    eight = img.backbone.draw([RIGHT] * 8, list(range(seed, seed + 8)), progress="eight images of one prompt")
with step("look"):
    best = int(np.argmax(img.satisfaction(to_pil(eight), [RIGHT] * 8, range(seed, seed + 8))))
image, prompts = eight[best : best + 1], [RIGHT, *WRONG]
[picture] = to_pil(image)
own = img.backbone.tokens([picture])
with step("align"):
    aligned = img.align(image.expand(len(prompts), -1, -1, -1), prompts, [seed] * len(prompts), passes=1)
with step("draw again"):
    again = img.backbone.draw(prompts, [seed + best] * len(prompts), aligned, progress="with corrected tokens")

# %% 3. How far each token was moved, painted where the Resampler reads that token
moved = (aligned - own).float().square().sum(-1).sqrt() / unit  # (prompts, N)
places = img.backbone.image_prompt.places([picture])[0].cpu()  # (N, side, side)
painted = torch.einsum("pn,nxy->pxy", moved, places) / places.sum(0)
sizes_here = (size_of(aligned - own) / unit).tolist()
for prompt, size in zip(prompts, sizes_here):
    print(f"  one image of {RIGHT!r}, correction under {prompt!r}: {size:.2f}  (n 1)")

# %% 4. Where the tokens looked while they were corrected for the first wrong prompt: (depth, heads, N, L + N)
with step("look"):
    h, _ = img.guidance([picture], [WRONG[0]], [seed])
img.placement.bring("aligner", img.aligner)
device = next(img.aligner.parameters()).device
maps = img.aligner.attention_maps(h.to(device).float(), own.to(device)).mean(2)[:, 0].cpu()
# The columns are the words of the question, None at image patches, and then the tokens themselves. What a question
# about this prompt and one about nothing do not share is the prompt.
words, without = (img.guide.words(picture, img.guide.question(prompt, seed)) for prompt in (WRONG[0], ""))
columns = implicit_aligner.kinds(words, without, own.shape[1])

# %% 5. A fresh aligner: f(h, c) = c, and where the gradient of ||target - f(h, c)||^2 arrives in two steps of SGD
with step("look"):
    h, _ = img.guidance(to_pil(images[:1]), captions[:1], [seed])
attention = img.aligner.layers[0][0]
fresh = ImplicitAligner(
    img.aligner.width, img.aligner.guidance_width, len(img.aligner.layers), attention.heads, attention.head_dim
).to(device)
h, source, target = h.float().to(device), c[:1].to(device), c[1:2].to(device)
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
sizes, names = [], []
for wanted, own_prompt in ((captions, True), (others, False)):
    with step("look and align"):
        f = img.align(images, wanted, range(seed, seed + count), passes=1)
    sizes.append(size_of(f - c).numpy() / unit)
    if preset.world == "tiny":  # how misaligned: the number of edits that the oracle asks for
        parsed = [parse(prompt) for prompt in wanted]
        edits = [len(correct(verdict.found, p)[0]) for verdict, p in zip(judge(images, parsed), parsed)]
        names += [str(n) if n < 3 else "3 or more" for n in edits]
    else:
        names += ["its own prompt" if own_prompt else "another image's"] * count
difference = "{value:+.2f} [{low:+.2f}, {high:+.2f}]".format(**mean_interval(sizes[1] - sizes[0], captions))
print(f"size under another prompt of its category minus under its own: {difference} (n {count}, paired)")
label = "edits that the oracle asks for" if preset.world == "tiny" else "whose prompt it is compared with"
groups = {}
for name in sorted(set(names)):
    chosen = np.array(names) == name
    values = np.concatenate(sizes)[chosen]
    mean = mean_interval(values, [caption for caption, here in zip(captions * 2, chosen) if here])
    groups[name] = values, mean
    print(f"  {label} {name:>16}: {mean['value']:.2f} [{mean['low']:.2f}, {mean['high']:.2f}]  (n {chosen.sum()})")

# %% 7. The picture
figure = implicit_aligner.draw(
    prompts, picture, painted, sizes_here, to_pil(again), maps, words, columns, groups, label
)  # fmt: skip
caption = (
    f"{preset.name}, --seed {seed}; above: one image of {RIGHT!r} (seed {seed + best}, of eight the one that the MLLM "
    f"likes best);\nbelow right: n {count} images, each under its own prompt and under another's; orange: mean "
    "and its 95 % interval over captions"
)
save(figure, options, "04_implicit_aligner", caption)

# %% 8. Its upper part alone: IMG at a glance
glance = implicit_aligner.glance(prompts, picture, painted, sizes_here, to_pil(again))
save(
    glance, options, "at-a-glance", f"{preset.name}: one image under five prompts, one seed; the first prompt is right"
)
