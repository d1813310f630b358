# %% [markdown]
"""What does an image say as a prompt, and what happens when it disagrees with the text?

IMG corrects nothing but 16 image tokens, so whatever they cannot say it cannot repair. Shown:

1. reconstruction: the tokens of an image and an empty prompt; how near does the drawing come?
2. disagreement: the text asks for one picture, the tokens are another's; the scale decides who is heard;
3. exchange: two prompts, two token sets, the four combinations;
4. the two branches of one cross-attention: their sizes at every layer, and where two of the tokens are heard.

    tokens   c = Resampler(CLIP penultimate states of the image)                   (N, D); SDXL: 16 x 2048
    layer    to_out( A_text + s A_image ),   A_x = softmax(Q K_x^T / sqrt(d)) V_x      (backbones/sdxl/injection.py)

so an image token is heard at scale s in proportion to s ||A_image|| / ||A_text||. Without text the distance of tokens,

    rest = ||c(drawn from c) - c||^2 / ||c' - c||^2,   c' the tokens of another image: 0 is "the same picture",

tells how much of an image its tokens hold.
"""

# %% Options
from dataclasses import dataclass, replace

from common import Options, begin, check, chosen_preset, option, save, step


@dataclass
class Config(Options):
    """The command line."""

    images: int = option(80, "how many images the curves are about")


options = begin(Config, __doc__)
check(options.images >= 4, f"--images is {options.images}, expected 4 or more")
preset = replace(chosen_preset(options), scale_end=1.0)  # the same in all steps, so that one number says it
check(
    preset.backbone == "sdxl",
    f"this tutorial opens the cross-attentions of SDXL's UNet, which {preset.name} has not; see 04 and 07",
)

from itertools import product

import numpy as np
import torch
from figures import image_prompt
from torch import Tensor

from img_minimal.sdxl import cross_attentions, inject
from img_minimal.evaluate.intervals import bootstrap_ratio, mean_interval
from img_minimal.load import load_backbone
from img_minimal.files import to_pil
from img_minimal.tiny.grammar import COLOURS, FORMS, HELD_OUT, Group, parse
from img_minimal.tiny.oracle import judge

SCALES = (0.0, 0.3, 1.0) if options.quick else (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
PAIR = ("a red circle and a blue square", "three yellow triangles")
with step("load"):
    backbone = load_backbone(preset)

# %% 1. Images of one shape each, which the base draws well, so that what is drawn later tells whom it listened to
count = 4 if options.quick else options.images
single = [str(Group(1, *kind)) for kind in product(COLOURS, FORMS) if kind not in HELD_OUT]
prompts = [single[(7 * k) % len(single)] for k in range(count)]
seeds = [options.seed + 100 + k for k in range(count)]
with step("draw"):
    pictures = to_pil(backbone.draw(prompts, seeds, progress="images"))
c = backbone.tokens(pictures)

# %% 2. Reconstruction: the tokens and no words


def rest(drawn: Tensor) -> dict[str, float]:
    """`rest` of what was drawn, by its tokens (B, N, D), with its interval; the other image is the next one."""
    left = (drawn - c).square().sum((1, 2)).numpy()
    apart = (c.roll(1, 0) - c).square().sum((1, 2)).numpy()
    return bootstrap_ratio(left, apart, prompts)


with step("draw from tokens alone"):
    alone = backbone.draw([""] * count, seeds, c, scale=1.0, progress="from tokens alone")
kept = rest(backbone.tokens(to_pil(alone)))
print(f"rest after drawing from tokens alone: {{value:.3f}} [{{low:.3f}}, {{high:.3f}}], n {count}".format(**kept))

# %% 3. Disagreement: the text asks for the next image's prompt. Who is heard, at every scale?
texts = prompts[1:] + prompts[:1]
heard: dict[str, list[dict]] = {"rest": [], "text": [], "tokens": []}
with step("draw from both"):
    for scale in SCALES:
        images = backbone.draw(texts, seeds, c, scale=scale, progress=f"scale {scale}")
        row = {"rest": rest(backbone.tokens(to_pil(images)))}
        if preset.world == "tiny":  # an oracle says whether the text, or the tokens' own prompt, is satisfied
            for name, wanted in (("text", texts), ("tokens", prompts)):
                strict = np.array([v.strict for v in judge(images, [parse(p) for p in wanted])])
                row[name] = mean_interval(strict, texts)
        words = (f"{name} {part['value']:.2f} [{part['low']:.2f}, {part['high']:.2f}]" for name, part in row.items())
        print(f"scale {scale}: " + ", ".join(words) + f"  (n {count})")
        for name, part in row.items():
            heard[name].append(part)

# %% 4. Exchange: two images, each drawn again from its tokens alone, and under the other's prompt at every scale
pair_seeds = [options.seed + 1, options.seed + 2]
with step("exchange"):
    pair = to_pil(backbone.draw(list(PAIR), pair_seeds))
    own = backbone.tokens(pair)
    pair_alone = to_pil(backbone.draw(["", ""], pair_seeds, own, scale=1.0))
    exchanged = [to_pil(backbone.draw(list(PAIR[::-1]), pair_seeds, own, scale=scale)) for scale in SCALES]

# %% 5. The two branches: one denoising step at half of the noise, with a look into every cross-attention. Sizes are
# root mean squares of A_text and A_image; weights (S, N) say where in the latents each token is heard.
backbone.placement.bring("diffusion")
pipe, sizes, weights = backbone.pipe, [], []
embeds, _, pooled, _ = pipe.encode_prompt(PAIR[0], do_classifier_free_guidance=False)
side = pipe.unet.config.sample_size
pixels = side * pipe.vae_scale_factor
noise = torch.randn(1, pipe.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(options.seed))
added = {"text_embeds": pooled, "time_ids": torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]]).to(pooled)}


def look(attn: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Keep what both branches of this layer say."""
    both = attn.processor.attend(attn, args[0], kwargs["encoder_hidden_states"])
    sizes.append({name: out.float().square().mean().sqrt().item() for name, (out, _) in both.items()})
    weights.append(both["image"][1][0].mean(0).float().cpu())


hooks = [a.register_forward_pre_hook(look, with_kwargs=True) for a in cross_attentions(pipe.unet).values()]
dtype, tokens = pipe.unet.dtype, own[:1].to(pipe.device)
with torch.no_grad(), inject(pipe.unet, backbone.branch, tokens, scale=backbone.sampling.scale):
    pipe.unet(noise.to(pipe.device, dtype), 500, embeds.to(dtype), added_cond_kwargs=added)
for hook in hooks:
    hook.remove()
ratios = [size["image"] / size["text"] for size in sizes]
print(f"||A_image|| / ||A_text||: from {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} layers (n 1)")

# %% 6. The picture
figure = image_prompt.draw(PAIR, pair, pair_alone, SCALES, exchanged, heard, sizes, weights)
save(figure, options, "03_image_prompt",
     f"{preset.name}, --seed {options.seed}; curves: n {count} images of one shape, bands: 95 % intervals "
     "over prompts; the rest: one image of each prompt")  # fmt: skip
