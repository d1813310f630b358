"""The true SDXL on the meta device: every key of the public files finds its place in our modules.

Keys and shapes are spelled out from the published files, independently of the code that takes them.
"""

import torch

from img_minimal.bench.memory import models
from img_minimal.devices import count_parameters
from img_minimal.hub.weights import fill
from img_minimal.sdxl import Resampler

Shapes = dict[str, tuple[int, ...]]
COUNTS = {
    "unet": 2_567_463_684,
    "image_encoder": 632_076_800,
    "branch": 340_787_200,
    "head": 82_961_664,
    "aligner": 195_094_528,
}


def linear(name: str, out: int, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, width)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def perceiver(width: int) -> Shapes:
    """List four layers of 20 heads x 64 in the names of IP-Adapter Plus."""
    shapes: Shapes = {}
    for i in range(4):
        attention, mlp = f"layers.{i}.0", f"layers.{i}.1"
        for name in (f"{attention}.norm1", f"{attention}.norm2", f"{mlp}.0"):
            shapes |= norm(name, width)
        for name, out, wide in (
            (f"{attention}.to_q", 1280, width),
            (f"{attention}.to_kv", 2560, width),
            (f"{attention}.to_out", width, 1280),
            (f"{mlp}.1", 4 * width, width),
            (f"{mlp}.3", width, 4 * width),
        ):
            shapes |= linear(name, out, wide, bias=False)
    return shapes


def public_aligner() -> Shapes:
    shapes = perceiver(2048) | linear("proj_in", 2048, 5120) | norm("norm_out", 2048)
    return shapes | linear("proj_out", 2048, 2048) | linear("zero_linear", 2048, 2048)


def public_resampler() -> Shapes:
    shapes = perceiver(1280) | linear("proj_in", 1280, 1280) | norm("norm_out", 2048)
    return shapes | linear("proj_out", 2048, 1280) | {"latents": (1, 16, 1280)}


def public_branch() -> Shapes:
    widths = [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10  # down, up, middle
    shapes: Shapes = {}
    for i, width in enumerate(widths):
        for kind in ("to_k_ip", "to_v_ip"):
            shapes |= linear(f"{2 * i + 1}.{kind}", width, 2048, bias=False)
    return shapes


def on_meta(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_every_key_of_the_public_files_finds_its_place_and_none_is_left_over():
    parts = models("sdxl", "llava-13b")
    fill(parts["aligner"], on_meta(public_aligner()), "aligner_sdxl.pth")
    fill(parts["branch"], on_meta(public_branch()), "ip-adapter.bin")
    resampler = Resampler.from_state_dict(on_meta(public_resampler()))
    assert resampler.latents.shape == (1, 16, 1280) and resampler.layers[3][0].heads == 20


def test_the_models_of_true_size_have_the_published_parameter_counts():
    parts = models("sdxl", "llava-13b")
    assert {name: count_parameters(parts[name]) for name in COUNTS} == COUNTS
