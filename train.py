"""Train an Implicit Aligner, or finetune the MLLM that guides it.

    python train.py                                  the tiny twin, on a CPU, in minutes
    python train.py --resume                         go on where a stopped run left off, to the same numbers
    python train.py --preference-weight 0 --output-dir ...      an ablation: L_base alone
    python train.py --model sdxl                     the paper's run, from a stream of Pick-a-Pic, on one GPU
    python train.py --model sdxl --max-pairs 10000 --cache-dir features --cache-gb 70     ablations, features kept
    python train.py --stage mllm                     an MLLM that says how to make an image match its prompt

The run folder holds config.json, metrics.jsonl, curves.png, samples.png, checkpoint.pt and aligner.safetensors (of an
MLLM: the folder mllm/). No UNet and no VAE is loaded for training.
"""

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from img_minimal.flags import ModelFlags
from img_minimal.presets import PRESETS, Preset, find_preset, with_overrides
from img_minimal.runtime.cli import check, option, parse, quiet_libraries, run


@dataclass
class Config(ModelFlags):
    """The command line; None means: as the preset says."""

    model: str = option("tiny-sdxl", "which model to train an aligner for", choices=list(PRESETS))
    stage: str = option("aligner", "what is trained: the aligner, or its MLLM", choices=["aligner", "mllm"])
    steps: int | None = option(None, "training steps; default: the preset's", most=10**9)
    output_dir: str | None = option(None, "run folder; default: outputs/train, for --stage mllm outputs/mllm")
    seed: int = option(0, "of initialisation, batches and the MLLM's questions")
    resume: bool = option(False, "go on from the checkpoint in the run folder")
    overwrite: bool = option(False, "start anew in a run folder that already holds a run")
    guidance: str = option("mllm", "what guides the aligner", choices=["mllm", "stock", "text"])
    pairs: str | None = option(None, "preference pairs in Pick-a-Pic's columns: hub id, folder or parquet file")
    max_pairs: int | None = option(None, "use only so many pairs, 0 for all; default: the preset's")
    triplets: str | None = option(None, "for --stage mllm: InstructPix2Pix's columns, as hub id, folder or file")
    batch_size: int | None = option(None, "samples in a step; default: the preset's", most=100_000)
    lr: float | None = option(None, "learning rate; default: the preset's", most=1000)
    preference_weight: float | None = option(None, "lambda, of the preference term; default: the preset's")
    dpo: bool = option(True, "the DPO part of the preference term")
    spin: bool = option(True, "the SPIN part of the preference term")
    norm: str | None = option(None, "squared distances: mean or sum over elements", choices=["mean", "sum"])
    refresh_after: int = option(10, "k, wins in a row after which the reference is refreshed", most=10**9)
    cache_dir: str | None = option(None, "keep frozen features here; none: compute them as pairs stream by")
    cache_gb: float = option(70.0, "what the cache may take; pairs that do not fit are not trained on")
    save_every: int | None = option(None, "steps between checkpoints; default: the preset's")
    eval_prompts: int = option(100, "prompts of the closing comparison; 0 leaves it out", most=100_000)


if __name__ == "__main__":
    parse(Config, __doc__)  # answers --help before torch is imported, which takes seconds

import torch
from torch import nn
from tqdm import tqdm

from img_minimal.bench.plan import aligner_plan, mllm_plan
from img_minimal.data.batches import Batches
from img_minimal.data.features import Features
from img_minimal.evaluate.arms import print_comparison
from img_minimal.finetuning.finetune import finetune
from img_minimal.load import load_backbone, load_guide, load_training_data
from img_minimal.pipeline import IMG
from img_minimal.preference import preference_loss, squared_distance
from img_minimal.runtime.checkpoint import RunFolder, save_checkpoint
from img_minimal.runtime.devices import Precision, best_device
from img_minimal.runtime.plots import curves
from img_minimal.training import Stop, Trainer, check_loss, validate


