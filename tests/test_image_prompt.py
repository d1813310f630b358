"""The Resampler is diffusers' own under public names, and reads the penultimate CLIP features."""

import numpy as np
import pytest
import torch
from diffusers.loaders import UNet2DConditionLoadersMixin
from PIL import Image
from refusals import refused
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from img_minimal.devices import Precision
from img_minimal.sdxl import ImagePrompt, Resampler

W, D, N = 24, 32, 4


@pytest.fixture
def resampler() -> Resampler:
    torch.manual_seed(0)
    resampler = Resampler(W, D, tokens=N, width=48, depth=4, heads=2)
    for p in resampler.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return resampler


@pytest.fixture
def prompt(resampler) -> ImagePrompt:
    torch.manual_seed(1)
    sizes = {"hidden_size": W, "intermediate_size": 48, "num_hidden_layers": 2, "patch_size": 8}
    sizes |= {"num_attention_heads": 2, "projection_dim": 8, "image_size": 16}
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes))
    square = {"height": 16, "width": 16}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square)
    precision = Precision.named("fp32", torch.device("cpu"))
    return ImagePrompt(encoder, processor, resampler, precision)


def pictures() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


@torch.no_grad()
def test_a_resampler_built_from_a_files_shapes_equals_diffusers_own(resampler):
    state = resampler.state_dict()
    convert = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers
    theirs = convert(state, low_cpu_mem_usage=False)
    features = torch.randn(2, 5, W)
    ours = Resampler.from_state_dict(state)
    assert (ours(features) - theirs(features)).abs().max() <= 1e-5


def test_another_kind_of_image_projection_is_refused():
    with refused("latents", "Resampler of an IP-Adapter *Plus*"):
        Resampler.from_state_dict({"proj.weight": torch.zeros(1), "norm.weight": torch.zeros(1)})


@torch.no_grad()
def test_features_are_the_input_of_the_last_encoder_layer(prompt):
    inputs = []

    def watch(_: object, arguments: tuple, named: dict) -> None:
        inputs.append((*arguments, named.get("hidden_states"))[0])

    last = prompt.encoder.vision_model.encoder.layers[-1]
    last.register_forward_pre_hook(watch, with_kwargs=True)
    features = prompt.features(prompt.pixels(pictures()))
    assert features.shape == (2, 1 + 4, W) and torch.equal(features, inputs[0])
