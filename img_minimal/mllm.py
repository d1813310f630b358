"""The multimodal LLM that looks at an image and knows what the prompt misses (step 2 of IMG).

Its *guidance features* h are the last hidden states of the whole sequence, image and text, after the final norm: one
forward pass, no decoding. `explain` decodes the same model's answer, for people.
"""

import random
from pathlib import Path
from typing import Self

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from img_minimal.questions import ask

CONVERSATION = "USER: <image>\n{question} ASSISTANT:"


class MLLM:
    """A LLaVA model and its processor, frozen."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor):
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.processor.tokenizer.padding_side = "right"  # features of a prompt do not depend on its batch

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Self:
        """Open a folder in the llava-hf layout. Raises OSError if there is no model."""
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device)
        return cls(model, LlavaProcessor.from_pretrained(folder))

    @property
    def width(self) -> int:
        """H, the width of the guidance features."""
        return self.model.config.text_config.hidden_size

    def _inputs(self, images: list[Image], questions: list[str]) -> dict[str, Tensor]:
        text = [CONVERSATION.format(question=question) for question in questions]
        inputs = self.processor(images=images, text=text, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        return inputs.to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def guidance(self, images: list[Image], prompts: list[str], rng: random.Random) -> tuple[Tensor, Tensor]:
        """Guidance features h (B, L, H) and their mask (B, L), True where valid; `rng` draws the phrasings.

        Sequences are padded on the right to the longest of the batch.
        """
        inputs = self._inputs(images, [ask(prompt, rng) for prompt in prompts])
        # The inner model returns post-norm states; asking for all hidden states would keep a list of every layer.
        states = self.model.model(**inputs).last_hidden_state
        return states, inputs["attention_mask"].bool()

    @torch.no_grad()
    def satisfaction(
        self, images: list[Image], prompts: list[str], rng: random.Random, batch_size: int = 64
    ) -> list[float]:
        """Log-probability that the answer begins with "nothing" (is wrong), for picking the better of two images."""
        nothing = self.processor.tokenizer("nothing", add_special_tokens=False).input_ids[0]
        scores = []
        for k in range(0, len(images), batch_size):
            states, mask = self.guidance(images[k : k + batch_size], prompts[k : k + batch_size], rng)
            last = states[torch.arange(len(states)), mask.sum(1) - 1]
            scores += self.model.lm_head(last).float().log_softmax(-1)[:, nothing].tolist()
        return scores

    @torch.no_grad()
    def explain(
        self, images: list[Image], prompts: list[str], rng: random.Random, max_new_tokens: int = 60
    ) -> list[str]:
        """The MLLM's answers in words, decoded greedily, one image at a time."""
        answers = []
        for image, prompt in zip(images, prompts, strict=True):
            inputs = self._inputs([image], [ask(prompt, rng)])
            out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            tokens = out[0, inputs["input_ids"].shape[1] :]
            answers.append(self.processor.tokenizer.decode(tokens, skip_special_tokens=True).replace(" ,", ",").strip())
        return answers
