"""How does the Implicit Aligner decide what to change in an image prompt, and how much?

    f(h, c) = c + zero_linear(norm_out(proj_out(x))),   x = layers(c, proj_in(h))            (Figs. 9 and 10)

h are the MLLM's last hidden states: one for each patch of the image, one for each word of the question. c are the
image's own tokens. `zero_linear` starts at zero, so f starts as "keep the image as it is". Shown here:

1. identity at the start, and why it learns all the same: only zero_linear gets a gradient in the first step, all the
   rest from the second on, when zero_linear is no longer zero;
2. one image under a right and several wrong prompts: which tokens are corrected, ||f(h, c) - c|| for each, painted
   where the Resampler reads that token, and what the UNet draws with the corrected tokens;
3. where each token looks, softmax(q k / sqrt(d)), in each layer: at the image patches, at the words of the question,
   or at the other tokens. A word's state has read the image before it, so "looks at the word 'purple'" means "asks
   what the MLLM thought when it read 'purple' after having seen this image";
4. size of the correction against how misaligned the image is: the number of edits that the oracle asks for. Where
   there is no oracle, an image under its own prompt against the same image under another image's prompt.

Sizes are in units of the distance between the tokens of two images (the median over pairs), so 1 means "as far as
another picture". Passes: one. One minute on two cores; with --model sdxl --images 32, some minutes on a GPU.
"""

from dataclasses import dataclass

from common import Options, begin, chosen_preset, option, parse, run, save


@dataclass
class Config(Options):
    """The command line."""

    images: int = option(128, "how many images are drawn for the size of the correction")


if __name__ == "__main__":
    parse(Config, __doc__)  # answers --help before torch is imported, which takes seconds

import math
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL.Image import Image, Resampling, fromarray
from torch import Tensor

from img_minimal.aligner import ImplicitAligner
from img_minimal.evaluate.intervals import mean_interval
from img_minimal.load import load_img
from img_minimal.pipeline import IMG
from img_minimal.runtime.cli import check
from img_minimal.runtime.images import to_pil
from img_minimal.runtime.plots import BLUE, GREEN, GREY, ORANGE, PINK
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
KINDS = {"image patches": BLUE, "words of the question": ORANGE, "words of the prompt": GREEN,
         "after the prompt": PINK, "the tokens themselves": GREY}  # fmt: skip


def gradients_reach(trained: ImplicitAligner, h: Tensor, c: Tensor, target: Tensor) -> list[float]:
    """Share of a fresh aligner's parameters with a gradient of ||target - f(h, c)||^2, in each of two steps of SGD."""
    attention = trained.layers[0][0]
    fresh = ImplicitAligner(trained.width, trained.guidance_width, len(trained.layers), attention.heads,
                            attention.head_dim).to(c.device)  # fmt: skip
    with torch.no_grad():
        print(f"a fresh aligner: max |f(h, c) - c| = {(fresh(h, c, passes=3) - c).abs().max():.1g} after three passes")
    shares = []
    for _ in range(2):
        fresh.zero_grad()
        (target - fresh(h, c)).square().sum().backward()
        reached = sum(p.numel() for p in fresh.parameters() if p.grad.any())
        shares.append(reached / sum(p.numel() for p in fresh.parameters()))
        torch.optim.SGD(fresh.parameters(), lr=1e-3).step()
    return shares


def size_of(correction: Tensor) -> Tensor:
    """||f(h, c) - c||, over tokens and channels: (B, N, D) -> (B,)."""
    return correction.float().square().sum((-2, -1)).sqrt()


def unit(c: Tensor) -> float:
    """The median distance ||c_a - c_b|| between the tokens of two neighbouring images of (B, N, D)."""
    return size_of(c - c.roll(1, 0)).median().item()


def painted(values: Tensor, places: Tensor) -> Tensor:
    """One value per token (N,), painted where the token reads, maps (N, side, side): (side, side).

    At each place it is the mean of the values, weighted with how much each token reads there.
    """
    return (values[:, None, None] * places).sum(0) / places.sum(0)


