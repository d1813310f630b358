"""The arms of the evaluation on one set of prompts and seeds, judged by the tiny world's oracle.

The base model; the same compute spent on a new seed; the better of two seeds as picked by the MLLM, or by the oracle
(which cheats); a second pass with the tokens of a correct picture (no aligner can do better); and the second pass with
the image's own tokens (no guidance), or aligned with text, stock MLLM, or the finetuned MLLM (IMG).
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
from torch import Tensor

from img_minimal.aligner import ImplicitAligner
from img_minimal.evaluate.compare import FIRST_SEED, NEW_SEED
from img_minimal.evaluate.intervals import mean_interval, said, win_rate
from img_minimal.files import to_pil
from img_minimal.load import load_guide
from img_minimal.mllm import MLLM, NOTHING
from img_minimal.pipeline import IMG
from img_minimal.plots import pairs_grid
from img_minimal.presets import Preset
from img_minimal.tiny.edits import correct
from img_minimal.tiny.grammar import CATEGORIES, Prompt, benchmark
from img_minimal.tiny.oracle import Verdict, judge
from img_minimal.tiny.world import render

TITLES = {
    "base": "base model",
    "new_seed": "same compute, new seed",
    "best_of_two_mllm": "best of two seeds, picked by the MLLM",
    "best_of_two_oracle": "best of two seeds, picked by the oracle (cheats)",
    "perfect_tokens": "tokens of a correct picture (ceiling)",
    "no_guidance": "second pass, the image's own tokens",
    "text": "second pass, guided by text",
    "stock_mllm": "second pass, guided by the stock MLLM",
    "img": "IMG",
    "img_kept": "IMG, or the first where the MLLM prefers it",
    "img_asked": "IMG where the MLLM has something to say",
}
CHOICES = ("img_kept", "img_asked")  # of a first and a second image, by the MLLM
ORDER = ("no_guidance", "base", "text", "stock_mllm", "img")  # from worst to best in the paper's Table 5


class Arms:
    """One set of prompts and seeds, the base model's images of it, and what every arm shares."""

    def __init__(self, img: IMG, prompts: list[Prompt], seed: int, progress: bool = True):
        self.img, self.prompts, self.progress = img, prompts, progress
        self.captions = [str(p) for p in prompts]
        self.seed, self.seeds = seed, [FIRST_SEED * (seed + 1) + k for k in range(len(prompts))]
        self.base = self._draw("base")
        self.pictures = to_pil(self.base)
        self.own = img.backbone.tokens(self.pictures)
        self.verdicts: dict[str, list[Verdict]] = {"base": judge(self.base, prompts)}

    def _draw(self, name: str, tokens: Tensor | None = None, offset: int = 0) -> Tensor:
        seeds = [s + offset for s in self.seeds]
        return self.img.backbone.draw(self.captions, seeds, tokens, progress=name if self.progress else None)

    def second_pass(self, name: str, tokens: Tensor) -> Tensor:
        """Draw again with tokens (B, N, D), from the same seeds, and judge it as arm `name`."""
        images = self._draw(name, tokens)
        self.verdicts[name] = judge(images, self.prompts)
        return images

    def aligned(self, name: str, img: IMG) -> Tensor:
        """The second pass of an aligner with its guide."""
        return self.second_pass(name, img.align(self.base, self.captions, self.seeds))

    def new_seed(self) -> Tensor:
        """The same compute spent on another try, judged as arm `new_seed`."""
        again = self._draw("new_seed", offset=NEW_SEED)
        self.verdicts["new_seed"] = judge(again, self.prompts)
        return again

    def controls(self) -> None:
        """The arms that need no aligner."""
        again = self.new_seed()
        tries = list(zip(self.verdicts["base"], self.verdicts["new_seed"]))
        better = self.img.better(self.pictures, to_pil(again), self.captions, self.seeds)
        self.verdicts["best_of_two_mllm"] = [pair[second] for pair, second in zip(tries, better)]
        self.verdicts["best_of_two_oracle"] = [max(pair, key=lambda v: (v.strict, v.soft)) for pair in tries]
        perfect = [correct(v.found, p)[1] for v, p in zip(self.verdicts["base"], self.prompts)]
        self.second_pass("perfect_tokens", self.img.backbone.tokens(to_pil(render(perfect))))
        self.second_pass("no_guidance", self.own)

    def choices(self, images: Tensor) -> None:
        """What the MLLM can spare: it keeps the first image where it prefers it, or where it had nothing to say."""
        pairs = list(zip(self.verdicts["base"], self.verdicts["img"]))
        better = self.img.better(self.pictures, to_pil(images), self.captions, self.seeds)
        self.verdicts["img_kept"] = [pair[second] for pair, second in zip(pairs, better)]
        self.said = self.img.explain(self.pictures, self.captions, self.seeds)
        self.verdicts["img_asked"] = [pair[words != NOTHING] for pair, words in zip(pairs, self.said)]

    def words(self) -> dict:
        """How the MLLM's words about the base's images agree with the oracle's; `choices` comes first."""
        seen = list(zip(self.prompts, self.said, self.verdicts["base"]))
        wrong, right = ([one for one in seen if one[2].strict == kind] for kind in (False, True))

        def share(some: list, silent: bool) -> float:
            return sum((said == NOTHING) == silent for _, said, _ in some) / max(1, len(some))

        def by_category(some: list, silent: bool) -> dict[str, float]:
            kinds = {kind: [one for one in some if one[0].category == kind] for kind in CATEGORIES}
            return {kind: share(few, silent) for kind, few in kinds.items() if few}

        return {
            "nothing_when_wrong": share(wrong, silent=True),
            "complaint_when_right": share(right, silent=False),
            "exact_when_wrong": sum(said == verdict.words for _, said, verdict in wrong) / max(1, len(wrong)),
            "n_wrong": len(wrong),
            "n_right": len(right),
            "nothing_by_category": by_category(wrong, silent=True),
            "complaint_by_category": by_category(right, silent=False),
        }

    def results(self) -> dict:
        """Scores of every arm, overall and by category, and IMG against every other, with intervals."""
        groups = {kind: np.array([p.category == kind for p in self.prompts]) for kind in CATEGORIES}
        held_out = np.array([p.held_out for p in self.prompts])
        groups |= {"seen": ~held_out, "held_out": held_out}
        names = [name for name in TITLES if name in self.verdicts]
        others = [name for name in names if name != "img"]
        marks = {
            mark: {name: np.array([getattr(v, mark) for v in self.verdicts[name]], float) for name in names}
            for mark in ("strict", "soft", "graded", "unclear")
        }
        strict = marks["strict"]

        def arm(name: str) -> dict:
            means = {mark: values[name].mean().item() for mark, values in marks.items()}
            by_category = {kind: strict[name][here].mean().item() for kind, here in groups.items() if here.any()}
            interval = mean_interval(strict[name], self.captions)
            return means | {"n": len(self.prompts), "interval": interval, "by_category": by_category}

        def minus(better: str, worse: str) -> dict:
            return mean_interval(strict[better] - strict[worse], self.captions)

        def wins(mark: str, ours: str, theirs: str) -> dict:
            return win_rate(marks[mark][ours], marks[mark][theirs], self.captions)

        steps = list(pairwise(name for name in ORDER if name in names))
        return {
            "arms": {name: arm(name) for name in names},
            "win_rate": {f"img_vs_{name}": wins("soft", "img", name) for name in others}
            | {f"{name}_vs_base": wins("soft", name, "base") for name in CHOICES if name in names},
            "graded_win_rate": {f"img_vs_{name}": wins("graded", "img", name) for name in others},
            "difference": {f"img_minus_{name}": minus("img", name) for name in others},
            "order": {f"{better}_minus_{worse}": minus(better, worse) for worse, better in steps},
        }


