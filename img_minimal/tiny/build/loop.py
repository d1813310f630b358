"""The one training loop of the tiny world's build: AdamW, a schedule, an average of the weights, bf16, resumable.

Each part of the build supplies its modules and a function `step -> loss`; this file supplies the rest.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from img_minimal.devices import Precision
from img_minimal.files import replacing
from img_minimal.optimizer import new_optimizer, warmup_constant_decay
from img_minimal.run import check_loss

CPU = torch.device("cpu")
MIXED = Precision.named("mixed", CPU)


@contextmanager
def autocast() -> Iterator[None]:
    """fp32 weights, and products in bf16 where the CPU is faster so: the precision of every part of the build.

    On a CPU the fused attention's backward pass takes half of a training step at these sizes; the plain one does not.
    """
    with MIXED.training(CPU), sdpa_kernel(SDPBackend.MATH):
        yield


class WeightAverage:
    """Exponential moving average of parameters; `swap()` puts it in the place of the live ones, and back."""

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.live, self.decay, self.count = parameters, decay, 0
        self.average = [p.detach().clone() for p in parameters]

    def update(self) -> None:
        """One step; the first ones count more, so that the random start is forgotten."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the live weights and their average."""
        for live, average in zip(self.live, self.average):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)


def fit(
    name: str,
    modules: nn.ModuleDict,
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    workdir: Path,
    *,
    lr: float | dict[str, float],
    muon: bool = False,
    weight_decay: float = 0.01,
    average: float = 0.995,
    seed: int = 0,
    hold: float = 0.6,
    watch: Callable[[int], str] | None = None,
    watch_every: int = 500,
    save_seconds: float = 60.0,
) -> None:
    """Train `modules` in place for `steps` and leave the averaged weights in them.

    `lr` may name one rate per module; with `muon`, which the matrices then follow, it is one rate. Every `save_seconds`
    a checkpoint of weights, optimiser, average and RNG is written to `workdir/NAME.ckpt`, from which the next call goes
    on. `watch(step)` returns a line to print, seen with averaged weights. Raises UserError when the loss is not finite.
    """
    torch.manual_seed(seed)
    trained = {key: [p for p in modules[key].parameters() if p.requires_grad] for key in modules}
    parameters = [p for group in trained.values() for p in group]
    if muon:
        optimizer = new_optimizer("muon", parameters, lr, weight_decay)
    else:
        rates = lr if isinstance(lr, dict) else dict.fromkeys(modules, lr)
        groups = [{"params": trained[key], "lr": rates[key]} for key in modules]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, warmup_constant_decay(steps, warmup=100, hold=hold, floor=0.03)
    )
    ema, start, path = WeightAverage(parameters, average), 0, workdir / f"{name}.ckpt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        ema.average, ema.count, start = state["average"], state["count"], state["step"]
        torch.set_rng_state(state["rng"])
    saved, shown = time.monotonic(), 0.0
    with tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=1.0) as bar:
        for step in bar:
            loss = loss_of_step(step)
            check_loss(loss.item(), step, name, workdir)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            ema.update()
            shown = loss.item() if step == start else 0.98 * shown + 0.02 * loss.item()
            bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
            if watch and (step + 1) % watch_every == 0 and step + 1 < steps:
                rng = torch.get_rng_state()
                ema.swap()
                bar.write(f"{name} step {step + 1}: loss {shown:.4f}, {watch(step + 1)}")
                ema.swap()
                torch.set_rng_state(rng)  # watching must not change the run
            if time.monotonic() - saved > save_seconds or step + 1 == steps:
                saved = time.monotonic()
                state = dict(
                    modules=modules.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict(),
                    average=ema.average, count=ema.count, step=step + 1, rng=torch.get_rng_state(),
                )  # fmt: skip
                with replacing(path) as partial:
                    torch.save(state, partial)
    ema.swap()
    if watch:
        print(f"{name} done: loss {shown:.4f}, {watch(steps)}", flush=True)


def save_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """Weights in bf16, for half the size. The configurations say fp32, in which diffusers opens a UNet by default.

    Transformers opens text encoders in what their configuration says, and all parts must agree.
    """
    pipe.to(torch.bfloat16).save_pretrained(folder)
    for path in folder.glob("*/config.json"):
        path.write_text(path.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))


def forget_paths(target: Path) -> None:
    """Take out of the configurations where on this machine a part came from; libraries write it into them."""
    for path in target.rglob("config.json"):
        path.write_text("".join(line for line in path.read_text().splitlines(True) if '"_name_or_path"' not in line))


def run_train(folder: Path, *options: object) -> None:
    """`python train.py` with these options, into a run folder; a run that was stopped goes on."""
    resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
    command = [sys.executable, "train.py", "--output-dir", folder, *options, *resume]
    subprocess.run([str(word) for word in command], check=True)
