"""The multimodal LLM that looks at an image and knows what the prompt misses (step 2 of IMG).

Its *guidance features* h are the last hidden states of the whole sequence, image and text, after the final norm: one
forward pass, no decoding. `explain` decodes the same model's answer, for people.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BatchFeature,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from img_minimal.errors import UserError
from img_minimal.models.hub import folder as find_folder
from img_minimal.models.llava_layout import is_original, open_original_llava
from img_minimal.models.pretrained import build, read_config, read_shards
from img_minimal.models.qwen import open_qwen
from img_minimal.models.weights import opening
from img_minimal.questions import ask

NOTHING = "nothing"  # the answer about an image that matches its prompt
CONVERSATION = "USER: <image>\n{question} ASSISTANT:"  # LLaVA-1.5 as transformers asks it, and the twins
CONVERSATION_V0 = (  # the first conversation of LLaVA, with which the release asks its own
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions.###Human: <image>\n{question}###Assistant:"
)
CONVERSATION_QWEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)


def open_llava(
    folder: Path, settings: dict, dtype: torch.dtype, device: torch.device | str
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model and processor from a folder in the llava-hf layout. Raises UserError if a file is missing or damaged."""
    with opening(folder, "LLaVA"):
        config = LlavaConfig(**settings)
        processor = LlavaProcessor(
            # LLaVA-1.5 was trained on images padded to a square; some folders' settings would cut them instead.
            image_processor=LlavaImageProcessorPil.from_pretrained(folder, do_pad=True),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1,
        )
    return build(LlavaForConditionalGeneration, config, read_shards(folder), folder, dtype, device), processor


@dataclass(frozen=True)
class Family:
    """What differs between MLLMs: how a folder is opened, how a question is put, and where an answer ends."""

    open: Callable[[Path, dict, torch.dtype, torch.device | str], tuple[PreTrainedModel, ProcessorMixin]]
    conversation: str
    stop: str | None = None  # beside the end-of-text token


FAMILIES = {
    "llava": Family(open_llava, CONVERSATION),
    "llava, original layout": Family(open_original_llava, CONVERSATION_V0, stop="###"),
    "qwen2_5_vl": Family(open_qwen, CONVERSATION_QWEN),
}


def find_family(config: dict, what: str | Path) -> Family:
    """The family of a model by its config.json. Raises UserError if it is none of ours; `what` is for the message."""
    kind = config.get("model_type")
    name = "llava, original layout" if kind in ("llava", "llava_llama") and is_original(config) else kind
    if name not in FAMILIES:
        raise UserError(f"{what}: model_type {kind!r} is no MLLM known here; expected one of: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def announced_width(folder: str | Path) -> int | None:
    """H as a local folder's config.json has it, without loading the MLLM; None if it leaves that to a default."""
    config = read_config(Path(folder))
    return config.get("text_config", config).get("hidden_size")


class MLLM:
    """A multimodal LLM and its processor, frozen."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, family: Family = FAMILIES["llava"]):
        self.model, self.processor, self.family = model.eval().requires_grad_(False), processor, family
        self.processor.tokenizer.padding_side = "right"  # features of a prompt do not depend on its batch

    @classmethod
    def from_pretrained(
        cls, location: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Self:
        """Open a folder, or a hub id: LLaVA (llava-hf or original layout) or Qwen2.5-VL.

        Raises UserError if the model cannot be had or is of another kind, or a file is missing or damaged.
        """
        folder = find_folder(str(location), "--mllm")
        config = read_config(folder)
        family = find_family(config, location)
        mllm = cls(*family.open(folder, config, dtype, device), family)
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
        marker = self.processor.image_token  # in a prompt it would stand for an image that is not there
        text = [self.family.conversation.format(question=question.replace(marker, "")) for question in questions]
        images = [image.convert("RGB") for image in images]
        inputs = self.processor(images=images, text=text, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        return inputs.to(self.model.device, self.model.dtype)

    def words(self, image: Image, question: str) -> list[str | None]:
        """What each of the L guidance features of one image and question stands for: a word, or None for a patch."""
        ids = self.inputs([image], [question])["input_ids"][0].tolist()
        marker = self.processor.image_token_id
        return [None if i == marker else self.processor.tokenizer.decode([i]).strip() for i in ids]

    @torch.no_grad()
    def guidance(self, images: list[Image], prompts: list[str], rng: random.Random) -> tuple[Tensor, Tensor]:
        """Guidance features h (B, L, H) and their mask (B, L), True where valid; `rng` draws the phrasings.

        Sequences are padded on the right to the longest of the batch.
        """
        inputs = self.inputs(images, [ask(prompt, rng) for prompt in prompts])
        # The inner model returns post-norm states; asking for all hidden states would keep a list of every layer.
        states = self.model.model(**inputs, use_cache=False).last_hidden_state
        return states, inputs["attention_mask"].bool()

    @torch.no_grad()
    def satisfaction(
        self, images: list[Image], prompts: list[str], rng: random.Random, batch_size: int = 64
    ) -> list[float]:
        """Log-probability that the answer begins with "nothing" (is wrong), for picking the better of two images."""
        scores = []
        for k in range(0, len(images), batch_size):
            states, mask = self.guidance(images[k : k + batch_size], prompts[k : k + batch_size], rng)
            last = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
            scores += self.model.lm_head(last).float().log_softmax(-1)[:, self.nothing].tolist()
        return scores

    @torch.no_grad()
    def explain(
        self, images: list[Image], prompts: list[str], rng: random.Random, max_new_tokens: int = 60
    ) -> list[str]:
        """The MLLM's answers in words, decoded greedily, one image at a time."""
        answers, tokenizer, stop = [], self.processor.tokenizer, self.family.stop
        for image, prompt in zip(images, prompts, strict=True):
            inputs = self.inputs([image], [ask(prompt, rng)])
            out = self.model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, stop_strings=stop, tokenizer=tokenizer,
            )  # fmt: skip
            answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers.append((answer.split(stop)[0] if stop else answer).replace(" ,", ",").strip())
        return answers