def prompt_span(words: list[str | None], without: list[str | None]) -> slice:
    """Which words are the prompt's, from the same question about nothing: what remains between what both share."""
    ahead = next((k for k, (a, b) in enumerate(zip(words, without)) if a != b), len(without))
    behind = 0
    while behind < len(without) - ahead and words[-1 - behind] == without[-1 - behind]:
        behind += 1
    return slice(ahead, len(words) - behind)


def kinds(words: list[str | None], prompt: slice, tokens: int) -> dict[str, list[int]]:
    """Columns of the attention weights (..., L + N) by what stands there; `words` are the L of the guidance."""
    positions = range(len(words))
    ahead = [k for k in positions[: prompt.start] if words[k] is not None]
    patches = [k for k in positions if words[k] is None]
    columns = [patches, ahead, positions[prompt], positions[prompt.stop :], range(len(words), len(words) + tokens)]
    return {name: list(column) for name, column in zip(KINDS, columns, strict=True)}


def mosaic(maps: Tensor) -> Tensor:
    """N maps (N, side, side) in rows and columns, one blank line between them: one map of all."""
    across = math.ceil(len(maps) ** 0.5)
    padded = torch.nn.functional.pad(maps, (0, 1, 0, 1), value=float("nan"))
    blank = torch.full((across * math.ceil(len(maps) / across) - len(maps), *padded.shape[1:]), float("nan"))
    rows = torch.cat([padded, blank]).unflatten(0, (-1, across))
    return rows.transpose(1, 2).flatten(2).flatten(0, 1)[:-1, :-1]


def groups(images: Tensor, prompts: list[str], judged: bool, own: bool) -> list[str]:
    """How misaligned each image is: "0", "1", ... edits by the oracle, or whose prompt it was compared with."""
    if not judged:
        return ["its own prompt" if own else "another image's"] * len(images)
    wanted = [parse(prompt) for prompt in prompts]
    edits = [len(correct(v.found, p)[0]) for v, p in zip(judge(images, wanted), wanted)]
    return [str(n) if n < 3 else "3 or more" for n in edits]


def one_image(img: IMG, seed: int) -> tuple[Tensor, Image, int]:
    """Of eight images of RIGHT the one that the MLLM is most content with: (1, 3, H, W), as a picture, its seed."""
    drawn = img.backbone.draw([RIGHT] * 8, list(range(seed, seed + 8)), progress="eight images of one prompt")
    content = img.satisfaction(to_pil(drawn), [RIGHT] * 8, range(seed, seed + 8))
    best = int(np.argmax(content))
    return drawn[best : best + 1], to_pil(drawn[best : best + 1])[0], seed + best


def attention(img: IMG, picture: Image, c: Tensor, seed: int) -> tuple[Tensor, list[str | None], dict[str, list[int]]]:
    """Weights (depth, N, L + N), mean over heads, for the first wrong prompt; the L words; columns by kind."""
    words, without = (img.guide.words(picture, img.guide.question(prompt, seed)) for prompt in (WRONG[0], ""))
    h, _ = img.guidance([picture], [WRONG[0]], [seed])
    img.placement.bring("aligner", img.aligner)
    device = next(img.aligner.parameters()).device
    maps = img.aligner.attention_maps(h.to(device).float(), c.to(device)).mean(2)[:, 0].cpu()
    return maps, words, kinds(words, prompt_span(words, without), c.shape[1])


def over(axis: plt.Axes, picture: Image, heat: Tensor, top: float) -> None:
    """A map (side, side) over a faded picture."""
    axis.imshow(picture, extent=(0, 1, 1, 0))
    smooth = fromarray(heat.numpy().astype(np.float32)).resize((64, 64), Resampling.BICUBIC)
    strength = np.clip(np.asarray(smooth) / top, 0, 1)
    axis.imshow(np.ones((64, 64, 3)), extent=(0, 1, 1, 0), alpha=0.55)
    axis.imshow(strength, extent=(0, 1, 1, 0), cmap="inferno_r", vmin=0, vmax=1, alpha=0.85 * strength**0.7)


