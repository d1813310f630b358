"""The arms of the evaluation: ways to draw the same prompts, judged by the tiny world's oracle.

The base model; the same compute spent on a new seed; the better of two seeds as picked by the MLLM,
or by the oracle (which cheats); a second pass with the tokens of a correct picture (no aligner can
do better); and the second pass with the image's own tokens (no guidance), or aligned with text,
stock MLLM, or the finetuned MLLM (IMG).
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from img_minimal.evaluate.intervals import (
    Interval,
    bootstrap_ratio,
    compare_arms,
    mean_interval,
    said,
    said_wins,
    shares,
)
from img_minimal.files import to_pil
from img_minimal.hub.questions import NOTHING
from img_minimal.mllm import MLLM
from img_minimal.pipeline import IMG
from img_minimal.plots import Cell, sheet
from img_minimal.preference import best_length
from img_minimal.tiny.edits import correct
from img_minimal.tiny.grammar import CATEGORIES, Prompt, benchmark
from img_minimal.tiny.oracle import Verdict, judge
from img_minimal.tiny.world import render

FIRST_SEED = 100_000  # times the run's seed plus one: images of two runs share none
NEW_SEED = 1_000_000  # added for the control that spends IMG's compute on another try
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
}
ORDER = ("no_guidance", "base", "text", "stock_mllm", "img")  # from worst to best in Table 5
MARKS = ("strict", "soft", "graded", "unclear")  # of a verdict
# Soft scores tie less often than strict ones, graded ones hardly ever.
WINS = {"win_rate": "soft", "graded_win_rate": "graded"}


class Arms:
    """Prompts and seeds, the base model's images of them, and the verdicts on every arm."""

    def __init__(self, img: IMG, prompts: list[Prompt], seed: int):
        """Draw and judge the base model's images."""
        self.img, self.prompts, self.seed = img, prompts, seed
        self.captions = list(map(str, prompts))
        first = FIRST_SEED * (seed + 1)
        self.seeds = list(range(first, first + len(prompts)))
        self.verdicts: dict[str, list[Verdict]] = {}
        self.base = self.draw("base")
        self.pictures = to_pil(self.base)
        self.own = img.backbone.tokens(self.pictures)

    def draw(self, name: str, tokens: Tensor | None = None, offset: int = 0) -> Tensor:
        """Draw and judge arm `name`, with tokens (B, N, D), from the seeds plus `offset`."""
        seeds = [seed + offset for seed in self.seeds]
        images = self.img.backbone.draw(self.captions, seeds, tokens, progress=name)
        self.verdicts[name] = judge(images, self.prompts)
        return images

    def aligned(self, name: str, img: IMG) -> Tensor:
        """Draw and judge the last images of an aligner with its guide.

        They begin with the base's images, or with drafts if `img` draws these.
        """
        start = None if img.backbone.sampling.draft_steps else self.pictures
        images = torch.stack(img.stages(self.captions, self.seeds, start=start)[-1])
        self.verdicts[name] = judge(images, self.prompts)
        return images

    def controls(self) -> None:
        """Draw and judge the arms that need no aligner."""
        again = to_pil(self.draw("new_seed", offset=NEW_SEED))
        if isinstance(self.img.guide, MLLM):
            chosen = self.img.better(self.pictures, again, self.captions, self.seeds)
            self.choose("best_of_two_mllm", chosen)
        # An image is right exactly if its soft score is 1, so this prefers right ones, too.
        soft = self.marks("soft")
        self.choose("best_of_two_oracle", soft["new_seed"] > soft["base"])
        self.draw("perfect_tokens", self.ideal)
        self.draw("no_guidance", self.own)

    def choose(self, name: str, chosen: Sequence[bool]) -> None:
        """Make up arm `name` of the base's images and, where `chosen`, of those of a new seed."""
        both = zip(self.verdicts["base"], self.verdicts["new_seed"], chosen)
        self.verdicts[name] = [new if better else first for first, new, better in both]

    def ablations(self) -> None:
        """Judge the arms guided by text and by the stock MLLM, except where an aligner is missing.

        They look at whole images and correct all of them: text cannot say what is wrong.
        """
        backbone = self.img.backbone
        for name, guidance in (("text", "text"), ("stock_mllm", "stock")):
            path = backbone.preset.guided_by(guidance).sampling.aligner
            if Path(path).exists():
                with self.img.drawing(draft_steps=None, only_wrong=False):
                    self.aligned(name, IMG(backbone, aligner=path, guidance=guidance))
            else:
                advice = f"train it with: python train.py --guidance {guidance}"
                print(f"left out: {TITLES[name]}; {path} is not there, {advice}")

    @cached_property
    def ideal(self) -> Tensor:
        """Encode correct pictures of the base's images: tokens c* (n, N, D)."""
        # The correct scene that is nearest to each image, as the pairs of training have it.
        scenes = []
        for verdict, prompt in zip(self.verdicts["base"], self.prompts):
            scenes.append(correct(verdict.found, prompt)[1])
        return self.img.backbone.tokens(to_pil(render(scenes)))

    def best_lengths(self, f: Tensor, redrawn: Tensor | None = None) -> dict[str, Interval]:
        """Measure b* of `preference.best_length` over the base's wrong images, if there are any.

        f (n, N, D) are aligned tokens; with `redrawn`, images (n, 3, H, W) drawn with them, b* is
        that of the injection, too. Returns intervals for "all" and for each category.
        """
        reached = f if redrawn is None else self.img.backbone.tokens(to_pil(redrawn))
        parts = best_length(f, self.own, self.ideal, reached)
        wrong, captions = self.marks("strict")["base"] == 0, np.array(self.captions)
        lengths = {}
        for name, group in ({"all": wrong} | self.categories()).items():
            if (chosen := wrong & group).any():
                top, bottom = (part.numpy()[chosen] for part in parts)
                lengths[name] = bootstrap_ratio(top, bottom, captions[chosen])
        return lengths

    def marks(self, mark: str) -> dict[str, np.ndarray]:
        """Return one of MARKS (n,) of every arm."""
        marks = {}
        for name, verdicts in self.verdicts.items():
            marks[name] = np.array([getattr(verdict, mark) for verdict in verdicts], float)
        return marks

    def categories(self) -> dict[str, np.ndarray]:
        """Find the prompts (n,) of each category."""
        categories = np.array([prompt.category for prompt in self.prompts])
        return {kind: categories == kind for kind in CATEGORIES}

    @cached_property
    def answers(self) -> list[str]:
        """Decode what the MLLM says about the base's images."""
        if not isinstance(self.img.guide, MLLM):
            return ["(guided by text: no MLLM looked)"] * len(self.captions)
        return self.img.explain(self.pictures, self.captions, self.seeds)

    def words(self) -> dict[str, dict[str, float]]:
        """Compare the MLLM's words about the base's images with the oracle's.

        Returns shares of the wrong or right images, of "all" and of each category that has any.
        """
        answers, right = np.array(self.answers), self.marks("strict")["base"] == 1
        exact = answers == np.array([verdict.words for verdict in self.verdicts["base"]])
        groups = {"all": np.ones_like(right)} | self.categories()
        return {
            "nothing_when_wrong": shares(answers == NOTHING, groups, ~right),
            "exact_when_wrong": shares(exact, groups, ~right),
            "complaint_when_right": shares(answers != NOTHING, groups, right),
        }

    def results(self) -> dict:
        """Score every arm, overall and by category, and compare IMG with each other arm."""
        marks = {mark: self.marks(mark) for mark in MARKS}
        held_out = np.array([prompt.held_out for prompt in self.prompts])
        groups = self.categories() | {"seen": ~held_out, "held_out": held_out}
        results = compare_arms(marks, WINS, groups, self.captions)
        order = results["order"] = {}
        for worse, better in pairwise(filter(self.verdicts.get, ORDER)):
            gain = marks["strict"][better] - marks["strict"][worse]
            order[f"{better}_minus_{worse}"] = mean_interval(gain, self.captions)
        return results


