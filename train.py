"""Train an Implicit Aligner, or finetune the MLLM that guides it.

    python train.py                                  the tiny twin, on a CPU, in minutes
    python train.py --resume                         go on where a stopped run left off, to the same numbers
    python train.py --preference-weight 0 --output-dir ...      an ablation: L_base alone
    python train.py --model sdxl                     the paper's run, from a stream of Pick-a-Pic, on one GPU
    python train.py --model sdxl --max-pairs 10000 --cache-dir features --cache-gb 70     ablations, features kept
    python train.py --rounds 3                       two more rounds, on pairs that the aligner makes itself
    python train.py --stage mllm                     an MLLM that says how to make an image match its prompt
    torchrun --nproc_per_node=8 train.py --model sdxl           one run on eight GPUs; --batch-size is theirs together
    python train.py --model sdxl --cache-dir features --shard 3/16         features alone, the fourth of 16 jobs

The run folder holds config.json, metrics.jsonl, curves.png, samples.png, checkpoint.pt and aligner.safetensors (of an
MLLM: the folder mllm/). No UNet and no VAE is loaded for training.
"""

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from img_minimal.flags import ModelFlags, chosen_preset, share_of
from img_minimal.presets import PRESETS, Preset
from img_minimal.runtime.cli import check, hush_other_ranks, option, parse, quiet_libraries, run


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
    rounds: int = option(1, "rounds of training; before each later one the aligner makes new pairs", most=100)
    round_steps: int | None = option(None, "training steps of a later round; default: the preset's", most=10**9)
    round_prompts: int | None = option(None, "prompts that a round draws; default: the preset's", most=100_000)
    replay: float = option(0.5, "least share of the original pairs in a later round", most=1)
    gate: bool = option(True, "keep the earlier aligner where a round makes held-back prompts worse")
    shard: str | None = option(None, "i/n: compute the i-th of n parts of the feature cache, counted from 0, and end")
    save_every: int | None = option(None, "steps between checkpoints; default: the preset's")
    eval_prompts: int = option(100, "prompts of the closing comparison; 0 leaves it out", most=100_000)


if __name__ == "__main__":
    parse(Config, __doc__)  # answers --help before torch is imported, which takes seconds
    hush_other_ranks()

import torch
from torch import nn
from tqdm import tqdm

from img_minimal.aligner import ImplicitAligner
from img_minimal.bench.plan import aligner_plan, mllm_plan
from img_minimal.data.batches import Batches
from img_minimal.data.features import Features
from img_minimal.data.sources import CachedData, StreamedData
from img_minimal.evaluate.arms import print_comparison
from img_minimal.files.weights import opening
from img_minimal.finetuning.finetune import finetune
from img_minimal.load import compute_features, load_backbone, load_guide, load_training_data
from img_minimal.pipeline import IMG
from img_minimal.preference import preference_loss, squared_distance
from img_minimal.rounds import RoundLog, Rounds, last_row
from img_minimal.runtime.checkpoint import RunFolder, save_checkpoint
from img_minimal.runtime.clock import peak_memory
from img_minimal.runtime.devices import Precision, best_device
from img_minimal.runtime.plots import curves
from img_minimal.runtime.ranks import ALONE, Ranks
from img_minimal.training import Stop, Trainer, check_loss, new_batches, own_place, validate


