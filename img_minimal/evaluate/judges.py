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

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

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
OUTCOMES = ("img_better", "base_better", "both_right")  # of two images; else "none"
BATCH = 32  # images that a round's judge sees at once; a gate has 200


@dataclass(frozen=True)
class Judge:
    """A judge by name: its score of the cosine and exp(logit_scale), and where its files are.

    The oracle has no formula and no files.
    """

    name: str
    title: str
    formula: Callable[[Tensor, Tensor], Tensor] | None = None
    model: str = ""  # hub id or folder
    published: str = ""  # tokenizer and image processor of copies of the model without any
    processor: str | None = None  # replaces the model's own

    def open(self) -> "ClipJudge | Oracle":
        """Load what scores images. Raises UserError for files that are missing or damaged."""
        return ClipJudge(self) if self.formula else Oracle(self.name)


KNOWN = [
    Judge("strict", "oracle: right images"),
    Judge("soft", "oracle: share of the prompt"),
    Judge(
        "pickscore",
        "PickScore",
        lambda cosine, scale: scale * cosine,
        "yuvalkirstain/PickScore_v1",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ),
    Judge(
        "hpsv2",
        "HPSv2",
        lambda cosine, scale: 100 * cosine,
        "adams-story/HPSv2-hf",
        "openai/clip-vit-base-patch32",
    ),
    Judge(
        "clipscore",
        "CLIPScore",
        lambda cosine, scale: 100 * cosine.clamp(min=0),
        "openai/clip-vit-large-patch14",
        "openai/clip-vit-large-patch14",
    ),
]
JUDGES = {judge.name: judge for judge in KNOWN}


def find_judges(names: str | None, world: str | None, **locations: str | None) -> list[Judge]:
    """Choose judges by names with commas between, by default all that suit the world.

    "oracle" stands for both of its scores. `locations` replace where a judge's model, or the
    `judge_processor` of all, was published. Raises UserError for no judge or an unknown one.
    """
    strict, soft, *real = KNOWN
    known = {judge.name: [judge] for judge in real}
    default = ",".join(known)
    if world == "tiny":
        known["oracle"], default = [strict, soft], "oracle"
    choice = ", ".join(known)
    judges = {}
    for name in (default if names is None else names).replace(",", " ").split():
        check(name in known, f"unknown judge {name!r}; this model's images are judged by: {choice}")
        for judge in known[name]:
            model = locations.get(f"{judge.name}_model") or judge.model
            processor = locations.get("judge_processor")
            judges[judge.name] = replace(judge, model=model, processor=processor)
    check(judges, f"--judges is empty, expected some of: {choice}")
    return list(judges.values())


class ClipJudge:
    """Scores images against prompts with a CLIP model, in fp32.

    The differences between arms are about a hundredth of the scores, too near to the resolution of
    half precision.
    """

    def __init__(self, judge: Judge):
        """Load a judge. Raises UserError for files that are missing, damaged, or no CLIPModel's."""
        self.judge, folder = judge, fetch_folder(judge.model, f"--{judge.name}-model")
        with opening(folder, "CLIP model"):
            config = CLIPConfig(**read_config(folder))
        self.model, _ = open_model(CLIPModel, config, folder, torch.float32, best_device())
        own = (folder / "preprocessor_config.json").exists() and any(folder.glob("tokenizer*.json"))
        location = judge.processor or (str(folder) if own else judge.published)
        with opening(location, "tokenizer and image processor, see --judge-processor"):
            self.processor = CLIPImageProcessorPil.from_pretrained(location)
            length = config.text_config.max_position_embeddings
            self.tokenizer = CLIPTokenizer.from_pretrained(location, model_max_length=length)
        # Without files, transformers makes up an empty tokenizer.
        crop, side = self.processor.crop_size, config.vision_config.image_size
        found = f"{len(self.tokenizer)} words and {crop.height} x {crop.width} pixels"
        expected = f"{config.text_config.vocab_size} words and {side} x {side} pixels"
        advice = "give --judge-processor the one that belongs to the model"
        check(found == expected, f"{location}: has {found}, {judge.name} {expected}; {advice}")

    def cut(self, prompts: list[str]) -> list[int]:
        """Count the tokens of each prompt that are beyond the judge's length and dropped."""
        ids = self.tokenizer(prompts, verbose=False).input_ids
        return [max(0, len(words) - self.tokenizer.model_max_length) for words in ids]

    @torch.no_grad()
    def score(self, images: Images, prompts: list[str]) -> np.ndarray:
        """Score B RGB images, each against its prompt: (B,). Raises UserError for NaN."""
        model, padded = self.model, {"padding": "max_length", "truncation": True}
        pixels = self.processor(images, return_tensors="pt").to(model.device)
        tokens = self.tokenizer(prompts, return_tensors="pt", **padded).to(model.device)
        image = model.get_image_features(**pixels).pooler_output.cpu().double()  # (B, E)
        text = model.get_text_features(**tokens).pooler_output.cpu().double()  # (B, E)
        scale = model.logit_scale.cpu().double().exp()
        scores = self.judge.formula(torch.cosine_similarity(image, text), scale).numpy()
        broken = np.array(prompts)[~np.isfinite(scores)]
        problem = "is not finite; its weights are damaged: download them again"
        check(not len(broken), f"{self.judge.title} of an image of {broken[:1]} {problem}")
        return scores


