"""Who judges images: CLIP models that people's preferences have finetuned, for real ones, and the tiny world's oracle.

Each CLIP judge is a CLIPModel, and one line of arithmetic on cos = <e_image, e_text> of unit embeddings:

| judge | score | weights | from |
|---|---|---|---|
| `pickscore` | exp(logit_scale) cos, about 22 | yuvalkirstain/PickScore_v1 | arXiv 2305.01569 |
| `hpsv2` | 100 cos, about 28 | adams-story/HPSv2-hf | arXiv 2306.09341 |
| `clipscore` | 100 max(cos, 0) | openai/clip-vit-large-patch14 | arXiv 2104.08718 |

HPSv2 was published in open_clip's layout; the location above is a third party's conversion into transformers' layout,
whose card reports equal embeddings and which has not been run here. HPSv2's own code gives cos; papers report 100 cos.
CLIPScore was defined for captions as 2.5 max(cos, 0) with a prefix to the text; text-to-image papers follow
torchmetrics, which is what is computed here. No factor changes a win rate.

All three read 224 pixels and 77 tokens. An image that is not square loses its margins, as CLIP's processor crops it;
HPSv2's own code pads it instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from img_minimal.cli import UserError
from img_minimal.devices import best_device
from img_minimal.files import from_pil
from img_minimal.hub.mllms import open_model, read_config
from img_minimal.hub.where import fetch_folder
from img_minimal.presets import Preset
from img_minimal.rounds import Outcome
from img_minimal.tiny.grammar import parse
from img_minimal.tiny.oracle import judge

Images = list[Image]


@dataclass(frozen=True)
class JudgeKind:
    """Where a judge's files are by default, and what it makes of the cosine and of exp(logit_scale)."""

    title: str
    model: str
    processor: str  # for model locations that bring no tokenizer and image processor of their own
    formula: Callable[[Tensor, Tensor], Tensor]


VIT_H, VIT_B, VIT_L = (
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
)  # fmt: skip
JUDGES = {
    "pickscore": JudgeKind("PickScore", "yuvalkirstain/PickScore_v1", VIT_H, lambda cosine, scale: scale * cosine),
    "hpsv2": JudgeKind("HPSv2", "adams-story/HPSv2-hf", VIT_B, lambda cosine, scale: 100 * cosine),
    "clipscore": JudgeKind("CLIPScore", VIT_L, VIT_L, lambda cosine, scale: 100 * cosine.clamp(min=0)),
}


@dataclass(frozen=True)
class JudgeFiles:
    """Which judge, and where it is: hub ids or folders. Without a processor it is the model's own, or the published."""

    name: str
    model: str
    processor: str | None = None

    @classmethod
    def find(cls, name: str, model: str | None = None, processor: str | None = None) -> Self:
        """Fill in where the model was published. Raises UserError if there is no judge of that name."""
        if name not in JUDGES:
            raise UserError(f"unknown judge {name!r}; this version has: {', '.join(JUDGES)}")
        return cls(name, model or JUDGES[name].model, processor)


class ClipJudge:
    """A CLIP model that scores images against prompts, in fp32.

    The differences between arms are about a hundredth of the scores, too near to the resolution of half precision.
    """

    def __init__(self, name: str, model: CLIPModel, tokenizer: CLIPTokenizer, processor: CLIPImageProcessorPil):
        self.kind, self.tokenizer, self.processor = JUDGES[name], tokenizer, processor
        self.model = model.eval().requires_grad_(False)
        self.length = model.config.text_config.max_position_embeddings  # tokens that the judge can read

    @classmethod
    def open(cls, files: JudgeFiles, device: torch.device | str = "cpu") -> Self:
        """Load a judge. Raises UserError, in one line, if files are missing, damaged, or not those of a CLIPModel."""
        local = fetch_folder(files.model, f"--{files.name}-model")
        model = open_model(CLIPModel, CLIPConfig(**read_config(local)), local, torch.float32, device)
        own = (local / "preprocessor_config.json").exists() and any(local.glob("tokenizer*.json"))
        location = files.processor or (str(local) if own else JUDGES[files.name].processor)
        try:
            processor = CLIPImageProcessorPil.from_pretrained(location)
            # Where it finds no files, transformers 5 makes an empty tokenizer and says nothing: counted below.
            tokenizer = CLIPTokenizer.from_pretrained(location)
        except Exception as error:
            raise UserError(
                f"{files.name}: no tokenizer and image processor at {location} ({' '.join(str(error).split())[:200]}); "
                "give --judge-processor a folder or hub id that has them"
            ) from None
        words, size = model.config.text_config.vocab_size, model.config.vision_config.image_size
        if len(tokenizer) != words or {processor.crop_size.height, processor.crop_size.width} != {size}:
            raise UserError(
                f"{files.name}: {location} has {len(tokenizer)} words and {processor.crop_size.height} x "
                f"{processor.crop_size.width} pixels, the model {words} words and {size} x {size}; give "
                "--judge-processor the one that belongs to the model"
            )
        return cls(files.name, model, tokenizer, processor)

    def cut(self, prompts: list[str]) -> list[int]:
        """How many tokens of each prompt (begin and end of text count) are too many for the judge, which drops them."""
        return [max(0, len(ids) - self.length) for ids in self.tokenizer(prompts, verbose=False).input_ids]

    @torch.no_grad()
    def score(self, images: Images, prompts: list[str]) -> np.ndarray:
        """Scores (B,) of B images, each against the prompt at its place. Raises UserError if a score is not finite."""
        device = self.model.device
        texts = list(dict.fromkeys(prompts))  # a prompt with images of several arms is read once
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(device)
        pixels = self.processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        text = self.model.get_text_features(**tokens).pooler_output  # (unique prompts, E)
        image = self.model.get_image_features(pixel_values=pixels.to(device)).pooler_output  # (B, E)
        text = text[[texts.index(prompt) for prompt in prompts]]  # (B, E)
        cosine = torch.cosine_similarity(image.cpu().double(), text.cpu().double(), dim=-1)
        scores = self.kind.formula(cosine, self.model.logit_scale.cpu().double().exp()).numpy()
        if not np.isfinite(scores).all():
            where = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise UserError(
                f"{self.kind.title} of an image of {prompts[where]!r} is not finite; its weights are damaged: "
                "download them again"
            )
        return scores