def train(
    trainer: Trainer, batches: Batches, unseen: Features, preset: Preset, folder: Path, *, steps: int,
    dpo: bool = True, spin: bool = True, save_every: int = 200, stop: Stop | None = None, ranks: Ranks = ALONE,
) -> bool:  # fmt: skip
    """The loop: batch, forward, loss, backward, clip, step, refresh; now and then validate on `unseen` and save.

    Continues from `trainer.step` and returns False if it was told to stop before `steps`. Weights and loss are in fp32.
    Several `ranks` see a part of each batch, and decide on its mean; the first one validates, writes and saves. Raises
    UserError with step and samples when the loss is not finite; the last checkpoint stays as it is.
    """
    aligner, reference, model = trainer.aligner, trainer.reference, ranks.parallel(trainer.aligner)
    device = next(aligner.parameters()).device
    with_preference = preset.preference_weight > 0 and (dpo or spin)  # else nobody asks the reference
    log, source = (folder / "metrics.jsonl").open("a") if ranks.main else nullcontext(), iter(batches)
    with tqdm(range(trainer.step, steps), desc="train", initial=trainer.step, total=steps) as bar, log:
        for step in bar:
            # Forward: f(c) and, without gradients, f_ref(c).
            batch: Features = next(source)
            h, mask, loser, winner = (x.to(device) for x in (batch.guidance, batch.mask, batch.loser, batch.winner))
            with trainer.precision.training(device):
                aligned = model(h.float(), loser, mask)
                earlier = None
                if with_preference:
                    with torch.no_grad():
                        earlier = reference(h.float(), loser, mask)
            loss, metrics = preference_loss(
                aligned, earlier, winner, loser, weight=preset.preference_weight, dpo=dpo, spin=spin, norm=preset.norm
            )

            # Backward; gradients are means over the ranks, and so is, in one transfer, all that is logged and decided.
            trainer.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            metrics["gradient_norm"] = nn.utils.clip_grad_norm_(aligner.parameters(), 1.0)
            metrics["correction"] = squared_distance(aligned.detach(), loser).mean()
            metrics["stopping"] = loss.new_tensor(float(stop is not None and stop.asked))
            values = ranks.mean(torch.stack([loss.detach(), *metrics.values()])).tolist()
            row = {"step": step + 1} | dict(zip(["loss", *metrics], values))
            stopping = row.pop("stopping") > 0
            check_loss(row["loss"], step, batches.where, folder)

            # Step; the reference is refreshed when f has beaten it often enough (Eqs. 18, 19).
            trainer.optimizer.step()
            trainer.schedule.step()
            if with_preference and trainer.refresh.update(row["error"], row["reference_error"]):
                reference.load_state_dict(aligner.state_dict())
            trainer.step = step + 1
            row["refreshes"] = trainer.refresh.refreshes

            # Once in a while: validate, write down, save.
            saving = (step + 1) % save_every == 0 or step + 1 == steps or stopping
            if saving:
                row |= validate(trainer, unseen) if ranks.main else {}
                places = ranks.gather(batches.state_dict()) if ranks.world > 1 else batches.state_dict()
            if ranks.main:
                log.write(json.dumps(row) + "\n")
            if saving and ranks.main:
                log.flush()  # rows before checkpoint, so that a killed run leaves no hole
                save_checkpoint(folder / "checkpoint.pt", trainer.state_dict() | {"data": places})
            bar.set_postfix(error=f"{row['error']:.4f}", refreshes=row["refreshes"], refresh=False)
            if stopping and step + 1 < steps:
                return False
    return True


def train_aligner(config: Config, preset: Preset, run_folder: RunFolder, ranks: Ranks = ALONE) -> bool:
    """Features, loop, later rounds, curves, comparison; False if it was told to stop."""
    folder, saved = run_folder.path, run_folder.saved
    with ranks.together():
        data = load_training_data(preset, config.guidance, config.seed, config.cache_gb, ranks)
    trainer = Trainer.new(preset, data.widths, config.refresh_after, config.seed)
    batches = new_batches(data, preset.batch_size, config.seed, ranks)
    print(f"{data.description}; {preset.train_steps} steps of {preset.batch_size}", flush=True)
    if saved:
        with opening(folder / "checkpoint.pt", "checkpoint of this run"):
            trainer.load_state_dict(saved)
            batches.resume(own_place(saved["data"], data.shared or trainer.step == preset.train_steps, ranks))
    run_folder.begin(trainer.step)
    with Stop().listening() as stop:
        finished = train(
            trainer, batches, data.unseen, preset, folder, steps=preset.train_steps, dpo=config.dpo,
            spin=config.spin, save_every=preset.save_every, stop=stop, ranks=ranks,
        )  # fmt: skip
    if not ranks.main:
        return finished
    curves(folder / "metrics.jsonl", folder / "curves.png")
    if data.stream.skips():
        print(data.stream.skips())
    if not finished:
        return False
    trainer.aligner.save(folder / "aligner.safetensors")
    if config.rounds > 1:
        (folder / "rounds" / "0").mkdir(parents=True, exist_ok=True)
        trainer.aligner.save(folder / "rounds" / "0" / "aligner.safetensors")
        aligner = train_rounds(config, preset, run_folder, data, trainer.aligner)
        if aligner is None:
            return False
        trainer.aligner.load_state_dict(aligner.state_dict())
        trainer.aligner.save(folder / "aligner.safetensors")
    print(", ".join(f"{name} {value:.4f}" for name, value in validate(trainer, data.unseen).items()))
    if config.eval_prompts and preset.world == "tiny":
        backbone = load_backbone(preset)
        guide = load_guide(preset, config.guidance, backbone)
        img = IMG(backbone, guide, trainer.aligner, preset.passes, preset.mllm_batch)
        print_comparison(img, preset.name, config.eval_prompts, folder / "samples.png")
    print(f"saved to {folder}/aligner.safetensors")
    return True


