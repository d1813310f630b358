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
3. where the tokens look in each layer, softmax(q k / sqrt(d)): at the image patches, each word of
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
backbone = img.backbone

# %% 1. Images of validation prompts, their tokens c, and the unit in which corrections are measured
count = options.images
captions = [str(prompt) for prompt in benchmark(count, "validation", seed)]
seeds = list(range(seed, seed + count))
with step("draw"):
    images = backbone.draw(captions, seeds, progress="images")
c = backbone.tokens(to_pil(images))
unit = matrix_norm(c - c.roll(1, 0)).median().item()

# %% 2. One image under right and wrong prompts: of eight the one that the MLLM is most content with
eight = [RIGHT] * 8
eight_seeds = list(range(seed, seed + 8))
prompts = [RIGHT, *WRONG]
many = len(prompts)
with step("one image under five prompts"):
    eight_images = to_pil(backbone.draw(eight, eight_seeds))
    best = int(np.argmax(img.satisfaction(eight_images, eight, eight_seeds)))
    image = eight_images[best]
    own = backbone.tokens([image])
    aligned = img.align([image] * many, prompts, [seed] * many, passes=1)
    again = to_pil(backbone.draw(prompts, [seed + best] * many, aligned))

# %% 3. How far each token was moved, painted where the Resampler reads that token
moved = (aligned - own).norm(dim=-1) / unit  # (prompts, N)
token_maps = backbone.image_prompt.token_maps([image])[0].cpu()  # (N, side, side)
painted = torch.einsum("pn,nxy->pxy", moved, token_maps) / token_maps.sum(0)
painted = (painted / painted.max()).numpy()
sizes_here = (matrix_norm(aligned - own) / unit).tolist()
for prompt, size in zip(prompts, sizes_here):
    print(f"  one image of {RIGHT!r}, correction under {prompt!r}: {size:.2f}  (n 1)")

# %% 4. Where the tokens looked while they were corrected for the first wrong prompt
h, _ = img.guidance([image], WRONG[:1], [seed])
img.turns.bring(img.aligner)
device = next(img.aligner.parameters()).device
maps = []
with torch.no_grad():
    img.aligner(h.to(device).float(), own.to(device), maps=maps)
attention = torch.stack(maps)[:, 0].mean((1, 2)).cpu()  # (depth, L + N), over heads and tokens

# The columns are the states of the MLLM, with a word each but for the image patches, and then the
# other tokens.
ids = img.guide.inputs([image], [img.guide.question(WRONG[0], seed)])["input_ids"][0]
asked = (ids != img.guide.model.config.image_token_id).nonzero().flatten().tolist()
words = [img.guide.processor.tokenizer.decode(ids[k]).strip() for k in asked]
at_tokens = attention[:, len(ids) :].sum(1)
at_patches = 1 - attention[:, asked].sum(1) - at_tokens
looked_at = torch.column_stack([at_patches, at_tokens, attention[:, asked]])
places = ["image patches", "other tokens", *words]

# %% 5. A fresh aligner: f(h, c) = c, and where the gradient of ||target - f(h, c)||^2 arrives in
# two steps of SGD
training = preset.training
sizes = training.depth, training.heads, training.head_dim
fresh = ImplicitAligner(img.aligner.width, img.aligner.guidance_width, *sizes)
h, _ = img.guidance(to_pil(images[:1]), captions[:1], [seed])
source, target = c[:1], c[1:2]
change = (fresh(h, source, passes=3) - source).abs().max()
print(f"a fresh aligner: max |f(h, c) - c| = {change:.1g} after three passes")
for name in ("first", "second"):
    fresh.zero_grad()
    (target - fresh(h, source)).square().sum().backward()
    reached = sum(p.numel() for p in fresh.parameters() if p.grad.any())
    share = reached / count_parameters(fresh)
    print(f"share of its parameters that the gradient reaches in the {name} step: {share:.3f}")
    torch.optim.SGD(fresh.parameters(), lr=1e-3).step()

# %% 6. Many images, each under its own prompt and under that of another image of its category
others = captions[len(CATEGORIES) :] + captions[: len(CATEGORIES)]
judged = preset.world == "tiny"
label = "edits that the oracle asks for" if judged else "compared with"
sizes, names = [], []
for wanted, whose in ((captions, "its own prompt"), (others, "another image's")):
    with step("look and align"):
        f = img.align(images, wanted, seeds, passes=1)
    sizes.append(matrix_norm(f - c).numpy() / unit)
    if not judged:
        names += [whose] * count
        continue
    parsed = [parse(prompt) for prompt in wanted]
    for verdict, prompt in zip(judge(images, parsed), parsed):
        edits, _ = correct(verdict.found, prompt)
        names.append(str(len(edits)) if len(edits) < 3 else "3 or more")
difference = said(mean_interval(sizes[1] - sizes[0], captions), "+.2f")
print("size under another prompt of its category minus under its own:", end=" ")
print(f"{difference} (n {count}, paired)")
means = {}
for name in sorted(set(names)):
    here = np.array(names) == name
    values = np.concatenate(sizes)[here]
    mean = mean_interval(values, np.array(captions * 2)[here])
    print(f"  {label} {name:>16}: {said(mean, '.2f')}  (n {len(values)})")
    means[f"{name} (n {len(values)})"] = mean


# %% 7. The picture: above, what f changes of the image, and what is drawn with that
def draw_prompts(above: np.ndarray, below: np.ndarray) -> None:
    """Paint corrections over the faded image, and show the images that they lead to."""
    area = (0, 1, 1, 0)
    for k, strength in enumerate(painted):
        size = f"correction {sizes_here[k]:.2f}"
        picture(above[k], image, f'"{prompts[k]}"', size, extent=area, alpha=0.45)
        look = {"vmin": 0, "vmax": 1, "interpolation": "bicubic", "extent": area}
        above[k].imshow(strength, "inferno_r", alpha=0.85 * strength**0.7, **look)
        picture(below[k], again[k])
    above[0].set_ylabel("one image, and what\nf changes of it")
    below[0].set_ylabel("drawn again with\nf(h, c)")


rows = (2.8, [1] * many), (2.2, [1] * many)
figure, (above, below, [looks], [sizes_axis]) = sheet(10, *rows, (2.5, [1]), (3.2, [1]))
draw_prompts(above, below)

looks.imshow(looked_at, "inferno_r", aspect="auto")
looks.set_xticks(range(len(places)), places, rotation=60, ha="right")
looks.set(yticks=range(len(attention)), ylabel="layer", title="where the tokens look")
bars(sizes_axis, means, color=ORANGE)
sizes_axis.set(xlabel=label, ylabel="||f(h, c) - c||  (1: another picture)")
caption = (
    f"above: one image of {RIGHT!r} (seed {seed + best}, of eight the one that the MLLM likes "
    f"best); below: n {count} images, each under its own prompt and under another's; bars: "
    "mean and its 95 % interval over captions"
)
save(figure, options, "04_implicit_aligner", caption)

# %% 8. Its upper part alone: IMG at a glance
glance, (above, below) = sheet(10, *rows)
draw_prompts(above, below)
caption = "one image under five prompts, one seed; the first prompt is right"
save(glance, options, "at-a-glance", caption)
