"""Memory: one big model, or one layer, on the device at a time, and what fits on which card."""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, call

import flux_folder
import pytest
import torch
from diffusers.hooks import group_offloading
from PIL import Image
from refusals import refused
from release_folder import PROMPT, preset
from torch import Tensor, nn

from img_minimal import devices
from img_minimal.bench import __main__ as bench
from img_minimal.bench.memory import GIB, TRAIN, models, needs, peak_of, table, usable
from img_minimal.devices import Precision, Turns, count_parameters
from img_minimal.hub.parts import open_guide
from img_minimal.pipeline import IMG


def watch(img: IMG) -> list[str]:
    """Return what computes, in order; fail as soon as something computes that is not resident."""
    order: list[str] = []
    pipe, prompt, mllm = img.backbone.pipe, img.backbone.image_prompt, img.guide.model
    for name, owner, module in (
        ("diffusion", pipe, pipe.text_encoder),
        ("diffusion", pipe, pipe.unet),
        ("diffusion", pipe, pipe.vae.decoder),
        ("image prompt", prompt, prompt.encoder),
        ("mllm", mllm, mllm.model),
        ("aligner", img.aligner, img.aligner),
    ):

        def check(*_: object, name: str = name, owner: object = owner) -> None:
            assert img.turns.resident[0] is owner
            if order[-1:] != [name]:
                order.append(name)

        module.register_forward_pre_hook(check)
    return order


def test_offload_has_one_model_on_the_device_at_a_time_and_changes_no_image(release):
    prompts, seeds = [PROMPT, "three green squares"], [0, 1]
    expected = IMG(preset=preset(release)).stages(prompts, seeds, rounds=2)
    img = IMG(preset=preset(release, offload="models"))
    order = watch(img)
    for images, same in zip(img.stages(prompts, seeds, rounds=2), expected, strict=True):
        assert torch.equal(torch.stack(images), torch.stack(same))
    one_round = ["mllm", "image prompt", "aligner", "image prompt", "diffusion"]
    assert order == ["diffusion", *one_round, *one_round]
    img.explain([Image.new("RGB", (64, 64))], prompts[:1], [0])
    assert order[-1] == "mllm"


def test_a_model_leaves_the_device_before_another_comes():
    models, gpu, cpu = Mock(), torch.device("cuda"), torch.device("cpu")
    turns = Turns(gpu, "models")
    for model in (models.old, models.old, models.new):
        turns.bring(model)
    assert models.mock_calls == [call.old.to(gpu), call.old.to(cpu), call.new.to(gpu)]
    Turns(gpu).bring(models.new)
    assert len(models.mock_calls) == 3, "without offload nothing moves"


@pytest.fixture
def held(monkeypatch) -> list[int]:
    """Pretend that the CPU is a GPU and every model large; list how many layers it holds.

    Weights that wait are NaN here, so nothing can compute with them; rotary buffers may wait, which
    transformers moves where they are used. The next layer is fetched ahead, as on CUDA.
    """
    group, cpu = group_offloading.ModuleGroup, torch.device("cpu")
    onload, offload = group.onload_, group.offload_
    there, weights, counts = set(), {}, []

    def wait(tensor: Tensor, _: bool) -> Tensor:
        weights.setdefault(tensor, tensor.data)
        waits = isinstance(tensor, nn.Parameter)
        return torch.full_like(tensor.data, torch.nan) if waits else tensor.data

    def fetch(self: object, tensor: Tensor, *_: object) -> None:
        tensor.data = weights[tensor]

    def come(self: object) -> None:
        onload(self)
        there.add(self)
        counts.append(len(there))

    def leave(self: object) -> None:
        offload(self)
        there.discard(self)

    def apply(module: nn.Module, device: torch.device, **_: object) -> None:
        config = (cpu, cpu, "leaf_level", False, False, False)
        config = group_offloading.GroupOffloadingConfig(*config, stream=MagicMock())
        group_offloading._apply_group_offloading(module, config)

    changes = {"_to_cpu": staticmethod(wait), "_transfer_tensor_to_device": fetch}
    changes |= {"onload_": come, "offload_": leave}
    changes["_pinned_memory_tensors"] = lambda self: nullcontext(self.cpu_param_dict)
    for name, change in changes.items():
        monkeypatch.setattr(group, name, change)
    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", MagicMock())
    monkeypatch.setattr(devices, "apply_group_offloading", apply)
    monkeypatch.setattr(devices, "WITHOUT_MEMORY", ())
    monkeypatch.setattr(devices, "LARGE", 0)
    return counts


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_in_layers_no_bit_changes_and_at_most_four_layers_are_on_the_device(flux, held, dtype):
    picture, tokens, results = [Image.new("RGB", (64, 64), "blue")], torch.ones(1, 4, 48), []
    for offload in ("none", "layers"):
        img = IMG(preset=flux_folder.preset(flux, dtype=dtype, steps=2, offload=offload))
        drawn = img.backbone.draw([PROMPT], [0], tokens)
        h, mask = img.guidance(picture, [PROMPT], [0])
        words = img.guide.explain(picture, ["three green squares"], [1], 4)
        results.append([drawn, h, img.correct(tokens, h, mask), words])
        results[-1].append(img.finds_wrong(h, mask))
        assert img.guide.model.lm_head.weight.isnan().all() == (offload == "layers"), "it waits"
    guide = open_guide(img.backbone.preset.models, "mllm")  # as train.py does
    h = guide.guidance(picture, [PROMPT], [0])[0].bfloat16()  # as they are kept
    results.append([drawn, h, *results[1][2:]])
    for streamed in results[1:]:
        for expected, found in zip(results[0], streamed, strict=True):
            assert expected == found if isinstance(found, list) else torch.equal(expected, found)
    # One that computes, the next one, and weights of blocks that hold layers, twice at the most.
    assert max(held) <= 4 < 20 < len(list(guide.model.parameters()))