def print_results(title: str, results: dict) -> None:
    """Print the arms with their intervals, each one against IMG, and all other numbers of them."""
    rates = [name for name in results if name.endswith("win_rate")]
    versus = [[title, "[95 %]", "IMG minus it", *(f"IMG's {rate}" for rate in rates)]]
    numbers = []
    for name, arm in results["arms"].items():
        row = [TITLES[name], said(arm["interval"])]
        if name != "img":
            row.append(said(results["difference"][f"img_minus_{name}"], "+.3f"))
            row += [said_wins(results[rate][f"img_vs_{name}"]) for rate in rates]
        versus.append(row)
        means = {mark: value for mark, value in arm.items() if isinstance(value, float)}
        means |= arm["by_category"]
        numbers.append([TITLES[name], *(f"{value:.3f}" for value in means.values())])
    print_table(versus)
    print_table([["", *means], *numbers])


def print_table(rows: list[list[str]]) -> None:
    """Print rows of cells, with columns as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    for row in rows:
        print(*map(str.ljust, row, widths), sep="  ")
    print()


def print_comparison(img: IMG, name: str, count: int, picture: Path) -> None:
    """Compare IMG with the base on validation prompts, and save samples: the end of a training."""
    arms = Arms(img, benchmark(count, "validation"), seed=0)
    tokens = img.align(arms.base, arms.captions, arms.seeds)
    images = arms.draw("img", tokens)
    print_results(f"strict alignment on {count} validation prompts", arms.results())
    print("b*, the best multiple of the aligner's steps for the base's wrong images:")
    print_lengths("in tokens", arms.best_lengths(tokens))
    print_lengths("as drawn", arms.best_lengths(tokens, images))
    before_and_after(arms, name, images, picture)


def print_lengths(title: str, lengths: dict[str, Interval]) -> None:
    """Print a line of `Arms.best_lengths`."""
    parts = [f"{name} {said(interval, '.2f')}" for name, interval in lengths.items()]
    print(f"{title:16}{', '.join(parts) or 'no image is wrong'}")


def before_and_after(arms: Arms, name: str, images: Tensor, path: Path | str) -> None:
    """Save both images of the first six prompts that the base draws wrong, with the verdicts."""
    wrong = np.flatnonzero(arms.marks("strict")["base"] == 0)[:6]
    cells = []
    for k, image in zip(wrong, to_pil(images[wrong])):
        before, after = (f"oracle: {arms.verdicts[arm][k].words}" for arm in ("base", "img"))
        words = f'"{arms.captions[k]}"\n{before}\nMLLM: {arms.answers[k]}'
        cells += [(arms.pictures[k], words), (image, after)]
    shown = f"the first {len(wrong)} of {len(images)} prompts that the base draws wrong"
    save_pairs(cells, path, f"{name}: {shown}, seed {arms.seed}; not chosen by result")


def save_pairs(cells: list[Cell], path: Path | str, caption: str) -> None:
    """Save labelled images, two pairs to a row; nothing if there are none."""
    rows = [cells[k : k + 4] for k in range(0, len(cells), 4)]
    if rows:
        sheet(rows, path, caption=caption, heads=["first image", "→ IMG, same seed"] * 2)
