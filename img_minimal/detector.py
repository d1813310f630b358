"""`python train.py --stage mllm`: finetune an MLLM to say how to make an image match a prompt.

The training data are triplets of an image, a prompt, and the instruction that would make the image
match it (Fig. 11). The vision encoder stays frozen. Projector, language model and output layer are
trained or, with a LoRA rank, low-rank additions to the language model's linear layers.
"""

import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BatchFeature, LlavaProcessor, PreTrainedModel

from img_minimal.cli import check, partial_of
from img_minimal.data.features import StreamedData
from img_minimal.data.pairs import Stream, Triplet, triplet_stream
from img_minimal.devices import Precision, best_device
from img_minimal.hub.mllms import CHAT
from img_minimal.hub.questions import find_questions, strip_placeholders
from img_minimal.hub.where import SETTINGS, fetch_folder
from img_minimal.mllm import MLLM, ask
from img_minimal.optimizer import optimizer_and_schedule
from img_minimal.plots import DETECTOR, curves, read_rows
from img_minimal.presets import Models, Training
from img_minimal.run import Run

IGNORE = -100  # label of tokens without a loss, as in transformers
MAX_HELD_OUT = 1000  # triplets that accuracy is measured on; at most a tenth of the first chunk


def finetune(run: Run, settings: Training, models: Models, triplets: str, seed: int) -> None:
    """Run the whole stage. Raises UserError for models or triplets that cannot be read."""
    device = best_device()
    stream = triplet_stream(triplets, settings.chunk, seed=seed)
    precision = Precision.named(models.dtype, device)
    # Trained weights must be fp32; LoRA's additions are, whatever the model's own are.
    dtype = precision.mllm if settings.lora_rank else torch.float32
    location = fetch_folder(models.stock_mllm, "--mllm", half=dtype != torch.float32)
    mllm = MLLM.from_pretrained(location, dtype, device, find_questions(models.questions))
    torch.manual_seed(seed)  # of LoRA's initial values
    detector = Detector(mllm, settings.lora_rank, precision)
    data = detector_data(stream)
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
    measure = partial(detector.accuracy, data.unseen, seed, size)
    steps = run.steps(state, settings.steps, settings.save_every, measure)
    for step, examples in zip(steps, batches):
        rng = random.Random(1_000_003 * seed + step)  # a resumed run asks the same questions
        micro_batches = [examples[k : k + size] for k in range(0, len(examples), size)]
        rows = [detector.rows(batch, rng) for batch in micro_batches]
        answer_tokens = sum(row.answer_tokens for row in rows)

        detector.model.train()
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=torch.float64)
        for row in rows:
            share = detector.loss(row) / answer_tokens
            share.backward()
            loss += share.item()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        run.log(batches.where, loss=loss, gradient_norm=norm.cpu())

        optimizer.step()
        schedule.step()


@dataclass
class Rows:
    """Inputs of questions and answers, padded on the right; labels are IGNORE outside answers."""

    inputs: BatchFeature  # `input_ids`, `attention_mask` (B, L), and pixels
    labels: Tensor  # (B, L)

    @property
    def answer_tokens(self) -> int:
        """Number of tokens that belong to answers."""
        return int((self.labels != IGNORE).sum())


class Examples(list[Triplet]):
    """A list that, like a tensor, can be indexed by a tensor; `validation` (N,) are held out."""

    def __init__(self, triplets: list[Triplet], validation: Tensor):
        super().__init__(triplets)
        self.validation = validation

    def __getitem__(self, index: Tensor) -> list[Triplet]:
        return [list.__getitem__(self, i) for i in index.tolist()]


