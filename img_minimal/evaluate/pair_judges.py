"""What labels the pairs of a round, and what guards its gate: the oracle of the twins, CLIP models for real ones."""

from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from img_minimal.data.rounds import Outcome
from img_minimal.evaluate.options import MODELS
from img_minimal.evaluate.scorers import Scorer, ScorerFiles
from img_minimal.presets import Preset
from img_minimal.runtime.devices import best_device
from img_minimal.runtime.images import from_pil
from img_minimal.tiny.grammar import parse
from img_minimal.tiny.oracle import judge


class Judge(Protocol):
    """What labels the new pairs, and what guards the gate, which on real models is another one."""

    def compare(self, prompts: list[str], base: list[Image.Image], img: list[Image.Image]) -> list[Outcome]:
        """Which image of each pair is better."""

    def measure(self, prompts: list[str], base: list[Image.Image], img: list[Image.Image]) -> dict[str, float]:
        """`score` of IMG's images, and `damage`: the share that was better, or right, before."""

    def category(self, prompt: str) -> str:
        """What a prompt asks for, in a word."""


class Oracle:
    """The tiny world's, which labels by its soft score; the gate counts by the strict one."""

    def compare(self, prompts: list[str], base: list[Image.Image], img: list[Image.Image]) -> list[Outcome]:
        """By soft score; both right is told from both wrong alike."""
        outcomes: list[Outcome] = []
        for x0, x1 in zip(*(judge(from_pil(x), [parse(p) for p in prompts]) for x in (base, img))):
            alike: Outcome = "both" if x0.strict else "none"
            outcomes.append(alike if x0.soft == x1.soft else "img" if x1.soft > x0.soft else "base")
        return outcomes

    def measure(self, prompts: list[str], base: list[Image.Image], img: list[Image.Image]) -> dict[str, float]:
        """Strict alignment; damage is right before and wrong after."""
        before, after = (judge(from_pil(x), [parse(p) for p in prompts]) for x in (base, img))
        broken = [x.strict and not y.strict for x, y in zip(before, after)]
        return {"score": sum(v.strict for v in after) / len(after), "damage": sum(broken) / len(broken)}

    def category(self, prompt: str) -> str:
        """One of the grammar's."""
        return parse(prompt).category


class ClipJudges:
    """PickScore and HPSv2 label, each with a margin below which it has no opinion; CLIPScore guards the gate."""

    MARGINS = {"pickscore": 0.2, "hpsv2": 0.2}
    GUARD, GUARD_MARGIN = "clipscore", 0.5

    def __init__(self, models: dict[str, str]):
        self.models, self.opened = models, {}

    def _scores(self, name: str, prompts: list[str], images: list[Image.Image]) -> Tensor:
        if name not in self.opened:
            self.opened[name] = Scorer.open(ScorerFiles.find(name, self.models.get(name)), best_device())
        parts, score = range(0, len(prompts), 32), self.opened[name].score
        return torch.cat([torch.as_tensor(score(images[k : k + 32], prompts[k : k + 32])) for k in parts])

    def compare(self, prompts: list[str], base: list[Image.Image], img: list[Image.Image]) -> list[Outcome]:
        """Where both judges prefer the same image by more than their margins; elsewhere none."""
        better, worse = (torch.ones(len(prompts), dtype=torch.bool) for _ in range(2))
        for name, margin in self.MARGINS.items():
            gain = self._scores(name, prompts, img) - self._scores(name, prompts, base)
            better, worse = better & (gain > margin), worse & (gain < -margin)
        return ["img" if up else "base" if down else "none" for up, down in zip(better.tolist(), worse.tolist())]

    def measure(self, prompts: list[str], base: list[Image.Image], img: list[Image.Image]) -> dict[str, float]:
        """Mean CLIPScore; damage is a loss of more than the margin."""
        before, after = (self._scores(self.GUARD, prompts, images) for images in (base, img))
        return {"score": after.mean().item(), "damage": (after < before - self.GUARD_MARGIN).float().mean().item()}

    def category(self, prompt: str) -> str:
        """Real prompts have none."""
        return "all"


def find_judge(preset: Preset) -> Judge:
    """The oracle where there is one."""
    return Oracle() if preset.world == "tiny" else ClipJudges(MODELS)
