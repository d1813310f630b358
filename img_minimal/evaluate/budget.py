"""The budget curve: how many images are right, beside the denoising steps that each one costs.

    python -m img_minimal.evaluate --budget --split validation                 to choose a way
    python -m img_minimal.evaluate --budget --prompts 512 --json budget.json   to report it

Every way delivers one image of each prompt, or four, from the same seeds. IMG looks at whole first
images or at drafts, at each image or at one of four, and corrects all or what the MLLM finds wrong.
Costs are counted, not computed: a hook sees every row that passes through the network.
"""

from collections.abc import Iterator
from itertools import combinations
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from img_minimal.evaluate.arms import FIRST_SEED, NEW_SEED
from img_minimal.evaluate.intervals import (
    bootstrap_ratio,
    paired_shares,
    said,
    said_wins,
    win_rate,
)
from img_minimal.files import to_pil
from img_minimal.pipeline import IMG
from img_minimal.tiny.grammar import Prompt
from img_minimal.tiny.oracle import judge

FOUR = 4  # images of a prompt, where there are several
DRAFTS = (1, 0.7, 0.5, 0.3)  # shares of the denoising steps; 1 is a whole image
ONE_LOOK = (0.7, 0.3)  # drafts that serve four images
BASE, WHOLE = "base model, four images", "IMG, four images"
Images = list[Tensor]  # (3, H, W) each, prompt by prompt


