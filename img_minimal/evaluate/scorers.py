"""Judges for real images: how well an image fits its prompt, by CLIP models that people's preferences have finetuned.

Each is a CLIPModel with embeddings e of image and text, and one line of arithmetic on cos = <e_image, e_text> of unit
embeddings:

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
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from img_minimal.evaluate.options import MODELS
from img_minimal.files.hub import fetch_folder
from img_minimal.runtime.errors import UserError


@dataclass(frozen=True)
class ScorerKind:
    """Where a judge's files are by default, and what it makes of the cosine and of exp(logit_scale)."""

    title: str
    model: str
    processor: str  # for model locations that bring no tokenizer and image processor of their own
    formula: Callable[[Tensor, Tensor], Tensor]


SCORERS = {
    "pickscore": ScorerKind(
        "PickScore",
        MODELS["pickscore"],
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        lambda cosine, scale: scale * cosine,
    ),
    "hpsv2": ScorerKind("HPSv2", MODELS["hpsv2"], "openai/clip-vit-base-patch32", lambda cosine, scale: 100 * cosine),
    "clipscore": ScorerKind(
        "CLIPScore",
        MODELS["clipscore"],
        "openai/clip-vit-large-patch14",
        lambda cosine, scale: 100 * cosine.clamp(min=0),
    ),
}


@dataclass(frozen=True)
class ScorerFiles:
    """Which judge, and where it is: hub ids or folders. Without a processor it is the model's own, or the published."""

    name: str
    model: str
    processor: str | None = None

    @classmethod
    def find(cls, name: str, model: str | None = None, processor: str | None = None) -> Self:
        """Fill in where the model was published. Raises UserError if there is no judge of that name."""
        if name not in SCORERS:
            raise UserError(f"unknown judge {name!r}; this version has: {', '.join(SCORERS)}")
        return cls(name, model or SCORERS[name].model, processor)


class Scorer:
    """A CLIP model that scores images against prompts, in fp32.

    The differences between arms are about a hundredth of the scores, too near to the resolution of half precision.
    """

    def __init__(self, name: str, model: CLIPModel, tokenizer: CLIPTokenizer, processor: CLIPImageProcessorPil):
        self.kind, self.tokenizer, self.processor = SCORERS[name], tokenizer, processor
        self.model = model.eval().requires_grad_(False)
        self.length = model.config.text_config.max_position_embeddings  # tokens that the judge can read

    @classmethod
    def open(cls, files: ScorerFiles, device: torch.device | str = "cpu") -> Self:
        """Load a judge. Raises UserError, in one line, if files are missing, damaged, or not those of a CLIPModel."""
        local = fetch_folder(files.model, f"--{files.name}-model")
        try:
            model, report = CLIPModel.from_pretrained(
                local, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except Exception as error:  # damaged settings or weights can fail in any way, depending on where they were cut
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"{files.name}: {files.model} is no readable CLIPModel ({reason}); download it again, or give "
                f"--{files.name}-model another hub id or folder"
            ) from None
        # transformers would fill these with random numbers.
        absent = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
        if absent:
            raise UserError(
                f"{files.name}: {files.model} has no {absent[0]!r} of the right shape ({len(absent)} weights of a "
                f"CLIPModel are wanting); give --{files.name}-model one in transformers' layout, with text and vision"
            )
        own = (local / "preprocessor_config.json").exists() and any(local.glob("tokenizer*.json"))
        location = files.processor or (str(local) if own else SCORERS[files.name].processor)
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
        crop = processor.crop_size
        if len(tokenizer) != words or (crop.height, crop.width) != (size, size):
            raise UserError(
                f"{files.name}: {location} has {len(tokenizer)} words and {crop.height} x {crop.width} pixels, "
                f"the model {words} words and {size} x {size}; give --judge-processor the one that belongs to the model"
            )
        return cls(files.name, model.to(device), tokenizer, processor)

    def cut(self, prompts: list[str]) -> list[int]:
        """How many tokens of each prompt (begin and end of text count) are too many for the judge, which drops them."""
        return [max(0, len(ids) - self.length) for ids in self.tokenizer(prompts, verbose=False).input_ids]

    @torch.no_grad()
    def score(self, images: list[Image], prompts: list[str]) -> np.ndarray:
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