def test_layers_need_a_device_with_memory(release):
    with refused("--offload layers needs a GPU"):
        IMG(preset=preset(release, offload="layers"))
    assert Turns(torch.device("cpu"), "auto").offload == "none"


@pytest.mark.parametrize(
    ("free", "chosen"), [(80, "none"), (41, "none"), (40, "models"), (29, "models"), (28, "layers")]
)
def test_auto_chooses_by_the_memory_that_is_free(monkeypatch, free, chosen):
    models = [nn.Linear(size, 1, bias=False) for size in (7, 25, 5)]
    pipe = SimpleNamespace(components={"unet": models[0], "scheduler": None})
    monkeypatch.setattr(devices, "WITHOUT_MEMORY", ())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * free, 0))
    turns = Turns(torch.device("cpu"), "auto")
    turns.settle(pipe, *models[1:], room=4 * 4)
    assert turns.offload == chosen


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_chosen_where_the_hardware_has_it_and_fp32_elsewhere(monkeypatch, fast):
    monkeypatch.setattr(devices, "bf16_is_fast", lambda device: fast)
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    compute, cpu = bf16 if fast else fp32, torch.device("cpu")
    for name, device, expected in (
        (None, "cpu", (fp32, fp32, fp32)),
        ("mixed", "cpu", (fp32, compute, compute, True)),
        ("bf16", "cpu", (bf16, bf16, bf16)),
        (None, "cuda", (fp16, bf16, compute)),
        ("fp32", "cuda", (fp32, fp32, fp32)),
    ):
        assert Precision.named(name, torch.device(device)) == Precision(*expected)
    with Precision.named("mixed", cpu).training(cpu):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == compute
    with refused("int8", "fp32"):
        Precision.named("int8", cpu)


@pytest.mark.parametrize(
    ("unit", "fast"),
    [
        ("avx2", False),
        ("avx512_f", False),
        ("avx512_bf16", True),
        ("amx_bf16", True),
        ("bf16", True),
    ],
)
def test_a_cpu_is_fast_in_bf16_if_it_has_the_units_and_torch_may_use_them(monkeypatch, unit, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True})
    for allowed in (True, False):  # False with ONEDNN_MAX_CPU_ISA=AVX2
        mkldnn = SimpleNamespace(_is_mkldnn_bf16_supported=lambda allowed=allowed: allowed)
        monkeypatch.setattr(torch, "ops", SimpleNamespace(mkldnn=mkldnn))
        assert devices.bf16_is_fast(torch.device("cpu")) == (fast and allowed)


def test_activations_are_counted_while_they_live_and_parameters_never():
    with torch.device("meta"):
        layer = nn.Linear(1000, 1000, bias=False)

    @torch.no_grad()
    def forward() -> None:
        x = layer(torch.empty(10, 1000))  # input and output: 2 x 40 KB
        for _ in range(5):
            x = layer(x)  # each output replaces the one before

    assert peak_of(forward) == 2 * 40_000
    backward = peak_of(lambda: layer(torch.empty(10, 1000)).sum().backward())
    assert backward >= 40_000 + 4_000_000, "gradients count"


def test_attention_maps_are_left_out_as_fused_attention_has_none():
    def attend() -> None:
        q = torch.empty(1, 1, 10_000, 8)
        assert nn.functional.scaled_dot_product_attention(q, q, q).shape == q.shape

    assert peak_of(attend) == 2 * 10_000 * 8 * 4


def test_the_table_adds_up_from_parameter_counts():
    rows = needs("sdxl", "llava-13b")
    unet, branch, text = 2_567_463_684, 340_787_200, 123_060_480 + 694_659_840
    vision, resampler, aligner = 632_076_800, 82_961_664, 195_094_528
    vae, llava = 83_653_863, 13_351_494_656
    half, fp32 = unet + branch + text + vision + llava, vae + resampler + aligner
    assert rows["sample", "fp16, bf16"][0] == 2 * half + 4 * fp32
    assert rows["sample", "fp32"][0] == 4 * (half + fp32)
    assert rows["sample --offload", "fp16, bf16"][0] == 2 * llava
    train, layers = f"{TRAIN}, features as they come", 4 * 32064 * 5120  # of the embeddings
    frozen = 2 * vision + 4 * resampler + 16 * aligner
    assert rows[train, "fp16, bf16"][0] == 2 * llava + frozen
    assert rows[f"{train} --offload layers", "fp16, bf16"][0] == layers + frozen
    weights, activations = rows[f"{TRAIN}, features from a cache", "fp32"]
    assert weights == 16 * aligner
    assert activations > 4 * aligner, "gradients are among the activations"
    for dtype in ("fp32", "fp16, bf16"):
        sample, widest = rows["sample", dtype], 4 * 256 * 1024 * 1024  # bytes, channels, pixels
        assert 2 * widest <= sample[1] <= 4 * widest, "the VAE's decoder in fp32 needs most"
    assert usable(16) < 16 * GIB < usable(24)


def test_the_page_of_real_models_shows_what_the_command_prints(monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "tutorials" / "real_models.md").read_text()
    assert table("sdxl", "llava-13b") in page
    assert table("sdxl", "llava-7b").split("\n\n")[1] in page
    monkeypatch.setattr(sys, "argv", ["bench", "memory", "--model", "flux"])
    assert bench.main() == 0
    assert capsys.readouterr().out in page
    assert count_parameters(models("sdxl", "qwen2.5-vl-7b")["mllm"]) == 8_292_166_656
