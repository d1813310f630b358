"""The true SDXL: every key of the public files finds its place, at true size, on the meta device.

The keys and shapes are spelled out here from the published files, independently of the code that is to take them.
"""

from itertools import product

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import nn

from img_minimal.aligner import ImplicitAligner
from img_minimal.sdxl import Resampler
from img_minimal.sdxl import ImageBranch, cross_attentions, inject
from img_minimal.bench.memory import SDXL_UNET
from img_minimal.bench.true_sizes import models
from img_minimal.hub.weights import fill
from img_minimal.devices import parameters

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, width)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def conv(name: str, out: int, width: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (out, width, side, side), f"{name}.bias": (out,)}


def perceiver(width: int) -> Shapes:
    """Four layers of 20 heads x 64 in the names of IP-Adapter Plus."""
    shapes: Shapes = {}
    for i in range(4):
        attention, mlp = f"layers.{i}.0", f"layers.{i}.1"
        shapes |= norm(f"{attention}.norm1", width) | norm(f"{attention}.norm2", width) | norm(f"{mlp}.0", width)
        shapes |= linear(f"{attention}.to_q", 1280, width, False) | linear(f"{attention}.to_kv", 2560, width, False)
        shapes |= linear(f"{attention}.to_out", width, 1280, False)
        shapes |= linear(f"{mlp}.1", 4 * width, width, False) | linear(f"{mlp}.3", width, 4 * width, False)
    return shapes


def public_aligner() -> Shapes:
    ends = linear("proj_in", 2048, 5120) | linear("proj_out", 2048, 2048) | linear("zero_linear", 2048, 2048)
    return perceiver(2048) | ends | norm("norm_out", 2048)


def public_resampler() -> Shapes:
    ends = linear("proj_in", 1280, 1280) | linear("proj_out", 2048, 1280) | norm("norm_out", 2048)
    return perceiver(1280) | ends | {"latents": (1, 16, 1280)}


def public_branch() -> Shapes:
    widths = [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10  # down, up, middle
    kinds = ("to_k_ip", "to_v_ip")
    return {f"{2 * i + 1}.{kind}.weight": (width, 2048) for i, width in enumerate(widths) for kind in kinds}


def resnet(name: str, out: int, width: int) -> Shapes:
    shapes = norm(f"{name}.norm1", width) | conv(f"{name}.conv1", out, width) | norm(f"{name}.norm2", out)
    shapes |= conv(f"{name}.conv2", out, out) | linear(f"{name}.time_emb_proj", out, 1280)
    return shapes | (conv(f"{name}.conv_shortcut", out, width, 1) if out != width else {})


def transformer(name: str, width: int, depth: int) -> Shapes:
    shapes = norm(f"{name}.norm", width) | linear(f"{name}.proj_in", width, width)
    shapes |= linear(f"{name}.proj_out", width, width)
    for k in range(depth):
        block = f"{name}.transformer_blocks.{k}"
        for i, context in ((1, width), (2, 2048)):
            attention = f"{block}.attn{i}"
            shapes |= linear(f"{attention}.to_q", width, width, False) | linear(f"{attention}.to_out.0", width, width)
            shapes |= linear(f"{attention}.to_k", width, context, False)
            shapes |= linear(f"{attention}.to_v", width, context, False)
        shapes |= linear(f"{block}.ff.net.0.proj", 8 * width, width) | linear(f"{block}.ff.net.2", width, 4 * width)
        shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width) | norm(f"{block}.norm3", width)
    return shapes


def public_unet() -> Shapes:
    shapes = conv("conv_in", 320, 4) | norm("conv_norm_out", 320) | conv("conv_out", 4, 320)
    for name, width in (("time_embedding", 320), ("add_embedding", 2816)):
        shapes |= linear(f"{name}.linear_1", 1280, width) | linear(f"{name}.linear_2", 1280, 1280)
    for i, (width, before, depth) in enumerate(((320, 320, 0), (640, 320, 2), (1280, 640, 10))):
        for j in range(2):
            shapes |= resnet(f"down_blocks.{i}.resnets.{j}", width, before if j == 0 else width)
            shapes |= transformer(f"down_blocks.{i}.attentions.{j}", width, depth) if depth else {}
        shapes |= conv(f"down_blocks.{i}.downsamplers.0.conv", width, width) if i < 2 else {}
    shapes |= resnet("mid_block.resnets.0", 1280, 1280) | resnet("mid_block.resnets.1", 1280, 1280)
    shapes |= transformer("mid_block.attentions.0", 1280, 10)
    # Each input of an up block is what comes from below, next to what its mirror image on the way down left behind.
    inputs = ((1280 + 1280, 1280 + 1280, 1280 + 640), (1280 + 640, 640 + 640, 640 + 320), (640 + 320, 640, 640))
    for i, (width, depth) in enumerate(((1280, 10), (640, 2), (320, 0))):
        for j in range(3):
            shapes |= resnet(f"up_blocks.{i}.resnets.{j}", width, inputs[i][j])
            shapes |= transformer(f"up_blocks.{i}.attentions.{j}", width, depth) if depth else {}
        shapes |= conv(f"up_blocks.{i}.upsamplers.0.conv", width, width) if i < 2 else {}
    return shapes


