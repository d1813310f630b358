"""What does the MLLM see, does finetuning teach it, and do its hidden states know more than the prompt?

IMG never reads the MLLM's words: the guidance h is the last hidden states of image and question, before any answer.
But words can be marked, so they are looked at first. Shown:

1. stock MLLM against the finetuned one on triplets that it was not trained on: instructions worded exactly, and the
   decision between an edit and "nothing" (in the paper people judged meaning: 42.3 % -> 76.3 %);
2. what a linear probe reads out of the features: is this image right for its prompt? Of the text embeddings alone, of
   the stock MLLM, of the finetuned one. Half of the prompts teach the probe, it is tested on the others;
3. some images with both answers, and the oracle's.

The probe is logistic regression on what x = [mean of h, last h] becomes after standardising,

    P(right | x) = sigmoid(w x + b),   w, b = argmin  mean loss + (ridge / 2) ||w||^2

and its mark is the area under the ROC curve: how often a right image scores above a wrong one; .5 is chance. The text
knows which prompts are hard, which is worth something; but only who has seen the image can tell two drawings of one
prompt apart. So the second mark counts such pairs only. About two minutes.
"""

from dataclasses import dataclass

from common import Options, begin, option, oracle_preset, parse, run, save


@dataclass
class AnalysisOptions(Options):
    """The command line."""

    prompts: int = option(250, "how many prompts the probe is about, each drawn four times")


if __name__ == "__main__":
    parse(AnalysisOptions, __doc__)  # answers --help before torch is imported, which takes seconds

import random
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from img_minimal.backbones import Backbone
from img_minimal.data.triplets import triplet_stream
from img_minimal.evaluate.intervals import bootstrap_ratio, mean_interval, ranking_interval
from img_minimal.finetuning.detector import Detector, Example
from img_minimal.finetuning.finetune import detector_data
from img_minimal.load import load_backbone, load_guide
from img_minimal.mllm import MLLM, Guide, guidance_features
from img_minimal.presets import Preset
from img_minimal.runtime.cli import check
from img_minimal.runtime.images import to_pil
from img_minimal.runtime.plots import BLUE, GREEN, GREY, ORANGE
from img_minimal.tiny.grammar import Prompt, benchmark
from img_minimal.tiny.oracle import Verdict, judge

DRAWN = 4  # images of each prompt
SHOWN = 5
NAMES = {"text alone": GREY, "stock MLLM": ORANGE, "finetuned MLLM": BLUE}
PAPER = {"stock MLLM": 0.423, "finetuned MLLM": 0.763}


@dataclass
class Drawn:
    """Images of the base, four for each prompt, and what the oracle says."""

    pictures: list
    captions: list[str]
    verdicts: list[Verdict]

    @property
    def right(self) -> np.ndarray:
        """What the probe is to find out."""
        return np.array([v.strict for v in self.verdicts])


def exams(preset: Preset, quick: bool) -> dict[str, dict[str, np.ndarray]]:
    """Marks of both MLLMs on the triplets that finetuning held out."""
    marks: dict[str, dict[str, np.ndarray]] = {}
    held_out: list[Example] = []
    for name, path in (("stock MLLM", preset.stock_mllm), ("finetuned MLLM", preset.mllm)):
        detector = Detector(MLLM.from_pretrained(path))
        if not held_out:  # both see with the same frozen eyes
            held_out = detector_data(triplet_stream(preset.triplets), detector, 64).unseen[: 20 if quick else None]
        marks[name] = {key: np.array(value) for key, value in detector.graded(held_out, 0, 64).items()}
    return marks


def draw_all(backbone: Backbone, prompts: list[Prompt], seed: int) -> Drawn:
    """Every prompt DRAWN times, each from a seed of its own."""
    wanted = [prompt for prompt in prompts for _ in range(DRAWN)]
    captions, seeds = [str(p) for p in wanted], [seed + 1000 + k for k in range(len(wanted))]
    images = backbone.draw(captions, seeds, progress="images")
    return Drawn(to_pil(images), captions, judge(images, wanted))