def draw_prompts(axes: np.ndarray, picture: Image, heats: list[Tensor], sizes: list[float], after: list[Image]) -> None:
    """Row of corrections over the image, row of what is drawn with them; a column for each prompt."""
    top = max(heat.max().item() for heat in heats)
    for k, (prompt, heat, size) in enumerate(zip((RIGHT, *WRONG), heats, sizes)):
        over(axes[0, k], picture, heat, top)
        axes[0, k].set_title(fill(f"“{prompt}”", 24) + f"\ncorrection {size:.2f}", fontsize=8.5)
        axes[1, k].imshow(after[k])
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("one image, and what\nf changes of it", fontsize=8.5)
    axes[1, 0].set_ylabel("drawn again with\nf(h, c)", fontsize=8.5)


def draw_attention(axes: list[plt.Axes], maps: Tensor, words: list[str | None], columns: dict[str, list[int]]) -> None:
    """Image patches and words that each token looks at, in the layer that looks most at the prompt."""
    layer = int(maps[:, :, columns["words of the prompt"]].sum(-1).mean(-1).argmax())
    side = math.isqrt(len(columns["image patches"]))
    patches = maps[layer][:, columns["image patches"]].unflatten(-1, (side, side))
    axes[0].imshow(mosaic(patches / patches.amax((1, 2), keepdim=True)), cmap="inferno_r")
    axes[0].set(xticks=[], yticks=[])
    axes[0].set_title(
        f"… at the {side} x {side} patches of the image\n(a square for each token, its own scale)", fontsize=9
    )
    asked = list(range(max(columns["image patches"]) + 1, len(words)))
    shown = axes[1].imshow(maps[layer][:, asked], cmap="inferno_r", aspect="auto", vmin=0)
    axes[1].set_xticks(range(len(asked)), [words[k] for k in asked], rotation=60, ha="right", fontsize=8.5,
                       rotation_mode="anchor")  # fmt: skip
    for label, k in zip(axes[1].get_xticklabels(), asked):
        label.set_color(GREEN if k in columns["words of the prompt"] else "black")
    axes[1].set_ylabel("image token")
    axes[1].set_title(f"… at the words of the question (layer {layer + 1}; green: the prompt)", fontsize=9)
    axes[1].figure.colorbar(shown, ax=axes[1], label="attention, mean over heads", pad=0.01)


def draw_shares(axis: plt.Axes, maps: Tensor, columns: dict[str, list[int]]) -> None:
    """A bar for each layer: how its attention is divided."""
    left = np.zeros(len(maps))
    for name, colour in KINDS.items():
        share = maps[:, :, columns[name]].sum(-1).mean(-1).numpy()
        axis.barh(np.arange(len(maps)) + 1, share, left=left, color=colour, label=name)
        left += share
    axis.set(xlim=(0, 1), yticks=range(1, len(maps) + 1), xlabel="share of attention, mean over tokens", ylabel="layer")
    axis.invert_yaxis()
    axis.legend(fontsize=7.5, ncols=2, loc="lower center", bbox_to_anchor=(0.45, 1.0), frameon=False)


def draw_sizes(axis: plt.Axes, sizes: np.ndarray, names: np.ndarray, clusters: np.ndarray, label: str) -> None:
    """Points and mean with its interval for each group; the same in print."""
    noise = np.random.default_rng(0)
    for x, name in enumerate(sorted(set(names))):
        chosen = names == name
        mean = mean_interval(sizes[chosen], list(clusters[chosen]))
        print(f"  {label} {name:>16}: {mean['value']:.2f} [{mean['low']:.2f}, {mean['high']:.2f}]  (n {chosen.sum()})")
        axis.scatter(x + noise.uniform(-0.3, 0.3, chosen.sum()), sizes[chosen], s=9, color=BLUE, alpha=0.45, lw=0)
        axis.plot([x - 0.38, x + 0.38], [mean["value"]] * 2, color=ORANGE, lw=2.5)
        axis.fill_between([x - 0.38, x + 0.38], mean["low"], mean["high"], color=ORANGE, alpha=0.3, lw=0)
    ticks = [f"{name}\nn {np.sum(names == name)}" for name in sorted(set(names))]
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set(xlabel=label, ylabel="‖f(h, c) − c‖  (1: another picture)")
    axis.set_ylim(bottom=0)


