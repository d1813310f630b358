"""Train an Implicit Aligner.

    python train.py                                  the tiny twin, on a CPU, in minutes
    python train.py --resume                         go on where a stopped run left off, to the same numbers
    python train.py --weight 0 --output-dir ...      an ablation: L_base alone

The run folder holds config.json, metrics.jsonl, curves.png, samples.png, checkpoint.pt and aligner.safetensors.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from img_minimal import features as frozen
from img_minimal.checkpoint import load_checkpoint, save_checkpoint
from img_minimal.cli import check, option, parse, quiet_libraries, run, writable_folder
from img_minimal.errors import UserError
from img_minimal.evaluate import print_comparison
from img_minimal.features import Features
from img_minimal.mllm import MLLM
from img_minimal.pairs import Pair, read_pairs
from img_minimal.pictures import curves
from img_minimal.pipeline import IMG, Guidance, Painter
from img_minimal.preference import preference_loss, squared_distance
from img_minimal.presets import PRESETS, Preset, find_preset, with_overrides
from img_minimal.training import Stop, Trainer, batch_indices, validate


@dataclass
class Config:
    """The command line; None means: as the preset says."""

    model: str = option("tiny-sdxl", "which model to train an aligner for", choices=list(PRESETS))
    steps: int | None = option(None, "training steps; default: the preset's")
    output_dir: str = option("outputs/train", "run folder")
    seed: int = option(0, "of initialisation, batches and the MLLM's questions")
    resume: bool = option(False, "go on from the checkpoint in the run folder")
    overwrite: bool = option(False, "start anew in a run folder that already holds a run")
    guidance: str = option("mllm", "what guides the aligner", choices=["mllm", "stock", "text"])
    pairs: str | None = option(None, "preference pairs, parquet with Pick-a-Pic's columns; default: the preset's")
    max_pairs: int | None = option(None, "use only so many pairs, 0 for all; default: the preset's")
    batch_size: int | None = option(None, "pairs in a step; default: the preset's")
    lr: float | None = option(None, "learning rate of AdamW; default: the preset's")
    weight: float | None = option(None, "lambda, the weight of the preference term; default: the preset's")
    dpo: bool = option(True, "the DPO part of the preference term")
    spin: bool = option(True, "the SPIN part of the preference term")
    norm: str | None = option(None, "squared distances: mean or sum over elements", choices=["mean", "sum"])
    refresh_after: int = option(10, "k, wins in a row after which the reference is refreshed")
    cache_dir: str = option("outputs/features", "where frozen features are kept between runs")
    save_every: int = option(200, "steps between checkpoints")
    eval_prompts: int = option(100, "prompts of the closing comparison; 0 leaves it out")


def train(
    trainer: Trainer, data: Features, preset: Preset, folder: Path, *, steps: int, seed: int = 0, dpo: bool = True,
    spin: bool = True, save_every: int = 200, stop: Stop | None = None,
) -> bool:  # fmt: skip
    """The loop: batch, forward, loss, backward, clip, step, refresh; now and then validate and save.

    Continues from `trainer.step` and returns False if it was told to stop before `steps`. bf16 compute, fp32 weights
    and loss. Raises UserError with step and samples when the loss is not finite; the last checkpoint stays as it is.
    """
    device = next(trainer.aligner.parameters()).device
    samples = (~data.validation).nonzero().flatten()
    unseen = data[data.validation.nonzero().flatten()]
    log = (folder / "metrics.jsonl").open("a")
    with tqdm(range(trainer.step, steps), desc="train", initial=trainer.step, total=steps) as bar, log:
        for step in bar:
            index = batch_indices(step, preset.batch_size, samples, seed)
            batch = data[index]
            h, mask, loser, winner = (x.to(device) for x in (batch.guidance, batch.mask, batch.loser, batch.winner))
            with torch.autocast(device.type, torch.bfloat16):
                aligned = trainer.aligner(h.float(), loser, mask)
                with torch.no_grad():
                    reference = trainer.reference(h.float(), loser, mask)
            loss, metrics = preference_loss(
                aligned, reference, winner, loser, weight=preset.weight, dpo=dpo, spin=spin, norm=preset.norm
            )
            if not torch.isfinite(loss):
                raise UserError(
                    f"the loss of step {step} is {loss.item()} (samples {index.tolist()[:8]}...); the last checkpoint "
                    f"is kept in {folder}. Lower --lr, or check these samples' features"
                )
            trainer.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            metrics["gradient_norm"] = nn.utils.clip_grad_norm_(trainer.aligner.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.schedule.step()
            if trainer.refresh.update(metrics["error"].item(), metrics["reference_error"].item()):
                trainer.reference.load_state_dict(trainer.aligner.state_dict())
            trainer.step = step + 1
            metrics["correction"] = squared_distance(aligned.detach(), loser).mean()
            row = {"step": step + 1, "loss": loss.item(), "refreshes": trainer.refresh.refreshes}
            row |= {name: float(value) for name, value in metrics.items()}
            stopping = stop is not None and stop.asked
            if (step + 1) % save_every == 0 or step + 1 == steps or stopping:
                row |= validate(trainer, unseen)
                save_checkpoint(folder / "checkpoint.pt", trainer.state_dict())
            log.write(json.dumps(row) + "\n")
            bar.set_postfix(error=f"{row['error']:.4f}", refreshes=row["refreshes"], refresh=False)
            if stopping and step + 1 < steps:
                return False
    return True


def load_features(config: Config, preset: Preset, painter: Painter, guide: Guidance, guide_path: str) -> Features:
    """From the cache, or computed and cached: tokens, which all kinds of guidance share, and guidance.

    Raises UserError if a feature is not finite.
    """

    @cache
    def pairs() -> list[Pair]:
        found, skipped = read_pairs(preset.pairs, preset.max_pairs)
        print(f"{len(found)} pairs ({skipped} ties or damaged rows skipped); computing frozen features once")
        return found

    def keep(name: str, models: list[str], compute: Callable[[], dict]) -> dict:
        mark = frozen.fingerprint(preset, models, config.seed)
        return frozen.cached(Path(config.cache_dir) / f"{preset.name}-{name}-{mark}.safetensors", mark, compute)

    share, image_models = preset.keep_share, [preset.image_encoder, preset.ip_adapter]
    tokens = keep("tokens", image_models, lambda: frozen.compute_tokens(pairs(), painter, share))
    guidance = keep(config.guidance, [guide_path], lambda: frozen.compute_guidance(pairs(), guide, share, config.seed))
    data = Features(**tokens, **guidance)
    data.check_finite()
    return data


def check_same_run(before: dict, now: dict) -> None:
    """Raises UserError if a run would be resumed with settings that change its numbers."""
    free = {"train_steps", "steps", "resume", "overwrite", "output_dir", "cache_dir", "save_every", "eval_prompts"}
    for part, values in now.items():
        for name, value in values.items():
            if name not in free and before[part].get(name) != value:
                raise UserError(
                    f"cannot resume with {name} {value!r}: the run began with {before[part].get(name)!r}; "
                    "repeat its options (config.json in the run folder), or choose another --output-dir"
                )


def main() -> int:
    """Features, loop, curves, comparison."""
    config = parse(Config, __doc__)
    preset = with_overrides(
        find_preset(config.model), train_steps=config.steps, batch_size=config.batch_size, lr=config.lr,
        weight=config.weight, norm=config.norm, pairs=config.pairs,
        max_pairs=config.max_pairs,
    )  # fmt: skip
    check(config.seed >= 0, f"--seed is {config.seed}, expected 0 or more")
    check(preset.train_steps > 0, f"--steps is {preset.train_steps}, expected 1 or more")
    check(preset.batch_size > 0, f"--batch-size is {preset.batch_size}, expected 1 or more")
    check(config.save_every > 0, f"--save-every is {config.save_every}, expected 1 or more")
    check(config.refresh_after > 0, f"--refresh-after is {config.refresh_after}, expected 1 or more")
    folder, began = writable_folder(config.output_dir), time.monotonic()
    writable_folder(config.cache_dir)
    settings = {"config": asdict(config), "preset": asdict(preset)}
    saved = None
    if config.resume:
        saved = load_checkpoint(folder / "checkpoint.pt")
        check_same_run(json.loads((folder / "config.json").read_text()), settings)
    elif not config.overwrite:
        taken = (folder / "checkpoint.pt").exists()
        check(not taken, f"{folder} holds a run; go on with --resume, or choose --overwrite or another --output-dir")
    quiet_libraries()
    painter = Painter.from_preset(preset)
    guide_path = {"mllm": preset.mllm, "stock": preset.stock_mllm, "text": preset.base}[config.guidance]
    guide = painter if config.guidance == "text" else MLLM.from_pretrained(guide_path, device=painter.pipe.device)
    data = load_features(config, preset, painter, guide, guide_path)
    print(f"{len(data)} samples, {int(data.validation.sum())} of them for validation; {preset.train_steps} steps")

    trainer = Trainer.new(preset, data, config.refresh_after, config.seed)
    if saved:
        trainer.load_state_dict(saved)
        rows = [row for row in (folder / "metrics.jsonl").open() if json.loads(row)["step"] <= trainer.step]
        (folder / "metrics.jsonl").write_text("".join(rows))
    else:
        (folder / "metrics.jsonl").write_text("")
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    with Stop().listening() as stop:
        finished = train(
            trainer, data, preset, folder, steps=preset.train_steps, seed=config.seed, dpo=config.dpo,
            spin=config.spin, save_every=config.save_every, stop=stop,
        )  # fmt: skip
    curves(folder / "metrics.jsonl", folder / "curves.png")
    if not finished:
        again = " ".join(a for a in sys.argv if a != "--resume")
        print(f"stopped and saved at step {trainer.step}; go on with: python {again} --resume")
        return 130
    trainer.aligner.save(folder / "aligner.safetensors")
    print(", ".join(f"{name} {value:.4f}" for name, value in validate(trainer, data[data.validation]).items()))
    if config.eval_prompts:
        print_comparison(IMG(painter, guide, trainer.aligner), config.eval_prompts, folder / "samples.png")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{folder}/aligner.safetensors, {time.monotonic() - began:.0f} s, peak memory {peak:.1f} GiB")
    return 0


if __name__ == "__main__":
    run(main)