def public_vit_h() -> Shapes:
    shapes: Shapes = {
        "vision_model.embeddings.class_embedding": (1280,),
        "vision_model.embeddings.patch_embedding.weight": (1280, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, 1280),
    }
    shapes |= norm("vision_model.pre_layrnorm", 1280) | norm("vision_model.post_layernorm", 1280)
    for i, name in product(range(32), ("q_proj", "k_proj", "v_proj", "out_proj")):
        shapes |= linear(f"vision_model.encoder.layers.{i}.self_attn.{name}", 1280, 1280)
    for i in range(32):
        layer = f"vision_model.encoder.layers.{i}"
        shapes |= norm(f"{layer}.layer_norm1", 1280) | norm(f"{layer}.layer_norm2", 1280)
        shapes |= linear(f"{layer}.mlp.fc1", 5120, 1280) | linear(f"{layer}.mlp.fc2", 1280, 5120)
    return shapes | linear("visual_projection", 1024, 1280, False)


PUBLIC = {
    "unet": (public_unet, 2_567_463_684),
    "image_encoder": (public_vit_h, 632_076_800),
    "branch": (public_branch, 340_787_200),
    "resampler": (public_resampler, 82_961_664),
    "aligner": (public_aligner, 195_094_528),
}


def on_meta(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_key_of_the_public_file_finds_its_place_and_none_is_left_over(name):
    keys, count = PUBLIC[name]
    model = models("llava-13b")[name]
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == keys()
    assert parameters(model) == count


def test_the_released_files_fill_our_modules_whose_sizes_follow_from_the_files():
    resampler = Resampler.from_state_dict(on_meta(public_resampler()))
    assert resampler.latents.shape == (1, 16, 1280) and resampler.layers[3][0].heads == 20
    with torch.device("meta"):
        fill(ImplicitAligner(2048, 5120), on_meta(public_aligner()), "aligner_sdxl.pth")
        fill(ImageBranch.for_unet(UNet2DConditionModel(**SDXL_UNET)), on_meta(public_branch()), "ip-adapter")


def test_sdxl_has_70_cross_attentions_numbered_down_up_middle():
    unet = models("llava-13b")["unet"]
    layers = cross_attentions(unet)
    assert len(unet.attn_processors) == 140
    assert [int(key) for key in layers] == list(range(1, 140, 2))
    names = {module: name for name, module in unet.named_modules()}
    blocks = [".".join(names[layer].split(".")[:2]) for layer in layers.values()]
    places = {block: (2 * blocks.index(block) + 1, blocks.count(block)) for block in blocks}
    assert places == {
        "down_blocks.1": (1, 4),
        "down_blocks.2": (9, 20),
        "up_blocks.0": (49, 30),
        "up_blocks.1": (109, 6),
        "mid_block.attentions": (121, 10),
    }


@torch.no_grad()
def test_in_the_true_attention_map_injection_equals_diffusers_own_loader_of_a_public_adapter():
    narrow = {"block_out_channels": (40, 80, 160), "cross_attention_dim": 32, "norm_num_groups": 8, "sample_size": 8,
              "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24 + 6 * 8}  # fmt: skip
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**(SDXL_UNET | narrow)).eval()
    branch = ImageBranch.for_unet(unet)
    for p in branch.parameters():
        nn.init.normal_(p, std=0.3)
    latents, text, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 32), torch.randn(2, 4, 32)
    added = {"text_embeds": torch.randn(2, 24), "time_ids": torch.ones(2, 6)}
    before = unet(latents, 7, text, added_cond_kwargs=added).sample
    with inject(unet, branch, tokens, scale=0.2):
        ours = unet(latents, 7, text, added_cond_kwargs=added).sample
    assert torch.equal(unet(latents, 7, text, added_cond_kwargs=added).sample, before)

    resampler = Resampler(16, 32, tokens=4, width=64, depth=4, heads=1).state_dict()
    unet._load_ip_adapter_weights([{"image_proj": resampler, "ip_adapter": branch.state_dict()}])
    for name, processor in unet.attn_processors.items():
        if "attn2" in name:
            processor.scale = [0.2]
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([nn.Identity()])
    theirs = unet(latents, 7, text, added_cond_kwargs=added | {"image_embeds": [tokens[:, None]]}).sample
    assert (ours - theirs).abs().max() <= 1e-5 and (ours - before).abs().max() > 1e-3
