"""`sample.py --model sdxl` draws with tiny random weights in exactly the real ones' layouts."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from refusals import refused
from release_folder import PROMPT, command, diffusers_adapter, new_base, preset
from torch import nn
from transformers import CLIPVisionModelWithProjection

import sample
from img_minimal.backbone import open_backbone
from img_minimal.hub.adapters import read_ip_adapter
from img_minimal.pipeline import IMG
from img_minimal.sdxl import Resampler


@pytest.fixture(scope="module")
def img(release) -> IMG:
    return IMG(preset=preset(release))


def red() -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), "red")]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"eta": 0.5, "guidance_rescale": 0.4, "clip_skip": 1}])
def test_both_images_equal_those_of_diffusers_own_pipeline_and_ip_adapter(release, img, more):
    before, after = map(torch.stack, img.stages([PROMPT], [3], call=more))
    tokens, negative = img.align(before, [PROMPT], [3]), img.backbone.image_prompt.negative()

    pipe = StableDiffusionXLPipeline.from_pretrained(release / "base", add_watermarker=False)
    asked = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 7.5, **more}

    def theirs(**more: object) -> torch.Tensor:
        noise = torch.Generator().manual_seed(3)
        return pipe(generator=noise, output_type="pt", **asked, **more).images

    assert torch.equal(before, theirs())
    pipe.image_encoder = CLIPVisionModelWithProjection.from_pretrained(release / "image_encoder")
    adapter = diffusers_adapter(release)
    pipe.load_ip_adapter(adapter, subfolder=None, weight_name=None, image_encoder_folder=None)
    pipe.unet.encoder_hid_proj.image_projection_layers = nn.ModuleList([nn.Identity()])
    pipe.set_ip_adapter_scale(0.2)
    both = torch.cat([negative, tokens])[:, None]
    assert (after - theirs(ip_adapter_image_embeds=[both])).abs().max() <= 1e-5
    assert (after - before).abs().max() > 1e-2


@torch.no_grad()
def test_no_image_is_grey_as_the_adapters_own_resampler_sees_it(release, img):
    prompt = img.backbone.image_prompt
    grey = prompt.features(torch.zeros(1, 3, 224, 224))
    adapter = torch.load(release / "ip-adapter-other.bin", weights_only=True)
    own = Resampler.from_state_dict(adapter["image_proj"])
    assert torch.equal(prompt.negative(), own(grey))
    assert not torch.allclose(prompt.negative(), prompt.head(grey), atol=1e-2)


def test_a_named_unet_replaces_the_bases_own_which_need_not_be_there(release, img, tmp_path):
    shutil.copytree(release / "base", tmp_path / "base", ignore=lambda *_: ["unet"])
    unet = str(release / "dpo" / "unet")
    dpo = open_backbone(preset(release, base=str(tmp_path / "base"), unet=unet))
    expected = UNet2DConditionModel.from_pretrained(unet).state_dict()
    assert same(dpo.pipe.unet.state_dict(), expected)
    for name in ("branch", "image_prompt"):
        parts = [getattr(backbone, name).state_dict() for backbone in (img.backbone, dpo)]
        assert same(*parts), name
    tokens = dpo.tokens(red())
    images = [backbone.draw([PROMPT], [0], tokens) for backbone in (img.backbone, dpo)]
    assert not torch.equal(*images)


def test_the_released_layouts_give_the_same_tensors_as_safetensors(release, tmp_path):
    def adapter(name: str, resampler: object = None) -> tuple[dict, dict]:
        resampler = resampler and str(resampler)
        files = preset(release, ip_adapter=str(release / name), resampler=resampler).models
        return read_ip_adapter(files)[:2]

    flat = adapter("ip-adapter.safetensors")
    prefixed = {f"module.{key}": value for key, value in flat[0].items()}
    torch.save(prefixed, tmp_path / "resampler.pth")
    for name, resampler in (
        ("ip-adapter-whole.bin", None),
        ("ip-adapter-half.bin", release / "resampler.pth"),
        ("ip-adapter-other.bin", release / "resampler.pth"),
        ("ip-adapter-other.bin", tmp_path / "resampler.pth"),
        ("ip-adapter-other.bin", release / "ip-adapter-whole.bin"),
    ):
        parts = adapter(name, resampler)
        assert all(same(part, other) for part, other in zip(parts, flat)), name
    with refused("half.bin: has no 'image_proj'"):
        adapter("ip-adapter-half.bin")


def test_half_precision_takes_fp16_files_and_decodes_in_fp32(release, tmp_path):
    new_base().to(torch.float16).save_pretrained(tmp_path / "base", variant="fp16")
    backbone = open_backbone(preset(release, base=str(tmp_path / "base"), dtype="fp16"))
    pipe, prompt, decoded = backbone.pipe, backbone.image_prompt, []
    for part in (pipe.unet, pipe.text_encoder, prompt.encoder):
        assert part.dtype == torch.float16
    assert pipe.vae.dtype == prompt.head.latents.dtype == torch.float32
    pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0].dtype))
    images = backbone.draw([PROMPT], [0], backbone.tokens(red()))
    assert decoded == [torch.float32]
    assert images.dtype == torch.float32 and images.isfinite().all()


def test_a_prompt_beyond_77_tokens_is_drawn_with_a_warning_that_says_what_is_cut(
    release, tmp_path, monkeypatch, capsys
):
    words = ("--prompt", "a red circle " * 26 + "above", "--no-explain", "--num-images", 1)
    command(monkeypatch, release, "--output", tmp_path, *words)
    assert sample.main() == 0
    lines = capsys.readouterr().err.splitlines()
    [warning] = [line for line in lines if line.startswith("warning")]
    assert "77 tokens" in warning and "'a red circle above'" in warning, warning
