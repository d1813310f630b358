"""Judge images: CLIP models finetuned on people's preferences for real ones, else the oracle.

Each CLIP judge is a CLIPModel and one line of arithmetic on cos = <e_image, e_text> of unit
embeddings:

| judge | score | weights | from |
|---|---|---|---|
| `pickscore` | exp(logit_scale) cos, about 22 | yuvalkirstain/PickScore_v1 | arXiv 2305.01569 |
| `hpsv2` | 100 cos, about 28 | adams-story/HPSv2-hf | arXiv 2306.09341 |
| `clipscore` | 100 max(cos, 0) | openai/clip-vit-large-patch14 | arXiv 2104.08718 |

HPSv2 was published in open_clip's layout; the location above is a third party's conversion into
transformers' layout, whose card reports equal embeddings and which has not been run here. HPSv2's
own code gives cos; papers report 100 cos. CLIPScore was defined for captions as 2.5 max(cos, 0)
with a prefix to the text; text-to-image papers follow torchmetrics, which is what is computed here.
No factor changes a win rate.

All three read 224 pixels and 77 tokens. An image that is not square loses its margins, as CLIP's
processor crops it; HPSv2's own code pads it instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from img_minimal.cli import check
from img_minimal.devices import best_device
from img_minimal.hub.mllms import open_model, read_config
from img_minimal.hub.weights import opening
from img_minimal.hub.where import fetch_folder

Images = list[Image]
Outcome = Literal["img", "base", "both", "none"]  # the better image; both are right, or neither
BATCH = 32


@dataclass(frozen=True)
class JudgeKind:
    """A published judge, and its score of the cosine and exp(logit_scale)."""

    title: str
    model: str
    processor: str  # for copies of the model without tokenizer and image processor
    formula: Callable[[Tensor, Tensor], Tensor]


JUDGES = {
    "pickscore": JudgeKind(
        "PickScore",
        "yuvalkirstain/PickScore_v1",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        lambda cosine, scale: scale * cosine,
    ),
    "hpsv2": JudgeKind(
        "HPSv2",
        "adams-story/HPSv2-hf",
        "openai/clip-vit-base-patch32",
        lambda cosine, scale: 100 * cosine,
    ),
    "clipscore": JudgeKind(
        "CLIPScore",
        "openai/clip-vit-large-patch14",
        "openai/clip-vit-large-patch14",
        lambda cosine, scale: 100 * cosine.clamp(min=0),
    ),
}


@dataclass(frozen=True)
class JudgeFiles:
    """A judge's name and files: hub ids or folders; the processor is by default the model's."""

    name: str
    model: str
    processor: str | None = None

    @classmethod
    def find(cls, name: str, model: str | None = None, processor: str | None = None) -> Self:
        """Fill in where the model was published. Raises UserError for an unknown judge."""
        check(name in JUDGES, f"unknown judge {name!r}; this version has: {', '.join(JUDGES)}")
        return cls(name, model or JUDGES[name].model, processor)


@dataclass
class ClipJudge:
    """Scores images against prompts with a CLIP model, in fp32.

    The differences between arms are about a hundredth of the scores, too near to the resolution of
    half precision.
    """

    kind: JudgeKind
    model: CLIPModel
    tokenizer: CLIPTokenizer
    processor: CLIPImageProcessorPil

    @classmethod
    def open(cls, source: JudgeFiles, device: torch.device | str = "cpu") -> Self:
        """Load a judge. Raises UserError for files that are missing, damaged, or no CLIPModel's."""
        folder = fetch_folder(source.model, f"--{source.name}-model")
        with opening(folder, "CLIP model"):
            config = CLIPConfig(**read_config(folder))
        model, _ = open_model(CLIPModel, config, folder, torch.float32, device)
        published = JUDGES[source.name].processor
        own = (folder / "preprocessor_config.json").exists() and any(folder.glob("tokenizer*.json"))
        location = source.processor or (str(folder) if own else published)
        with opening(location, "tokenizer and image processor, see --judge-processor"):
            processor = CLIPImageProcessorPil.from_pretrained(location)
            length = config.text_config.max_position_embeddings
            tokenizer = CLIPTokenizer.from_pretrained(location, model_max_length=length)
        # Without files, transformers makes up an empty tokenizer.
        crop, side = processor.crop_size, config.vision_config.image_size
        found = f"{len(tokenizer)} words and {crop.height} x {crop.width} pixels"
        expected = f"{config.text_config.vocab_size} words and {side} x {side} pixels"
        advice = "give --judge-processor the one that belongs to the model"
        check(found == expected, f"{location}: has {found}, {source.name} {expected}; {advice}")
        return cls(JUDGES[source.name], model, tokenizer, processor)

    def cut(self, prompts: list[str]) -> list[int]:
        """Count the tokens of each prompt that are beyond the judge's length and dropped."""
        ids = self.tokenizer(prompts, verbose=False).input_ids
        return [max(0, len(words) - self.tokenizer.model_max_length) for words in ids]

    @torch.no_grad()
    def score(self, images: Images, prompts: list[str]) -> np.ndarray:
        """Score B images, each against its prompt: (B,). Raises UserError for NaN and infinity."""
        model, cosines = self.model, []
        for k in range(0, len(images), BATCH):
            batch, texts = [x.convert("RGB") for x in images[k : k + BATCH]], prompts[k : k + BATCH]
            pixels = self.processor(batch, return_tensors="pt").to(model.device)
            padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            tokens = self.tokenizer(texts, **padded).to(model.device)
            image = model.get_image_features(**pixels).pooler_output.cpu().double()  # (B, E)
            text = model.get_text_features(**tokens).pooler_output.cpu().double()  # (B, E)
            cosines.append(torch.cosine_similarity(image, text))
        scale = model.logit_scale.cpu().double().exp()
        scores = self.kind.formula(torch.cat(cosines), scale).numpy()
        broken = [prompt for prompt, score in zip(prompts, scores) if not np.isfinite(score)]
        problem = "is not finite; its weights are damaged: download them again"
        check(not broken, f"{self.kind.title} of an image of {broken[:1]} {problem}")
        return scores


