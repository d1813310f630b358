"""The multimodal LLM that looks at an image and knows what the prompt misses (step 2 of IMG).

Its *guidance features* h are the last hidden states of the whole sequence, image and text, after the final norm: one
forward pass, no decoding. `explain` decodes the same model's answer, for people.
"""

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, Self

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from img_minimal.files.hub import fetch_folder
from img_minimal.files.mllm_layouts import FAMILIES, Family, find_family
from img_minimal.files.pretrained import read_config
from img_minimal.questions import QUESTIONS, ask
from img_minimal.runtime.cli import printable
from img_minimal.runtime.errors import UserError

MARKER = re.compile(r"<\|?\s*/?\s*(image|img|im_|video|vision)[^<>]*>", re.IGNORECASE)  # as MLLMs spell an image
TAUTOLOGY = re.compile(r"(?:^|, )change (?:the|an?) ([^,]+?) to (?:the|an?) \1(?=,|$)")
NOTHING = "nothing"  # the answer about an image that matches its prompt


class Guide(Protocol):
    """What can tell the aligner about an image and its prompt: an MLLM or, as a control, the prompt's embedding."""

    width: int  # H

    def guidance(self, images: list[Image], prompts: list[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features h (B, L, H) and their mask (B, L), True where valid; an image's seed draws its question."""


class TextGuidance:
    """The text encoders' states of a prompt, in the place of an MLLM's features: the "text" row of Table 5.

    `text_states` maps prompts to states (B, L, width); it is asked of a backbone, whose text encoders they are.
    """

    def __init__(self, text_states: Callable[[list[str]], Tensor], width: int):
        self.text_states = text_states
        self.width = width

    def guidance(self, images: list[Image], prompts: list[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The states of the prompts; the images are not looked at."""
        states = self.text_states(prompts).float()
        return states, torch.ones(states.shape[:2], dtype=torch.bool)


class MLLM:
    """A multimodal LLM and its processor, frozen, with the phrasings that it is asked in."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        family: Family = FAMILIES["llava"],
        questions: tuple[str, ...] = QUESTIONS,
    ):
        self.model, self.processor, self.family = model.eval().requires_grad_(False), processor, family
        self.questions = questions
        self.processor.tokenizer.padding_side = "right"  # features of a prompt do not depend on its batch

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        questions: tuple[str, ...] = QUESTIONS,
    ) -> Self:
        """Open a folder, or a hub id: LLaVA (llava-hf or original layout) or Qwen2.5-VL.

        Raises UserError if the model cannot be had or is of another kind, or a file is missing or damaged.
        """
        folder = fetch_folder(str(location), "--mllm")
        config = read_config(folder)
        family = find_family(config, location)
        mllm = cls(*family.open(folder, config, dtype, device), family, questions)
        # A tokenizer whose file is absent opens as an empty one.
        if mllm.processor.image_token_id != mllm.model.config.image_token_id:
            raise UserError(f"{location}: its tokenizer lacks the model's image token; download the tokenizer again")
        return mllm

    @property
    def width(self) -> int:
        """H, the width of the guidance features."""
        return self.model.config.text_config.hidden_size

    @property
    def nothing(self) -> int:
        """The token that an answer begins with if the image matches."""
        return self.processor.tokenizer(NOTHING, add_special_tokens=False).input_ids[0]

    def inputs(self, images: list[Image], questions: list[str]) -> BatchFeature:
        """What the model is called with: `input_ids` and `attention_mask` (B, L), padded on the right, and pixels."""
        text = [self.family.conversation.replace("{question}", without_markers(q)) for q in questions]
        images = [image.convert("RGB") for image in images]
        inputs = self.processor(images=images, text=text, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        return inputs.to(self.model.device, self.model.dtype)

    def question(self, prompt: str, seed: int) -> str:
        """The question about a prompt that a seed draws: the same one alone and in a batch."""
        return ask(prompt, random.Random(seed), self.questions)

    def words(self, image: Image, question: str) -> list[str | None]:
        """What each of the L guidance features of one image and question stands for: a word, or None for a patch."""
        ids = self.inputs([image], [question])["input_ids"][0].tolist()
        marker = self.processor.image_token_id
        return [None if i == marker else self.processor.tokenizer.decode([i]).strip() for i in ids]

    @torch.no_grad()
    def guidance(self, images: list[Image], prompts: list[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Guidance features h (B, L, H) and their mask (B, L), True where valid; an image's seed draws its question.

        Sequences are padded on the right to the longest of the batch.
        """
        asked = [self.question(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        inputs = self.inputs(images, asked)
        # The inner model returns post-norm states; asking for all hidden states would keep a list of every layer.
        states = self.model.model(**inputs, use_cache=False).last_hidden_state
        return states, inputs["attention_mask"].bool()

    @torch.no_grad()
    def satisfaction(
        self, images: list[Image], prompts: list[str], seeds: Sequence[int], batch_size: int = 64
    ) -> list[float]:
        """Log-probability that the answer begins with "nothing" (is wrong), for picking the better of two images."""
        scores = []
        for k in range(0, len(images), batch_size):
            states, mask = self.guidance(*(x[k : k + batch_size] for x in (images, prompts, seeds)))
            last = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
            scores += self.model.lm_head(last).float().log_softmax(-1)[:, self.nothing].tolist()
        return scores

    @torch.no_grad()
    def explain(
        self, images: list[Image], prompts: list[str], seeds: Sequence[int], max_new_tokens: int = 60,
        batch_size: int = 32,
    ) -> list[str]:  # fmt: skip
        """The MLLM's answers in words, decoded greedily; those whose input is equally long are decoded together."""
        asked = [self.question(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        alike: dict[tuple, list[int]] = {}  # a padded input would give another answer
        for k, (image, question) in enumerate(zip(images, asked, strict=True)):
            length = len(self.processor.tokenizer(without_markers(question)).input_ids)
            alike.setdefault((length, image.size), []).append(k)
        answers = [""] * len(images)
        for numbers in alike.values():
            for start in range(0, len(numbers), batch_size):
                chosen = numbers[start : start + batch_size]
                inputs = self.inputs([images[k] for k in chosen], [asked[k] for k in chosen])
                for k, answer in zip(chosen, self._decode(inputs, max_new_tokens)):
                    answers[k] = answer
        return answers

    def _decode(self, inputs: BatchFeature, max_new_tokens: int) -> list[str]:
        tokenizer, stop = self.processor.tokenizer, self.family.stop
        out = self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, stop_strings=stop, tokenizer=tokenizer,
        )  # fmt: skip
        replies = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [(reply.split(stop)[0] if stop else reply).replace(" ,", ",").strip() for reply in replies]
        return [without_tautologies(answer) for answer in answers]


def guidance_features(
    guide: Guide,
    images: list[Image],
    prompts: list[str],
    seeds: Sequence[int],
    batch_size: int = 64,
    progress: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Guidance features of many images in batches: h (B, L, H) in bf16 and mask (B, L), padded to the longest.

    bf16 is how they are kept, whatever they were computed in: it halves 6.5 MB a sample. An image's seed draws its
    question.
    """
    features, masks = [], []
    for k in tqdm(range(0, len(images), batch_size), desc=progress, disable=progress is None, leave=False):
        h, mask = guide.guidance(*(x[k : k + batch_size] for x in (images, prompts, seeds)))
        features.append(h.to("cpu", torch.bfloat16))
        masks.append(mask.cpu())
    return cat_padded(features), cat_padded(masks)


def without_tautologies(answer: str) -> str:
    """An answer less what it asks to change to itself ("change the red circle to a red circle"), or "nothing".

    Such a clause comes of decoding word by word: something is wrong, but what it is now is read from the prompt.
    """
    return answer if not TAUTOLOGY.search(answer) else TAUTOLOGY.sub("", answer).lstrip(", ") or NOTHING


def without_markers(text: str) -> str:
    """A text less what would stand for an image that is not there, in any spelling, also where removing makes one."""
    shorter = MARKER.sub("", text)
    return printable(text) if shorter == text else without_markers(shorter)


def cat_padded(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (B_i, L_i, ...) -> (sum of B_i, longest L, ...), padded with zeros after their own length."""
    length = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, 0) * (part.ndim - 2) + (0, length - part.shape[1])) for part in parts])
