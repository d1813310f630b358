"""`sample.py --model sdxl` on tiny random weights in exactly the layouts that the real ones have."""

import shutil
from functools import wraps

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from release_folder import PROMPT, command, new_base, preset
from torch import nn
from transformers import CLIPVisionModelWithProjection

import sample
from img_minimal.aligner import ImplicitAligner
from img_minimal.backbones.sdxl import backbone as module
from img_minimal.sdxl import Resampler, load_ip_adapter
from img_minimal.hub.weights import WeightsError, read_weights
from img_minimal.load import load_backbone, load_img
from img_minimal.presets import find_preset
from img_minimal.files import from_pil


def test_sample_runs_through_with_flags_that_point_at_the_files(release, tmp_path, monkeypatch, capsys):
    command(monkeypatch, release, "--output", tmp_path, "--num-images", 2)
    assert sample.main() == 0
    said = capsys.readouterr()
    assert "seed 1, round 1" in said.out and "oracle" not in said.out and "warning" not in said.err
    first, second = (Image.open(tmp_path / name) for name in ("seed0-0-initial.png", "seed0-1-round1.png"))
    assert first.size == (64, 64) and first.tobytes() != second.tobytes()
    assert (tmp_path / "side-by-side.png").exists()


@torch.no_grad()
def test_both_images_equal_those_of_diffusers_own_pipeline_and_ip_adapter(release):
    img = load_img(preset(release))
    before, after = img.stages([PROMPT], [3])
    tokens, negative = img.align(before, [PROMPT], [3]), img.backbone.image_prompt.negative()

    pipe = StableDiffusionXLPipeline.from_pretrained(release / "base", dtype=torch.float32, add_watermarker=False)
    asked = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 7.5, "output_type": "pt"}
    theirs = pipe(generator=torch.Generator().manual_seed(3), **asked).images
    assert torch.equal(before, theirs)
    pipe.image_encoder = CLIPVisionModelWithProjection.from_pretrained(release / "image_encoder", dtype=torch.float32)
    adapter = torch.load(release / "ip-adapter-whole.bin", weights_only=True)
    # diffusers deduces a depth of 4 from nothing, so its loader gets four layers of which two do nothing
    for i in (2, 3):
        for key in [key for key in adapter["image_proj"] if key.startswith("layers.0.")]:
            adapter["image_proj"][key.replace("layers.0.", f"layers.{i}.")] = adapter["image_proj"][key] * 0
    pipe.load_ip_adapter(adapter, subfolder=None, weight_name=None, image_encoder_folder=None, low_cpu_mem_usage=False)
    pipe.unet.encoder_hid_proj.image_projection_layers = nn.ModuleList([nn.Identity()])
    pipe.set_ip_adapter_scale(0.2)
    both = torch.cat([negative, tokens])[:, None]
    theirs = pipe(generator=torch.Generator().manual_seed(3), ip_adapter_image_embeds=[both], **asked).images
    assert (after - theirs).abs().max() <= 1e-5 and (after - before).abs().max() > 1e-2


@torch.no_grad()
def test_the_released_samplers_settings_are_those_that_are_used(release, monkeypatch):
    assert find_preset("sdxl").sampling_steps == 50
    img, calls, text, passes = load_img(preset(release)), [], [], []
    plain, forward = module.draw, img.aligner.forward
    monkeypatch.setattr(module, "draw", lambda *a, **k: calls.append(k) or plain(*a, **k))
    monkeypatch.setattr(img.aligner, "forward", lambda h, c, m, n: passes.append((n, h.dtype)) or forward(h, c, m, n))
    noise = []

    def watch(_, arguments, named):
        text.append(named["encoder_hidden_states"])
        noise.append(arguments[0][:1])

    img.backbone.pipe.unet.register_forward_pre_hook(watch, with_kwargs=True)
    img.stages([PROMPT], [3])
    first, second = calls
    assert first["guidance_scale"] == second["guidance_scale"] == 7.5
    assert first["tokens"] is None and (second["scale"], second["scale_end"]) == (0.2, 1.0)
    assert passes == [(3, torch.float32)]
    prompt = img.backbone.image_prompt
    grey = prompt.encoder(torch.zeros(1, 3, 224, 224), output_hidden_states=True).hidden_states[-2]
    own = Resampler.from_state_dict(torch.load(release / "ip-adapter-other.bin", weights_only=True)["image_proj"])
    assert torch.equal(second["negative"], own(grey)), "of the adapter's own Resampler, as in the release"
    assert not torch.allclose(second["negative"], prompt.resampler(grey), atol=1e-2)
    assert all((states[0] == 0).all() and (states[1] != 0).any() for states in text), "negative text is zeros"
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(noise[0], noise[2]), "both passes start from the same noise"
    assert torch.allclose(noise[0] / noise[0].std(), start / start.std(), atol=1e-5)


