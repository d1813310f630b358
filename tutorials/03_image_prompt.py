# %% [markdown]
"""What does an image say as a prompt, and what happens when it disagrees with the text?

IMG corrects nothing but 16 image tokens, so whatever they cannot say it cannot repair. Shown:

1. reconstruction: the tokens of an image and an empty prompt; how near does the drawing come?
2. disagreement: the text asks for one picture, the tokens are another's; the scale decides who is
   heard;
3. exchange: two prompts, two token sets, the four combinations;
4. the two branches of a cross-attention: their sizes at every layer.

    tokens   c = Resampler(CLIP penultimate states of the image)         (N, D); SDXL: 16 x 2048
    layer    to_out( A_text + s A_image ),   A_x = softmax(Q K_x^T / sqrt(d)) V_x      (sdxl.py)

so an image token is heard at scale s in proportion to s ||A_image|| / ||A_text||. Without text the
distance of tokens,

    rest = ||c(drawn from c) - c||^2 / ||c' - c||^2,   c' the tokens of another image,

tells how much of an image its tokens hold: 0 is "the same picture".
"""

# %% Options
from common import begin, check, curve, option, picture, save, sheet, step

help_text = "how many images the curves are about"
options, preset = begin(__doc__, images=option(80, help_text, least=4, quick=4))
opens = "this tutorial opens the cross-attentions of SDXL's UNet"
check(preset.backbone == "sdxl", f"{opens}, which {preset.name} has not; see 04 and 07")

from itertools import product

import numpy as np
import torch

from img_minimal.backbone import open_backbone
from img_minimal.evaluate.intervals import bootstrap_ratio, mean_interval, said
from img_minimal.files import to_pil
from img_minimal.hub.parts import ADAPTER
from img_minimal.hub.where import fetch
from img_minimal.plots import BLUE, GREY, ORANGE
from img_minimal.sdxl import cross_attentions, inject
from img_minimal.tiny.grammar import COLOURS, FORMS, HELD_OUT, Group, parse
from img_minimal.tiny.oracle import judge

