"""The arms of the evaluation: ways to draw the same prompts, judged by the tiny world's oracle.

The base model; the same compute spent on a new seed; the better of two seeds as picked by the MLLM,
or by the oracle (which cheats); a second pass with the tokens of a correct picture (no aligner can
do better); and the second pass with the image's own tokens (no guidance), or aligned with text,
stock MLLM, or the finetuned MLLM (IMG).
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from img_minimal.evaluate.intervals import (
    Interval,
    bootstrap_ratio,
    differences,
    mean_interval,
    said,
    said_wins,
    win_rate,
    win_rates,
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
Groups = dict[str, np.ndarray]  # which prompts (n,) belong to a group


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
        again = self.draw("new_seed", offset=NEW_SEED)
        chosen = self.img.better(self.pictures, to_pil(again), self.captions, self.seeds)
        self.choose("best_of_two_mllm", "new_seed", chosen)
        # An image is right exactly if its soft score is 1, so this prefers right ones, too.
        soft = self.marks("soft")
        self.choose("best_of_two_oracle", "new_seed", soft["new_seed"] > soft["base"])
        self.draw("perfect_tokens", self.ideal)
        self.draw("no_guidance", self.own)

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
        top, bottom = best_length(f, self.own, self.ideal, reached)
        wrong, captions = self.marks("strict")["base"] == 0, np.array(self.captions)
        lengths = {}
        for name, group in ({"all": wrong} | self.categories()).items():
            if (chosen := wrong & group).any():
                parts = top.numpy()[chosen], bottom.numpy()[chosen]
                lengths[name] = bootstrap_ratio(*parts, captions[chosen])
        return lengths

    def choose(self, name: str, other: str, chosen: Sequence[bool]) -> None:
        """Make up arm `name` of the base's images and, where `chosen`, another arm's."""
        self.verdicts[name] = verdicts = list(self.verdicts["base"])
        for k, takes_other in enumerate(chosen):
            if takes_other:
                verdicts[k] = self.verdicts[other][k]

    def marks(self, mark: str) -> dict[str, np.ndarray]:
        """Return one of MARKS (n,) of every arm."""
        marks = {}
        for name, verdicts in self.verdicts.items():
            marks[name] = np.array([getattr(verdict, mark) for verdict in verdicts], float)
        return marks

    def categories(self) -> Groups:
        """Group the prompts by category."""
        categories = np.array([prompt.category for prompt in self.prompts])
        return {kind: categories == kind for kind in CATEGORIES}

    def words(self) -> dict:
        """Compare the MLLM's words about the base's images with the oracle's."""
        answers = np.array(self.img.explain(self.pictures, self.captions, self.seeds))
        right = self.marks("strict")["base"] == 1
        oracle = np.array([verdict.words for verdict in self.verdicts["base"]])
        exact, silent = oracle == answers, answers == NOTHING
        groups = {"all": np.ones_like(right)} | self.categories()
        nothing = shares(silent, ~right, groups)
        complaints = shares(~silent, right, groups)
        return {
            "nothing_when_wrong": nothing.pop("all", 0.0),
            "complaint_when_right": complaints.pop("all", 0.0),
            "exact_when_wrong": shares(exact, ~right, groups).get("all", 0.0),
            "n_wrong": sum(~right).item(),
            "n_right": sum(right).item(),
            "nothing_by_category": nothing,
            "complaint_by_category": complaints,
        }

    def results(self) -> dict:
        """Score every arm, overall and by category, and compare IMG with each other arm."""
        marks = {mark: self.marks(mark) for mark in MARKS}
        strict, captions = marks["strict"], self.captions
        everything = np.ones(len(captions), bool)
        held_out = np.array([prompt.held_out for prompt in self.prompts])
        groups = self.categories() | {"seen": ~held_out, "held_out": held_out}
        arms = {}
        for name, values in strict.items():
            arms[name] = {mark: marks[mark][name].mean().item() for mark in MARKS}
            arms[name]["n"] = len(values)
            arms[name]["interval"] = mean_interval(values, captions)
            arms[name]["by_category"] = shares(values, everything, groups)
        others = [("img", name) for name in arms if name != "img"]
        steps = []
        for worse, better in pairwise(filter(arms.get, ORDER)):
            steps.append((better, worse))
        return {
            "arms": arms,
            "win_rate": win_rates(marks["soft"], captions, others),
            "graded_win_rate": win_rates(marks["graded"], captions, others),
            "difference": differences(strict, captions, others),
            "order": differences(strict, captions, steps),
        }


def shares(hits: np.ndarray, chosen: np.ndarray, groups: Groups) -> dict[str, float]:
    """Average hits (n,) over the `chosen` images (n,) of every group that has any."""
    means = {}
    for name, group in groups.items():
        if any(chosen & group):
            means[name] = hits[chosen & group].mean().item()
    return means


