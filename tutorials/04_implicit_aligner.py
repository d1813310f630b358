# %% [markdown]
"""# How does the Implicit Aligner decide what to change in an image prompt, and how much?

    f(h, c) = c + zero_linear(norm_out(proj_out(x))),   x = layers(c, proj_in(h))    (Figs. 9, 10)

h are the MLLM's last hidden states: one for each patch of the image, one for each word of the
question. c are the image's own tokens, see [03](03_image_prompt.py). Sizes of the correction are in
units of the distance between the tokens of two images (the median over pairs), so 1 means "as far
as another picture".

Not as in the paper: its release applies f three times in a row. Here it is one pass, as validation
prompts chose for the twin. The twin was also trained on right images that are their own target, so
that it learns to leave them alone; the paper trains on losers only.

In full: less than a minute on two cores.
"""

# %%
from common import bars, begin, option, picture, save, sheet, step

help_text = "how many images are drawn for the size of the correction"
options, preset = begin(__doc__, images=option(128, help_text, least=8, quick=8))

import numpy as np
import torch
from torch.linalg import matrix_norm

from img_minimal.aligner import ImplicitAligner
from img_minimal.devices import count_parameters
from img_minimal.evaluate.intervals import mean_interval, said
from img_minimal.files import to_pil
from img_minimal.pipeline import IMG
from img_minimal.plots import ORANGE
from img_minimal.tiny.edits import correct
from img_minimal.tiny.grammar import CATEGORIES, benchmark, parse
from img_minimal.tiny.oracle import judge

# %% [markdown]
# ## 1. Many images, and the unit in which corrections are measured

# %%
count, seed = options.images, options.seed
captions = [str(prompt) for prompt in benchmark(count, "validation", seed)]
seeds = list(range(seed, seed + count))
with step("load"):
    img = IMG(preset=preset)
backbone = img.backbone
with step("draw"):
    images = backbone.draw(captions, seeds, progress="images")
c = backbone.tokens(to_pil(images))
unit = matrix_norm(c - c.roll(1, 0)).median().item()

# %% [markdown]
# ## 2. It starts as "keep the image as it is", and learns all the same
#
# zero_linear starts at zero, so f(h, c) = c. Of ||target - f(h, c)||^2 only zero_linear gets a
# gradient in the first step, and all the rest from the second on, when it is no longer zero.

# %%
training = preset.training
sizes = training.depth, training.heads, training.head_dim
fresh = ImplicitAligner(img.aligner.width, img.aligner.guidance_width, *sizes)
h, _ = img.guidance(to_pil(images[:1]), captions[:1], [seed])
change = (fresh(h, c[:1], passes=3) - c[:1]).abs().max()
print(f"a fresh aligner: max |f(h, c) - c| = {change:.1g} after three passes")
for name in ("first", "second"):
    fresh.zero_grad()
    (c[1:2] - fresh(h, c[:1])).square().sum().backward()
    reached = sum(p.numel() for p in fresh.parameters() if p.grad.any())
    share = reached / count_parameters(fresh)
    print(f"the gradient reaches {share:.1%} of its parameters in the {name} step")
    torch.optim.SGD(fresh.parameters(), lr=1e-3).step()

# %% [markdown]
# ## 3. One image under a right and four wrong prompts
#
# Of eight images, that with which the MLLM is most content. How far each token is moved is painted
# where the Resampler reads that token; below, what is drawn with the corrected tokens. Watch the
# yellow cross come out orange: a colour is easily lost in tokens, see [03](03_image_prompt.py).

# %%
RIGHT = "a red circle and a blue square"
WRONG = (  # the first is the one whose attention is shown
    "a purple circle and a blue square",
    "a red triangle and a blue square",
    "a red circle, a blue square and a yellow cross",
    "three orange triangles",
)
eight, eight_seeds = [RIGHT] * 8, list(range(seed, seed + 8))
prompts = [RIGHT, *WRONG]
many = len(prompts)
with step("one image under five prompts"):
    eight_images = to_pil(backbone.draw(eight, eight_seeds))
    best = int(np.argmax(img.satisfaction(eight_images, eight, eight_seeds)))
    image = eight_images[best]
    own = backbone.tokens([image])
    aligned = img.align([image] * many, prompts, [seed] * many, passes=1)
    again = to_pil(backbone.draw(prompts, [seed + best] * many, aligned))
moved = (aligned - own).norm(dim=-1) / unit  # (prompts, N)
token_maps = backbone.image_prompt.token_maps([image])[0].cpu()  # (N, side, side)
painted = torch.einsum("pn,nxy->pxy", moved, token_maps) / token_maps.sum(0)
sizes_here = (matrix_norm(aligned - own) / unit).tolist()

