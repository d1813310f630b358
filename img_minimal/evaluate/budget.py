"""The budget curve: how many images are right, beside the drawings that each one costs.

    python -m img_minimal.evaluate --budget --split validation                 to choose a way
    python -m img_minimal.evaluate --budget --prompts 512 --json budget.json   to report it

Every way delivers one image of each prompt, or four, from the same seeds. IMG looks at whole first
images or at drafts, at each image or at one of four, and corrects all or what the MLLM finds wrong.
Costs are counted, not computed: a hook sees every row that passes through the network.
"""

from collections.abc import Iterator

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
Way = tuple[str, Images, float]  # with the drawings that each image costs


class Budget:
    """Draw the same prompts from the same seeds in every way."""

    def __init__(self, img: IMG, prompts: list[Prompt], seed: int):
        self.img, self.prompts = img, prompts
        self.seeds = FIRST_SEED * (seed + 1) + np.arange(len(prompts))
        self.evaluations = 0  # of the network, so far; guidance takes two a step
        self.drawing = 0.0  # evaluations that an image of the base takes
        self.scores: dict[str, tuple[np.ndarray, ...]] = {}  # strict, soft, distance

    def rows(self) -> Iterator[tuple[str, dict]]:
        """Yield each way's name and results as soon as it is drawn."""
        network = getattr(self.img.backbone.pipe, self.img.backbone.network)
        with network.register_forward_pre_hook(self._count, with_kwargs=True):
            for name, images, drawings in self.ways():
                yield name, {"drawings": drawings} | self.results(name, images)

    def ways(self) -> Iterator[Way]:
        """Draw in one way after another; all are compared with the first two."""
        fours = list(self.img.backbone.draw(*self.requests(FOUR)))
        self.drawing = self.evaluations / len(fours)
        yield BASE, fours, 1.0
        yield self.draw(WHOLE, FOUR, start=fours)
        seeds = [fours[k::FOUR] for k in range(FOUR)]
        yield "base model", seeds[0], 1.0
        for count in (2, FOUR):
            yield f"best of {count} seeds, by the MLLM", self.preferred(*seeds[:count]), count
        for name in ("IMG", "IMG, only what is wrong"):
            name, images, cost = self.draw(name, start=seeds[0], only_wrong=name != "IMG")
            yield name, images, cost
            yield f"{name}, the better image", self.preferred(seeds[0], images), cost
        for share, only_wrong, one_look in WAYS:
            draft = round(share * self.img.backbone.sampling.steps)
            name = "IMG" + f", drafts of {draft} steps" * (share < 1)
            name += ", only what is wrong" * only_wrong + ", one look for four" * one_look
            settings = {"draft_steps": draft, "only_wrong": only_wrong}
            yield self.draw(name, FOUR if one_look else 1, one_look=one_look, **settings)

    def draw(
        self,
        name: str,
        count: int = 1,
        start: Images | None = None,
        one_look: bool = False,
        **settings: object,
    ) -> Way:
        """Draw `count` images of each prompt with IMG; first images are drawn unless given."""
        prompts, seeds = self.requests(count)
        size, images, before = count if one_look else len(seeds), [], self.evaluations
        first = start and to_pil(start)
        with self.img.drawing(**settings):
            for k in range(0, len(seeds), size):
                asked = prompts[k : k + size], seeds[k : k + size]
                images += self.img.stages(*asked, one_look=one_look, start=first)[-1]
        drawings = (self.evaluations - before) / len(images) / self.drawing
        return name, images, drawings + (start is not None)

    def requests(self, count: int = 1) -> tuple[list[str], list[int]]:
        """Repeat each caption `count` times, each time with another seed."""
        seeds = np.add.outer(self.seeds, NEW_SEED * np.arange(count))
        return np.repeat(list(map(str, self.prompts)), count).tolist(), seeds.ravel().tolist()

    def preferred(self, *candidates: Images) -> Images:
        """Choose the image of each prompt that the MLLM is most content with."""
        content = [self.img.satisfaction(to_pil(x), *self.requests()) for x in candidates]
        best = np.argmax(content, 0)  # the first of equals
        return [candidates[k][i] for i, k in enumerate(best)]

    def results(self, name: str, images: Images) -> dict:
        """Compare a way with whole IMG, strictly, and with the base, from the same seeds.

        Of four images, `distance` is how far the image tokens of two are apart on average, over
        that of the base's; so many fours are `all_right` or `all_wrong`.
        """
        count = len(images) // len(self.prompts)
        verdicts = judge(torch.stack(images), [p for p in self.prompts for _ in range(count)])
        marks = np.array([(verdict.strict, verdict.soft) for verdict in verdicts], float)
        strict, soft = marks.T.reshape(2, -1, count)
        tokens = self.img.backbone.tokens(to_pil(images)).flatten(1).unflatten(0, (-1, count))
        distance = torch.cdist(tokens, tokens).sum((1, 2)).numpy()  # of all pairs of a prompt
        self.scores[name] = strict, soft, distance
        base = self.scores[BASE]
        whole = self.scores.get(WHOLE, base)
        captions, _ = self.requests(count)
        row = paired_shares(strict.ravel(), whole[0][:, :count].ravel(), captions)
        row["win_rate"] = win_rate(soft.ravel(), base[1][:, :count].ravel(), captions)
        if count > 1:
            row["distance"] = bootstrap_ratio(distance, base[2], captions[::count])
            row["all_right"], row["all_wrong"] = strict.all(1).mean(), 1 - strict.any(1).mean()
        return row

    def _count(self, network: object, inputs: tuple, named: dict) -> None:
        latents, *_ = *inputs, *named.values()
        self.evaluations += len(latents)


def print_row(name: str, row: dict) -> None:
    """Print a way's results, a line at once: the next one takes a while."""
    line = f"{name}; {row['drawings']:.2f} drawings; strict {said(row['share'])}"
    line += f"; minus whole IMG {said(row['difference'], '+.3f')}"
    line += f"; wins over the base {said_wins(row['win_rate'])}"
    if "distance" in row:
        line += f"; distance {said(row['distance'])}"
        line += "; all right {all_right:.2f}, all wrong {all_wrong:.2f}".format(**row)
    print(line, flush=True)
