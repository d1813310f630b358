"""Train an Implicit Aligner, or finetune the MLLM that guides it.

    python train.py                            the tiny twin, on a CPU, in minutes
    python train.py --resume                   continue a stopped run, bitwise the same
    python train.py --preference-weight 1 --output-dir outputs/full    the paper's whole objective
    python train.py --rounds 3                 two more rounds, on pairs the aligner makes itself
    python train.py --stage mllm               finetune the MLLM that says what to correct
    python train.py --model sdxl               the paper's settings on 10,000 public pairs, one GPU
    python train.py --model sdxl --max-pairs 10000 --cache-dir features --cache-gb 70    ablations
    python train.py --model sdxl --cache-dir features --shard 3/16    part 3 (0 to 15) of the cache
    torchrun --nproc_per_node=8 train.py --model sdxl      eight GPUs that share --batch-size

The run folder holds config.json, metrics.jsonl, curves.png, samples.png, checkpoint.pt and
aligner.safetensors (for an MLLM: the folder mllm/). Training loads neither UNet nor VAE.
"""

import copy
import re
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module

from img_minimal import cli
from img_minimal.cli import check, option, parse, quiet_libraries, silence_nonzero_ranks
from img_minimal.presets import PRESETS, Data, Models, Preset, Training, find_preset


@dataclass
class Config:
    """Flags of this command; all others override one number of the preset."""

    model: str = option("tiny-sdxl", "model to train an aligner for", choices=list(PRESETS))
    stage: str = option("aligner", "what to train", choices=["aligner", "mllm"])
    output_dir: str | None = option(None, "run folder (default: outputs/train or outputs/mllm)")
    seed: int = option(0, "seed of initialisation, batches and the MLLM's questions")
    resume: bool = option(False, "continue from the checkpoint in the run folder")
    overwrite: bool = option(False, "start over in a run folder that already holds a run")
    guidance: str = option("mllm", "what guides the aligner", choices=["mllm", "stock", "text"])
    dpo: bool = option(True, "include the DPO part of the preference term")
    spin: bool = option(True, "include the SPIN part of the preference term")
    refresh_after: int = option(10, "k, steps in a row f must beat f_ref to refresh it", least=1)
    cache_gb: float = option(
        70.0, "size limit of the cache; pairs beyond it are unused", least=1e-6
    )
    shard: str | None = option(None, "i/n: only compute part i (from 0) of n of the cache")
    rounds: int = option(1, "number of rounds; later ones make new pairs first", least=1, most=100)
    replay: float = option(0.5, "minimum share of original pairs in a later round", most=1)
    gate: bool = option(True, "reject a round that makes held-back prompts worse")
    eval_prompts: int = option(100, "prompts of the final comparison, 0 to skip it", most=100_000)


if __name__ == "__main__":
    # Answers --help before torch is imported, which takes seconds.
    parse(Config, __doc__, Models, Data, Training)
    silence_nonzero_ranks()

import torch
from torch import nn

from img_minimal.aligner import ImplicitAligner, align
from img_minimal.bench.plan import aligner_plan, mllm_plan
from img_minimal.data.features import CachedData, Features, StreamedData
from img_minimal.data.load import compute_features, load_training_data
from img_minimal.detector import finetune
from img_minimal.devices import Precision, best_device
from img_minimal.files import model_name, peak_memory
from img_minimal.optimizer import optimizer_and_schedule
from img_minimal.pipeline import IMG
from img_minimal.plots import ALIGNER, curves, read_rows
from img_minimal.preference import ReferenceRefresh, preference_loss, squared_distance
from img_minimal.rounds import Mixture, train_rounds
from img_minimal.run import Ranks, Run


