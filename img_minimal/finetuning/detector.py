"""An MLLM that learns to say how to make an image match a prompt (Fig. 11): what is trained, the loss, the accuracy.

The vision encoder stays frozen, so its features of an image are computed once (`encode`). A LLaVA's projector, language
model and output layer are trained, or, with a LoRA rank, low-rank additions to the language model's linear layers.
"""

import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from img_minimal.data.triplets import Triplet
from img_minimal.files.mllm_layouts import FAMILIES
from img_minimal.files.weights import writing
from img_minimal.mllm import MLLM, without_markers
from img_minimal.questions import ask
from img_minimal.runtime.devices import Precision

IGNORE = -100  # the label of tokens that do not count, as in transformers
ADAPTED = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # what LoRA adds to


@dataclass(frozen=True)
class Example:
    """A triplet whose image has been through the vision encoder."""

    features: Tensor  # (P, W): the vision encoder's, bf16
    extras: dict[str, Tensor]  # what else the model wants to know of the image: Qwen's image_grid_thw
    prompt: str
    instruction: str


@dataclass
class Rows:
    """A batch of questions with their answers, padded on the right; labels are IGNORE outside the answers."""

    ids: Tensor  # (B, L)
    mask: Tensor  # (B, L)
    labels: Tensor  # (B, L)

    @property
    def count(self) -> int:
        """How many tokens belong to answers."""
        return int((self.labels != IGNORE).sum())


def prepare(model: PreTrainedModel, lora_rank: int) -> Callable[[], object]:
    """Say which parameters are to learn; with a LoRA rank they are added to the model, in place, in fp32.

    Returns what makes an ordinary model of it again.
    """
    if lora_rank:
        import peft  # takes seconds, and only this needs it

        settings = peft.LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=ADAPTED)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft asks by a name of yesterday
            return peft.get_peft_model(model, settings).merge_and_unload
    model.requires_grad_(True)
    tower = "vision_tower" if hasattr(model.model, "vision_tower") else "visual"
    getattr(model.model, tower).requires_grad_(False)
    return lambda: None


