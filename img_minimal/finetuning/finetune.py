"""`python train.py --stage mllm`: finetune the stock MLLM as a detector of misalignment, on edit triplets.

The run folder holds config.json, metrics.jsonl, curves.png, checkpoint.pt and the MLLM itself, in the folder mllm.
"""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from img_minimal.checkpoint import RunFolder, save_checkpoint
from img_minimal.data.stream import START, Place, Stream, ahead
from img_minimal.data.triplets import Triplet, triplet_stream
from img_minimal.errors import UserError
from img_minimal.finetuning.detector import Detector, Lesson
from img_minimal.mllm import MLLM
from img_minimal.models.devices import Precision, best_device
from img_minimal.models.hub import fetch
from img_minimal.optimizer import warmup_constant_decay
from img_minimal.pictures import detector_curves
from img_minimal.presets import Finetuning, Preset
from img_minimal.training import Batches, Part, Stop

HELD_OUT = 1000  # triplets at most, and a tenth at most, that accuracy is measured on


class Lessons:
    """Triplets whose images have been seen, a chunk at a time; the last of the first chunk are held out."""

    def __init__(self, stream: Stream[Triplet], detector: Detector, batch_size: int):
        """Raises UserError if there is no triplet."""
        self.stream, self.detector, self.batch_size = stream, detector, batch_size
        chunk = next(stream.chunks(), None)
        if chunk is None:
            raise UserError(f"{stream.source}: holds no triplet with an image, an edited_prompt and an edit_prompt")
        self.first, self.after = self._see(chunk.items), chunk.after
        self.held_out = self.first[len(self.first) - self._spared(len(self.first)) :]

    @staticmethod
    def _spared(count: int) -> int:
        return min(HELD_OUT, max(1, count // 10))

    def _see(self, triplets: list[Triplet]) -> list[Lesson]:
        return self.detector.see(triplets, self.batch_size)

    def parts(self, place: Place) -> Iterator[Part]:
        """Chunks from `place` to the end of an epoch."""
        if place == START:
            count = len(self.first) - len(self.held_out)
            yield Part(Indexed(self.first), torch.arange(count))
            place = self.after
        for chunk in ahead(self.stream.chunks(place)):
            yield Part(Indexed(self._see(chunk.items)), torch.arange(len(chunk.items)), chunk.place)


class Indexed(list):
    """A list that, like a tensor, gives the items of an index tensor."""

    def __getitem__(self, index: torch.Tensor) -> list:
        return [list.__getitem__(self, i) for i in index.tolist()]


class Course:
    """All state of a finetuning run but the data's position; `state_dict` goes into a checkpoint."""

    def __init__(self, detector: Detector, settings: Finetuning):
        self.detector, self.step = detector, 0
        self.optimizer = torch.optim.AdamW(
            detector.trained.values(), settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay
        )
        factor = warmup_constant_decay(settings.steps, max(1, settings.warmup), settings.constant_share, floor=0.03)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.before: dict[str, float] = {}  # accuracy of the stock model

    def state_dict(self) -> dict:
        """Of what is trained alone: the rest of a 13 B model is on disk already."""
        learned = {name: p.detach() for name, p in self.detector.trained.items()}
        parts = {name: getattr(self, name).state_dict() for name in ("optimizer", "schedule")}
        return parts | {"learned": learned, "step": self.step, "before": self.before}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""
        for name, parameter in self.detector.trained.items():
            parameter.copy_(state["learned"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.before = state["step"], state["before"]


def learn(
    course: Course, batches: Batches, held_out: list[Lesson], settings: Finetuning, folder: Path, *, seed: int = 0,
    stop: Stop | None = None,
) -> bool:  # fmt: skip
    """The loop: questions, loss of the answers, backward, clip, step; now and then measure on `held_out` and save.

    Continues from `course.step` and returns False if it was told to stop before the last step. Raises UserError with
    step and samples when the loss is not finite; the last checkpoint stays as it is.
    """
    detector, size = course.detector, settings.micro_batch
    parameters = list(detector.trained.values())
    log, source = (folder / "metrics.jsonl").open("a"), iter(batches)
    begin, end = course.step, settings.steps
    with tqdm(range(begin, end), desc="finetune", initial=begin, total=end) as bar, log:
        for step in bar:
            lessons: list[Lesson] = next(source)
            dice = random.Random(1_000_003 * seed + step)  # of the step, so that a resumed run asks the same
            parts = [lessons[k : k + size] for k in range(0, len(lessons), size)]
            rows = [detector.rows(part, dice) for part in parts]
            answers = sum(r.count for r in rows)
            detector.model.train()
            course.optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for part, r in zip(parts, rows):
                share = detector.loss(part, r) / answers
                share.backward()
                loss += share.item()
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of step {step} is {loss} ({batches.where}); the last checkpoint is kept in {folder}. "
                    "Lower --lr, or check these triplets"
                )
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            course.optimizer.step()
            course.schedule.step()
            course.step = step + 1
            row = {"step": step + 1, "loss": loss, "gradient_norm": float(norm)}
            stopping = stop is not None and stop.asked
            saving = (step + 1) % settings.save_every == 0 or step + 1 == settings.steps or stopping
            if saving:
                row |= detector.accuracy(held_out, seed, size)
            log.write(json.dumps(row) + "\n")
            if saving:
                log.flush()  # rows before checkpoint, so that a killed run leaves no hole
                save_checkpoint(folder / "checkpoint.pt", course.state_dict() | {"data": batches.state_dict()})
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if stopping and step + 1 < settings.steps:
                return False
    return True


def finetune(preset: Preset, run_folder: RunFolder, seed: int) -> bool:
    """The whole stage; False if it was told to stop. Raises UserError for models or triplets that cannot be read."""
    settings, folder, device = preset.finetuning, run_folder.path, best_device()
    stream = triplet_stream(preset.triplets, settings.chunk, seed)
    precision = Precision.named(preset.dtype, device)
    dtype = precision.mllm if settings.lora_rank else torch.float32  # what learns must be fp32: LoRA adds that itself
    location = fetch(preset, ("stock_mllm",), half=dtype != torch.float32).stock_mllm
    mllm = MLLM.from_pretrained(location, dtype, device)
    torch.manual_seed(seed)  # of LoRA's first values
    detector = Detector(mllm, settings.lora_rank)
    data = Lessons(stream, detector, settings.micro_batch)
    course, batches = Course(detector, settings), Batches(data.parts, settings.batch_size, seed)
    if run_folder.saved:
        course.load_state_dict(run_folder.saved)
        batches.resume(run_folder.saved["data"], course.step)
    else:
        course.before = detector.accuracy(data.held_out, seed, settings.micro_batch)
    run_folder.begin(course.step)
    print(f"{len(data.first)} triplets at hand at once, {len(data.held_out)} of them held out {stream.skips()}")
    print("before: " + in_words(course.before), flush=True)
    with Stop().listening() as stop:
        finished = learn(course, batches, data.held_out, settings, folder, seed=seed, stop=stop)
    detector_curves(folder / "metrics.jsonl", folder / "curves.png")
    if not finished:
        return False
    print("after:  " + in_words(detector.accuracy(data.held_out, seed, settings.micro_batch)))
    detector.save(folder / "mllm")
    print(f"saved to {folder}/mllm; use it with --mllm {folder}/mllm")
    return True


def in_words(accuracy: dict[str, float]) -> str:
    """One line of what `Detector.accuracy` returns."""
    return (
        f"instruction worded exactly {accuracy['exact']:.1%}; edit or nothing, decided rightly "
        f"{accuracy['decided']:.1%} (a model that never says nothing: {accuracy['always_edit']:.1%})"
    )
