"""The budget curve: how many images are right, beside the drawings that each one costs.

    python -m img_minimal.evaluate --budget --split validation                 to choose a way
    python -m img_minimal.evaluate --budget --prompts 512 --json budget.json   to report it

Every way delivers one image of each prompt, or four, from the same seeds. IMG looks at whole first
images or at drafts, at each image or at one of four, and corrects all or what the MLLM finds wrong.
Costs are counted, not computed: a hook sees every row that passes through the network.
"""

from collections.abc import Iterator
from itertools import combinations

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
# Of IMG's ways: the share of the steps that drafts take, whether only what is wrong is corrected,
# and whether one look serves four images. Whole first images are the base's, drawn once.
WAYS = (
    (0.7, False, False),
    (0.5, False, False),
    (0.3, False, False),
    (0.3, True, False),
    (0.7, False, True),
    (0.3, False, True),
    (1, True, True),
)
BASE, WHOLE = "base model, four images", "IMG, four images"
Images = list[Tensor]  # (3, H, W) each, prompt by prompt
Drawn = tuple[Images, float]  # with the evaluations of the network that each image has taken


class Budget:
    """Draw the same prompts from the same seeds in every way."""

    def __init__(self, img: IMG, prompts: list[Prompt], seed: int):
        self.img, self.prompts, self.first_seed = img, prompts, FIRST_SEED * (seed + 1)
        self.evaluations = 0  # so far; guidance takes two a step
        self.scores: dict[str, dict[str, np.ndarray]] = {}

    def rows(self) -> Iterator[tuple[str, dict]]:
        """Yield each way's name and results as soon as it is drawn."""
        network = getattr(self.img.backbone.pipe, self.img.backbone.network)
        with network.register_forward_pre_hook(self._count, with_kwargs=True):
            for name, (images, cost) in self.ways():
                if name == BASE:
                    drawing = cost
                yield name, {"drawings": cost / drawing} | self.results(name, images)

    def ways(self) -> Iterator[tuple[str, Drawn]]:
        """Draw in one way after another; all are compared with the first two."""
        steps = self.img.backbone.sampling.steps
        fours, cost = self.draw(FOUR, rounds=0)
        yield BASE, (fours, cost)
        images, more = self.draw(FOUR, start=fours)
        yield WHOLE, (images, cost + more)
        seeds = [fours[k::FOUR] for k in range(FOUR)]
        yield "base model", (seeds[0], cost)
        for count in (2, FOUR):
            images = self.preferred(*seeds[:count])
            yield f"best of {count} seeds, by the MLLM", (images, count * cost)
        for only_wrong, words in ((False, ""), (True, ", only what is wrong")):
            images, more = self.draw(start=seeds[0], only_wrong=only_wrong)
            yield f"IMG{words}", (images, cost + more)
            images = self.preferred(seeds[0], images)
            yield f"IMG{words}, the better image", (images, cost + more)
        for share, only_wrong, one_look in WAYS:
            draft = round(share * steps)
            name = "IMG" + f", drafts of {draft} steps" * (share < 1)
            name += ", only what is wrong" * only_wrong + ", one look for four" * one_look
            settings = {"draft_steps": draft, "only_wrong": only_wrong}
            yield name, self.draw(FOUR if one_look else 1, one_look=one_look, **settings)

    def draw(
        self,
        count: int = 1,
        rounds: int = 1,
        one_look: bool = False,
        start: Images | None = None,
        **settings: object,
    ) -> Drawn:
        """Draw `count` images of each prompt with IMG, or in no `rounds` without."""
        prompts, seeds = self.requests(count)
        size, images, before = count if one_look else len(seeds), [], self.evaluations
        pictures = start and to_pil(start)
        with self.img.drawing(**settings):
            for k in range(0, len(seeds), size):
                asked = prompts[k : k + size], seeds[k : k + size]
                stages = self.img.stages(*asked, rounds=rounds, one_look=one_look, start=pictures)
                images += stages[-1]
        return images, (self.evaluations - before) / len(images)

    def requests(self, count: int = 1) -> tuple[list[str], list[int]]:
        """Repeat each caption `count` times, each time with another seed."""
        prompts, seeds = [], []
        for number, prompt in enumerate(self.prompts):
            prompts += [str(prompt)] * count
            seeds += [self.first_seed + number + k * NEW_SEED for k in range(count)]
        return prompts, seeds

    def preferred(self, *candidates: Images) -> Images:
        """Choose the image of each prompt that the MLLM is most content with."""
        content = []
        for images in candidates:
            content.append(self.img.satisfaction(to_pil(images), *self.requests()))
        best = np.argmax(content, 0)  # the first of equals
        return [candidates[k][i] for i, k in enumerate(best)]

    def results(self, name: str, images: Images) -> dict:
        """Compare a way with whole IMG, strictly, and with the base, from the same seeds.

        Of four images, `distance` is how far the image tokens of two are apart on average, over
        that of the base's; so many fours are `all_right` or `all_wrong`.
        """
        count = len(images) // len(self.prompts)
        verdicts = judge(torch.stack(images), [p for p in self.prompts for _ in range(count)])
        marks = [(verdict.strict, verdict.soft) for verdict in verdicts]
        strict, soft = np.array(marks, float).T.reshape(2, -1, count)
        tokens = self.img.backbone.tokens(to_pil(images)).flatten(1).unflatten(0, (-1, count))
        pairs = [(a - b).norm(dim=1).numpy() for a, b in combinations(tokens.unbind(1), 2)]
        self.scores[name] = {"strict": strict, "soft": soft, "distance": sum(pairs)}
        base, whole = self.scores[BASE], self.scores.get(WHOLE, self.scores[BASE])
        captions, _ = self.requests(count)
        row = paired_shares(strict.ravel(), whole["strict"][:, :count].ravel(), captions)
        row["win_rate"] = win_rate(soft.ravel(), base["soft"][:, :count].ravel(), captions)
        if count > 1:
            captions, _ = self.requests()
            row["distance"] = bootstrap_ratio(sum(pairs), base["distance"], captions)
            row["all_right"], row["all_wrong"] = strict.all(1).mean(), 1 - strict.any(1).mean()
        return row

    def _count(self, network: object, inputs: tuple, named: dict) -> None:
        latents, *_ = *inputs, *named.values()
        self.evaluations += len(latents)


HEAD = f"{'':58} {'strict [95 %]':20} {'minus whole IMG':24} {'win rate over the base':29} "
HEAD += "drawings; distance; all right, all wrong"


def line(name: str, row: dict) -> str:
    """Format a way's results."""
    cells = [said(row["share"]), said(row["difference"], "+.3f"), said_wins(row["win_rate"])]
    words = "{:58} {} {:24} {:29}".format(name, *cells) + f" {row['drawings']:8.2f}"
    if "distance" in row:
        words += f"  {said(row['distance'], '.2f')} {row['all_right']:.2f} {row['all_wrong']:.2f}"
    return words