def train_rounds(
    config: Config, preset: Preset, run_folder: RunFolder, data: CachedData | StreamedData, aligner: ImplicitAligner
) -> ImplicitAligner | None:
    """Rounds 1, 2, ... from an aligner of round 0; the aligner that stands at the end, None if it was told to stop."""
    shared = Rounds(preset, config.guidance, config.seed, run_folder.path / "rounds", config.replay, config.gate)
    log = RoundLog(shared.folder / "metrics.jsonl")
    if not log.rows:
        log.add({"round": 0, "kept": True} | shared.measure(aligner) | last_row(run_folder.path))
    aligner = log.latest(aligner, shared.folder)
    for number in range(len(log.rows), config.rounds):
        trainer, batches, row = shared.begin(number, aligner, data, config.refresh_after)
        folder = replace(run_folder, path=shared.folder / str(number))
        folder.begin(trainer.step)
        with Stop().listening() as stop:
            finished = train(
                trainer, batches, data.unseen, preset, folder.path, steps=preset.round_steps, dpo=config.dpo,
                spin=config.spin, save_every=preset.save_every, stop=stop,
            )  # fmt: skip
        if not finished:
            return None
        after = shared.measure(trainer.aligner)
        kept = shared.passes(log.standing, after)
        trainer.aligner.save(folder.path / "aligner.safetensors")
        log.add({"round": number, "kept": kept} | row | after | last_row(folder.path))
        if not kept:
            print(f"round {number} draws held-back prompts worse, or breaks more: the aligner before it stays")
        aligner = trainer.aligner if kept else aligner
    log.draw(run_folder.path / "rounds.png")
    return aligner


def main() -> int:
    """Plan, then the stage that is asked for."""
    config = parse(Config, __doc__)
    preset, began = chosen_preset(config), time.monotonic()
    quiet_libraries()
    if config.shard:
        print(compute_features(preset, config.guidance, config.seed, config.cache_gb, share_of(config.shard)))
        return 0
    device = best_device()
    compute = Precision.named(preset.dtype, device).described(device)
    settings = {"config": asdict(config), "preset": asdict(preset), "compute": compute}
    folder = config.output_dir or ("outputs/mllm" if config.stage == "mllm" else "outputs/train")
    with Ranks.joined() as ranks:
        with ranks.together():
            alone = config.stage == "mllm" or config.rounds > 1
            check(ranks.world == 1 or not alone, "--stage mllm and --rounds run in one process: leave torchrun out")
            if ranks.main:
                run_folder = RunFolder.open(folder, settings, config.resume, config.overwrite)
        if not ranks.main:
            run_folder = RunFolder.follow(folder, settings, config.resume)
        if config.stage == "mllm":
            print(mllm_plan(preset, run_folder.path), f"  {compute}", sep="\n", flush=True)
            finished = finetune(preset, run_folder, config.seed)
        else:
            plan = aligner_plan(preset, config.guidance, run_folder.path, config.cache_gb)
            print(plan, f"  {compute}", sep="\n", flush=True)
            finished = train_aligner(config, preset, run_folder, ranks)
    if not finished:
        again = " ".join(a for a in sys.argv if a != "--resume")
        print(f"stopped and saved in {run_folder.path}; go on with: python {again} --resume")
        return 130
    print(f"{time.monotonic() - began:.0f} s; {peak_memory()}")
    return 0


if __name__ == "__main__":
    run(main)