def identity(img: IMG, images: Tensor, captions: list[str], c: Tensor, seed: int) -> None:
    """Print what a fresh aligner does to four images, and where its first gradients arrive."""
    h, _ = img.guidance(to_pil(images[:1]), captions[:1], [seed])
    img.placement.bring("aligner", img.aligner)
    device = next(img.aligner.parameters()).device
    shares = gradients_reach(img.aligner, h.float().to(device), c[:1].to(device), c[1:2].to(device))
    print("share of its parameters that the gradient reaches, first step {:.3f}, second step {:.3f}".format(*shares))


def many_images(
    img: IMG, images: Tensor, captions: list[str], c: Tensor, seed: int, judged: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each image under its own prompt and under one of its category that is another image's: size, group, caption."""
    sizes, names = [], []
    others = captions[len(CATEGORIES) :] + captions[: len(CATEGORIES)]
    for prompts, own in ((captions, True), (others, False)):
        sizes.append(
            size_of(img.align(images, prompts, range(seed, seed + len(prompts)), passes=1) - c).numpy() / unit(c)
        )
        names += groups(images, prompts, judged, own)
    difference = mean_interval(sizes[1] - sizes[0], captions)
    print(
        "size under another prompt of its category minus under its own: {value:+.2f} [{low:+.2f}, {high:+.2f}]".format(
            **difference
        ),
        f"(n {len(images)}, paired)",
    )
    return np.concatenate(sizes), np.array(names), np.array(captions * 2)


def main() -> int:
    """One image in detail, then many; print, and draw."""
    options = begin(Config, __doc__)
    check(options.images >= 8, f"--images is {options.images}, expected 8 or more")
    preset, count = chosen_preset(options), 8 if options.quick else options.images
    img, seed = load_img(preset), options.seed

    captions = [str(prompt) for prompt in benchmark(count, "validation", seed)]
    images = img.backbone.draw(captions, list(range(seed, seed + count)), progress="images")
    c = img.backbone.tokens(to_pil(images))
    identity(img, images, captions, c, seed)

    found, picture, its_seed = one_image(img, seed)
    prompts, own = [RIGHT, *WRONG], img.backbone.tokens([picture])
    aligned = img.align(found.expand(len(prompts), -1, -1, -1), prompts, [seed] * len(prompts), passes=1)
    after = img.backbone.draw(prompts, [its_seed] * len(prompts), aligned, progress="with corrected tokens")
    places = img.backbone.image_prompt.places([picture])[0].cpu()
    by_token = (aligned - own).float().square().sum(-1).sqrt() / unit(c)  # (prompts, N)
    one = (size_of(aligned - own) / unit(c)).tolist()
    for prompt, size in zip(prompts, one):
        print(f"  one image of {RIGHT!r}, correction under {prompt!r}: {size:.2f}  (n 1)")
    maps, words, columns = attention(img, picture, own, seed)

    figure = plt.figure(figsize=(10, 12.2), layout="constrained")
    rows = figure.add_gridspec(3, 1, height_ratios=[4.4, 3.3, 3.2], hspace=0.06)
    top, middle = rows[0].subgridspec(2, len(prompts)), rows[1].subgridspec(1, 2, width_ratios=[1, 2.2])
    bottom = rows[2].subgridspec(1, 2)
    axes = np.array([[figure.add_subplot(top[r, k]) for k in range(len(prompts))] for r in range(2)])
    draw_prompts(axes, picture, [painted(values, places) for values in by_token], one, to_pil(after))
    draw_attention([figure.add_subplot(cell) for cell in middle], maps, words, columns)
    axis = figure.add_subplot(bottom[0])
    draw_shares(axis, maps, columns)
    judged = preset.world == "tiny"
    label = "edits that the oracle asks for" if judged else "whose prompt it is compared with"
    draw_sizes(figure.add_subplot(bottom[1]), *many_images(img, images, captions, c, seed, judged), label)
    caption = (
        f"{preset.name}, --seed {seed}; above: one image of {RIGHT!r} (seed {its_seed}, of eight the one that the MLLM "
        f"likes best);\nbelow right: n {count} images, each under its own prompt and under another's; orange: mean "
        "and its 95 % interval over captions"
    )
    save(figure, options, "04_implicit_aligner", caption)
    return 0


if __name__ == "__main__":
    run(main)