def train(
    trainer: Trainer, batches: Batches, unseen: Features, preset: Preset, folder: Path, *, steps: int,
    dpo: bool = True, spin: bool = True, save_every: int = 200, stop: Stop | None = None,
) -> bool:  # fmt: skip
    """The loop: batch, forward, loss, backward, clip, step, refresh; now and then validate on `unseen` and save.

    Continues from `trainer.step` and returns False if it was told to stop before `steps`. Weights and loss are in fp32.
    Raises UserError with step and samples when the loss is not finite; the last checkpoint stays as it is.
    """
    aligner, reference = trainer.aligner, trainer.reference
    device = next(aligner.parameters()).device
    with_preference = preset.preference_weight > 0 and (dpo or spin)  # else nobody asks the reference
    log, source = (folder / "metrics.jsonl").open("a"), iter(batches)
    with tqdm(range(trainer.step, steps), desc="train", initial=trainer.step, total=steps) as bar, log:
        for step in bar:
            # Forward: f(c) and, without gradients, f_ref(c).
            batch: Features = next(source)
            h, mask, loser, winner = (x.to(device) for x in (batch.guidance, batch.mask, batch.loser, batch.winner))
            with trainer.precision.training(device):
                aligned = aligner(h.float(), loser, mask)
                earlier = None
                if with_preference:
                    with torch.no_grad():
                        earlier = reference(h.float(), loser, mask)
            loss, metrics = preference_loss(
                aligned, earlier, winner, loser, weight=preset.preference_weight, dpo=dpo, spin=spin, norm=preset.norm
            )

            # Backward, and one transfer of all that is logged.
            trainer.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            metrics["gradient_norm"] = nn.utils.clip_grad_norm_(aligner.parameters(), 1.0)
            metrics["correction"] = squared_distance(aligned.detach(), loser).mean()
            names = ["loss", *metrics]
            values = torch.stack([loss.detach(), *metrics.values()]).tolist()
            row = {"step": step + 1} | dict(zip(names, values))
            check_loss(row["loss"], step, batches.where, folder)

            # Step; the reference is refreshed when f has beaten it often enough (Eqs. 18, 19).
            trainer.optimizer.step()
            trainer.schedule.step()
            if with_preference and trainer.refresh.update(row["error"], row["reference_error"]):
                reference.load_state_dict(aligner.state_dict())
            trainer.step = step + 1
            row["refreshes"] = trainer.refresh.refreshes

            # Once in a while: validate, write down, save.
            stopping = stop is not None and stop.asked
            saving = (step + 1) % save_every == 0 or step + 1 == steps or stopping
            if saving:
                row |= validate(trainer, unseen)
            log.write(json.dumps(row) + "\n")
            if saving:
                log.flush()  # rows before checkpoint, so that a killed run leaves no hole
                save_checkpoint(folder / "checkpoint.pt", trainer.state_dict() | {"data": batches.state_dict()})
            bar.set_postfix(error=f"{row['error']:.4f}", refreshes=row["refreshes"], refresh=False)
            if stopping and step + 1 < steps:
                return False
    return True


def train_aligner(config: Config, preset: Preset, run_folder: RunFolder) -> bool:
    """Features, loop, curves, comparison; False if it was told to stop."""
    folder = run_folder.path
    data = load_training_data(preset, config.guidance, config.seed, config.cache_gb)
    trainer = Trainer.new(preset, data.widths, config.refresh_after, config.seed)
    batches = Batches(data.parts, preset.batch_size, config.seed)
    print(f"{data.description}; {preset.train_steps} steps of {preset.batch_size}", flush=True)
    if run_folder.saved:
        trainer.load_state_dict(run_folder.saved)
        batches.resume(run_folder.saved["data"])
    run_folder.begin(trainer.step)
    with Stop().listening() as stop:
        finished = train(
            trainer, batches, data.unseen, preset, folder, steps=preset.train_steps, dpo=config.dpo,
            spin=config.spin, save_every=preset.save_every, stop=stop,
        )  # fmt: skip
    curves(folder / "metrics.jsonl", folder / "curves.png")
    if data.stream.skips():
        print(data.stream.skips())
    if not finished:
        return False
    trainer.aligner.save(folder / "aligner.safetensors")
    print(", ".join(f"{name} {value:.4f}" for name, value in validate(trainer, data.unseen).items()))
    if config.eval_prompts and preset.world == "tiny":
        backbone = load_backbone(preset)
        guide = load_guide(preset, config.guidance, backbone)
        img = IMG(backbone, guide, trainer.aligner, preset.passes, preset.mllm_batch)
        print_comparison(img, preset.name, config.eval_prompts, folder / "samples.png")
    print(f"saved to {folder}/aligner.safetensors")
    return True