@dataclass
class Oracle:
    """The tiny world's exact judge: one mark of its verdicts."""

    mark: str

    def cut(self, prompts: list[str]) -> list[int]:
        """Return zeros: it reads every prompt of its world to the end."""
        return [0] * len(prompts)

    def score(self, images: Images, prompts: list[str]) -> np.ndarray:
        """Score B images, each against its prompt: (B,)."""
        # Imported here, so that training real models imports nothing of the tiny world.
        from img_minimal.tiny.grammar import parse
        from img_minimal.tiny.oracle import judge_pictures

        verdicts = judge_pictures(images, [parse(prompt) for prompt in prompts])
        return np.array([getattr(verdict, self.mark) for verdict in verdicts], float)


class RoundJudge:
    """Label pairs of images where judges agree beyond their margins; another one guards the gate.

    In the tiny world the oracle labels by its soft score, and guards by the strict one. For real
    images PickScore and HPSv2 label, and CLIPScore guards.
    """

    def __init__(self, world: str | None):
        self.open = cache(lambda name: JUDGES[name].open())
        self.margins, self.guard, self.guard_margin = {"soft": 0.0}, "strict", 0.0
        self.perfect = 1.0  # the score of what is right, if there is such a score
        if world != "tiny":
            self.margins = {"pickscore": 0.2, "hpsv2": 0.2}
            self.guard, self.guard_margin, self.perfect = "clipscore", 0.5, math.inf

    def scores(self, name: str, prompts: list[str], images: Images) -> np.ndarray:
        """Score images (B,) in batches with a judge, which is loaded when it is needed first."""
        judge, batches = self.open(name), range(0, len(images), BATCH)
        parts = [judge.score(images[k : k + BATCH], prompts[k : k + BATCH]) for k in batches]
        return np.concatenate(parts)

    def compare(self, prompts: list[str], base: Images, img: Images) -> list[str]:
        """Find the OUTCOMES of pairs, "none" where judges differ or hardly care."""
        better = worse = right = True
        for name, margin in self.margins.items():
            before = self.scores(name, prompts, base)
            gain = self.scores(name, prompts, img) - before
            better, worse = better & (gain > margin), worse & (gain < -margin)
            right = right & (before == self.perfect)
        return np.select([better, worse, right], OUTCOMES, "none").tolist()

    def measure(self, prompts: list[str], base: Images, img: Images) -> dict[str, float]:
        """Compute the mean `score` of IMG's images, and the `damage`: the share that got worse."""
        before, after = (self.scores(self.guard, prompts, images) for images in (base, img))
        damaged = after < before - self.guard_margin
        return {"score": after.mean().item(), "damage": damaged.mean().item()}
