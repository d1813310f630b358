"""What happens between the first image and the second, and how often, how strongly and how many times should it?

Sampling step by step: initial image -> MLLM -> tokens -> aligned tokens -> second image, from the same prompt and seed.
Then one setting at a time: passes of the aligner (1 to 5), scale of the image tokens, the share of it that is left at
the last step, rounds (the second image is looked at again, up to four times). For each, what became right and what
became wrong, by the exact oracle, against controls: another seed, the better of two seeds, and a second drawing with
the image's own tokens. Under two minutes.

With G the base model, T the prompt, z the start noise, q a question about T, f the aligner, s the scale:

    x_0 = G(T, z)                                        1  initial image
    h = MLLM(x_0, q),  c_0 = Resampler(CLIP(x_0))        2  what is seen to be wrong; what the image is
    c_k = f(h, c_(k-1))                                  3  k passes of the aligner, with the same h
    x_1 = G(T, z; c_k, s)                                4  the same prompt and noise, and the tokens beside the text;
                                                            over the steps s goes linearly to its end, a share of it
    x_r from x_(r-1) as x_1 from x_0                        rounds: h and c_0 are computed anew, of the latest image

h and c_0 are frozen: computed once, they serve every number of passes and scale. Look at both colours of the bars: a
setting that mends more often spoils more, too, and its worth is the difference. With --model sdxl there is no oracle,
and the pictures alone are shown.
"""

from dataclasses import dataclass

from common import Options, begin, chosen_preset, option, parse, run, save


@dataclass
class RegenerationOptions(Options):
    """The command line."""

    prompts: int = option(200, "how many prompts of the test split")


if __name__ == "__main__":
    parse(RegenerationOptions, __doc__)  # answers --help before torch is imported, which takes seconds

from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import SubFigure
from torch import Tensor

from img_minimal.evaluate.arms import TITLES, Arms
from img_minimal.evaluate.image_folder import FIRST_SEED
from img_minimal.evaluate.intervals import paired_shares, win_rate
from img_minimal.load import load_img
from img_minimal.pipeline import IMG
from img_minimal.presets import Preset
from img_minimal.runtime.cli import check
from img_minimal.runtime.images import to_pil
from img_minimal.runtime.plots import BLUE, GREEN, GREY, ORANGE, PINK
from img_minimal.tiny.grammar import CATEGORIES, benchmark
from img_minimal.tiny.oracle import judge

PASSES = range(1, 6)
FACTORS = (0.5, 1.0, 1.5, 2.0)  # times the preset's scale
ENDS = (0.25, 0.5, 1.0)  # beside the preset's
ROUNDS = range(1, 5)
CONTROLS = ("new_seed", "best_of_two_mllm", "best_of_two_oracle", "no_guidance", "perfect_tokens")
SHORT = (
    "new seed",
    "best of two,\nMLLM picks",
    "best of two,\noracle picks*",
    "own tokens",
    "tokens of a\nright image*",
)
REAL_PROMPTS = ("a red cube on top of a blue sphere", "three green apples and one banana on a table")
Setting = tuple[str, float]  # ("passes", 3), ("scale", 0.7), ("scale_end", 0.5) or ("rounds", 2)


@dataclass
class Start:
    """Steps 1 and 2, which all settings share."""

    captions: list[str]
    seeds: list[int]
    images: Tensor  # x_0, (B, 3, H, W) in [0, 1]
    features: Tensor  # h, (B, L, H)
    mask: Tensor  # (B, L), True where h is valid
    tokens: Tensor  # c_0, (B, N, D)


def first_steps(img: IMG, captions: list[str], seeds: list[int], images: Tensor) -> Start:
    """h = MLLM(x_0, q) and c_0 = Resampler(CLIP(x_0)); an image's seed draws the phrasing q."""
    pictures = to_pil(images)
    features, mask = img.guidance(pictures, captions, seeds, progress="look")
    return Start(captions, seeds, images, features, mask, img.backbone.tokens(pictures))