def chosen_preset(config: Config) -> Preset:
    """The preset with what the command line changes. Raises UserError for values that cannot be."""
    preset = config.applied_to(find_preset(config.model))
    names = "pairs max_pairs triplets cache_dir save_every preference_weight norm"
    preset = with_overrides(preset, **{name: getattr(config, name) for name in names.split()})
    both = dict(batch_size=config.batch_size, lr=config.lr, save_every=config.save_every)
    if config.stage == "mllm":
        preset = replace(preset, stock_mllm=config.mllm or preset.stock_mllm)
        preset = replace(preset, finetuning=with_overrides(preset.finetuning, steps=config.steps, **both))
        steps, batch_size, save_every = (getattr(preset.finetuning, n) for n in ("steps", "batch_size", "save_every"))
    else:
        preset = with_overrides(preset, train_steps=config.steps, **both)
        steps, batch_size, save_every = preset.train_steps, preset.batch_size, preset.save_every
    at_least_one = {"steps": steps, "batch-size": batch_size, "save-every": save_every}
    for name, value in (at_least_one | {"refresh-after": config.refresh_after}).items():
        check(value > 0, f"--{name} is {value}, expected 1 or more")
    rate = preset.finetuning.lr if config.stage == "mllm" else preset.lr
    check(rate > 0, f"--lr is {rate}, expected more than 0")
    weight = preset.preference_weight
    check(weight >= 0, f"--preference-weight is {weight}, expected 0 or more")
    check(preset.max_pairs >= 0, f"--max-pairs is {preset.max_pairs}, expected 0 (all) or more")
    check(config.seed >= 0, f"--seed is {config.seed}, expected 0 or more")
    fp16 = config.stage == "mllm" and preset.dtype == "fp16"
    check(not fp16, "--stage mllm cannot train with --dtype fp16, whose gradients vanish; choose bf16")
    check(config.cache_gb > 0, f"--cache-gb is {config.cache_gb}, expected more than 0; --cache-dir none for no cache")
    return preset


def main() -> int:
    """Plan, then the stage that is asked for."""
    config = parse(Config, __doc__)
    preset, began = chosen_preset(config), time.monotonic()
    device = best_device()
    compute = Precision.named(preset.dtype, device).described(device)
    settings = {"config": asdict(config), "preset": asdict(preset), "compute": compute}
    default = "outputs/mllm" if config.stage == "mllm" else "outputs/train"
    run_folder = RunFolder.open(config.output_dir or default, settings, config.resume, config.overwrite)
    quiet_libraries()
    if config.stage == "mllm":
        print(mllm_plan(preset, run_folder.path), f"  {compute}", sep="\n", flush=True)
        finished = finetune(preset, run_folder, config.seed)
    else:
        plan = aligner_plan(preset, config.guidance, run_folder.path, config.cache_gb)
        print(plan, f"  {compute}", sep="\n", flush=True)
        finished = train_aligner(config, preset, run_folder)
    if not finished:
        again = " ".join(a for a in sys.argv if a != "--resume")
        print(f"stopped and saved in {run_folder.path}; go on with: python {again} --resume")
        return 130
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    on_gpu = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU" if torch.cuda.is_available() else ""
    print(f"{time.monotonic() - began:.0f} s, peak memory {peak:.1f} GiB{on_gpu}")
    return 0


if __name__ == "__main__":
    run(main)