class Detector:
    """An MLLM in training; `trained` are the parameters that learn, by name."""

    def __init__(self, mllm: MLLM, lora_rank: int = 0, precision: Precision | None = None):
        """`precision` is what its products are in; by default "mixed"."""
        self.mllm = mllm
        self.model = mllm.model
        self.precision = precision or Precision.named("mixed", self.model.device)
        if mllm.family is FAMILIES["llava, original layout"]:
            mllm.family = FAMILIES["llava"]  # the layout it is saved in, and so the way it will be asked
        if self.model.device.type == "cpu":  # fused attention's backward pass would take half of a step there
            self.model.set_attn_implementation("eager")
        self.merge = prepare(self.model, lora_rank)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if lora_rank:
            self.model.activation_checkpointing_enable({"use_reentrant": False})

    @torch.no_grad()
    def encode(self, triplets: list[Triplet], batch_size: int) -> list[Example]:
        """Encode every image once, in batches that depend on nothing else, so that a resumed run gets the same."""
        examples, inner = [], self.model.model
        for k in range(0, len(triplets), batch_size):
            part = triplets[k : k + batch_size]
            inputs = self.mllm.inputs([t.image for t in part], [t.prompt for t in part])
            with self.precision.training(self.model.device):
                if hasattr(inner, "vision_tower"):  # LLaVA: its projector is trained, so it comes later
                    states = inner.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
                    features = states[inner.config.vision_feature_layer]
                    features = features[:, 1:] if inner.config.vision_feature_select_strategy == "default" else features
                else:
                    features = inner.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
            for i, (triplet, feature) in enumerate(zip(part, features, strict=True)):
                extras = {name: inputs[name][i].cpu() for name in ("image_grid_thw",) if name in inputs}
                feature = feature.to("cpu", torch.bfloat16, copy=True)
                examples.append(Example(feature, extras, triplet.prompt, triplet.instruction))
        return examples

    def rows(self, examples: list[Example], rng: random.Random) -> Rows:
        """Question and answer of each example as tokens; `rng` draws the phrasings."""
        processor, tokenizer = self.mllm.processor, self.mllm.processor.tokenizer
        marker, ids, labels = processor.image_token, [], []
        for example in examples:
            question = without_markers(ask(example.prompt, rng, self.mllm.questions))
            text = self.mllm.family.conversation.replace("{question}", question)
            asked = tokenizer(text.replace(marker, marker * len(example.features))).input_ids
            answer = tokenizer(without_markers(example.instruction), add_special_tokens=False).input_ids
            answer = answer + [tokenizer.eos_token_id]
            ids.append(torch.tensor(asked + answer))
            labels.append(torch.tensor([IGNORE] * len(asked) + answer))
        mask = [torch.ones(len(row), dtype=torch.long) for row in ids]
        padded = ((ids, tokenizer.pad_token_id), (mask, 0), (labels, IGNORE))
        return Rows(*(nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=p) for rows, p in padded))

    def scores(self, examples: list[Example], rows: Rows) -> tuple[Tensor, Tensor]:
        """Scores (T, V) of the next token wherever it belongs to an answer, and these tokens (T,), row by row.

        The rest of the sequence never reaches the output layer.
        """
        device, inner = self.model.device, self.model.model
        with self.precision.training(device):
            features = [example.features.to(device, self.model.dtype) for example in examples]
            if hasattr(inner, "multi_modal_projector"):
                features = list(inner.multi_modal_projector(torch.stack(features)))
            extras = {name: torch.stack([example.extras[name] for example in examples]) for name in examples[0].extras}
            if extras:
                extras["mm_token_type_ids"] = (rows.ids == inner.config.image_token_id).int()
            states = inner(
                input_ids=rows.ids.to(device), attention_mask=rows.mask.to(device), use_cache=False,
                mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
                **{name: value.to(device) for name, value in extras.items()},
            ).last_hidden_state[:, :-1]  # fmt: skip
            answers = (rows.labels[:, 1:] != IGNORE).to(device)
            return self.model.lm_head(states[answers]).float(), rows.labels[:, 1:].to(device)[answers]

    def loss(self, examples: list[Example], rows: Rows) -> Tensor:
        """Cross-entropy summed over the tokens of the answers; what was asked does not count."""
        return F.cross_entropy(*self.scores(examples, rows), reduction="sum")

    def accuracy(self, examples: list[Example], seed: int, batch_size: int) -> dict[str, float]:
        """Share of instructions worded exactly (decoded greedily), and of right decisions between edit and nothing.

        `always_edit` is what the second is for a model that never says "nothing".
        """
        return {name: sum(marks) / len(examples) for name, marks in self.graded(examples, seed, batch_size).items()}

    @torch.no_grad()
    def graded(self, examples: list[Example], seed: int, batch_size: int) -> dict[str, list[bool]]:
        """What `accuracy` averages: one mark for each example under each name. `seed` draws the phrasings."""
        nothing, rng, before = self.mllm.nothing, random.Random(seed), self.model.training
        marks: dict[str, list[bool]] = {"exact": [], "decided": [], "always_edit": []}
        self.model.eval()
        for k in range(0, len(examples), batch_size):
            part = examples[k : k + batch_size]
            rows = self.rows(part, rng)
            scores, tokens = self.scores(part, rows)
            guesses = scores.argmax(-1)
            lengths = (rows.labels != IGNORE).sum(1).tolist()
            # Right tokens after right tokens: the same as decoding greedily and comparing.
            for guess, answer in zip(guesses.split(lengths), tokens.split(lengths)):
                marks["exact"].append(torch.equal(guess, answer))
                marks["decided"].append(bool((guess[0] == nothing) == (answer[0] == nothing)))
                marks["always_edit"].append(bool(answer[0] != nothing))
        self.model.train(before)
        return marks

    def save(self, folder: Path) -> None:
        """An ordinary folder that `MLLM.from_pretrained` opens; what LoRA learned is merged into the weights.

        Merged, because then nothing that samples needs peft or the stock model beside it. bf16, as LLaVA is published.
        """
        self.merge()
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with writing(folder):
            self.model.to(torch.bfloat16).save_pretrained(partial)
        self.mllm.processor.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
