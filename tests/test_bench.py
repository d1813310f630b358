"""The benchmarks run, on shapes that take no time; what they measure is never a test."""

import re
import sys
import time
from dataclasses import replace

import pytest
import torch

from img_minimal import backbones
from img_minimal.bench import __main__ as bench
from img_minimal.bench import growth, true_size, true_sizes
from img_minimal.bench.aligner import aligner_costs
from img_minimal.bench.attention import attention_costs
from img_minimal.bench.features import stages
from img_minimal.bench.injection import injection_costs
from img_minimal.bench.measure import in_turn, matmul_rate
from img_minimal.bench.sampling import true_size_operations, true_size_table, twin_table
from img_minimal.bench.startup import startup_costs
from img_minimal.presets import find_preset

CPU = torch.device("cpu")


def table(text: str) -> dict[str, list[str]]:
    """The rows of a Markdown table by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in rows[2:]}


def test_calls_are_made_in_turn_and_ratios_are_taken_within_a_round():
    order = []
    calls = {name: lambda n=name, s=s: (order.append(n), time.sleep(s)) for name, s in (("a", 0.001), ("b", 0.02))}
    found = in_turn(calls, rounds=3)
    assert order == ["a", "b"] * 4
    assert found["a"].ratio == 1 and found["b"].low <= found["b"].ratio <= found["b"].high
    assert found["b"].ratio > 2
    assert matmul_rate(CPU, 64, 1) > 0


def test_the_aligner_is_compared_with_a_formula_that_gives_the_same_numbers():
    said = aligner_costs(CPU, rounds=1, width=64, guidance_width=32)
    rows = table(said)
    assert len(rows) == 6 and all(float(cells[0]) > 0 for cells in rows.values())
    assert re.search(r"runs at \d+% of this machine's matmul rate", said)


def test_injection_is_compared_with_diffusers_own():
    rows = table(injection_costs(CPU, 1, ((64, 2, 8),), (128, 2, 4)))
    kinds = ("plain", "ours", "diffusers")
    assert list(rows) == [
        f"{block}, {kind}" for block in ("SDXL block of 64", "FLUX double block of 128") for kind in kinds
    ]


def test_attention_is_compared_in_both_directions():
    said = table(attention_costs(CPU, 1, {"small": (1, 2, 16, 8)}))
    assert list(said) == [f"small, {w}, {k}" for w in ("forward", "forward and backward") for k in ("plain", "fused")]


def test_start_up_is_measured_with_processes_of_their_own():
    assert list(table(startup_costs(rounds=1, only=1))) == ["python, nothing imported"]


def test_stages_of_the_features_are_measured_and_make_the_features_that_training_gets():
    found, features = stages(48)
    assert list(found) == ["read", "decode", "image tokens", "MLLM"]
    assert len(features) == 48 and features.guidance.shape[1] > 64


def test_what_img_adds_at_true_size_is_counted_in_operations():
    found = true_size_operations("sdxl", "llava-7b")
    # A step of SDXL's UNet is known to take about 6 TFLOP at 1024 x 1024 for each of the two halves of guidance.
    assert 50 * 2 * 5e12 < found["draw"] < 50 * 2 * 8e12
    # Two operations a parameter and token, of 6.6 B parameters and 640 tokens, and the vision encoder.
    assert found["look"] == pytest.approx(2 * 6.6e9 * 640, rel=0.15)
    said = table(true_size_table("sdxl", "llava-7b"))
    assert said["draw"][1] == said["draw again"][1] == "100.0%"


def test_the_twins_steps_are_measured_in_turn():
    assert list(table(twin_table(count=1, rounds=1, steps=1)))[:4] == ["draw", "look", "image tokens", "align"]


def test_growth_says_how_much_more_work_costs_how_much_more():
    assert growth.line("passes", {1: 0.5, 4: 1.0}, "ms", 1e3) == "| passes | 1: 500.0, 4: 1,000.0 | ms | x 4 | x 2.0 |"
    passes, lengths = growth.aligner_curves(CPU, 1, width=64, guidance_width=32)
    assert (tuple(passes), tuple(lengths)) == (growth.PASSES, growth.LENGTHS)
    assert tuple(growth.drawing_curve(1, images=(1, 2))) == (1, 2)


def test_pairs_stream_by_in_a_process_that_says_what_it_held(tmp_path):
    seconds, size = growth.stream_curves((64, 128))
    assert seconds[64] > 0 and size[128] > 1e7
    growth.draw({"pairs": seconds}, size, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000


SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL_VISION = SMALL_TEXT | {"projection_dim": 32, "image_size": 28, "patch_size": 14}
SMALL_VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
SMALL = {
    "sdxl": {
        "SDXL_UNET": dict(
            sample_size=8, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, attention_head_dim=(2, 4),
            cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8, use_linear_projection=True, norm_num_groups=8,
        ),
        "SDXL_VAE": SMALL_VAE, "CLIP_L_TEXT": SMALL_TEXT, "BIG_G_TEXT": SMALL_TEXT | {"projection_dim": 32},
        "VIT_H": SMALL_VISION, "TOKEN_SHAPE": (16, 64),
    },
    "flux": {
        "FLUX_TRANSFORMER": dict(
            guidance_embeds=True, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=4096, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
        ),
        "FLUX_VAE": SMALL_VAE, "CLIP_L_TEXT": SMALL_TEXT, "CLIP_L_VISION": SMALL_VISION | {"projection_dim": 768},
        "T5_XXL": dict(vocab_size=200, d_model=4096, d_kv=16, d_ff=32, num_layers=1, num_heads=2,
                       feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    },
}  # fmt: skip


@pytest.mark.parametrize("model", ["sdxl", "flux"])
@pytest.mark.parametrize("offload", [False, True])
def test_the_run_at_true_size_runs_on_small_shapes(model, offload, monkeypatch, capsys):
    for name, value in SMALL[model].items():
        shapes = backbones.true_size(model)
        old = getattr(shapes, name)
        kept = {}
        if name.endswith("VAE"):  # its kinds of blocks and its scaling stay
            kept = {k: v for k, v in old.items() if k not in ("block_out_channels", "layers_per_block")}
        monkeypatch.setattr(shapes, name, kept | value if isinstance(value, dict) else value)
    monkeypatch.setitem(true_sizes.MLLMS, "llava-7b", SMALL_TEXT)
    monkeypatch.setattr(true_sizes, "CLIP_336_CONFIG", SMALL_VISION)
    monkeypatch.setattr(true_size, "true_size_operations", lambda *_: {"look": 1e9})
    monkeypatch.setattr(true_size, "matmul_rate", lambda *_: 1e9)
    preset = replace(
        find_preset(model), sampling_steps=2, batch_size=2, depth=1, heads=2, head_dim=16, dtype="fp32", height=64,
        width=64, finetuning=replace(find_preset(model).finetuning, lora_rank=2, micro_batch=2),
    )  # fmt: skip
    found = true_size.measure(preset, "llava-7b", offload, steps=2, pairs=6)
    rows = ["build", "one image, the first time", "one image", "features of 6 pairs"]
    rows += ["2 steps of train.py, batch 2", "3 LoRA steps of the MLLM, batch 2"]
    assert list(found["rows"]) == rows and list(table(capsys.readouterr().out)) == rows
    assert found["tokens_per_second"] > 0 and found["card"] == "CPU"


@pytest.mark.parametrize("what", ["memory"])
def test_the_command_prints_a_table(what, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", what])
    assert bench.main() == 0
    assert "| " in capsys.readouterr().out
