"""What does an image say as a prompt, and what happens when it disagrees with the text?

IMG corrects nothing but 16 image tokens, so whatever they cannot say it cannot mend. Shown:

1. reconstruction: the tokens of an image and an empty prompt; how near does the drawing come?
2. disagreement: the text asks for one picture, the tokens are another's; the scale decides who is heard;
3. exchange: two prompts, two token sets, the four combinations;
4. the two branches of one cross-attention: their sizes at every layer, and where two of the tokens are heard.

    tokens   c = Resampler(CLIP penultimate states of the image)                   (N, D); SDXL: 16 x 2048
    layer    to_out( A_text + s A_image ),   A_x = softmax(Q K_x^T / sqrt(d)) V_x      (backbones/sdxl/injection.py)

so an image token is heard at scale s in proportion to s ||A_image|| / ||A_text||. Without text the distance of tokens,

    rest = ||c(drawn from c) - c||^2 / ||c' - c||^2,   c' the tokens of another image: 0 is "the same picture",

tells how much of an image its tokens hold. Ninety seconds; with --model sdxl --images 8 some minutes on a GPU.
"""

from dataclasses import dataclass

from common import Options, begin, chosen_preset, option, parse, run, save


@dataclass
class PromptOptions(Options):
    """The command line."""

    images: int = option(80, "how many images the curves are about")


if __name__ == "__main__":
    parse(PromptOptions, __doc__)  # answers --help before torch is imported, which takes seconds

from dataclasses import replace
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from img_minimal.backbones.sdxl.backbone import SDXLBackbone
from img_minimal.backbones.sdxl.injection import cross_attentions, inject
from img_minimal.evaluate.intervals import bootstrap_ratio, mean_interval
from img_minimal.load import load_backbone
from img_minimal.runtime.cli import check
from img_minimal.runtime.images import to_pil
from img_minimal.runtime.plots import BLUE, GREY, ORANGE
from img_minimal.tiny.grammar import COLOURS, FORMS, HELD_OUT, Group, parse
from img_minimal.tiny.oracle import judge

SCALES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
PAIR = ("a red circle and a blue square", "three yellow triangles")


def simple_prompts(count: int) -> list[str]:
    """Prompts that the base draws well, so that what is drawn tells whom it listened to."""
    single = [str(Group(1, *kind)) for kind in product(COLOURS, FORMS) if kind not in HELD_OUT]
    return [single[(7 * k) % len(single)] for k in range(count)]


def rest(c: Tensor, drawn: Tensor, captions: list[str]) -> dict[str, float]:
    """`rest` of the docstring, tokens (B, N, D) each, with its interval; another image is the next one."""
    left = (drawn - c).square().sum((1, 2)).numpy()
    apart = (c.roll(1, 0) - c).square().sum((1, 2)).numpy()
    return bootstrap_ratio(left, apart, captions)


def disagreement(
    backbone: SDXLBackbone, judged: bool, texts: list[str], others: list[str], seeds: list[int], c: Tensor
) -> dict:
    """At every scale: how near the drawing is to the tokens' image, and, where an oracle judges, who was heard."""
    found = {"rest": [], "text": [], "tokens": []}
    for scale in SCALES:
        images = backbone.draw(texts, seeds, c, scale=scale, progress=f"scale {scale}")
        found["rest"].append(rest(c, backbone.tokens(to_pil(images)), texts))
        if judged:
            for name, wanted in (("text", texts), ("tokens", others)):
                strict = np.array([v.strict for v in judge(images, [parse(p) for p in wanted])])
                found[name].append(mean_interval(strict, texts))
    return found


def branches(backbone: SDXLBackbone, prompt: str, seed: int, c: Tensor) -> tuple[list[dict], list[Tensor]]:
    """One denoising step at half of the noise: per cross-attention both branches' sizes, and the image's weights.

    Sizes are root mean squares of A_text and A_image; weights (S, N), the mean over heads.
    """
    backbone.placement.bring("diffusion")
    pipe, sizes, weights = backbone.pipe, [], []
    embeds, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    side = pipe.unet.config.sample_size
    pixels = side * pipe.vae_scale_factor
    noise = torch.randn(1, pipe.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(seed))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]]).to(pooled)}

    def open_up(attn: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        both = attn.processor.attend(attn, args[0], kwargs["encoder_hidden_states"])
        sizes.append({name: out.float().square().mean().sqrt().item() for name, (out, _) in both.items()})
        weights.append(both["image"][1][0].mean(0).float().cpu())

    hooks = [a.register_forward_pre_hook(open_up, with_kwargs=True) for a in cross_attentions(pipe.unet).values()]
    try:
        with torch.no_grad(), inject(pipe.unet, backbone.branch, c[:1].to(pipe.device), scale=backbone.sampling.scale):
            dtype = pipe.unet.dtype
            pipe.unet(noise.to(pipe.device, dtype), 500, embeds.to(dtype), added_cond_kwargs=added)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes, weights


def show(axis: plt.Axes, image: object, title: str = "", colour: str = "black") -> None:
    """An image without ticks."""
    axis.imshow(image, interpolation="nearest" if getattr(image, "width", 0) < 256 else None)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9, color=colour)