def draw_settings(img: IMG, start: Start, seed: int) -> tuple[dict[Setting, Tensor], Tensor]:
    """Steps 3 and 4 in every setting: images (B, 3, H, W) of each, and the tokens c_1 (B, N, D)."""
    aligned, images = [start.tokens], {}

    def draw(tokens: Tensor, kind: str, value: float, **scales: float) -> None:
        title = f"{kind} {value:g}"
        images[kind, value] = img.backbone.draw(start.captions, start.seeds, tokens, progress=title, **scales)

    for k in PASSES:  # c_k = f(h, c_(k-1)): each pass goes on from the one before
        aligned.append(img.correct(aligned[-1], start.features, start.mask, passes=1))
        draw(aligned[-1], "passes", k)
    chosen = images["passes", img.passes]
    # text attention + s * image attention, in every cross-attention of the UNet
    sampling = img.backbone.sampling
    for field, values in (("scale", [sampling.scale * factor for factor in FACTORS]), ("scale_end", ENDS)):
        own = getattr(sampling, field)
        for value in sorted({own, *values}):
            if value == own:
                images[field, own] = chosen
            else:
                draw(aligned[img.passes], field, value, **{field: value})
    images["rounds", 1] = chosen
    for r in ROUNDS[1:]:  # h and c_0 of x_(r-1)
        draw(img.align(images["rounds", r - 1], start.captions, [seed + r - 1 for seed in start.seeds]), "rounds", r)
    return images, aligned[1]


def print_steps(start: Start, images: Tensor, aligned: Tensor, answer: str, k: int) -> None:
    """The steps of image k with their shapes."""
    c, f = start.tokens[k], aligned[k]
    moved = (images[k] - start.images[k]).abs().mean().item()
    print(f'"{start.captions[k]}", seed {start.seeds[k]}')
    print(f"  1  initial image x_0          {tuple(start.images[k].shape)}")
    print(f"  2  MLLM: {answer}")
    print(
        f"     guidance features h        {(int(start.mask[k].sum()), start.features.shape[-1])}; "
        f"tokens c_0 {tuple(c.shape)}"
    )
    print(f"  3  aligned tokens c_1 = f(h, c_0): ||c_1 - c_0|| / ||c_0|| = {((f - c).norm() / c.norm()).item():.2f}")
    print(f"  4  second image x_1, whose pixels differ by {moved:.3f} of their range on average")


def compared(arms: Arms, images: dict[Setting, Tensor]) -> dict[Setting | str, dict]:
    """Every setting and control against the base: which are right, shares, differences, mended, spoilt, win rate."""
    verdicts = {name: arms.verdicts[name] for name in ("base", *CONTROLS)}
    verdicts |= {setting: judge(drawn, arms.prompts) for setting, drawn in images.items()}
    strict = {name: np.array([v.strict for v in said]) for name, said in verdicts.items()}
    soft = {name: np.array([v.soft for v in said]) for name, said in verdicts.items()}
    return {
        name: paired_shares(strict[name], strict["base"], arms.captions)
        | {"win": win_rate(soft[name], soft["base"], arms.captions), "right": strict[name]}
        for name in verdicts
    }


def print_table(table: dict[Setting | str, dict]) -> None:
    """The comparisons with the base, one line each."""
    print(f"\n{'95 % intervals over captions':40} strict                minus base               mended  spoilt  wins*")
    for name, row in table.items():
        line = f"{TITLES[name] if isinstance(name, str) else '{} {:g}'.format(*name):40} "
        line += "{value:.3f} [{low:.3f}, {high:.3f}]  ".format(**row["share"])
        if name != "base":
            line += "{value:+.3f} [{low:+.3f}, {high:+.3f}]  ".format(**row["difference"])
            line += f"{row['mended']:5d}  {row['spoilt']:6d}  {row['win']['value']:.2f} of {row['win']['decided']}"
        print(line)
    print("* against the base on the soft score, without ties\n")


