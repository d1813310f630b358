"""The benchmarks run, on shapes that take no time. Their numbers are printed and never tested."""

import sys
import time
from dataclasses import replace

import pytest
from release_folder import UNET

from img_minimal.bench import __main__ as bench
from img_minimal.bench import memory, true_size
from img_minimal.presets import find_preset


def first_cells(text: str) -> list[str]:
    """Return the first cells of a Markdown table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [line.split("|")[1].strip() for line in lines[2:]]


def test_calls_are_made_in_turn_after_a_round_to_warm_up():
    calls, order = {}, []
    for name, seconds in (("a", 0.001), ("b", 0.02)):
        calls[name] = lambda name=name, seconds=seconds: order.append(name) or time.sleep(seconds)
    report = bench.Report(rounds=3)
    report.in_turn("waiting", calls)
    assert order == ["a", "b"] * 4
    assert first_cells(str(report)) == ["waiting, a", "waiting, b"]
    assert report.lines[2].endswith("| 1.00 | 1.00 to 1.00 |")


SUBJECTS = {
    "aligner": ({"width": 64, "guidance_width": 32}, 3),
    "features": ({"pairs": 48}, 4),
    "sampling": ({"count": 1, "steps": 1}, 9),
}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_subject_is_measured(subject):
    report = bench.Report(rounds=1)
    small, rows = SUBJECTS[subject]
    bench.MEASURES[subject](report, **small)
    assert len(first_cells(str(report))) == rows


def test_without_a_subject_the_timed_ones_are_measured_in_one_table(monkeypatch, capsys):
    monkeypatch.setattr(bench, "TIMED", ("wait", "sleep"))
    measures = {
        "wait": lambda report: report.in_turn("wait", {"x": dict, "y": dict}),
        "sleep": lambda report: report.in_turn("sleep", {"x": dict}),
    }
    monkeypatch.setattr(bench, "MEASURES", measures)
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert bench.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("|---|---|---|---|") == 1 and first_cells(printed)[2:] == ["sleep, x"]


def test_operations_at_true_size_are_counted():
    flop = memory.operations("sdxl", "llava-7b")
    # A UNet's step is known to take about 6 TFLOP at 1024 x 1024, for each half of the guidance.
    assert 50 * 2 * 5e12 < flop["draw"] < 50 * 2 * 8e12
    # Two operations per parameter and token, of 6.6 B parameters and 640 tokens, plus the vision.
    assert flop["look"] == pytest.approx(2 * 6.6e9 * 640, rel=0.15)
    table = memory.operations_table("sdxl", "llava-7b")
    assert first_cells(table)[:6] == [*flop, "draw again"]
    share = float(table.split("for four images |")[1].split("|")[1].strip(" %"))
    assert 107 < share < 110, "of one drawing: a quarter of a draft and of a look, and the drawing"


TEXT = memory.sizes(32, 64, 1, 2)
VISION = TEXT | {"projection_dim": 32, "patch_size": 56}
VAE = memory.SDXL_VAE | {"block_out_channels": (8,) * 4, "layers_per_block": 1}
VAE |= {"norm_num_groups": 4}
SETTINGS = {
    "SDXL_UNET": UNET | {"projection_class_embeddings_input_dim": 32 + 6 * 8},
    "FLUX_TRANSFORMER": dict(
        guidance_embeds=True,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    ),
    "SDXL_VAE": VAE,
    "FLUX_VAE": memory.FLUX_VAE | VAE,
    "CLIP_L": TEXT,
    "BIG_G": TEXT | {"projection_dim": 32},
    "T5_XXL": memory.T5_XXL | {"vocab_size": 200, "d_model": 64, "num_layers": 1, "num_heads": 2},
    "SDXL_VISION": VISION,
    "FLUX_VISION": VISION | {"projection_dim": 768},
    "LLAVA_VISION": VISION | {"image_size": 56, "patch_size": 28},
    "TOKENS": {"sdxl": (16, 64), "flux": (4, 64)},
    "MLLMS": {"llava-7b": TEXT},
}


@pytest.mark.parametrize("offload", ["none", "models"])
@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_the_run_at_true_size_runs_on_small_shapes(model, offload, monkeypatch, capsys):
    for name, value in SETTINGS.items():
        monkeypatch.setattr(memory, name, value)
    monkeypatch.setattr(true_size, "operations", lambda *_: {"look": 1e9})
    monkeypatch.setattr(true_size, "matmul_rate", lambda *_: 1e9)
    preset = find_preset(model).changed(
        ("models", "sampling", "training"),
        dtype="fp32",
        offload=offload,
        steps=2,
        height=64,
        width=64,
        batch_size=2,
        depth=1,
        heads=2,
        head_dim=16,
    )
    finetuning = replace(preset.finetuning, lora_rank=2, micro_batch=2)
    results = true_size.measure(
        replace(preset, finetuning=finetuning), "llava-7b", steps=2, pairs=12
    )
    rows = ["build", "one image, the first time", "one image", "features of 12 pairs"]
    rows += ["2 steps of train.py, batch 2", "3 LoRA steps of the MLLM, batch 2"]
    assert list(results["rows"]) == rows == first_cells(capsys.readouterr().out)
    assert results["tokens_per_second"] > 0 and results["card"] == "CPU"