# Judges of rounds: `compare` labels pairs; `measure` guards the gate by the `score` of IMG's images
# and the `damage`, the share of images that were right, or better, before.


class Oracle:
    """The tiny world's exact judge: labels by the soft score, and guards by the strict one."""

    def verdicts(self, prompts: list[str], images: Images) -> list:
        """Compare images with their prompts."""
        # Imported here, so that training real models imports nothing of the tiny world.
        from img_minimal.tiny.grammar import parse
        from img_minimal.tiny.oracle import judge_pictures

        return judge_pictures(images, [parse(prompt) for prompt in prompts])

    def compare(self, prompts: list[str], base: Images, img: Images) -> list[Outcome]:
        """Find the better image of each pair; of equal ones, tell right from wrong."""
        before, after = self.verdicts(prompts, base), self.verdicts(prompts, img)
        x0, x1 = (np.array([v.soft for v in verdicts]) for verdicts in (before, after))
        right = np.array([verdict.strict for verdict in before])
        return np.select([x1 > x0, x1 < x0, right], ["img", "base", "both"], "none").tolist()

    def measure(self, prompts: list[str], base: Images, img: Images) -> dict[str, float]:
        """Compute strict alignment; damage is right before and wrong after."""
        before, after = self.verdicts(prompts, base), self.verdicts(prompts, img)
        damaged = [x0.strict and not x1.strict for x0, x1 in zip(before, after)]
        right = [verdict.strict for verdict in after]
        return {"score": sum(right) / len(right), "damage": sum(damaged) / len(right)}

    def category(self, prompt: str) -> str:
        """Return the category of a prompt."""
        from img_minimal.tiny.grammar import parse

        return parse(prompt).category


class ClipJudges:
    """PickScore and HPSv2 label where both see more than a margin; CLIPScore guards the gate."""

    MARGINS = {"pickscore": 0.2, "hpsv2": 0.2}
    GUARD, GUARD_MARGIN = "clipscore", 0.5

    def __init__(self):
        self.judges: dict[str, ClipJudge] = {}

    def scores(self, name: str, prompts: list[str], images: Images) -> np.ndarray:
        """Score images with a judge, which is loaded when it is needed first."""
        if name not in self.judges:
            self.judges[name] = ClipJudge.open(JudgeFiles.find(name), best_device())
        return self.judges[name].score(images, prompts)

    def compare(self, prompts: list[str], base: Images, img: Images) -> list[Outcome]:
        """Find the better image of each pair, "none" where the judges differ or hardly care."""
        better = worse = True
        for name, margin in self.MARGINS.items():
            gain = self.scores(name, prompts, img) - self.scores(name, prompts, base)
            better, worse = better & (gain > margin), worse & (gain < -margin)
        return np.select([better, worse], ["img", "base"], "none").tolist()

    def measure(self, prompts: list[str], base: Images, img: Images) -> dict[str, float]:
        """Compute the mean CLIPScore; damage is a loss of more than the margin."""
        before, after = (self.scores(self.GUARD, prompts, images) for images in (base, img))
        damaged = after < before - self.GUARD_MARGIN
        return {"score": after.mean().item(), "damage": damaged.mean().item()}


def find_judge(world: str | None) -> Oracle | ClipJudges:
    """Return the oracle in the tiny world, CLIP models elsewhere."""
    return Oracle() if world == "tiny" else ClipJudges()