# %% [markdown]
# ## 4. Where the tokens look while they are corrected
#
# That is softmax(q k / sqrt(d)) in each layer, for the first wrong prompt: at the image patches,
# each word of the question, or the other tokens. A word's state has read the image before it, so
# "looks at the word 'purple'" means "asks what the MLLM thought when it read 'purple' after seeing
# this image".

# %%
h, _ = img.guidance([image], WRONG[:1], [seed])
img.turns.bring(img.aligner)
device = next(img.aligner.parameters()).device
maps = []
with torch.no_grad():
    img.aligner(h.to(device).float(), own.to(device), maps=maps)
attention = torch.stack(maps)[:, 0].mean((1, 2)).cpu()  # (depth, L + N), over heads and tokens
ids = img.guide.inputs([image], [img.guide.question(WRONG[0], seed)])["input_ids"][0]
asked = (ids != img.guide.model.config.image_token_id).nonzero().flatten().tolist()
words = [img.guide.processor.tokenizer.decode(ids[k]).strip() for k in asked]
at_tokens = attention[:, len(ids) :].sum(1)
at_patches = 1 - attention[:, asked].sum(1) - at_tokens
looked_at = torch.column_stack([at_patches, at_tokens, attention[:, asked]])
places = ["image patches", "other tokens", *words]

# %% [markdown]
# ## 5. The size of the correction, by how much is wrong
#
# Every image under its own prompt and under that of another image of its category, by the number of
# edits that the oracle asks for. Without an oracle: under its own prompt, and under the other.

# %%
others = captions[len(CATEGORIES) :] + captions[: len(CATEGORIES)]
wanted = captions + others
with step("look and align"):
    f = img.align(images.repeat(2, 1, 1, 1), wanted, seeds * 2, passes=1)
sizes = matrix_norm(f - c.repeat(2, 1, 1)).numpy() / unit  # (2 count,)
label, names = "compared with", ["its own prompt"] * count + ["another image's"] * count
if preset.world == "tiny":
    label = "edits that the oracle asks for"
    parsed = list(map(parse, wanted))
    for k, verdict in enumerate(judge(images.repeat(2, 1, 1, 1), parsed)):
        edits = len(correct(verdict.found, parsed[k])[0])
        names[k] = str(edits) if edits < 3 else "3 or more"
means = {}
for name in sorted(set(names)):
    here = np.array(names) == name
    mean = mean_interval(sizes[here], np.array(captions * 2)[here])
    print(f"{label} {name}: {said(mean, '.2f')}  (n {sum(here)})")
    means[f"{name} (n {sum(here)})"] = mean

# %% [markdown]
# ## 6. The picture
#
# It goes on with how f is trained, and why on two terms more than a regression:
# [05, the preference objective](05_preference_objective.py).

# %%
grid = [1] * many + [0.08]  # images, and the scale of their colours
rows = (2.4, grid), (1.7, grid), (2.4, [60, 1]), (2.4, [1])
figure, (above, below, [looks, looks_scale], [bars_axis]) = sheet(9, *rows)
area, most = (0, 1, 1, 0), painted.max()
for k, strength in enumerate(painted.numpy()):
    picture(above[k], image, f'"{prompts[k]}"', f"correction {sizes_here[k]:.2f}", extent=area)
    look = {"vmin": 0, "vmax": most, "interpolation": "bicubic", "extent": area}
    faint = 0.85 * (strength / most) ** 0.7
    heat = above[k].imshow(strength, "inferno_r", alpha=faint, **look)
    picture(below[k], again[k])
figure.colorbar(heat, cax=above[-1], label="tokens moved by")
above[0].set_ylabel("one image, and\nwhat f changes")
below[0].set_ylabel("drawn again\nwith f(h, c)")
heat = looks.imshow(looked_at, "inferno_r", aspect="auto", vmin=0)
figure.colorbar(heat, cax=looks_scale, label="share of attention")
looks.set_xticks(range(len(places)), places, rotation=60, ha="right")
looks.set(yticks=range(len(attention)), ylabel="layer", title="where the tokens look")
bars(bars_axis, means, color=ORANGE)
bars_axis.set(xlabel=label, ylabel="||f(h, c) - c||")
caption = (
    f"above: one image of {RIGHT!r} (seed {seed + best}, of eight the one that the MLLM likes "
    f"best); sizes: 1 is as far as another picture; bars: n {count} images, each under its own "
    "prompt and under another's, mean and its 95 % interval over captions"
)
parts = [f"{mean['value']:.2f} for {name}" for name, mean in means.items()]
conclusion = f"By {label}, f changes the tokens by {', '.join(parts)}; 1 is another picture."
save(figure, options, "04_implicit_aligner", caption, conclusion)
