"""The Resampler is diffusers' one with the public key names; the image prompt uses the penultimate CLIP features."""

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from img_minimal.sdxl import ImagePrompt, Resampler, load_ip_adapter
from img_minimal.hub.weights import WeightsError
from img_minimal.devices import Precision

W, D, N = 24, 32, 4
FP32 = Precision.named("fp32", torch.device("cpu"))


def new_resampler() -> Resampler:
    torch.manual_seed(0)
    resampler = Resampler(W, D, tokens=N, width=48, depth=2, heads=2)
    for p in resampler.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return resampler


def new_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=W,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
    )
    return CLIPVisionModelWithProjection(config).eval()


def new_prompt() -> ImagePrompt:
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return ImagePrompt(new_encoder(), CLIPImageProcessorPil(**sizes), new_resampler(), FP32)


def pictures(n: int = 2) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 20, 24, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


def in_diffusers_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {
        "0.norm1": "ln0",
        "0.norm2": "ln1",
        "0.to_q": "attn.to_q",
        "0.to_out": "attn.to_out.0",
        "1.0": "ff.0",
        "1.1": "ff.1.net.0.proj",
        "1.3": "ff.1.net.2",
    }
    renamed = {}
    for key, value in state.items():
        if not key.startswith("layers."):
            renamed[key] = value
            continue
        _, layer, rest = key.split(".", 2)
        part, kind = rest.rsplit(".", 1)
        if part == "0.to_kv":
            for name, half in zip(("to_k", "to_v"), value.chunk(2)):
                renamed[f"layers.{layer}.attn.{name}.{kind}"] = half
        else:
            renamed[f"layers.{layer}.{names[part]}.{kind}"] = value
    return renamed


@torch.no_grad()
def test_the_resampler_equals_diffusers_own():
    ours = new_resampler()
    theirs = IPAdapterPlusImageProjection(W, D, hidden_dims=48, depth=2, dim_head=64, heads=2, num_queries=N)
    theirs.load_state_dict(in_diffusers_names(ours.state_dict()))
    features = torch.randn(2, 5, W)
    assert (ours(features) - theirs(features)).abs().max() <= 1e-5


@torch.no_grad()
def test_a_resampler_is_rebuilt_from_shapes_alone():
    ours = new_resampler()
    again = Resampler.from_state_dict(ours.state_dict())
    features = torch.randn(2, 5, W)
    assert torch.equal(again(features), ours(features))


def test_another_kind_of_image_projection_is_refused():
    with pytest.raises(WeightsError, match="lacks 'latents'.*Plus"):
        Resampler.from_state_dict({"proj.weight": torch.zeros(1), "norm.weight": torch.zeros(1)})


def test_the_published_resampler_has_the_published_layout():
    with torch.device("meta"):
        state = Resampler(1280, 2048).state_dict()
    assert state["latents"].shape == (1, 16, 1280)
    assert state["layers.3.0.to_kv.weight"].shape == (2560, 1280)
    assert state["layers.3.1.1.weight"].shape == (5120, 1280)
    assert len(state) == 7 + 4 * 11


@torch.no_grad()
def test_features_are_the_input_of_the_last_encoder_layer():
    prompt, seen = new_prompt(), []
    last = prompt.encoder.vision_model.encoder.layers[-1]
    last.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args, kwargs.get("hidden_states"))[0]), with_kwargs=True
    )
    features = prompt.features(pictures())
    assert features.shape == (2, 1 + 4, W) and torch.equal(features, seen[0])


def test_tokens_do_not_depend_on_the_batch_and_keep_no_graph():
    prompt, (first, second) = new_prompt(), pictures()
    tokens = prompt.tokens([first, second])
    assert tokens.shape == (2, N, D) and not tokens.requires_grad
    assert torch.allclose(tokens[1:], prompt.tokens([second]), atol=1e-5)


def test_the_negative_is_a_mid_grey_image_rather_than_a_black_one_or_zero_tokens():
    prompt = new_prompt()
    prompt.processor.image_mean = [128 / 255] * 3  # so that 128 is zero after normalisation
    grey, black = (Image.new("RGB", (16, 16), (v, v, v)) for v in (128, 0))
    negative = prompt.negative()
    assert negative.shape == (1, N, D) and negative.abs().max() > 0.1
    assert torch.allclose(prompt.tokens([grey]), negative, atol=1e-5)
    assert not torch.allclose(prompt.tokens([black]), negative, atol=1e-2)


def test_an_image_prompt_is_loaded_from_a_folder_and_an_adapter_file(tmp_path):
    prompt = new_prompt()
    prompt.encoder.save_pretrained(tmp_path)
    assert (
        ImagePrompt.from_pretrained(tmp_path, prompt.resampler.state_dict(), FP32).processor.size.shortest_edge == 224
    )
    prompt.processor.save_pretrained(tmp_path)
    again = ImagePrompt.from_pretrained(tmp_path, prompt.resampler.state_dict(), FP32)
    assert torch.allclose(again.tokens(pictures()), prompt.tokens(pictures()), atol=1e-5)


def test_both_forms_of_adapter_file_give_the_same_two_parts(tmp_path):
    parts = {"image_proj": {"latents": torch.ones(1, 2, 3)}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(2, 2)}}
    torch.save(parts, tmp_path / "ip.bin")
    save_file({f"{part}.{k}": v for part in parts for k, v in parts[part].items()}, tmp_path / "ip.safetensors")
    for name in ("ip.bin", "ip.safetensors"):
        image_proj, ip_adapter = load_ip_adapter(tmp_path / name)
        assert image_proj.keys() == {"latents"} and ip_adapter.keys() == {"1.to_k_ip.weight"}


def test_a_file_that_is_no_adapter_is_refused(tmp_path):
    save_file({"image_proj.latents": torch.ones(1)}, tmp_path / "ip.safetensors")
    with pytest.raises(WeightsError, match="no 'ip_adapter' weights"):
        load_ip_adapter(tmp_path / "ip.safetensors")