# Who labels the pairs of a round (`compare`), and guards its gate (`measure`: `score` of IMG's images, and `damage`,
# the share that was right, or better, before).


class Oracle:
    """The tiny world's, which labels by its soft score; the gate counts by the strict one."""

    def _verdicts(self, prompts: list[str], *images: Images) -> list[list]:
        return [judge(from_pil(some), [parse(p) for p in prompts]) for some in images]

    def compare(self, prompts: list[str], base: Images, img: Images) -> list[Outcome]:
        """Which image of each pair is better, by soft score; both right is told from both wrong alike."""
        outcomes: list[Outcome] = []
        for x0, x1 in zip(*self._verdicts(prompts, base, img)):
            alike: Outcome = "both" if x0.strict else "none"
            outcomes.append(alike if x0.soft == x1.soft else "img" if x1.soft > x0.soft else "base")
        return outcomes

    def measure(self, prompts: list[str], base: Images, img: Images) -> dict[str, float]:
        """Strict alignment; damage is right before and wrong after."""
        before, after = self._verdicts(prompts, base, img)
        broken = [x.strict and not y.strict for x, y in zip(before, after)]
        return {"score": sum(v.strict for v in after) / len(after), "damage": sum(broken) / len(broken)}

    def category(self, prompt: str) -> str:
        """One of the grammar's."""
        return parse(prompt).category


class ClipJudges:
    """PickScore and HPSv2 label, each with a margin below which it has no opinion; CLIPScore guards the gate."""

    MARGINS = {"pickscore": 0.2, "hpsv2": 0.2}
    GUARD, GUARD_MARGIN = "clipscore", 0.5

    def __init__(self):
        self.opened: dict[str, ClipJudge] = {}

    def _scores(self, name: str, prompts: list[str], images: Images) -> Tensor:
        if name not in self.opened:
            self.opened[name] = ClipJudge.open(JudgeFiles.find(name), best_device())
        parts, score = range(0, len(prompts), 32), self.opened[name].score
        return torch.cat([torch.as_tensor(score(images[k : k + 32], prompts[k : k + 32])) for k in parts])

    def compare(self, prompts: list[str], base: Images, img: Images) -> list[Outcome]:
        """Where both judges prefer the same image by more than their margins; elsewhere none."""
        better, worse = (torch.ones(len(prompts), dtype=torch.bool) for _ in range(2))
        for name, margin in self.MARGINS.items():
            gain = self._scores(name, prompts, img) - self._scores(name, prompts, base)
            better, worse = better & (gain > margin), worse & (gain < -margin)
        return ["img" if up else "base" if down else "none" for up, down in zip(better.tolist(), worse.tolist())]

    def measure(self, prompts: list[str], base: Images, img: Images) -> dict[str, float]:
        """Mean CLIPScore; damage is a loss of more than the margin."""
        before, after = (self._scores(self.GUARD, prompts, images) for images in (base, img))
        return {"score": after.mean().item(), "damage": (after < before - self.GUARD_MARGIN).float().mean().item()}

    def category(self, prompt: str) -> str:
        """Real prompts have none."""
        return "all"


def find_judge(preset: Preset) -> Oracle | ClipJudges:
    """The oracle where there is one."""
    return Oracle() if preset.world == "tiny" else ClipJudges()