def print_results(results: dict) -> None:
    """Print the table of arms, and the paired comparisons."""
    arms = results["arms"]
    groups = "".join(f"{group[:8]:>9}" for group in arms["img"]["by_category"])
    print(f"{'strict':>56} soft  graded unclear{groups}")
    for name, arm in arms.items():
        marks = "{strict:7.3f} {soft:5.3f} {graded:6.3f} {unclear:7.3f}".format(**arm)
        groups = "".join(f"{share:9.2f}" for share in arm["by_category"].values())
        print(f"{TITLES[name]:48} {marks}{groups}")

    columns = "strict, difference       win rate, soft score            win rate, graded score"
    print(f"\n{'IMG against':48} {columns}")
    for name in arms:
        if name != "img":
            difference = said(results["difference"][f"img_minus_{name}"], "+.3f")
            soft = said_wins(results["win_rate"][f"img_vs_{name}"])
            graded = said_wins(results["graded_win_rate"][f"img_vs_{name}"])
            print(f"{TITLES[name]:48} {difference}   {soft:29}   {graded}")

    print("\nThe paper's order, each arm minus the one before it, strict:")
    for name, difference in results["order"].items():
        better, worse = name.split("_minus_")
        print(f"{TITLES[better]:48} {said(difference, '+.3f')}   minus {TITLES[worse]}")
    if "mllm" in results:
        print_words(results["mllm"])


def print_words(words: dict) -> None:
    """Print how the MLLM's words agree with the oracle's."""
    report = (
        "\nThe MLLM says nothing about {nothing_when_wrong:.0%} of the base's {n_wrong} wrong "
        "images, and exactly\nwhat is wrong about {exact_when_wrong:.0%}; it complains about "
        "{complaint_when_right:.0%} of {n_right} right ones."
    )
    print(report.format(**words))
    titles = {
        "nothing_by_category": "Nothing about wrong ones",
        "complaint_by_category": "Complaints about right ones",
    }
    for part, title in titles.items():
        cells = [f"{kind} {share:.0%}" for kind, share in words[part].items()]
        print(f"{title}: {', '.join(cells)}")


def print_comparison(img: IMG, name: str, count: int, picture: Path) -> None:
    """Compare IMG with the base on validation prompts, and save samples: the end of a training."""
    arms = Arms(img, benchmark(count, "validation"), seed=0)
    tokens = img.align(arms.base, arms.captions, arms.seeds)
    images = arms.draw("img", tokens)
    strict, soft = arms.marks("strict"), arms.marks("soft")
    print(
        f"strict alignment on {count} validation prompts: base {strict['base'].mean():.3f}, IMG "
        f"{strict['img'].mean():.3f}; win rate without ties "
        f"{said_wins(win_rate(soft['img'], soft['base'], arms.captions), '.2f')}"
    )
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
    redrawn = to_pil(images)
    cells: list[Cell] = []
    for k, verdict in enumerate(arms.verdicts["base"]):
        if verdict.strict or len(cells) == 12:
            continue
        picture, caption = arms.pictures[k], arms.captions[k]
        answer = "(guided by text: no MLLM looked)"
        if isinstance(arms.img.guide, MLLM):
            [answer] = arms.img.explain([picture], [caption], [arms.seeds[k]])
        cells.append((picture, f'"{caption}"\noracle: {verdict.words}\nMLLM: {answer}'))
        verdict = arms.verdicts["img"][k]
        words = "right" if verdict.strict else f"still wrong: {verdict.words}"
        cells.append((redrawn[k], f"IMG, same seed\noracle: {words}"))
    shown = f"the first {len(cells) // 2} of {len(redrawn)} prompts that the base draws wrong"
    save_pairs(cells, path, f"{name}: {shown}, seed {arms.seed}; not chosen by result")


def save_pairs(cells: list[Cell], path: Path | str, caption: str) -> None:
    """Save labelled images, three pairs to a row; nothing if there are none."""
    rows = [cells[k : k + 6] for k in range(0, len(cells), 6)]
    if rows:
        sheet(rows, path, caption=caption)


def ablations(arms: Arms) -> None:
    """Judge the arms guided by text and by the stock MLLM, except where an aligner is missing.

    They look at whole images and correct all of them: text cannot say what is wrong.
    """
    backbone = arms.img.backbone
    sampling = backbone.preset.sampling
    rows = (
        ("text", "text", sampling.text_aligner),
        ("stock_mllm", "stock", sampling.stock_aligner),
    )
    for name, guidance, path in rows:
        if Path(path).exists():
            with arms.img.drawing(draft_steps=None, only_wrong=False):
                arms.aligned(name, IMG(backbone, aligner=path, guidance=guidance))
        else:
            advice = f"train it with: python train.py --guidance {guidance}"
            print(f"left out: {TITLES[name]}; {path} is not there, {advice}")