def print_results(results: dict) -> None:
    """The table of arms, and the paired comparisons."""
    groups = list(results["arms"]["img"]["by_category"])
    print(f"{'strict':>56} soft  graded unclear " + " ".join(f"{g[:8]:>8}" for g in groups))
    for name, arm in results["arms"].items():
        scores = f"{arm['strict']:7.3f} {arm['soft']:5.3f} {arm['graded']:6.3f} {arm['unclear']:7.3f} "
        print(f"{TITLES[name]:48} {scores}" + " ".join(f"{arm['by_category'][g]:8.2f}" for g in groups))
    print(f"\n{'IMG against':48} strict, difference       win rate, soft score            win rate, graded score")
    for name in (name for name in results["arms"] if name != "img"):
        rates = [results[kind][f"img_vs_{name}"] for kind in ("win_rate", "graded_win_rate")]
        wins = "   ".join(f"{said(rate)} of {rate['decided']:<5}" for rate in rates)
        print(f"{TITLES[name]:48} {said(results['difference'][f'img_minus_{name}'], '+.3f')}   {wins}")
    for name in filter(results["arms"].get, CHOICES):
        rate = results["win_rate"][f"{name}_vs_base"]
        print(f"{TITLES[name]} wins {said(rate)} of {rate['decided']} comparisons with the base model, soft score")
    print("\nThe paper's order, each beside the one before it, strict:")
    for name, difference in results["order"].items():
        better, worse = (TITLES[arm] for arm in name.split("_minus_"))
        print(f"{better:48} {said(difference, '+.3f')}   minus {worse}")
    if words := results.get("mllm"):
        print(
            "\nThe MLLM says nothing about {nothing_when_wrong:.0%} of the base's {n_wrong} wrong images, and exactly "
            "what is wrong\nabout {exact_when_wrong:.0%}; it complains about {complaint_when_right:.0%} of "
            "{n_right} right ones.".format(**words)
        )
        for title, name in (("Nothing about wrong ones", "nothing"), ("Complaints about right ones", "complaint")):
            shares = words[f"{name}_by_category"]
            print(f"{title}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))


def print_comparison(img: IMG, name: str, count: int, picture: Path) -> None:
    """Base against IMG on validation prompts: what a training run ends with. Also saves a grid of samples."""
    arms = Arms(img, benchmark(count, "validation"), seed=0)
    images = arms.aligned("img", img)
    results = arms.results()
    base, ours = (results["arms"][arm]["strict"] for arm in ("base", "img"))
    rate = results["win_rate"]["img_vs_base"]
    print(
        f"strict alignment on {count} validation prompts: base {base:.3f}, IMG {ours:.3f}; win rate without ties "
        f"{rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}] of {rate['decided']}"
    )
    before_and_after(arms, name, images, picture)


def before_and_after(arms: Arms, name: str, images: Tensor, path: Path | str, count: int = 6) -> None:
    """The first prompts whose base image is wrong: both images, what the MLLM said, what the oracle says of both."""
    chosen = [k for k, verdict in enumerate(arms.verdicts["base"]) if not verdict.strict][:count]
    pictures = [arms.pictures[k] for k in chosen]
    captions = [arms.captions[k] for k in chosen]
    said = ["(guided by text: no MLLM looked)"] * len(chosen)
    if isinstance(arms.img.guide, MLLM):
        said = arms.img.explain(pictures, captions, [arms.seeds[k] for k in chosen])
    pairs = []
    for k, picture, caption, words in zip(chosen, pictures, captions, said):
        first, verdict = arms.verdicts["base"][k], arms.verdicts["img"][k]
        now = "right" if verdict.strict else f"still wrong: {verdict.words}"
        after = to_pil(images[k : k + 1])[0]
        before = f'"{caption}"\noracle: {first.words}\nMLLM: {words}'
        pairs.append([(picture, before), (after, f"IMG, same seed\noracle: {now}")])
    note = f"the first {len(chosen)} of {len(arms.prompts)} prompts that the base draws wrong, seed {arms.seed}"
    pairs_grid(pairs, path, f"{name}: {note}; not chosen by result")


def ablations(arms: Arms, preset: Preset) -> None:
    """The arms guided by text and by the stock MLLM, each with an aligner of its own; left out where there is none."""
    backbone = arms.img.backbone
    for name, kind, path in (("text", "text", preset.text_aligner), ("stock_mllm", "stock", preset.stock_aligner)):
        if Path(path).exists():
            guide = load_guide(preset, kind, backbone)
            img = IMG(backbone, guide, ImplicitAligner.from_file(path), preset.passes, preset.mllm_batch)
            arms.aligned(name, img)
        else:
            print(f"left out: {TITLES[name]}; {path} is not there, train it with: python train.py --guidance {kind}")