SCALES = (0.0, 0.3, 1.0) if options.quick else (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
PAIR = ["a red circle and a blue square", "three yellow triangles"]
seed = options.seed
with step("load"):
    preset = preset.changed(scale_end=1.0)  # the same in all steps, so that one number says it
    backbone = open_backbone(fetch(preset, *ADAPTER, "unet", "base"))

# %% 1. Images of one shape each, which the base draws well, so that what is drawn later tells whom
# it listened to
count = options.images
single = []
for colour, form in product(COLOURS, FORMS):
    if (colour, form) not in HELD_OUT:
        single.append(str(Group(1, colour, form)))
prompts = [single[(7 * k) % len(single)] for k in range(count)]
seeds = list(range(seed + 100, seed + 100 + count))
with step("draw"):
    pictures = to_pil(backbone.draw(prompts, seeds, progress="images"))
c = backbone.tokens(pictures)

# %% 2. Reconstruction: the tokens and no words


def rest(images) -> dict[str, float]:
    """Compute `rest` of drawn images, with its interval; the other image is the next one."""
    left = (backbone.tokens(to_pil(images)) - c).square().sum((1, 2))
    apart = (c.roll(1, 0) - c).square().sum((1, 2))
    return bootstrap_ratio(left.numpy(), apart.numpy(), prompts)


with step("draw from tokens alone"):
    alone = backbone.draw([""] * count, seeds, c, scale=1.0, progress="from tokens alone")
print(f"rest after drawing from tokens alone: {said(rest(alone))}, n {count}")

# %% 3. Disagreement: the text asks for the next image's prompt. Who is heard, at every scale?
texts = prompts[1:] + prompts[:1]
wishes = {}
if preset.world == "tiny":  # the oracle says whose prompt is satisfied
    wishes = {"text": texts, "tokens": prompts}
heard = {"rest": [], "text": [], "tokens": []}
with step("draw from both"):
    for scale in SCALES:
        images = backbone.draw(texts, seeds, c, scale=scale, progress=f"scale {scale}")
        shares = {"rest": rest(images)}
        for name, wanted in wishes.items():
            verdicts = judge(images, [parse(prompt) for prompt in wanted])
            strict = [verdict.strict for verdict in verdicts]
            shares[name] = mean_interval(np.array(strict), texts)
        words = []
        for name, share in shares.items():
            heard[name].append(share)
            words.append(f"{name} {said(share, '.2f')}")
        print(f"scale {scale}: {', '.join(words)}  (n {count})")

# %% 4. Exchange: two images, each drawn again from its tokens alone, and under the other's prompt
two_seeds = [seed + 1, seed + 2]
with step("exchange"):
    pair = to_pil(backbone.draw(PAIR, two_seeds))
    own = backbone.tokens(pair)
    alone = backbone.draw(["", ""], two_seeds, own, scale=1.0)
    columns = {"image": pair, "its tokens,\nno words": to_pil(alone)}
    for scale in SCALES:
        images = backbone.draw(PAIR[::-1], two_seeds, own, scale=scale)
        columns[f"s = {scale}"] = to_pil(images)

# %% 5. The two branches: one denoising step at half of the noise, with a look into every
# cross-attention. Sizes are root mean squares of A_text and A_image.
backbone.turns.bring(backbone.pipe, backbone.branch)
unet = backbone.pipe.unet
sizes = {"text": [], "image": []}


def look(attn, args, kwargs) -> None:
    """Measure what both branches of a layer say, before it runs."""
    terms = attn.processor.attend(attn, args[0], kwargs["encoder_hidden_states"])
    for name, (output, _) in terms.items():
        sizes[name].append(output.float().square().mean().sqrt().item())


for attn in cross_attentions(unet).values():
    attn.register_forward_pre_hook(look, with_kwargs=True)  # nothing is drawn after this
embeds, _, pooled, _ = backbone.pipe.encode_prompt(PAIR[0], do_classifier_free_guidance=False)
side = unet.config.sample_size
pixels = side * backbone.pipe.vae_scale_factor
generator = torch.Generator().manual_seed(seed)
noise = torch.randn(1, 4, side, side, generator=generator).to(embeds)
size_ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]]).to(pooled)
added = {"text_embeds": pooled, "time_ids": size_ids}
tokens = own[:1].to(embeds)
with torch.no_grad(), inject(unet, backbone.branch, tokens, preset.sampling.scale):
    unet(noise, 500, embeds, added_cond_kwargs=added)
ratios = np.divide(sizes["image"], sizes["text"])
extremes = f"from {ratios.min():.2f} to {ratios.max():.2f}"
print(f"||A_image|| / ||A_text||: {extremes} over {len(ratios)} layers (n 1)")

# %% 6. The picture: the exchange; who is heard by scale, and both branches by layer
grid = [1] * len(columns)
figure, (*rows, (left, right)) = sheet(11, (2.2, grid), (2.2, grid), (4, [1, 1]))
for k, row in enumerate(rows):
    for axis, (title, images) in zip(row, columns.items()):
        picture(axis, images[k], title)
    row[0].set_ylabel(f'tokens of\n"{PAIR[k]}"', fontsize=8)
    row[2].set_ylabel(f'text:\n"{PAIR[1 - k]}"', fontsize=8)
for name, colour, label in (
    ("text", BLUE, "text is satisfied"),
    ("tokens", ORANGE, "tokens' image is satisfied"),
    ("rest", GREY, "rest: distance to the tokens' image"),
):
    if heard[name]:
        curve(left, SCALES, heard[name], fmt="o-", label=label, color=colour)
left.set(
    title="text asks for one thing, tokens for another",
    xlabel="scale s of the image tokens",
    ylabel="share, or ratio",
)
left.legend()
for name, size in sizes.items():
    right.plot(size, "o-", label=f"A_{name}, before s")
right.set(
    title="the two branches side by side",
    xlabel="cross-attention, in the order of the pass",
    ylabel="root mean square",
)
right.legend()
caption = (
    f"curves on the left: n {count} images of one shape, with 95 % intervals over prompts; the "
    "rest: one image of each prompt"
)
save(figure, options, "03_image_prompt", caption)