def detector_data(stream: Stream[Triplet]) -> StreamedData:
    """Stream triplets; the end of the first chunk is held out.

    Raises UserError if there is no triplet.
    """

    def split(triplets: list[Triplet], chunk: int) -> Examples:
        count = len(triplets)
        held_out = min(MAX_HELD_OUT, max(1, count // 10)) if chunk == 0 else 0
        return Examples(triplets, torch.arange(count) >= count - held_out)

    return StreamedData(stream, split, "triplet with an image, an edited_prompt and an edit_prompt")


class Detector:
    """An MLLM in training; `trained` are the parameters that learn, by name."""

    def __init__(self, mllm: MLLM, lora_rank: int = 0, precision: Precision | None = None):
        self.mllm, self.model = mllm, mllm.model
        self.precision = precision or Precision.named("mixed", self.model.device)
        # An original LLaVA is saved in llava-hf's layout, and so will be asked in its way.
        self.converted = bool(mllm.stop)
        if self.converted:
            mllm.processor.chat_template, mllm.stop = CHAT, None
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

    def rows(self, examples: list[Triplet], rng: random.Random) -> Rows:
        """Tokenize question and answer of each example; `rng` draws the phrasings."""
        tokenizer = self.mllm.processor.tokenizer
        questions = [ask(example.prompt, rng, self.mllm.questions) for example in examples]
        inputs = self.mllm.inputs([example.image for example in examples], questions)
        asked = inputs["attention_mask"].sum(1).tolist()
        answers = []
        for example in examples:
            instruction = strip_placeholders(example.instruction, self.mllm.marks)
            ids = tokenizer(instruction, add_special_tokens=False).input_ids
            answers.append(torch.tensor([*ids, tokenizer.eos_token_id]).to(self.model.device))

        longest, shape = max(map(len, answers)), inputs["input_ids"].shape
        for name, value in inputs.items():
            if value.shape[:2] == shape:
                check(value.ndim == 2, f"--stage mllm cannot train this MLLM, for its {name}")
                inputs[name] = F.pad(value, (0, longest))
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        labels = torch.full_like(ids, IGNORE)
        for k, (length, answer) in enumerate(zip(asked, answers)):
            place = k, slice(length, length + len(answer))
            ids[place] = labels[place] = answer
            mask[place] = 1
        return Rows(inputs, labels)

    def scores(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Compute the logits (T, V) of all answer tokens, row by row, and the tokens (T,).

        The rest of the sequence never reaches the output layer.
        """
        labels = F.pad(rows.labels[:, 1:], (0, 1), value=IGNORE)
        answers = labels != IGNORE
        with self.precision.training(self.model.device):
            _, logits = self.mllm.run(rows.inputs, answers)
        return logits.float(), labels[answers]

    def loss(self, rows: Rows) -> Tensor:
        """Compute the cross-entropy, summed over answer tokens; the question does not count."""
        return F.cross_entropy(*self.scores(rows), reduction="sum")

    def accuracy(self, examples: list[Triplet], seed: int, batch_size: int) -> dict[str, float]:
        """Average `grades`: shares of exactly worded instructions and of right decisions."""
        grades = self.grades(examples, seed, batch_size)
        return {name: sum(marks) / len(examples) for name, marks in grades.items()}

    @torch.no_grad()
    def grades(self, examples: list[Triplet], seed: int, batch_size: int) -> dict[str, list[bool]]:
        """Grade each example; `seed` draws the phrasings.

        `exact`: the instruction is worded exactly; `decided`: rightly an edit or "nothing";
        `always_edit`: `decided` of a model that never says "nothing".
        """
        nothing, rng, training = self.mllm.nothing, random.Random(seed), self.model.training
        grades = {"exact": [], "decided": [], "always_edit": []}
        self.model.eval()
        for k in range(0, len(examples), batch_size):
            batch = examples[k : k + batch_size]
            rows = self.rows(batch, rng)
            scores, tokens = self.scores(rows)
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
        partial = partial_of(folder)
        shutil.rmtree(partial, ignore_errors=True)
        model = self.model.to(torch.bfloat16)
        # Saving would undo the renaming of a converted model, but only half of it.
        model.save_pretrained(partial, save_original_format=not self.converted)
        processor, source = self.mllm.processor, Path(model.name_or_path)
        if isinstance(processor, LlavaProcessor):
            processor.save_pretrained(partial)
        else:
            # As they are, with the half for videos, which is not opened here.
            for file in chain(*(source.glob(pattern) for pattern in SETTINGS)):
                if not (partial / file.name).exists() and ".index." not in file.name:
                    shutil.copy(file, partial)
            (partial / "chat_template.jinja").write_text(processor.chat_template)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def mark_trainable(model: PreTrainedModel, lora_rank: int) -> Callable[[], object]:
    """Set which parameters learn: low-rank additions in fp32, or all but the vision encoder's.

    Returns a function that merges the LoRA weights and returns the plain model.
    """
    if lora_rank:
        import peft  # takes seconds to import

        decoder, head, targets = {*model.get_decoder().modules()}, model.get_output_embeddings(), []
        for name, module in model.named_modules():
            if module in decoder and isinstance(module, nn.Linear) and module is not head:
                targets.append(name)
        settings = peft.LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=targets)
        # peft uses a deprecated name of transformers.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            return peft.get_peft_model(model, settings).merge_and_unload
    model.requires_grad_(True)
    tower = model.get_encoder(modality="image")
    if tower is not model:  # a model without a vision encoder reads pixels in its language model
        tower.requires_grad_(False)
    return lambda: model


def describe_accuracy(accuracy: dict[str, float]) -> str:
    """Describe `Detector.accuracy` in one line."""
    return (
        f"instruction worded exactly {accuracy['exact']:.1%}; edit or nothing, decided rightly "
        f"{accuracy['decided']:.1%} (a model that never says nothing: "
        f"{accuracy['always_edit']:.1%})"
    )