def train(
    run: Run,
    data: CachedData | StreamedData | Mixture,
    settings: Training,
    precision: Precision,
    *,
    start: ImplicitAligner | None = None,
    refresh_after: int = 10,
    dpo: bool = True,
    spin: bool = True,
    seed: int = 0,
) -> ImplicitAligner:
    """Train an aligner for `settings.steps` steps, from where `run` was stopped, and return it.

    It starts as a copy of `start`, or at the identity. Weights and loss are in fp32. With several
    ranks each sees a part of every batch, and all decide on its mean.
    """
    # What learns: f, its frozen earlier copy f_ref, and when that is refreshed (Eqs. 18, 19).
    torch.manual_seed(seed)
    device = best_device()
    sizes = settings.depth, settings.heads, settings.head_dim
    aligner = ImplicitAligner(*data.unseen.widths, *sizes).to(device)
    if start is not None:
        aligner.load_state_dict(start.state_dict())
    reference = copy.deepcopy(aligner).requires_grad_(False)
    refresh = ReferenceRefresh(refresh_after)
    optimizer, schedule = optimizer_and_schedule(
        settings, aligner.parameters(), floor=0.02, dtype=precision.compute
    )

    # What it learns from. All of this is saved in a checkpoint.
    batches = data.batches(settings.batch_size, seed, run.ranks)
    state = {
        "aligner": aligner,
        "reference": reference,
        "optimizer": optimizer,
        "schedule": schedule,
        "refresh": refresh,
        "data": batches,
    }
    model = run.ranks.parallel(aligner)
    weight, norm = settings.preference_weight, settings.norm
    with_preference = weight > 0 and (dpo or spin)  # else nobody asks the reference
    measure = partial(validate, aligner, data.unseen)
    for _, batch in zip(run.steps(state, settings.steps, settings.save_every, measure), batches):
        # Forward: f(c) and, without gradients, f_ref(c).
        h, mask = batch.padded()
        h, mask = h.to(device).float(), mask.to(device)
        c_l, c_w = batch.loser.to(device), batch.winner.to(device)
        f_ref = None
        with precision.training(device):
            f = model(h, c_l, mask)
            if with_preference:
                with torch.no_grad():
                    f_ref = reference(h, c_l, mask)
        loss, metrics = preference_loss(
            f, f_ref, c_w, c_l, weight=weight, dpo=dpo, spin=spin, norm=norm
        )

        # Backward. Gradients are means over the ranks, and so is all that is logged.
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        metrics["gradient_norm"] = nn.utils.clip_grad_norm_(aligner.parameters(), 1.0)
        metrics["correction"] = squared_distance(f.detach(), c_l).mean()
        row = run.log(batches.where, loss=loss, **metrics)

        # Step, and refresh f_ref when f has beaten it often enough (Eqs. 18, 19).
        optimizer.step()
        schedule.step()
        if with_preference and refresh.update(row["error"], row["reference_error"]):
            reference.load_state_dict(aligner.state_dict())
        row["refreshes"] = refresh.refreshes  # written when this step ends
    return aligner


@torch.no_grad()
def validate(aligner: ImplicitAligner, data: Features) -> dict[str, float]:
    """Measure the aligner on prompts that are not trained on; {} if there are none.

    `validation_error` is ||c_w - f||^2, `identity_error` that of doing nothing, `nearer` the share
    of losers that move nearer to c_w. Errors are means over elements.
    """
    wrong = ~data.is_identity
    if not wrong.any():
        return {}
    sample_bytes = 4 * int(data.lengths.max()) * data.guidance.shape[1]
    size = min(250, int(5e8 / sample_bytes) + 1)  # half a gigabyte of guidance in fp32
    batches = [data[index] for index in torch.arange(len(data)).split(size)]
    f = torch.cat([align(aligner, b.loser, *b.padded(), passes=1) for b in batches])
    after, before = squared_distance(data.winner, f), squared_distance(data.winner, data.loser)
    identity_samples = after[data.is_identity]
    return {
        "validation_error": after[wrong].mean().item(),
        "identity_error": before[wrong].mean().item(),
        "nearer": (after < before)[wrong].float().mean().item(),
        "identity_sample_error": identity_samples.mean().item() if len(identity_samples) else 0.0,
    }


