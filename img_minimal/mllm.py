"""The multimodal LLM that looks at an image and knows what the prompt misses (step 2 of IMG).

Its *guidance features* h are the last hidden states of the whole sequence, image and text, after
the final norm: one forward pass, no decoding. `explain` decodes the same model's answer for people.

The question comes in a hundred phrasings, drawn at random (Fig. 11), so that finetuning teaches the
question and not a string.
"""

import random
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Self

import torch
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from img_minimal.hub.mllms import CHAT_V0, STOP_V0, chat, open_mllm, tokenize
from img_minimal.hub.questions import NOTHING, QUESTIONS, drop_no_op_edits, strip_placeholders

DECODED_AT_ONCE = 32  # answers


def ask(prompt: str, rng: random.Random, bank: tuple[str, ...] = QUESTIONS) -> str:
    """Phrase the question about a prompt, in a random phrasing."""
    return rng.choice(bank).replace("{}", prompt)


class TextGuidance:
    """Use the text encoder's states of the prompt as guidance: the "text" row of Table 5."""

    def __init__(self, text_states: Callable[[list[str]], Tensor], width: int):
        """`text_states` maps B prompts to (B, L, width)."""
        self.text_states = text_states
        self.width = width

    def guidance(
        self, images: list[Image], prompts: list[str], seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the prompts' states (B, L, H) and a mask (B, L); the images are not looked at."""
        states = self.text_states(prompts).float()
        return states, torch.ones(states.shape[:2], dtype=torch.bool)


class MLLM:
    """A frozen multimodal LLM with its processor and the phrasings of its question."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        questions: tuple[str, ...] = QUESTIONS,
    ):
        self.model = model.eval().requires_grad_(False)
        self.processor, self.questions = processor, questions
        # What ends an answer of the release, in addition to the end-of-text tokens.
        self.stop = STOP_V0 if processor.chat_template == CHAT_V0 else None
        added = processor.tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]
        # The release's tokenizer reads special tokens in a prompt, so they stay there.
        self.marks = [] if self.stop else special + processor.all_special_multimodal_tokens

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        questions: tuple[str, ...] = QUESTIONS,
    ) -> Self:
        """Open a folder or hub id of any kind that `hub.mllms` knows how to ask.

        Raises UserError if the model cannot be had, is of another kind, or a file is damaged.
        """
        return cls(*open_mllm(str(location), dtype, device), questions)

    @property
    def width(self) -> int:
        """H, the width of the guidance features."""
        return self.model.config.get_text_config().hidden_size

    @property
    def nothing(self) -> int:
        """The token id that begins the answer "nothing"."""
        return self.processor.tokenizer(NOTHING, add_special_tokens=False).input_ids[0]

    def question(self, prompt: str, seed: int) -> str:
        """Phrase the question about a prompt; a seed draws the same one alone and in a batch."""
        return ask(prompt, random.Random(seed), self.questions)

    def inputs(self, images: list[Image], questions: list[str]) -> BatchFeature:
        """Build the model's inputs: `input_ids`, `attention_mask` (B, L), and pixels.

        Tokens that control a conversation are stripped from questions.
        """
        chats = []
        for image, question in zip(images, questions):
            chats.append(chat(self.processor, image, strip_placeholders(question, self.marks)))
        inputs = tokenize(self.processor, chats)
        if "token_type_ids" not in signature(self.model.forward).parameters:
            inputs.pop("token_type_ids", None)
        return inputs.to(self.model.device, self.model.dtype)

    def asked(self, images: list[Image], prompts: list[str], seeds: Sequence[int]) -> BatchFeature:
        """Build the inputs for questions about prompts, drawn by seeds."""
        questions = [self.question(p, seed) for p, seed in zip(prompts, seeds, strict=True)]
        return self.inputs(images, questions)

    def run(self, inputs: BatchFeature, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the model: its last states (B, L, H), and the logits (T, V) of T chosen positions.

        `chosen` (B, L) is True there, by default at each row's last token. States are caught where
        they enter the output layer, which is after the final norm in every kind of model; other
        logits are never computed.
        """
        if chosen is None:
            chosen = inputs["attention_mask"].flip(1).cumsum(1).flip(1) == 1
        states = []

        def catch(head: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
            states.append(arguments[0])
            return (arguments[0][chosen][None],)

        hook = self.model.get_output_embeddings().register_forward_pre_hook(catch)
        try:
            logits = self.model(**inputs, use_cache=False).logits[0]
        finally:
            hook.remove()
        return states[0], logits

    @torch.no_grad()
    def guidance(
        self, images: list[Image], prompts: list[str], seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Compute guidance features h (B, L, H) and their mask (B, L), True where valid.

        The seed of an image draws its question.
        """
        inputs = self.asked(images, prompts, seeds)
        return self.run(inputs)[0], inputs["attention_mask"].bool()

    @torch.no_grad()
    def finds_wrong(self, states: Tensor, mask: Tensor) -> list[bool]:
        """For guidance features (B, L, H), return True where the answer would name a mistake."""
        last = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
        head = self.model.get_output_embeddings()
        first = head(last.to(self.model.device, self.model.dtype)).argmax(-1)
        return (first != self.nothing).tolist()

    @torch.no_grad()
    def satisfaction(
        self,
        images: list[Image],
        prompts: list[str],
        seeds: Sequence[int],
        batch_size: int = 64,
    ) -> list[float]:
        """Compute the log-probability that the answer begins with "nothing", i.e. none is wrong."""
        scores = []
        for k in range(0, len(images), batch_size):
            batch = slice(k, k + batch_size)
            _, logits = self.run(self.asked(images[batch], prompts[batch], seeds[batch]))
            scores += logits.float().log_softmax(-1)[:, self.nothing].tolist()
        return scores

    @torch.no_grad()
    def explain(
        self,
        images: list[Image],
        prompts: list[str],
        seeds: Sequence[int],
        max_new_tokens: int = 60,
    ) -> list[str]:
        """Decode the MLLM's answers greedily. For inspection only: alignment uses h."""
        # Padding would change an answer, so only inputs of equal shapes share a batch.
        answers = [""] * len(images)
        waiting: dict[tuple, dict[int, BatchFeature]] = {}

        def decode(batch: dict[int, BatchFeature]) -> None:
            names = next(iter(batch.values()))
            inputs = {n: torch.cat([alone[n] for alone in batch.values()]) for n in names}
            for k, answer in zip(batch, self._decode(inputs, max_new_tokens)):
                answers[k] = answer

        for k, (image, prompt, seed) in enumerate(zip(images, prompts, seeds, strict=True)):
            inputs = self.asked([image], [prompt], [seed])
            key = image.size, *(value.shape for value in inputs.values())
            batch = waiting.setdefault(key, {})
            batch[k] = inputs
            if len(batch) == DECODED_AT_ONCE:
                decode(waiting.pop(key))
        for batch in waiting.values():
            decode(batch)
        return answers

    def _decode(self, inputs: dict[str, Tensor], max_new_tokens: int) -> list[str]:
        tokenizer, stop = self.processor.tokenizer, self.stop
        ends = self.model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        out = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=tokenizer.pad_token_id,
            stop_strings=stop,
            tokenizer=tokenizer,
        )
        replies = out[:, inputs["input_ids"].shape[1] :]
        answers = []
        for reply in tokenizer.batch_decode(replies, skip_special_tokens=True):
            reply = reply.split(stop)[0] if stop else reply
            answers.append(drop_no_op_edits(reply.replace(" ,", ",").strip()))
        return answers


GuidanceEncoder = MLLM | TextGuidance


def guidance_features(
    guide: GuidanceEncoder,
    images: list[Image],
    prompts: list[str],
    seeds: Sequence[int],
    batch_size: int = 64,
    progress: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute guidance features of B images, in batches: h (sum of L_i, H) in bf16, lengths (B,).

    They lie end to end: for Qwen a large image has a hundred times as many as a small one. Kept in
    bf16 whatever they were computed in, which halves 13 MB per sample of LLaVA-13B.
    """
    features, lengths = [], []
    starts = range(0, len(images), batch_size)
    for k in tqdm(starts, desc=progress, disable=progress is None, leave=False):
        batch = slice(k, k + batch_size)
        h, mask = guide.guidance(images[batch], prompts[batch], seeds[batch])
        features.append(h[mask].to("cpu", torch.bfloat16))
        lengths.append(mask.sum(1).cpu())
    return torch.cat(features), torch.cat(lengths)


def padded(h: Tensor, lengths: Tensor, longest: int = 0) -> tuple[Tensor, Tensor]:
    """Pad features that lie end to end: h (B, L, H) and mask (B, L), True where valid.

    L is the longest length, or up to twice as much if `longest` asks for it.
    """
    own = int(lengths.max())
    mask = torch.arange(min(max(own, longest), 2 * own)) < lengths[:, None]
    rows = h.new_zeros(*mask.shape, h.shape[1])
    rows[mask] = h
    return rows, mask
