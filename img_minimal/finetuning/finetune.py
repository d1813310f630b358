"""`python train.py --stage mllm`: finetune the stock MLLM as a detector of misalignment, on edit triplets.

The run folder holds config.json, metrics.jsonl, curves.png, checkpoint.pt and the MLLM itself, in the folder mllm.
"""

import json
import random
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from img_minimal.data.batches import Batches
from img_minimal.data.sources import StreamedData
from img_minimal.data.stream import Stream
from img_minimal.data.triplets import Triplet, triplet_stream
from img_minimal.files.hub import fetch_folder
from img_minimal.finetuning.detector import Detector, Example
from img_minimal.mllm import MLLM
from img_minimal.presets import Finetuning, Preset
from img_minimal.questions import find_questions
from img_minimal.runtime.checkpoint import RunFolder, save_checkpoint
from img_minimal.runtime.devices import Precision, best_device
from img_minimal.runtime.optimizer import new_optimizer, warmup_constant_decay
from img_minimal.runtime.plots import detector_curves
from img_minimal.training import Stop, check_loss

HELD_OUT = 1000  # triplets at most, and a tenth at most, that accuracy is measured on


class Examples(list[Example]):
    """A list that, like a tensor, gives the items of an index tensor; some of them are for validation."""

    def __init__(self, examples: list[Example], validation: torch.Tensor):
        super().__init__(examples)
        self.validation = validation  # (N,)

    def __getitem__(self, index: torch.Tensor) -> list[Example]:
        return [list.__getitem__(self, i) for i in index.tolist()]

    @property
    def sample_bytes(self) -> int:
        """What one of them takes."""
        return max(1, list.__getitem__(self, 0).features.nbytes)


def detector_data(stream: Stream[Triplet], detector: Detector, batch_size: int) -> StreamedData:
    """Triplets whose images are encoded, a chunk at a time; the last of the first chunk are held out.

    Raises UserError if there is no triplet.
    """

    def encode(triplets: list[Triplet], chunk: int) -> Examples:
        """A chunk's examples."""
        count = len(triplets)
        held_out = min(HELD_OUT, max(1, count // 10)) if chunk == 0 else 0
        return Examples(detector.encode(triplets, batch_size), torch.arange(count) >= count - held_out)

    return StreamedData(stream, encode, "triplet with an image, an edited_prompt and an edit_prompt")


class DetectorState:
    """All state of a finetuning run but the data's position; `state_dict` goes into a checkpoint."""

    def __init__(self, detector: Detector, settings: Finetuning):
        self.detector, self.step = detector, 0
        trained = detector.trained.values()
        self.optimizer = new_optimizer(settings.optimizer, trained, settings.lr, settings.weight_decay)
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


def train_detector(
    state: DetectorState,
    batches: Batches,
    held_out: list[Example],
    settings: Finetuning,
    folder: Path,
    *,
    seed: int = 0,
    stop: Stop | None = None,
) -> bool:
    """The loop: questions, loss of the answers, backward, clip, step; now and then measure on `held_out` and save.

    Continues from `state.step` and returns False if it was told to stop before the last step. Raises UserError with
    step and samples when the loss is not finite; the last checkpoint stays as it is.
    """
    detector, size = state.detector, settings.micro_batch
    parameters = list(detector.trained.values())
    log, source = (folder / "metrics.jsonl").open("a"), iter(batches)
    begin, end = state.step, settings.steps
    with tqdm(range(begin, end), desc="finetune", initial=begin, total=end) as bar, log:
        for step in bar:
            examples: list[Example] = next(source)
            rng = random.Random(1_000_003 * seed + step)  # of the step, so that a resumed run asks the same
            parts = [examples[k : k + size] for k in range(0, len(examples), size)]
            rows = [detector.rows(part, rng) for part in parts]
            answers = sum(r.count for r in rows)
            detector.model.train()
            state.optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for part, r in zip(parts, rows):
                share = detector.loss(part, r) / answers
                share.backward()
                loss += share.item()
            check_loss(loss, step, batches.where, folder)
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            state.optimizer.step()
            state.schedule.step()
            state.step = step + 1
            row = {"step": step + 1, "loss": loss, "gradient_norm": float(norm)}
            stopping = stop is not None and stop.asked
            saving = (step + 1) % settings.save_every == 0 or step + 1 == settings.steps or stopping
            if saving:
                row |= detector.accuracy(held_out, seed, size)
            log.write(json.dumps(row) + "\n")
            if saving:
                log.flush()  # rows before checkpoint, so that a killed run leaves no hole
                save_checkpoint(folder / "checkpoint.pt", state.state_dict() | {"data": batches.state_dict()})
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if stopping and step + 1 < settings.steps:
                return False
    return True


def finetune(preset: Preset, run_folder: RunFolder, seed: int) -> bool:
    """The whole stage; False if it was told to stop. Raises UserError for models or triplets that cannot be read."""
    settings, folder, device = preset.finetuning, run_folder.path, best_device()
    stream = triplet_stream(preset.triplets, settings.chunk, seed)
    precision = Precision.named(preset.dtype, device)
    dtype = precision.mllm if settings.lora_rank else torch.float32  # what is trained must be fp32: LoRA adds that
    location = fetch_folder(preset.stock_mllm, "--mllm", half=dtype != torch.float32)
    mllm = MLLM.from_pretrained(location, dtype, device, find_questions(preset.questions))
    torch.manual_seed(seed)  # of LoRA's first values
    detector = Detector(mllm, settings.lora_rank, precision)
    data = detector_data(stream, detector, settings.micro_batch)
    state = DetectorState(detector, settings)
    batches = Batches(data.parts, settings.batch_size, seed)
    if run_folder.saved:
        state.load_state_dict(run_folder.saved)
        batches.resume(run_folder.saved["data"])
    else:
        state.before = detector.accuracy(data.unseen, seed, settings.micro_batch)
    run_folder.begin(state.step)
    print(f"{data.description}, {len(data.unseen)} of the first held out {stream.skips()}")
    print("before: " + in_words(state.before), flush=True)
    with Stop().listening() as stop:
        finished = train_detector(state, batches, data.unseen, settings, folder, seed=seed, stop=stop)
    detector_curves(folder / "metrics.jsonl", folder / "curves.png")
    if not finished:
        return False
    print("after:  " + in_words(detector.accuracy(data.unseen, seed, settings.micro_batch)))
    detector.save(folder / "mllm")
    print(f"saved to {folder}/mllm; use it with --mllm {folder}/mllm")
    return True


def in_words(accuracy: dict[str, float]) -> str:
    """One line of what `Detector.accuracy` returns."""
    return (
        f"instruction worded exactly {accuracy['exact']:.1%}; edit or nothing, decided rightly "
        f"{accuracy['decided']:.1%} (a model that never says nothing: {accuracy['always_edit']:.1%})"
    )