class Budget:
    """Ways to draw the same prompts from the same seeds. No image is drawn twice."""

    def __init__(self, img: IMG, prompts: list[Prompt], seed: int):
        self.img, self.prompts, self.first_seed = img, prompts, FIRST_SEED * (seed + 1)
        self.steps, self.draw_anew = img.backbone.sampling.steps, img.draw_each
        self.evaluations = 0  # of the network so far; guidance takes two a step
        self.drawn: dict[tuple, tuple[Tensor, float]] = {}  # images, and the evaluations of each
        self.asked: set[tuple] = set()  # images that the current way has asked for
        self.scores: dict[str, dict[str, np.ndarray]] = {}

    def rows(self) -> Iterator[tuple[str, dict]]:
        """Yield each way's name and results as soon as it is drawn."""
        network = getattr(self.img.backbone.pipe, self.img.backbone.network)
        hook = network.register_forward_pre_hook(self._count)
        with hook, patch.object(self.img, "draw_each", self._draw):
            for name, images in self.ways():
                yield name, self.results(name, images)
                self.asked.clear()

    def ways(self) -> Iterator[tuple[str, Images]]:
        """Draw in one way after another; the first two are what all others are compared with."""
        yield BASE, self.images(FOUR, rounds=0)
        yield WHOLE, self.images(FOUR)
        yield "base model", self.images(rounds=0)
        for count in (2, FOUR):
            images = self.images(count, rounds=0)
            candidates = [images[k::count] for k in range(count)]
            yield f"best of {count} seeds, by the MLLM", self.preferred(candidates)
        for only_wrong, words in ((False, ""), (True, ", only what is wrong")):
            for share in DRAFTS:
                draft = round(share * self.steps)
                settings = {"draft_steps": draft, "only_wrong": only_wrong}
                name = f"IMG, a look at {draft} of {self.steps} steps{words}"
                yield name, self.images(**settings)
                if share in ONE_LOOK:
                    images = self.images(FOUR, one_look=True, **settings)
                    yield f"{name}, for four images", images
            both = self.images(rounds=0), self.images(only_wrong=only_wrong)
            yield f"IMG{words}, the better image", self.preferred(both)

    def images(
        self, count: int = 1, *, rounds: int = 1, one_look: bool = False, **settings: object
    ) -> Images:
        """Draw `count` images of each prompt with IMG, or without it in no `rounds`."""
        prompts, seeds = self.requests(count)
        size, images = count if one_look else len(seeds), []
        with self.img.drawing(**settings):
            for k in range(0, len(seeds), size):
                asked = prompts[k : k + size], seeds[k : k + size]
                images += self.img.stages(*asked, rounds=rounds, one_look=one_look)[-1]
        return images

    def requests(self, count: int) -> tuple[list[str], list[int]]:
        """Repeat each caption `count` times, each time with another seed."""
        prompts, seeds = [], []
        for number, prompt in enumerate(self.prompts):
            prompts += [str(prompt)] * count
            seeds += [self.first_seed + number + k * NEW_SEED for k in range(count)]
        return prompts, seeds

    def preferred(self, candidates: list[Images]) -> Images:
        """Choose the image of each prompt that the MLLM is most content with."""
        content = []
        for images in candidates:
            content.append(self.img.satisfaction(to_pil(images), *self.requests(1)))
        best = np.argmax(content, 0)  # the first of equals
        return [candidates[k][i] for i, k in enumerate(best)]

    def results(self, name: str, images: Images) -> dict:
        """Compare a way with the base and with whole IMG from the same seeds.

        `drawings` are what an image costs, in whole images of the base. Of four images, `distance`
        is how far the image tokens of two are apart on average, over that of the base's; the four
        are `all_right` or `all_wrong` in so many prompts.
        """
        count = len(images) // len(self.prompts)
        captions, _ = self.requests(count)
        verdicts = judge(torch.stack(images), [p for p in self.prompts for _ in range(count)])
        scores = self.scores[name] = {}
        for mark in ("strict", "soft"):
            marks = np.array([getattr(verdict, mark) for verdict in verdicts], float)
            scores[mark] = marks.reshape(-1, count)
        base, whole = self.scores[BASE], self.scores.get(WHOLE, scores)
        ours, theirs = scores["soft"].ravel(), base["soft"][:, :count].ravel()
        strict, rival = scores["strict"], whole["strict"][:, :count]
        costs = [evaluations for _, evaluations in map(self.drawn.get, self.asked)]
        row = paired_shares(strict.ravel(), rival.ravel(), captions)
        row["win_rate"] = win_rate(ours, theirs, captions)
        row["drawings"] = sum(costs) / len(images) / next(iter(self.drawn.values()))[1]
        if count > 1:
            tokens = self.img.backbone.tokens(to_pil(images)).flatten(1).unflatten(0, (-1, count))
            pairs = [(a - b).norm(dim=1) for a, b in combinations(tokens.unbind(1), 2)]
            scores["distance"] = torch.stack(pairs).mean(0).numpy()
            every, _ = self.requests(1)
            row["distance"] = bootstrap_ratio(scores["distance"], base["distance"], every)
            row["all_right"], row["all_wrong"] = strict.all(1).mean(), 1 - strict.any(1).mean()
        return row

    def _count(self, network: object, inputs: tuple[Tensor, ...]) -> None:
        self.evaluations += len(inputs[0])

    def _draw(
        self,
        prompts: list,
        seeds: list,
        tokens: list,
        steps: int,
        progress: str = "",
        _: object = 0,
    ) -> Images:
        """Draw as `IMG.draw_each` does, but only what has not been drawn before."""
        keys, before = [], self.evaluations
        for prompt, seed, token in zip(prompts, seeds, tokens):
            guided = None if token is None else token.numpy().tobytes()
            keys.append((prompt, seed, steps, guided))
        known = {k: self.drawn[key][0] for k, key in enumerate(keys) if key in self.drawn}
        images = self.draw_anew(prompts, seeds, tokens, steps, progress, known)
        each = (self.evaluations - before) / max(1, len(keys) - len(known))
        for key, image in zip(keys, images):
            self.drawn.setdefault(key, (image, each))
        self.asked.update(keys)
        return images


HEAD = f"{'':62} {'strict [95 %]':20} {'minus whole IMG':24} {'win rate over the base':29} "
HEAD += "drawings; distance; all right, all wrong"


def line(name: str, row: dict) -> str:
    """Format a way's results."""
    cells = [said(row["share"]), said(row["difference"], "+.3f"), said_wins(row["win_rate"])]
    words = "{:62} {} {:24} {:29}".format(name, *cells) + f" {row['drawings']:8.2f}"
    if "distance" in row:
        words += f"  {said(row['distance'], '.2f')} {row['all_right']:.2f} {row['all_wrong']:.2f}"
    return words