def pooled(guide: Guide, drawn: Drawn, seed: int) -> Tensor:
    """x (B, 2 H): the mean of the valid h, and the last of them."""
    h, mask = guidance_features(
        guide, drawn.pictures, drawn.captions, range(seed, seed + len(drawn.captions)), progress="features"
    )
    h, count = h.float() * mask[..., None], mask.sum(1)
    return torch.cat([h.sum(1) / count[:, None], h[torch.arange(len(h)), count - 1]], dim=1)


def probe(x: Tensor, right: np.ndarray, teach: np.ndarray, ridge: float = 0.01) -> np.ndarray:
    """Scores w x + b of all samples (B,), with w and b from those of `teach`."""
    x = x.double()
    x = (x - x[teach].mean(0)) / (x[teach].std(0) + 1e-6)
    target = torch.tensor(right, dtype=torch.float64)
    w, b = torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([w.requires_grad_(), b.requires_grad_()], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = torch.nn.functional.binary_cross_entropy_with_logits((x @ w + b)[teach], target[teach])
        value = fit + ridge / 2 * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (x @ w + b).detach().numpy()


def same_prompt(scores: np.ndarray, right: np.ndarray, captions: list[str]) -> dict[str, float]:
    """The share of pairs, one right and one wrong image of one prompt, that the scores order rightly."""
    won, pairs, clusters = [], [], []
    for caption in sorted(set(captions)):
        here = np.array([c == caption for c in captions])
        high, low = scores[here & right][:, None], scores[here & ~right][None]
        won.append(((high > low) + 0.5 * (high == low)).sum())
        pairs.append(high.size * low.size)
        clusters.append(caption)
    return bootstrap_ratio(np.array(won, float), np.array(pairs, float), clusters)


def probes(guides: dict[str, Guide], drawn: Drawn, seed: int) -> dict[str, tuple[dict, dict]]:
    """Both marks of every guidance, on prompts that did not teach."""
    names = sorted(set(drawn.captions))
    teachers = set(random.Random(seed).sample(names, len(names) // 2))
    teach = np.array([caption in teachers for caption in drawn.captions])
    captions, marks = [c for c, t in zip(drawn.captions, teach) if not t], {}
    for name, guide in guides.items():
        scores, right = probe(pooled(guide, drawn, seed), drawn.right, teach)[~teach], drawn.right[~teach]
        marks[name] = ranking_interval(scores, right, captions), same_prompt(scores, right, captions)
    return marks


def print_marks(marks: dict, found: dict, drawn: Drawn) -> None:
    """Two tables."""
    for name, part in marks.items():
        exact, decided = (
            mean_interval(part[key], [str(k) for k in range(len(part[key]))]) for key in ("exact", "decided")
        )
        words = "worded exactly {value:.3f} [{low:.3f}, {high:.3f}]".format(**exact)
        words += ", edit or nothing decided {value:.3f} [{low:.3f}, {high:.3f}]".format(**decided)
        always = part["always_edit"].mean()
        print(f"{name:15} {words}  (n {len(part['exact'])}; always saying 'edit': {always:.3f})")
    print(
        f"a linear probe for 'right' on unseen prompts, {len(drawn.captions)} images, {drawn.right.mean():.0%} right:"
    )
    for name, (area, pairs) in found.items():
        print(
            f"{name:15} area under ROC {{value:.3f}} [{{low:.3f}}, {{high:.3f}}]".format(**area),
            "; between drawings of one prompt {value:.3f} [{low:.3f}, {high:.3f}]".format(**pairs),
        )


def bars(axis: plt.Axes, places: np.ndarray, values: list[dict], colours: list[str]) -> None:
    """Bars with intervals."""
    value = np.array([v["value"] for v in values])
    error = np.array([value - [v["low"] for v in values], [v["high"] for v in values] - value]).clip(0)
    axis.bar(places, value, 0.75, color=colours, alpha=0.8)
    axis.errorbar(places, value, yerr=error, fmt="none", ecolor="black", capsize=4)


def plot_marks(axes: np.ndarray, marks: dict, found: dict) -> None:
    """The exam on the left, the probes on the right."""
    exact = [mean_interval(part["exact"], [str(k) for k in range(len(part["exact"]))]) for part in marks.values()]
    bars(axes[0], np.arange(2), exact, [NAMES[name] for name in marks])
    axes[0].plot(range(2), [PAPER[name] for name in marks], "D", color="black", label="the paper, judged by people")
    axes[0].set_xticks(range(2), [name.replace(" ", "\n") for name in marks])
    axes[0].set(ylim=(0, 1), ylabel="instructions right", title="in words")
    axes[0].legend(fontsize=8)
    for k, title in enumerate(("any two images", "two drawings of one prompt")):
        bars(axes[1], np.arange(3) + 3.6 * k, [m[k] for m in found.values()], [NAMES[name] for name in found])
        axes[1].text(1 + 3.6 * k, 1.02, title, ha="center", fontsize=9)
    places = [*range(3), *(np.arange(3) + 3.6)]
    axes[1].set_xticks(places, [name.replace(" ", "\n") for name in found] * 2, fontsize=8)
    axes[1].axhline(0.5, color="black", ls=":", lw=1)
    axes[1].set(
        ylim=(0.4, 1.08), ylabel="right image above wrong (.5: chance)", title="in hidden states, by a linear probe"
    )


def plot_answers(axes: np.ndarray, drawn: Drawn, stock: MLLM, finetuned: MLLM, seed: int) -> None:
    """The first image of the first prompts, every other one right, with three answers."""
    firsts = range(0, len(drawn.captions), DRAWN)
    wrong, right = ([k for k in firsts if drawn.right[k] == kind] for kind in (False, True))
    chosen = [*wrong[: SHOWN - 1], *right[:1]]
    pictures, captions = [drawn.pictures[k] for k in chosen], [drawn.captions[k] for k in chosen]
    said = [mllm.explain(pictures, captions, [seed + k for k in chosen]) for mllm in (stock, finetuned)]
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, k, first, second in zip(axes, chosen, *said):
        axis.imshow(drawn.pictures[k], interpolation="nearest")
        axis.set_title(fill(drawn.captions[k], 24), fontsize=9, color=GREEN)
        lines = (f"stock: {first}", f"finetuned: {second}", f"oracle: {drawn.verdicts[k].words}")
        axis.set_xlabel("\n".join(fill(line, 30) for line in lines), fontsize=8, loc="left")


def main() -> None:
    """Exam, probes, pictures."""
    options = begin(AnalysisOptions, __doc__)
    preset = oracle_preset(options)
    check(options.prompts >= 20, f"--prompts is {options.prompts}, expected 20 or more")
    marks = exams(preset, options.quick)
    backbone = load_backbone(preset)
    text, stock, finetuned = (load_guide(preset, kind, backbone) for kind in ("text", "stock", "mllm"))
    drawn = draw_all(
        backbone, benchmark(20 if options.quick else options.prompts, "validation", options.seed), options.seed
    )
    found = probes(dict(zip(NAMES, (text, stock, finetuned))), drawn, options.seed)
    print_marks(marks, found, drawn)

    figure = plt.figure(figsize=(10, 8.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4, 4.4), hspace=0.04)
    plot_marks(upper.subplots(1, 2, width_ratios=(1, 2.4)), marks, found)
    plot_answers(lower.subplots(1, SHOWN), drawn, stock, finetuned, options.seed)
    count = len(next(iter(marks.values()))["exact"])
    caption = (
        f"{preset.name}, --seed {options.seed}; words: {count} held-out triplets; probes: {len(drawn.captions)} images "
        f"of {len(set(drawn.captions))} prompts,\nhalf of the prompts teach, the others test; images: the first of "
        "either kind, not chosen"
    )
    save(figure, options, "02_mllm_analysis", caption)


if __name__ == "__main__":
    run(main)
