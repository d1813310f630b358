"""Memory: one big model on the device at a time with --offload, and the table of what fits where."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from release_folder import PROMPT, preset
from torch import nn

from img_minimal.bench import __main__ as bench
from img_minimal.bench.memory import CARDS, GIB, counting, needs, table, usable
from img_minimal.load import load_img
from img_minimal.pipeline import IMG
from img_minimal.runtime import devices
from img_minimal.devices import Placement, Precision
from img_minimal.cli import UserError

ROOT = Path(__file__).parent.parent
PARTS = ("diffusion", "mllm", "image_prompt", "aligner")


def watched(img: IMG, moves: list[tuple[str, bool]], monkeypatch) -> None:
    """Fail as soon as a model computes that is not placed; note all moves."""
    placed, move = set(), Placement._move

    def record(self, name, away):
        moves.append((name, away))
        (placed.discard if away else placed.add)(name)
        assert len(placed) <= 1, f"{placed} are on the device at once"
        move(self, name, away)

    def check(name):
        def hook(*_):
            assert placed == {name}, f"{name} computes, but on the device is {placed}"

        return hook

    monkeypatch.setattr(Placement, "_move", record)
    for name, modules in img.placement.parts.items():
        for module in modules:
            for inner in module.modules():
                inner.register_forward_pre_hook(check(name))


def test_offload_has_one_model_placed_at_a_time_and_leaves_the_images_as_they_are(release, monkeypatch):
    prompts, seeds = [PROMPT, "three green squares"], [0, 1]
    usual = load_img(preset(release)).stages(prompts, seeds, rounds=2)
    img, moves = load_img(preset(release, offload=True)), []
    assert set(img.placement.parts) == set(PARTS) and img.placement.resident is None
    watched(img, moves, monkeypatch)
    offloaded = img.stages(prompts, seeds, rounds=2)
    assert all(torch.equal(a, b) for a, b in zip(usual, offloaded))
    one_round = ["mllm", "image_prompt", "aligner", "image_prompt", "diffusion"]
    assert [name for name, away in moves if not away] == ["diffusion", *one_round, *one_round]
    img.explain([Image.new("RGB", (64, 64))], prompts[:1], [0])
    assert img.placement.resident == "mllm"


def test_without_offload_nothing_moves_after_loading(release, monkeypatch):
    img, moves = load_img(preset(release)), []
    monkeypatch.setattr(Placement, "_move", lambda self, name, away: moves.append(name))
    img.stages([PROMPT], [0])
    assert moves == []


def test_what_replaces_a_part_makes_it_leave_the_device_first(monkeypatch):
    place, moves = Placement(torch.device("cpu"), offload=True), []
    monkeypatch.setattr(Placement, "_move", lambda self, name, away: moves.append((self.parts[name][0], away)))
    old, new = nn.Linear(1, 1), nn.Linear(1, 1)
    place.add("mllm", old)
    place.bring("mllm")
    place.add("mllm", new)
    place.bring("mllm")
    assert moves == [(old, True), (old, False), (old, True), (new, True), (new, False)]


def test_bf16_is_chosen_where_the_hardware_has_it_and_fp32_elsewhere(monkeypatch):
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for fast, compute in ((True, bf16), (False, fp32)):
        monkeypatch.setattr(devices, "bf16_is_fast", lambda device, fast=fast: fast)
        assert Precision.named(None, cpu) == Precision(fp32, fp32, fp32)
        assert Precision.named("mixed", cpu) == Precision(fp32, compute, compute, mixed=True)
        assert Precision.named(None, gpu) == Precision(fp16, bf16, compute)
        assert Precision.named("bf16", cpu) == Precision(bf16, bf16, bf16), "what is asked for is done"
        assert Precision.named("fp32", gpu) == Precision(fp32, fp32, fp32)
        with Precision.named("mixed", cpu).training(cpu):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == compute
    with pytest.raises(UserError, match="int8.*fp32"):
        Precision.named("int8", gpu)


@pytest.mark.parametrize(
    ("units", "fast"),
    [({"avx2": True}, False), ({"avx512_f": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True),
     ({"bf16": True}, True)],
)  # fmt: skip
def test_a_cpu_is_fast_in_bf16_if_it_has_the_units_and_torch_may_use_them(monkeypatch, units, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    usable = SimpleNamespace(mkldnn=SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True))
    monkeypatch.setattr(torch, "ops", usable)
    assert devices.bf16_is_fast(torch.device("cpu")) is fast
    usable.mkldnn._is_mkldnn_bf16_supported = lambda: False  # ONEDNN_MAX_CPU_ISA=AVX2
    assert not devices.bf16_is_fast(torch.device("cpu"))


def test_activations_are_counted_while_they_live_and_parameters_never():
    with torch.device("meta"):
        layer = nn.Linear(1000, 1000, bias=False)
    with counting() as alive, torch.no_grad():
        x = layer(torch.empty(10, 1000))  # input and output: 2 x 40 KB
        for _ in range(5):
            x = layer(x)  # each output replaces the one before
    assert alive.peak == 2 * 40_000 and alive.now == 40_000
    with counting() as alive:
        layer(torch.empty(10, 1000)).sum().backward()
    assert alive.peak >= 40_000 + 4_000_000, "gradients count"


def test_attention_maps_are_left_out_as_fused_attention_has_none():
    with counting() as alive:
        q = torch.empty(1, 1, 10_000, 8)
        assert nn.functional.scaled_dot_product_attention(q, q, q).shape == q.shape
    assert alive.peak == 2 * q.numel() * 4


@pytest.fixture(scope="module")
def rows() -> dict:
    return {(need.run, need.dtype): need for need in needs("sdxl", "llava-13b")}


def test_the_table_adds_up_from_parameter_counts(rows):
    unet, branch, text = 2_567_463_684, 340_787_200, 123_060_480 + 694_659_840
    vision, resampler, aligner, vae, llava = 632_076_800, 82_961_664, 195_094_528, 83_653_863, 13_351_494_656
    half, kept = unet + branch + text + vision + llava, vae + resampler + aligner
    assert rows["sample", "fp16, bf16"].weights == 2 * half + 4 * kept
    assert rows["sample", "fp32"].weights == 4 * (half + kept)
    assert rows["sample --offload", "fp16, bf16"].weights == 2 * llava
    train = rows["train the aligner, features as they come", "fp16, bf16"]
    assert train.weights == 2 * (vision + llava) + 4 * resampler + 4 * 4 * aligner
    cached = rows["train the aligner, features from a cache", "fp32"]
    assert cached.weights == 16 * aligner and cached.activations > 4 * aligner, "gradients are in the activations"


def test_the_vaes_decoder_in_fp32_is_what_drawing_needs_most(rows):
    pixels, widest = 1024 * 1024, 256  # channels of the last upsampling
    assert rows["sample", "fp16, bf16"].activations >= 2 * 4 * widest * pixels
    assert rows["sample", "fp16, bf16"].activations <= 4 * 4 * widest * pixels


def test_offload_never_needs_more_and_more_memory_never_fits_less(rows):
    for dtype in ("fp32", "fp16, bf16"):
        assert rows["sample --offload", dtype].total < rows["sample", dtype].total
    sizes = [usable(card) for card in CARDS]
    assert sizes == sorted(sizes) and all(size < card * GIB for size, card in zip(sizes, CARDS))


def test_the_readme_shows_the_tables_that_the_command_prints():
    readme = (ROOT / "tutorials" / "real_models.md").read_text()
    assert table("sdxl", "llava-13b") in readme
    [totals] = [part for part in table("sdxl", "llava-7b").split("\n\n") if part.startswith("| with")]
    assert totals in readme
    assert table("flux", "llava-13b") in readme


def test_the_command_prints_it_and_refuses_an_unknown_mllm(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "memory", "--mllm", "qwen2.5-vl-7b"])
    assert bench.main() == 0
    assert "| qwen2.5-vl-7b | 8,292.2 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bench", "memory", "--mllm", "gpt"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2 and "invalid choice: 'gpt'" in capsys.readouterr().err
