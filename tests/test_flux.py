"""FLUX takes image tokens, draws and trains as its authors do, and refuses other models' files."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from flux_folder import WIDTH, locations, new_adapter, preset, public_names
from mllm_folders import edit
from pair_files import rows, write
from PIL import Image
from refusals import refused
from release_folder import flags
from safetensors.torch import load_file, save_file
from torch import nn

from img_minimal.aligner import ImplicitAligner
from img_minimal.backbone import open_backbone
from img_minimal.bench.memory import models
from img_minimal.devices import count_parameters
from img_minimal.files import to_pil
from img_minimal.flux import authors_scheduler, inject, set_scale
from img_minimal.pipeline import IMG
from img_minimal.presets import find_preset

PROMPT = "a red circle"
TOKENS = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def img(flux) -> IMG:
    return IMG(preset=preset(flux))


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 0.2, 1.0])
def test_thirty_steps_equal_two_calls_of_diffusers_pipeline_with_the_same_adapter_file(flux, scale):
    """Tell diffusers what the authors' sampler does: step 0 without true guidance, then with it."""
    backbone = open_backbone(preset(flux, steps=30))
    ours = backbone.draw([PROMPT], [5], TOKENS, scale=scale)

    pipe = FluxPipeline.from_pretrained(flux / "base", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    longer = {"base_image_seq_len": 64 * 256, "max_image_seq_len": 64 * 4096}
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **longer)
    more = {"prompt": PROMPT, "negative_prompt": "", "guidance_scale": 3.5, "output_type": "latent"}
    more |= {"max_sequence_length": 24, "height": 64, "width": 64}
    if scale:
        encoder = str(flux / "image_encoder")
        pipe.load_ip_adapter(
            str(flux),
            weight_name="ip_adapter.safetensors",
            image_encoder_pretrained_model_name_or_path=encoder,
        )
        pipe.set_ip_adapter_scale(scale)
        pipe.transformer.encoder_hid_proj.image_projection_layers = nn.ModuleList([nn.Identity()])
        more |= {"ip_adapter_image_embeds": [TOKENS[:, None]]}
        more |= {"negative_ip_adapter_image_embeds": [backbone.negative_tokens()[:, None]]}

    def stop(pipe: FluxPipeline, *_: object) -> dict:
        pipe._interrupt = True
        return {}

    sigmas = torch.linspace(1, 1 / 30, 30).tolist()
    noise = torch.Generator().manual_seed(5)
    first = {"true_cfg_scale": 1.0, "callback_on_step_end": stop, "generator": noise}
    latents = pipe(num_inference_steps=30, sigmas=sigmas, **first, **more).images
    rest = {"true_cfg_scale": 3.5, "latents": latents, "sigmas": sigmas[1:]}
    latents = pipe(num_inference_steps=29, **rest, **more).images
    latents = pipe._unpack_latents(latents, 64, 64, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    theirs = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pt")
    assert (ours - theirs).abs().max() <= 1e-5


def test_at_scale_zero_and_after_the_context_the_transformer_is_bitwise_untouched(img):
    backbone = img.backbone
    before, own = backbone.draw([PROMPT], [5]), backbone.pipe.transformer.attn_processors
    assert torch.equal(backbone.draw([PROMPT], [5], TOKENS, scale=0.0), before)
    assert (backbone.draw([PROMPT], [5], TOKENS, scale=1.0) - before).abs().max() > 1e-3
    assert torch.equal(backbone.draw([PROMPT], [5]), before)
    with pytest.raises(KeyError), inject(backbone.pipe.transformer, backbone.branch):
        set_scale(backbone.branch, 1.0)
        raise KeyError
    after = backbone.pipe.transformer.attn_processors
    assert all(after[name] is processor for name, processor in own.items())


def test_the_presets_numbers_are_those_of_the_authors_demo():
    models, sampling = find_preset("flux").models, find_preset("flux").sampling
    assert (sampling.steps, sampling.guidance_scale, sampling.true_cfg_scale) == (30, 3.5, 3.5)
    assert (sampling.scale, sampling.scale_end, sampling.passes) == (0.2, 1.0, 3)
    assert (models.base, models.dtype) == ("black-forest-labs/FLUX.1-dev", "bf16")
    assert sampling.aligner == "shi-labs/IMG/aligner_flux.pth"
    assert models.mllm == find_preset("sdxl").models.mllm


@pytest.mark.parametrize(
    ("width", "height", "mu"),
    [(512, 512, 0.459375), (1024, 1024, 0.4675), (1360, 768, 0.467331), (2048, 2048, 0.5)],
)
def test_the_schedule_is_shifted_as_the_authors_shift_it(img, width, height, mu):
    config = authors_scheduler(img.backbone.pipe.scheduler).config
    names = "base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"
    assert calculate_shift(width * height // 256, *map(config.get, names)) == pytest.approx(
        mu, abs=2e-4
    )


@pytest.mark.parametrize("more", [{}, {"sigmas": [1.0, 0.7, 0.2]}, {"max_sequence_length": 8}])
def test_one_setting_draws_fluxpipelines_own_first_picture(flux, img, more):
    """Without the authors' sampler, and with true guidance as FluxPipeline has it, in all steps."""
    pipe, asked = img.backbone.pipe, {"num_inference_steps": 3, "height": 64, "width": 32}
    for scale in (1.0, 2.0):
        theirs = {"true_cfg_scale": scale, "negative_prompt": "a cross", "guidance_scale": 3.5}
        theirs |= {"max_sequence_length": 24, "output_type": "pt", **asked, **more}
        expected = to_pil(pipe(PROMPT, generator=torch.Generator().manual_seed(5), **theirs).images)
        options = {"authors_sampler": False, "true_cfg_scale": scale, "negative_prompt": "a cross"}
        ours = img(PROMPT, 5, **options, **asked, **more).initial
        difference = np.subtract(ours[0], expected[0], dtype=int)
        assert np.abs(difference).max() <= (scale > 1)
    with img.drawing(height=100, width=64), refused("--height is 100", "multiples of 16"):
        img(PROMPT)


@torch.no_grad()
def test_the_whole_method_draws_with_flux_and_no_image_is_a_black_one(img):
    before, after = map(torch.stack, img.stages([PROMPT], [1]))
    assert before.shape == after.shape == (1, 3, 64, 64) and not torch.equal(before, after)
    prompt = img.backbone.image_prompt
    black = Image.new("RGB", (300, 200))
    assert torch.equal(prompt.negative(), prompt.tokens([black]))
    pooled = prompt.encoder(prompt.pixels(to_pil(before))).image_embeds
    assert torch.allclose(img.backbone.tokens(to_pil(before)), prompt.head(pooled), atol=1e-6)


def test_sample_draws_with_flux_by_flags_alone(flux, tmp_path, call):
    size = ("--height", 64, "--width", 96, "--steps", 2, "--dtype", "fp32", "--num-images", 1)
    words = ("--model", "flux", "--prompt", PROMPT, "--output", tmp_path, *size)
    done = call("sample.py", *words, *flags(locations(flux)))
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "seed0-1-round1.png").size == (96, 64)


