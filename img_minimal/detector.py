"""`python train.py --stage mllm`: finetune an MLLM to say how to make an image match a prompt.

The training data are triplets of an image, a prompt, and the instruction that would make the image
match it (Fig. 11). The vision encoder stays frozen, so its features of an image are computed once.
LLaVA's projector, language model and output layer are trained or, with a LoRA rank, low-rank
additions to the language model's linear layers.
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

from img_minimal.data.features import StreamedData
from img_minimal.data.pairs import Stream, Triplet, triplet_stream
from img_minimal.devices import Precision, best_device
from img_minimal.hub.mllms import FAMILIES
from img_minimal.hub.weights import writing
from img_minimal.hub.where import fetch_folder
from img_minimal.mllm import MLLM, ask, find_questions, strip_placeholders
from img_minimal.optimizer import optimizer_and_schedule
from img_minimal.plots import DETECTOR, curves, read_rows
from img_minimal.presets import Models, Training
from img_minimal.run import Run

IGNORE = -100  # label of tokens without a loss, as in transformers
LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
MAX_HELD_OUT = 1000  # triplets that accuracy is measured on; at most a tenth of the first chunk


def finetune(run: Run, settings: Training, models: Models, triplets: str, seed: int) -> None:
    """Run the whole stage. Raises UserError for models or triplets that cannot be read."""
    device = best_device()
    stream = triplet_stream(triplets, settings.chunk, seed)
    precision = Precision.named(models.dtype, device)
    # Trained weights must be fp32; LoRA's additions are, whatever the model's own are.
    dtype = precision.mllm if settings.lora_rank else torch.float32
    location = fetch_folder(models.stock_mllm, "--mllm", half=dtype != torch.float32)
    mllm = MLLM.from_pretrained(location, dtype, device, find_questions(models.questions))
    torch.manual_seed(seed)  # of LoRA's initial values
    detector = Detector(mllm, settings.lora_rank, precision)
    data = detector_data(stream, detector, settings.micro_batch)
    held_out = data.unseen
    print(f"{data.description}, {len(held_out)} of the first held out {stream.skips()}")
    if not run.saved:
        before = detector.accuracy(held_out, seed, settings.micro_batch)
        print(f"before: {describe_accuracy(before)}", flush=True)
    train_detector(run, detector, data, settings, seed)
    curves({"": read_rows(run.metrics)}, DETECTOR, run.path / "curves.png")
    if run.stopped:
        return
    after = detector.accuracy(held_out, seed, settings.micro_batch)
    print(f"after:  {describe_accuracy(after)}")
    detector.save(run.path / "mllm")
    print(f"saved to {run.path}/mllm; use it with --mllm {run.path}/mllm")


def train_detector(
    run: Run, detector: "Detector", data: StreamedData, settings: Training, seed: int = 0
) -> None:
    """Train on questions and answers, with gradients accumulated over micro-batches.

    Accuracy on held-out triplets is logged with every checkpoint.
    """
    parameters = list(detector.trained.values())
    optimizer, schedule = optimizer_and_schedule(settings, parameters, floor=0.03)
    batches = data.batches(settings.batch_size, seed, run.ranks)
    state = {
        "detector": detector,
        "optimizer": optimizer,
        "schedule": schedule,
        "data": batches,
    }
    size = settings.micro_batch

    def measure() -> dict[str, float]:
        return detector.accuracy(data.unseen, seed, size)

    steps = run.steps(state, settings.steps, settings.save_every, measure)
    for step, examples in zip(steps, batches):
        rng = random.Random(1_000_003 * seed + step)  # a resumed run asks the same questions
        micro_batches = [examples[k : k + size] for k in range(0, len(examples), size)]
        rows = [detector.rows(batch, rng) for batch in micro_batches]
        answer_tokens = sum(row.answer_tokens for row in rows)

        detector.model.train()
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=torch.float64)
        for batch, row in zip(micro_batches, rows):
            share = detector.loss(batch, row) / answer_tokens
            share.backward()
            loss += share.item()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        run.log(batches.where, loss=loss, gradient_norm=norm.cpu())

        optimizer.step()
        schedule.step()


@dataclass(frozen=True)
class Example:
    """A triplet whose image has been through the vision encoder."""

    features: Tensor  # (P, W) in bf16
    extras: dict[str, Tensor]  # further inputs about the image: Qwen's image_grid_thw
    prompt: str
    instruction: str


@dataclass
class Rows:
    """Tokens of questions and answers, padded on the right; labels are IGNORE outside answers."""

    ids: Tensor  # (B, L)
    mask: Tensor  # (B, L)
    labels: Tensor  # (B, L)

    @property
    def answer_tokens(self) -> int:
        """Number of tokens that belong to answers."""
        return int((self.labels != IGNORE).sum())


class Examples(list[Example]):
    """A list that, like a tensor, can be indexed by a tensor; `validation` (N,) are held out."""

    def __init__(self, examples: list[Example], validation: Tensor):
        super().__init__(examples)
        self.validation = validation

    def __getitem__(self, index: Tensor) -> list[Example]:
        return [list.__getitem__(self, i) for i in index.tolist()]

    @property
    def sample_bytes(self) -> int:
        """Memory of one example's features."""
        return max(1, list.__getitem__(self, 0).features.nbytes)