def test_one_unet_is_made_and_swapping_it_changes_nothing_else(release, monkeypatch):
    made, init = [], UNet2DConditionModel.__init__
    counting = wraps(init)(lambda self, *a, **k: made.append(1) or init(self, *a, **k))  # diffusers reads its signature
    monkeypatch.setattr(UNet2DConditionModel, "__init__", counting)
    plain = load_backbone(preset(release))
    assert len(made) == 1
    dpo = load_backbone(preset(release, unet=str(release / "dpo" / "unet")))
    assert len(made) == 2
    names = {name for name, part in plain.pipe.components.items() if isinstance(part, nn.Module)}
    assert names == {"unet", "vae", "text_encoder", "text_encoder_2"}
    states = {name: [getattr(p.pipe, name).state_dict() for p in (plain, dpo)] for name in names}
    states |= {name: [getattr(p, name).state_dict() for p in (plain, dpo)] for name in ("branch", "image_prompt")}
    same = {name: all(torch.equal(a[k], b[k]) for k in a) for name, (a, b) in states.items()}
    assert same == {name: name != "unet" for name in states}
    loaded = states["unet"][1]["conv_in.weight"]
    assert torch.equal(loaded, UNet2DConditionModel.from_pretrained(release / "dpo" / "unet").conv_in.weight)
    tokens = plain.tokens([Image.new("RGB", (64, 64), "red")])
    assert not torch.equal(*(p.draw([PROMPT], [0], tokens) for p in (plain, dpo)))


def test_a_base_without_a_unet_of_its_own_is_enough_when_one_is_named(release, tmp_path):
    shutil.copytree(release / "base", tmp_path / "base", ignore=lambda *_: ["unet"])
    bare = {"base": str(tmp_path / "base"), "unet": str(release / "dpo" / "unet")}
    assert load_backbone(preset(release, **bare)).draw([PROMPT], [0]).shape == (1, 3, 64, 64)


def test_the_released_layouts_give_the_same_tensors_as_safetensors(release, tmp_path):
    def same(first: dict, second: dict) -> bool:
        return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)

    aligner = ImplicitAligner.from_file(release / "aligner.safetensors").state_dict()
    assert same(ImplicitAligner.from_file(release / "aligner_sdxl.pth").state_dict(), aligner)
    for k, wrapped in enumerate(({"state_dict": aligner}, {"step": 3, "model": {"module": aligner}})):
        torch.save(wrapped, tmp_path / f"{k}.pth")
        assert same(ImplicitAligner.from_file(tmp_path / f"{k}.pth").state_dict(), aligner)
    flat = load_ip_adapter(release / "ip-adapter.safetensors")
    others = [("half", "resampler.pth"), ("other", "resampler.pth"), ("other", "ip-adapter-whole.bin")]
    for name, resampler in [("whole", None), *others]:
        parts = load_ip_adapter(release / f"ip-adapter-{name}.bin", resampler and release / resampler)
        assert all(same(a, b) for a, b in zip(parts, flat)), name
    torch.save({f"module.{k}": v for k, v in flat[0].items()}, tmp_path / "resampler.pth")
    assert same(load_ip_adapter(release / "ip-adapter-other.bin", tmp_path / "resampler.pth")[0], flat[0])
    with pytest.raises(WeightsError, match="half.bin: has no 'image_proj'"):
        load_ip_adapter(release / "ip-adapter-half.bin")


def test_what_is_saved_as_pth_is_a_plain_state_dict_and_safetensors_come_with_their_sizes(release, tmp_path):
    aligner = ImplicitAligner.from_file(release / "aligner_sdxl.pth")
    aligner.save(tmp_path / "a.pth")
    plain = torch.load(tmp_path / "a.pth", weights_only=True)
    assert plain.keys() == {k.removeprefix("module.") for k in read_weights(release / "aligner_sdxl.pth")}
    assert all(type(v) is torch.Tensor for v in plain.values())
    assert (release / "aligner.json").read_text() == (
        '{\n "width": 64,\n "guidance_width": 160,\n "depth": 2,\n "heads": 1,\n "head_dim": 64\n}\n'
    )


def test_half_precision_takes_fp16_files_and_decodes_in_fp32(release, tmp_path):
    pipe = new_base().to(torch.float16)
    pipe.save_pretrained(tmp_path / "base", variant="fp16")
    assert not list((tmp_path / "base" / "unet").glob("*model.safetensors"))
    backbone = load_backbone(preset(release, base=str(tmp_path / "base"), dtype="fp16"))
    assert backbone.pipe.unet.dtype == backbone.pipe.text_encoder.dtype == backbone.image_prompt.encoder.dtype
    assert backbone.pipe.unet.dtype == torch.float16 and backbone.pipe.vae.dtype == torch.float32
    assert backbone.image_prompt.resampler.latents.dtype == torch.float32
    seen = []
    backbone.pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    tokens = backbone.tokens([Image.new("RGB", (64, 64), "red")])
    images = backbone.draw([PROMPT], [0], tokens)
    assert seen == [torch.float32] and images.dtype == torch.float32 and images.isfinite().all()
    # fp32 from the same folder works, too: half files are better than none
    assert load_backbone(preset(release, base=str(tmp_path / "base"))).pipe.unet.dtype == torch.float32


def test_a_prompt_beyond_77_tokens_is_drawn_with_a_warning_that_says_what_is_cut(
    release, tmp_path, monkeypatch, capsys
):
    command(monkeypatch, release, "--output", tmp_path, "--prompt", "a red circle " * 26 + "above", "--no-explain")
    assert sample.main() == 0
    [warning] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "77 tokens" in warning and "'a red circle above'" in warning, warning


def test_pictures_saved_are_the_pictures_drawn(release, tmp_path, monkeypatch):
    drawn, plain = [], module.SDXLBackbone.draw
    monkeypatch.setattr(module.SDXLBackbone, "draw", lambda *a, **k: drawn.append(plain(*a, **k)) or drawn[-1])
    command(monkeypatch, release, "--output", tmp_path, "--num-images", 1, "--no-explain")
    assert sample.main() == 0
    saved = from_pil([Image.open(tmp_path / "seed0-1-round1.png")])
    assert (saved - drawn[1]).abs().max() <= 0.5 / 255 + 1e-6