def test_an_aligner_for_flux_is_trained_without_the_models_that_draw(
    flux, tmp_path, monkeypatch, call
):
    for model in (FluxPipeline, FluxTransformer2DModel):
        monkeypatch.setattr(model, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    files = locations(flux)
    del files["aligner"]
    more = ("--pairs", write(tmp_path / "pairs", rows(24)), "--steps", 2, "--batch-size", 4)
    more += ("--dtype", "fp32", "--output-dir", tmp_path / "run")
    done = call("train.py", "--model", "flux", *flags(files), *more)
    assert done.returncode == 0, done.stderr
    assert "plan: an aligner for flux" in done.stdout
    assert ImplicitAligner.from_file(tmp_path / "run" / "aligner.safetensors").width == WIDTH


def test_an_aligner_of_the_other_backbone_is_refused(flux, release):
    with refused("image tokens of width 64", "these have width 48"):
        IMG(preset=preset(flux, aligner=str(release / "aligner_sdxl.pth")))


def without(part: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in new_adapter().items() if part not in key}


def test_other_adapters_are_refused(flux, release, tmp_path):
    path, state = tmp_path / "ip.safetensors", new_adapter()
    cases = {
        "makes 16 tokens of an image, expected 4": new_adapter(tokens=16),
        "unknown key 'single.weight'": state | {"single.weight": torch.zeros(1)},
        "lacks 'norm.weight'": without("_model.norm.weight"),
        "lacks '0.to_k_ip.0.weight'": without("blocks.0."),
        'Missing key(s) in state_dict: "1.to_k_ip': without("blocks.1."),
        # InstantX nests its parts as IP-Adapter Plus does.
        "XLabs-AI/flux-ip-adapter": load_file(release / "ip-adapter.safetensors"),
    }
    for words, content in cases.items():
        save_file(content, path)
        with refused("ip.safetensors", words):
            open_backbone(preset(flux, ip_adapter=str(path)))


@pytest.mark.parametrize(
    ("path", "values", "words"),
    [
        ("transformer/config.json", {"guidance_embeds": False}, "no guidance embedding"),
        ("model_index.json", {"_class_name": "Flux2Pipeline"}, "is a Flux2Pipeline"),
    ],
)
def test_other_flux_models_are_refused_before_anything_is_loaded(
    flux, tmp_path, monkeypatch, path, values, words
):
    shutil.copytree(flux / "base", tmp_path / "base")
    edit(tmp_path / "base" / path, **values)
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with refused(words, "FLUX.1-dev"):
        open_backbone(preset(flux, base=str(tmp_path / "base")))


def test_a_size_that_is_no_multiple_of_16_and_a_unet_are_refused(flux):
    with refused("--height is 100", "multiples of 16"):
        open_backbone(preset(flux, height=100))
    with refused("no UNet"):
        open_backbone(preset(flux, unet=str(flux / "base" / "transformer")))


def test_the_end_of_a_prompt_that_t5_does_not_read_is_known(img):
    assert img.backbone.truncated_part(PROMPT) == ("", 24)
    unseen, limit = img.backbone.truncated_part("a red circle " * 10)
    assert limit == 24 and unseen and ("a red circle " * 10).endswith(unseen)


def test_the_public_files_fill_our_modules_at_true_size_and_none_is_left_over():
    parts = models("flux", "llava-13b")
    shapes = {
        "ip_adapter_proj_model.proj.weight": (16384, 768),
        "ip_adapter_proj_model.proj.bias": (16384,),
        "ip_adapter_proj_model.norm.weight": (4096,),
        "ip_adapter_proj_model.norm.bias": (4096,),
    }
    for i in range(19):
        for kind in "kv":
            name = f"double_blocks.{i}.processor.ip_adapter_double_stream_{kind}_proj"
            shapes |= {f"{name}.weight": (3072, 4096), f"{name}.bias": (3072,)}
    ours = public_names(parts["head"], parts["branch"])
    assert {key: tuple(value.shape) for key, value in ours.items()} == shapes
    counts = {
        "transformer": 11_901_408_320,
        "text_encoder_2": 4_762_310_656,
        "text_encoder": 123_060_480,
        "image_encoder": 303_966_208,
        "branch": 478_267_392,
        "head": 12_607_488,
        "vae": 83_819_683,
        "aligner": 675_401_728,
    }
    assert {name: count_parameters(parts[name]) for name in counts} == counts