def plot_pictures(axes: np.ndarray, backbone: SDXLBackbone, seed: int) -> tuple[Tensor, list]:
    """Two rows: a picture, its reconstruction, and the other prompt at growing scales of its tokens."""
    seeds = [seed + 1, seed + 2]
    pictures = to_pil(backbone.draw(list(PAIR), seeds))
    c = backbone.tokens(pictures)
    alone = to_pil(backbone.draw(["", ""], seeds, c, scale=1.0))
    texts = [PAIR[1], PAIR[0]]
    sweep = [to_pil(backbone.draw(texts, seeds, c, scale=scale)) for scale in SCALES]
    for k, row in enumerate(axes):
        show(row[0], pictures[k], "image", BLUE)
        row[0].set_ylabel(f"tokens of\n“{PAIR[k]}”", fontsize=8)
        show(row[1], alone[k], "its tokens,\nno words", BLUE)
        for axis, scale, images in zip(row[2:], SCALES, sweep):
            show(axis, images[k], f"s = {scale}")
        row[2].set_ylabel(f"text:\n“{texts[k]}”", fontsize=8)
    return c, pictures


def plot_curves(axis: plt.Axes, found: dict) -> None:
    """Who is heard, by scale."""
    lines = (("text", BLUE, "text is satisfied"), ("tokens", ORANGE, "tokens' image is satisfied"),
             ("rest", GREY, "rest: distance to the tokens' image"))  # fmt: skip
    for name, colour, label in lines:
        if found[name]:
            value, low, high = ([row[key] for row in found[name]] for key in ("value", "low", "high"))
            axis.plot(SCALES, value, "o-", color=colour, label=label)
            axis.fill_between(SCALES, low, high, color=colour, alpha=0.2, lw=0)
    axis.set(xlabel="scale s of the image tokens", ylabel="share, or ratio", ylim=(0, None))
    axis.legend(fontsize=8)
    axis.set_title("text asks for one thing, tokens for another", fontsize=10)


def plot_branches(axis: plt.Axes, sizes: list[dict]) -> None:
    """A pair of bars for each cross-attention; many are drawn as lines."""
    place = np.arange(len(sizes))
    for k, (name, colour) in enumerate((("text", BLUE), ("image", ORANGE))):
        axis.bar(place + 0.4 * k - 0.2, [s[name] for s in sizes], 0.4, color=colour, label=f"A_{name}, before s")
    axis.set(
        xlabel="cross-attention, in the order of the pass",
        ylabel="root mean square",
        xticks=place[:: max(1, len(place) // 10)],
    )
    axis.legend(fontsize=8)
    axis.set_title("the two branches beside each other", fontsize=10)


def plot_heard(axes: np.ndarray, weights: list[Tensor]) -> None:
    """Where in the latents the two most concentrated tokens are heard, in the most selective of the finest layers."""
    finest = max(len(w) for w in weights)
    chosen = max((w for w in weights if len(w) == finest), key=lambda w: w.std(0).max())
    side = int(finest**0.5)
    for axis, token in zip(axes, chosen.std(0).argsort(descending=True)):
        axis.imshow(chosen[:, token].reshape(side, side), cmap="inferno_r", vmin=0)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"token {int(token)} is\nheard here", fontsize=9)


def main() -> None:
    """Measure, print, draw."""
    options = begin(PromptOptions, __doc__)
    check(options.images >= 4, f"--images is {options.images}, expected 4 or more")
    preset = replace(chosen_preset(options), scale_end=1.0)  # the same in all steps, so that one number says it
    check(
        preset.backbone == "sdxl",
        f"this tutorial opens the cross-attentions of SDXL's UNet, which {preset.name} has not; see 04 and 07",
    )
    count, backbone = 4 if options.quick else options.images, load_backbone(preset)
    others, seeds = simple_prompts(count), [options.seed + 100 + k for k in range(count)]
    texts = others[1:] + others[:1]
    pictures = backbone.draw(others, seeds, progress="images")
    c = backbone.tokens(to_pil(pictures))
    alone = backbone.tokens(to_pil(backbone.draw([""] * count, seeds, c, scale=1.0, progress="from tokens alone")))
    print(f"rest after drawing from tokens alone: {{value:.3f}} [{{low:.3f}}, {{high:.3f}}], n {count}".format(
        **rest(c, alone, others)))  # fmt: skip
    found = disagreement(backbone, preset.world == "tiny", texts, others, seeds, c)
    for k, scale in enumerate(SCALES):
        row = {name: found[name][k] for name in found if found[name]}
        words = (f"{name} {part['value']:.2f} [{part['low']:.2f}, {part['high']:.2f}]" for name, part in row.items())
        print(f"scale {scale}: " + ", ".join(words) + f"  (n {count})")

    figure = plt.figure(figsize=(11, 8.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4, 4))
    own, _ = plot_pictures(upper.subplots(2, 2 + len(SCALES)), backbone, options.seed)
    sizes, weights = branches(backbone, PAIR[0], options.seed, own)
    shares = [s["image"] / s["text"] for s in sizes]
    print(f"||A_image|| / ||A_text||: from {min(shares):.2f} to {max(shares):.2f} over {len(shares)} layers (n 1)")
    left, middle, right = lower.subfigures(1, 3, width_ratios=(4, 4, 1.5))
    plot_curves(left.subplots(), found)
    plot_branches(middle.subplots(), sizes)
    plot_heard(right.subplots(2, 1), weights)
    save(figure, options, "03_image_prompt",
         f"{preset.name}, --seed {options.seed}; curves: n {count} images of one shape, bands: 95 % intervals "
         "over prompts; the rest: one image of each prompt")  # fmt: skip


if __name__ == "__main__":
    run(main)