def detector_data(stream: Stream[Triplet], detector: "Detector", batch_size: int) -> StreamedData:
    """Stream triplets whose images are encoded; the end of the first chunk is held out.

    Raises UserError if there is no triplet.
    """

    def encode(triplets: list[Triplet], chunk: int) -> Examples:
        count = len(triplets)
        held_out = min(MAX_HELD_OUT, max(1, count // 10)) if chunk == 0 else 0
        validation = torch.arange(count) >= count - held_out
        return Examples(detector.encode(triplets, batch_size), validation)

    return StreamedData(
        stream, encode, "triplet with an image, an edited_prompt and an edit_prompt"
    )


class Detector:
    """An MLLM in training; `trained` are the parameters that learn, by name."""

    def __init__(self, mllm: MLLM, lora_rank: int = 0, precision: Precision | None = None):
        self.mllm, self.model = mllm, mllm.model
        self.precision = precision or Precision.named("mixed", self.model.device)
        # An original LLaVA is saved in llava-hf's layout, and so will be asked in its way.
        self.converted = mllm.family is FAMILIES["llava, original layout"]
        if self.converted:
            mllm.family = FAMILIES["llava"]
        # On a CPU the backward pass of fused attention would take half of a step.
        if self.model.device.type == "cpu":
            self.model.set_attn_implementation("eager")
        self.merge = mark_trainable(self.model, lora_rank)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if lora_rank:
            self.model.activation_checkpointing_enable({"use_reentrant": False})

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trained parameters; the rest of a 13 B model is on disk already."""
        return {name: p.detach() for name, p in self.trained.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a `state_dict`."""
        for name, parameter in self.trained.items():
            parameter.copy_(state[name])

    @torch.no_grad()
    def encode(self, triplets: list[Triplet], batch_size: int) -> list[Example]:
        """Encode images in fixed batches, so that a resumed run gets the same features."""
        examples, inner = [], self.model.model
        for k in range(0, len(triplets), batch_size):
            batch = triplets[k : k + batch_size]
            inputs = self.mllm.inputs([t.image for t in batch], [t.prompt for t in batch])
            with self.precision.training(self.model.device):
                if hasattr(inner, "vision_tower"):  # LLaVA, whose projector is trained
                    features = tower_features(inner, inputs["pixel_values"])
                else:
                    grid = inputs["image_grid_thw"]
                    output = inner.get_image_features(inputs["pixel_values"], grid)
                    features = output.pooler_output
            for i, (triplet, feature) in enumerate(zip(batch, features, strict=True)):
                extras = {}
                if "image_grid_thw" in inputs:
                    extras["image_grid_thw"] = inputs["image_grid_thw"][i].cpu()
                feature = feature.to("cpu", torch.bfloat16, copy=True)
                examples.append(Example(feature, extras, triplet.prompt, triplet.instruction))
        return examples

    def rows(self, examples: list[Example], rng: random.Random) -> Rows:
        """Tokenize question and answer of each example; `rng` draws the phrasings."""
        processor, tokenizer = self.mllm.processor, self.mllm.processor.tokenizer
        patch, ids, labels = processor.image_token, [], []
        for example in examples:
            question = strip_placeholders(ask(example.prompt, rng, self.mllm.questions))
            text = self.mllm.family.conversation.replace("{question}", question)
            asked = tokenizer(text.replace(patch, patch * len(example.features))).input_ids
            instruction = strip_placeholders(example.instruction)
            answer = tokenizer(instruction, add_special_tokens=False).input_ids
            answer = answer + [tokenizer.eos_token_id]
            ids.append(torch.tensor(asked + answer))
            labels.append(torch.tensor([IGNORE] * len(asked) + answer))
        mask = [torch.ones(len(row), dtype=torch.long) for row in ids]

        def padded(rows: list[Tensor], value: int) -> Tensor:
            return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        return Rows(padded(ids, tokenizer.pad_token_id), padded(mask, 0), padded(labels, IGNORE))

    def scores(self, examples: list[Example], rows: Rows) -> tuple[Tensor, Tensor]:
        """Compute the logits (T, V) of all answer tokens, row by row, and the tokens (T,).

        The rest of the sequence never reaches the output layer.
        """
        device, inner = self.model.device, self.model.model
        with self.precision.training(device):
            features = [e.features.to(device, self.model.dtype) for e in examples]
            if hasattr(inner, "multi_modal_projector"):
                features = list(inner.multi_modal_projector(torch.stack(features)))
            extras = {}
            for name in examples[0].extras:
                extras[name] = torch.stack([e.extras[name] for e in examples]).to(device)
            if extras:
                is_patch = rows.ids == inner.config.image_token_id
                extras["mm_token_type_ids"] = is_patch.int().to(device)
            states = inner(
                input_ids=rows.ids.to(device),
                attention_mask=rows.mask.to(device),
                use_cache=False,
                mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
                **extras,
            ).last_hidden_state[:, :-1]
            answers = (rows.labels[:, 1:] != IGNORE).to(device)
            tokens = rows.labels[:, 1:].to(device)[answers]
            return self.model.lm_head(states[answers]).float(), tokens

    def loss(self, examples: list[Example], rows: Rows) -> Tensor:
        """Compute the cross-entropy, summed over answer tokens; the question does not count."""
        return F.cross_entropy(*self.scores(examples, rows), reduction="sum")

    def accuracy(self, examples: list[Example], seed: int, batch_size: int) -> dict[str, float]:
        """Average `grades`: shares of exactly worded instructions and of right decisions."""
        grades = self.grades(examples, seed, batch_size)
        return {name: sum(marks) / len(examples) for name, marks in grades.items()}

    @torch.no_grad()
    def grades(self, examples: list[Example], seed: int, batch_size: int) -> dict[str, list[bool]]:
        """Grade each example; `seed` draws the phrasings.

        `exact`: the instruction is worded exactly; `decided`: rightly an edit or "nothing";
        `always_edit`: `decided` of a model that never says "nothing".
        """
        nothing, rng, training = self.mllm.nothing, random.Random(seed), self.model.training
        grades: dict[str, list[bool]] = {"exact": [], "decided": [], "always_edit": []}
        self.model.eval()
        for k in range(0, len(examples), batch_size):
            batch = examples[k : k + batch_size]
            rows = self.rows(batch, rng)
            scores, tokens = self.scores(batch, rows)
            guesses = scores.argmax(-1)
            lengths = (rows.labels != IGNORE).sum(1).tolist()
            # Right tokens after right tokens: the same as decoding greedily and comparing.
            for guess, answer in zip(guesses.split(lengths), tokens.split(lengths)):
                says_nothing, is_nothing = guess[0] == nothing, answer[0] == nothing
                grades["exact"].append(torch.equal(guess, answer))
                grades["decided"].append(bool(says_nothing == is_nothing))
                grades["always_edit"].append(not is_nothing)
        self.model.train(training)
        return grades

    def save(self, folder: Path) -> None:
        """Save an ordinary MLLM folder in bf16, as LLaVA is published, with LoRA merged.

        Merged, so that sampling needs neither peft nor the stock model.
        """
        self.merge()
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model = self.model.to(torch.bfloat16)
        with writing(folder):
            # Saving would undo the renaming of a converted model, but only half of it.
            model.save_pretrained(partial, save_original_format=not self.converted)
        self.mllm.processor.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def mark_trainable(model: PreTrainedModel, lora_rank: int) -> Callable[[], object]:
    """Set which parameters learn: low-rank additions in fp32, or all but the vision encoder's.

    Returns a function that merges the LoRA weights and returns the plain model.
    """
    if lora_rank:
        import peft  # takes seconds to import

        settings = peft.LoraConfig(
            r=lora_rank, lora_alpha=2 * lora_rank, target_modules=LORA_TARGETS
        )
        # peft uses a deprecated name of transformers.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            return peft.get_peft_model(model, settings).merge_and_unload
    model.requires_grad_(True)
    tower = "vision_tower" if hasattr(model.model, "vision_tower") else "visual"
    getattr(model.model, tower).requires_grad_(False)
    return lambda: model


def tower_features(inner: nn.Module, pixels: Tensor) -> Tensor:
    """Compute LLaVA's image features before the projector: (B, P, W)."""
    states = inner.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = states[inner.config.vision_feature_layer]
    drop_class_token = inner.config.vision_feature_select_strategy == "default"
    return features[:, 1:] if drop_class_token else features


def describe_accuracy(accuracy: dict[str, float]) -> str:
    """Describe `Detector.accuracy` in one line."""
    return (
        f"instruction worded exactly {accuracy['exact']:.1%}; edit or nothing, decided rightly "
        f"{accuracy['decided']:.1%} (a model that never says nothing: "
        f"{accuracy['always_edit']:.1%})"
    )