def print_categories(arms: Arms, before: np.ndarray, after: np.ndarray) -> None:
    """What the preset's own setting mends and spoils, by category."""
    print("the preset's own setting, by category:")
    for category in CATEGORIES:
        mask = np.array([p.category == category for p in arms.prompts])
        wrong, right = mask & ~before, mask & before
        mended, spoilt = (wrong & after).sum(), (right & ~after).sum()
        print(
            f"  {category:9} mended {mended:2d} of {wrong.sum():2d} wrong, spoilt {spoilt:2d} of {right.sum():2d} right"
        )


def chosen_rows(arms: Arms, before: np.ndarray, after: np.ndarray) -> dict[int, str]:
    """Images for the strip and why: the first wrong ones of two categories, and the first that IMG spoils."""
    rows = {}
    for category in ("position", "complex"):
        wrong = [k for k, p in enumerate(arms.prompts) if p.category == category and not before[k]]
        rows |= dict.fromkeys(wrong[:1], f"the first {category} that the base draws wrong")
    return rows | {int(k): "the first right one that IMG spoils" for k in np.flatnonzero(before & ~after)[:1]}


def plot_row(figure: SubFigure, title: str, k: int, columns: dict[str, tuple], heads: bool) -> None:
    """Image k in every column, each (images or correction, right or wrong of all images or None)."""
    figure.suptitle(fill(title, 125), fontsize=9.5, x=0.01, ha="left")
    for axis, (head, (values, right)) in zip(figure.subplots(1, len(columns)), columns.items()):
        if values.ndim == 4:
            axis.imshow(to_pil(values[k : k + 1])[0], interpolation="nearest")
        else:
            axis.imshow(values[k], cmap="Blues", vmin=0, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(head if heads else "", fontsize=9)
        axis.spines[:].set(color=GREY, linewidth=1)
        if right is not None:
            colour = GREEN if right[k] else ORANGE
            axis.spines[:].set(color=colour, linewidth=3)
            axis.set_xlabel("right" if right[k] else "wrong", fontsize=9, color=colour, fontweight="bold", labelpad=2)


def strip_columns(preset: Preset, start: Start, images: dict, aligned: Tensor, table: dict | None) -> dict[str, tuple]:
    """Initial image, correction, some passes, lowest and highest scale, a constant one, some rounds."""
    low, high = (preset.scale * factor for factor in (FACTORS[0], FACTORS[-1]))
    settings = [
        ("passes", 1),
        ("passes", 3),
        ("passes", 5),
        ("scale", low),
        ("scale", high),
        ("scale_end", 1.0),
        ("rounds", 2),
        ("rounds", 4),
    ]
    sizes = (aligned - start.tokens).norm(dim=-1)  # (B, N)
    side = int(sizes.shape[1] ** 0.5)
    sizes = sizes.unflatten(1, (side, side)) if side**2 == sizes.shape[1] else sizes[:, None]
    columns = {"initial": (start.images, table and table["base"]["right"]), "correction": (sizes, None)}
    for setting in settings:
        head = "{} {:g}".format(*setting) + (" = IMG" if setting == ("passes", preset.passes) else "")
        columns[head] = (images[setting], table and table[setting]["right"])
    return columns


def plot_effects(figure: SubFigure, table: dict, preset: Preset) -> None:
    """Upper row: strict share minus the base's, with intervals. Lower row: what was mended and what was spoilt."""
    axes = figure.subplots(2, 5, sharey="row", sharex="col", width_ratios=(5, 4, 4, 4, 4.6), height_ratios=(3, 2))
    groups = {kind: [name for name in table if name[0] == kind] for kind in ("passes", "scale", "scale_end", "rounds")}
    labels = (
        "passes of the aligner",
        "scale of the tokens",
        "share of it at the last step",
        "rounds of looking, drawing",
    )
    marks = (preset.passes, preset.scale, preset.scale_end, 1)
    for (upper, lower), (kind, names), label, mark in zip(axes.T, groups.items(), labels, marks):
        x = [value for _, value in sorted(names)]
        plot_pair(upper, lower, x, [table[kind, value] for value in x], 0.6 * (x[1] - x[0]), "o-", BLUE)
        upper.axvline(mark, color=PINK, linestyle=":", label="IMG's setting")
        lower.set(xlabel=label, xticks=x if x[0] < 0.1 else [0, *x])
    upper, lower = axes[:, -1]
    plot_pair(upper, lower, range(len(CONTROLS)), [table[name] for name in CONTROLS], 0.6, "s", "black")
    lower.set_xticks(range(len(CONTROLS)), SHORT, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    upper.set_title("controls", fontsize=10)
    base = table["base"]["share"]["value"]
    axes[0, 0].set_ylabel(f"strict share minus base's ({base:.2f})")
    axes[1, 0].set_ylabel("prompts: mended (up),\nspoilt (down)")
    axes[0, 0].legend(fontsize=8, loc="lower right")


def plot_pair(
    upper: plt.Axes, lower: plt.Axes, x: list[float], rows: list[dict], width: float, mark: str, colour: str
) -> None:
    """Differences with their intervals above, counts of mended and spoilt below."""
    value, low, high = (np.array([row["difference"][key] for row in rows]) for key in ("value", "low", "high"))
    upper.errorbar(x, value, yerr=(value - low, high - value), fmt=mark, color=colour, capsize=3)
    upper.axhline(0, color=GREY, linewidth=1)
    upper.grid(axis="y", alpha=0.3)
    for key, sign, shade in (("mended", 1, GREEN), ("spoilt", -1, ORANGE)):
        counts = [row[key] for row in rows]
        lower.bar(x, [sign * count for count in counts], width, color=shade, alpha=0.85)
        for place, count in zip(x, counts):
            lower.text(place, sign * count, count, ha="center", va="bottom" if sign > 0 else "top", fontsize=8)
    lower.axhline(0, color=GREY, linewidth=1)
    lower.margins(y=0.2)


def first_images(img: IMG, judged: bool, options: RegenerationOptions) -> tuple[Start, Arms | None]:
    """Step 1, x_0 = G(T, z), and step 2; with a arms of controls where there is an oracle."""
    seed = options.seed
    if judged:
        arms = Arms(img, benchmark(10 if options.quick else options.prompts, "test", seed), seed)
        arms.controls()
        return first_steps(img, arms.captions, arms.seeds, arms.base), arms
    captions = list(REAL_PROMPTS[: 1 if options.quick else None])
    seeds = [FIRST_SEED * (seed + 1) + k for k in range(len(captions))]
    images = img.backbone.draw(captions, seeds, progress="initial")
    return first_steps(img, captions, seeds, images), None


def main() -> None:
    """Draw, judge, print, picture."""
    options = begin(RegenerationOptions, __doc__)
    check(options.prompts >= 20, f"--prompts is {options.prompts}, expected 20 or more")
    preset = chosen_preset(options)
    img = load_img(preset)
    start, arms = first_images(img, preset.world == "tiny", options)
    images, aligned = draw_settings(img, start, options.seed)
    table, rows = None, dict.fromkeys(range(len(start.captions)), "")
    if arms:
        table = compared(arms, images)
        before, after = table["base"]["right"], table["passes", preset.passes]["right"]
        rows = chosen_rows(arms, before, after)
    pictures = to_pil(start.images[list(rows)])
    answers = img.explain(pictures, [start.captions[k] for k in rows], [start.seeds[k] for k in rows])
    if rows:
        print_steps(start, images["passes", 1], aligned, answers[0], next(iter(rows)))
    if table:
        print_table(table)
        print_categories(arms, before, after)
    figure = plt.figure(figsize=(13.5, 1.85 * len(rows) + 5.5 * bool(table) + 0.4), layout="constrained")
    heights = [1.85] * len(rows) + [5.5] * bool(table)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    columns = strip_columns(preset, start, images, aligned, table)
    for part, (k, why), answer in zip(parts, rows.items(), answers):
        title = f'"{start.captions[k]}"' + (f" ({why})" if why else "") + f"  MLLM of the initial image: {answer}"
        plot_row(part, title, k, columns, heads=part is parts[0])
    if table:
        plot_effects(parts[-1], table, preset)
    save(figure, options, "07_regeneration", f"{preset.name}, n {len(start.captions)}")


if __name__ == "__main__":
    run(main)
