"""Train the parts of the twins: one loop for all of them, which can be stopped and resumed.

A part of the build gives its modules and a function from the step to a loss; the rest is here:
precision, optimizer, schedule, and an average of the weights, which is what ships.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from img_minimal.aligner import ImplicitAligner
from img_minimal.devices import Precision
from img_minimal.optimizer import new_optimizer, warmup_constant_decay
from img_minimal.presets import Preset, find_preset
from img_minimal.run import Run

CPU = torch.device("cpu")
MIXED = Precision.named("mixed", CPU)


@contextmanager
def autocast() -> Iterator[None]:
    """Compute in bf16 where the CPU is faster so, with fp32 weights.

    At these sizes the backward pass of fused attention takes half of a training step on a CPU, so
    attention is the plain one.
    """
    with MIXED.training(CPU), sdpa_kernel(SDPBackend.MATH):
        yield


class RandomBatches:
    """Batches drawn by torch's generator, whose state is in every checkpoint anyway."""

    shared = True

    def state_dict(self) -> dict:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore nothing."""


def fit(
    folder: Path,
    modules: nn.ModuleDict,
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    *,
    lr: float,
    own_lr: dict[str, float] | None = None,
    optimizer: str = "adamw",
    weight_decay: float = 0.01,
    average: float = 0.995,
    hold: float = 0.6,
    measure: Callable[[], dict[str, float]] = dict,
    save_every: int = 500,
    seed: int = 0,
) -> None:
    """Train `modules` in place for `steps` and leave the averaged weights in them.

    `own_lr` gives single modules another learning rate; all rates fall after a share `hold` of the
    steps. `folder` keeps log and checkpoints, from which a stopped run is resumed. With every
    checkpoint the numbers of `measure`, seen with averaged weights, are printed and logged. Raises
    UserError if the loss is not finite.
    """
    # What learns, and at which rate.
    torch.manual_seed(seed)
    groups = []
    for name, module in modules.items():
        learning = [p for p in module.parameters() if p.requires_grad]
        groups.append({"params": learning, "lr": (own_lr or {}).get(name, lr)})
    updates = new_optimizer(optimizer, groups, lr, weight_decay)
    if optimizer == "adamw":
        # In runs this short, a gradient's size must be forgotten sooner than by default.
        for group in updates.param_groups:
            group["betas"] = (0.9, 0.98)
    schedule = LambdaLR(updates, warmup_constant_decay(steps, warmup=100, hold=hold, floor=0.03))
    parameters = [p for group in groups for p in group["params"]]
    averaged = EMAModel(parameters, average, foreach=True)
    run = Run(folder, {"lr": lr, "steps": steps}, resume=(folder / "checkpoint.pt").exists())

    def measure_average() -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):  # measuring must not change the run
            averaged.store(parameters)
            averaged.copy_to(parameters)
            numbers = measure()
            averaged.restore(parameters)
        tqdm.write(f"{folder.name}, step {run.step + 1}: {numbers}")
        return numbers

    state = {"modules": modules, "optimizer": updates, "schedule": schedule, "average": averaged}
    state["data"] = RandomBatches()
    for step in run.steps(state, steps, save_every, measure_average):
        loss = loss_of_step(step)
        run.log("a random batch", loss=loss)
        updates.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        updates.step()
        schedule.step()
        averaged.step(parameters)
    if run.stopped:  # by Ctrl-C; later parts must not be built on unfinished weights
        raise KeyboardInterrupt
    averaged.copy_to(parameters)


def preset_in(target: Path) -> Preset:
    """Return the preset of SDXL's twin, with the models that were built in `target`."""
    return find_preset("tiny-sdxl").changed(
        base=str(target / "sdxl"),
        image_encoder=str(target / "image_encoder"),
        ip_adapter=str(target / "ip_adapter.safetensors"),
    )


def save_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline in bf16, which halves its size, with configurations that say fp32.

    diffusers opens a UNet in fp32 by default, but transformers opens text encoders in what their
    configuration says, and all parts must agree.
    """
    pipe.to(torch.bfloat16).save_pretrained(folder)
    for path in folder.glob("*/config.json"):
        path.write_text(path.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))


def forget_paths(target: Path) -> None:
    """Remove paths of this machine, which libraries write into configurations."""
    for path in target.rglob("config.json"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if '"_name_or_path"' not in line))


def run_train(folder: Path, *options: object) -> None:
    """Run `python train.py` with these options in a run folder, resuming a stopped run."""
    resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
    command = [sys.executable, "train.py", "--output-dir", folder, *options, *resume]
    subprocess.run(list(map(str, command)), check=True)


def build_aligner(workdir: Path, target: Path) -> None:
    """Train three aligners on 110 K pairs, whose features take 15 GB."""
    pairs = "--pairs", workdir / "pairs.parquet", "--max-pairs", 110_000
    train_aligners("aligner", workdir, target, *pairs, "--steps", 6000)


def build_flux_aligner(workdir: Path, target: Path) -> None:
    """Train three aligners on the shipped pairs: all bases learn from the same, as in the paper."""
    options = "--model", "tiny-flux", "--max-pairs", 0, "--steps", 2000
    train_aligners("aligner-flux", workdir, target, *options)


def train_aligners(name: str, workdir: Path, target: Path, *options: object) -> None:
    """Run train.py once for each kind of guidance, and keep the weights in fp16."""
    for guidance in ("mllm", "stock", "text"):
        file = name if guidance == "mllm" else f"{name}-{guidance}"
        cache = "--cache-dir", workdir / "features"
        common = "--guidance", guidance, "--eval-prompts", 0, "--lr", 2e-3
        run_train(workdir / file, *common, *cache, "--save-every", 500, *options)
        aligner = ImplicitAligner.from_file(workdir / file / "aligner.safetensors")
        aligner.half().save(target / f"{file}.safetensors")