def train_aligner(config: Config, preset: Preset, run: Run) -> None:
    """Run the stage: features, training, later rounds, curves, and a comparison with the base."""
    guidance, seed, ranks = config.guidance, config.seed, run.ranks
    precision = Precision.named(preset.models.dtype, best_device())
    options = {"refresh_after": config.refresh_after, "dpo": config.dpo, "spin": config.spin}
    with ranks.together():
        data = load_training_data(preset, guidance, seed, config.cache_gb, ranks)
    settings = preset.training
    print(f"{data.description}; {settings.steps} steps of {settings.batch_size}", flush=True)
    aligner = train(run, data, settings, precision, seed=seed, **options)
    if not ranks.main:
        return
    curves({"": read_rows(run.metrics)}, ALIGNER, run.path / "curves.png")
    if skipped := data.stream.skips():
        print(skipped)

    if run.stopped:
        return
    guide = "text" if guidance == "text" else model_name(preset.guide(guidance))
    aligner.guide = guide
    aligner.save(run.path / "aligner.safetensors")
    if config.rounds > 1:
        aligner = train_rounds(
            preset,
            run,
            data,
            aligner,
            partial(train, precision=precision, **options),
            rounds=config.rounds,
            guidance=guidance,
            seed=seed,
            replay=config.replay,
            gate=config.gate,
        )
        if run.stopped:
            return
        aligner.guide = guide
        aligner.save(run.path / "aligner.safetensors")
    results = validate(aligner, data.unseen)
    print(", ".join(f"{name} {value:.4f}" for name, value in results.items()))
    if config.eval_prompts and preset.world == "tiny":
        # By name, like a backbone: the oracle belongs to this world alone.
        arms = import_module("img_minimal.evaluate.arms")
        img = IMG(preset=preset, aligner=aligner, guidance=guidance)
        arms.print_comparison(img, preset.name, config.eval_prompts, run.path / "samples.png")
    print(f"saved to {run.path}/aligner.safetensors")


def start(config: Config, preset: Preset) -> Run:
    """Open the run folder, print the plan, and run the stage that is asked for."""
    compute = Precision.named(preset.models.dtype, best_device()).described(best_device())
    settings = {"config": asdict(config), "preset": asdict(preset), "compute": compute}
    mllm_stage = config.stage == "mllm"
    folder = config.output_dir or ("outputs/mllm" if mllm_stage else "outputs/train")
    with Ranks() as ranks:
        with ranks.together():
            alone = ranks.world == 1 or not (mllm_stage or config.rounds > 1)
            check(alone, "--stage mllm and --rounds run in one process: leave torchrun out")
            run = Run(
                folder, settings, resume=config.resume, overwrite=config.overwrite, ranks=ranks
            )
        if mllm_stage:
            print(mllm_plan(preset, run.path), f"  {compute}", sep="\n", flush=True)
            finetune(run, preset.finetuning, preset.models, preset.data.triplets, config.seed)
        else:
            plan = aligner_plan(preset, config.guidance, run.path, config.cache_gb)
            print(plan, f"  {compute}", sep="\n", flush=True)
            train_aligner(config, preset, run)
    return run


def chosen_preset(config: Config, changes: dict) -> Preset:
    """Apply the command line to the preset. Raises UserError for values that do not go together."""
    preset = find_preset(config.model)
    if config.stage == "mllm":
        if "mllm" in changes:
            changes = changes | {"stock_mllm": changes["mllm"]}
        preset = preset.changed(("models", "data", "finetuning"), **changes)
        advice = "--stage mllm cannot train with --dtype fp16, whose gradients vanish; choose bf16"
        check(preset.models.dtype != "fp16", advice)
    else:
        preset = preset.changed(("models", "data", "training"), **changes)
    no_cache = config.shard and preset.data.cache_dir == "none"
    check(not no_cache, "--shard computes a cache: give --cache-dir a folder")
    return preset


def share_of(shard: str) -> tuple[int, int]:
    """Parse "3/16" to (3, 16). Raises UserError for anything else."""
    match = re.fullmatch(r"(\d{1,7})/(\d{1,7})", shard)
    fits = match and int(match[1]) < int(match[2])
    check(fits, f"--shard is {shard!r}, expected i/n with i from 0 to n - 1, as in 0/8")
    return int(match[1]), int(match[2])


def main() -> int:
    """Read the command line, train, and report."""
    config, changes = parse(Config, __doc__, Models, Data, Training)
    preset, began = chosen_preset(config, changes), time.monotonic()
    quiet_libraries()
    if config.shard:
        share = share_of(config.shard)
        print(compute_features(preset, config.guidance, config.seed, config.cache_gb, share))
        return 0
    run = start(config, preset)
    if run.stopped:
        print(f"stopped and saved in {run.path}; go on with: {run.ranks.again()}")
        return 130
    print(f"{time.monotonic() - began:.0f} s; {peak_memory()}")
    return 0


if __name__ == "__main__":
    cli.run(main)
