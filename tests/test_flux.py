"""FLUX takes image tokens, draws and trains as its authors do, and other models' files are told apart in one line."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from flux_folder import edit, locations, new_transformer, preset, public_names, write_flux
from pair_files import rows, write
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from img_minimal.aligner import ImplicitAligner
from img_minimal.flux import TokenProjection, load_ip_adapter
from img_minimal.flux import DecoupledAttention, ImageBranch, inject
from img_minimal.bench.memory import parts
from img_minimal.hub.weights import WeightsError, fill
from img_minimal.load import load_backbone, load_img
from img_minimal.presets import find_preset
from img_minimal.devices import parameters
from img_minimal.cli import UserError
from img_minimal.files import to_pil

PROMPT = "a red circle"
B, S, T, N, D = 2, 16, 5, 4, 48


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    write_flux(folder)
    return folder


def velocity(transformer: FluxTransformer2DModel, batch: int = B, **more: object) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    places = torch.zeros(S, 3)
    places[:, 1], places[:, 2] = torch.arange(S) // 4, torch.arange(S) % 4
    return transformer(
        torch.randn(batch, S, 64, generator=random), torch.randn(batch, T, D, generator=random),
        torch.randn(batch, 32, generator=random), torch.full([batch], 0.6), places, torch.zeros(T, 3),
        torch.full([batch], 3.5), **more,
    ).sample  # fmt: skip


def tokens(batch: int = B) -> torch.Tensor:
    return torch.randn(batch, N, D, generator=torch.Generator().manual_seed(2))


def new_branch(transformer: FluxTransformer2DModel) -> ImageBranch:
    branch = ImageBranch.for_transformer(transformer)
    torch.manual_seed(1)
    for p in branch.parameters():
        nn.init.normal_(p, std=0.3)
    return branch


def with_diffusers_adapter(transformer: FluxTransformer2DModel, branch: ImageBranch, scale: float) -> None:
    """Put the same weights into diffusers' own processors."""
    processors = transformer.attn_processors
    for i in range(len(branch)):
        own = FluxIPAdapterAttnProcessor(32, D, scale=scale)
        pair = branch[str(i)]
        own.load_state_dict({
            "to_k_ip.0.weight": pair["to_k_ip"].weight, "to_k_ip.0.bias": pair["to_k_ip"].bias,
            "to_v_ip.0.weight": pair["to_v_ip"].weight, "to_v_ip.0.bias": pair["to_v_ip"].bias,
        })  # fmt: skip
        processors[f"transformer_blocks.{i}.attn.processor"] = own
    transformer.set_attn_processor(processors)
    transformer.encoder_hid_proj = MultiIPAdapterImageProjection([nn.Identity()])


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 0.2, 1.0])
def test_injection_equals_diffusers_own_flux_ip_adapter(scale):
    transformer = new_transformer()
    branch = new_branch(transformer)
    plain = velocity(transformer)
    with inject(transformer, branch, tokens(), scale):
        ours = velocity(transformer)
    with_diffusers_adapter(transformer, branch, scale)
    theirs = velocity(transformer, joint_attention_kwargs={"ip_adapter_image_embeds": [tokens()[:, None]]})
    assert (ours - theirs).abs().max() <= 1e-5
    assert ((ours - plain).abs().max() > 1e-3) == (scale > 0)


@torch.no_grad()
def test_at_scale_zero_and_after_the_context_the_transformer_is_bitwise_untouched():
    transformer = new_transformer()
    branch, before, own = new_branch(transformer), velocity(transformer), transformer.attn_processors
    with inject(transformer, branch, tokens(), 0.0):
        assert torch.equal(velocity(transformer), before)
    with pytest.raises(KeyError), inject(transformer, branch, tokens(), 1.0):
        during = transformer.attn_processors
        assert not torch.equal(velocity(transformer), before)
        raise KeyError
    double = [name for name in own if name.startswith("transformer_blocks")]
    assert all(isinstance(during[name], DecoupledAttention) == (name in double) for name in own)
    assert torch.equal(velocity(transformer), before)
    assert all(transformer.attn_processors[name] is own[name] for name in own)


def test_what_does_not_fit_is_refused():
    transformer = new_transformer()
    branch = new_branch(transformer)
    with pytest.raises(ValueError, match="batch of 4.*tokens for 2"), inject(transformer, branch, tokens(), 1.0):
        velocity(transformer, batch=4)
    with pytest.raises(ValueError, match=f"tokens, {D}"), inject(transformer, branch, torch.zeros(B, N, 7), 1.0):
        pass
    del branch["1"]
    with pytest.raises(ValueError, match="made for this transformer"), inject(transformer, branch, tokens(), 1.0):
        pass


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 0.2])
def test_thirty_steps_equal_two_calls_of_diffusers_pipeline(flux, scale):
    """Step 0 without true guidance, the other 29 with it: what the authors' sampler does, told to diffusers."""
    backbone = load_backbone(preset(flux, sampling_steps=30))
    c = tokens(1)
    ours = backbone.draw([PROMPT], [5], c, scale=scale)

    pipe = FluxPipeline.from_pretrained(flux / "base", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        config, base_image_seq_len=64 * 256, max_image_seq_len=64 * 4096
    )
    more = {"prompt": PROMPT, "negative_prompt": "", "guidance_scale": 3.5, "max_sequence_length": 24, "height": 64,
            "width": 64, "output_type": "latent"}  # fmt: skip
    if scale:
        with_diffusers_adapter(pipe.transformer, backbone.branch, scale)
        more |= {"ip_adapter_image_embeds": [c[:, None]]}
        more |= {"negative_ip_adapter_image_embeds": [backbone.negative_tokens()[:, None]]}

    def stop(pipe: FluxPipeline, *_: object) -> dict:
        pipe._interrupt = True
        return {}

    first = pipe(
        num_inference_steps=30, true_cfg_scale=1.0, callback_on_step_end=stop,
        sigmas=torch.linspace(1, 1 / 30, 30).tolist(), generator=torch.Generator().manual_seed(5), **more,
    ).images  # fmt: skip
    rest = torch.linspace(1, 1 / 30, 30)[1:].tolist()
    latents = pipe(num_inference_steps=29, true_cfg_scale=3.5, latents=first, sigmas=rest, **more).images
    latents = pipe._unpack_latents(latents, 64, 64, pipe.vae_scale_factor)
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    theirs = pipe.image_processor.postprocess(decoded, output_type="pt")
    assert (ours - theirs).abs().max() <= 1e-5


def test_the_presets_numbers_are_those_of_the_authors_demo():
    flux = find_preset("flux")
    assert (flux.sampling_steps, flux.guidance_scale, flux.true_cfg_scale) == (30, 3.5, 3.5)
    assert (flux.scale, flux.scale_end, flux.passes, flux.dtype) == (0.2, 1.0, 3, "bf16")
    assert (flux.base, flux.aligner) == ("black-forest-labs/FLUX.1-dev", "shi-labs/IMG/aligner_flux.pth")
    assert flux.mllm == find_preset("sdxl").mllm


@pytest.mark.parametrize(
    ("size", "mu"), [((512, 512), 0.459375), ((1024, 1024), 0.4675), ((1360, 768), 0.467331), ((2048, 2048), 0.5)]
)
def test_the_schedule_is_shifted_as_the_authors_shift_it(flux, size, mu):
    from img_minimal.flux import schedule

    pipe = load_backbone(preset(flux)).pipe
    sigmas = schedule(pipe, 30, size[0] * size[1] // 256, torch.device("cpu"))
    t = torch.linspace(1, 1 / 30, 30, dtype=torch.float64)
    expected = torch.exp(torch.tensor(mu)) / (torch.exp(torch.tensor(mu)) + 1 / t - 1)
    assert len(sigmas) == 31 and sigmas[-1] == 0
    assert (sigmas[:-1].double() - expected).abs().max() < 2e-4


@torch.no_grad()
def test_the_whole_method_draws_with_flux_and_negative_tokens_are_a_black_picture(flux):
    img = load_img(preset(flux))
    prompt = img.backbone.image_prompt
    assert img.backbone.token_shape == (4, D) and img.passes == 3
    assert torch.equal(prompt.negative(), prompt.tokens([Image.new("RGB", (300, 200))]))
    before, after = img.stages([PROMPT], [1])
    assert before.shape == after.shape == (1, 3, 64, 64) and not torch.equal(before, after)
    c = img.backbone.tokens(to_pil(before))
    expected = prompt.projection(prompt.encoder(prompt.processor(to_pil(before), return_tensors="pt").pixel_values)[0])
    assert torch.allclose(c, expected, atol=1e-6)
    offloaded = load_img(preset(flux, offload=True)).stages([PROMPT], [1])
    assert torch.equal(after, offloaded[1])


def test_sample_draws_with_flux_by_flags_alone(flux, tmp_path, call):
    flags = [f"--{name.replace('_', '-')}={path}" for name, path in locations(flux).items()]
    size = ("--height", 64, "--width", 96, "--steps", 2, "--dtype", "fp32", "--num-images", 1)
    done = call("sample.py", "--model", "flux", "--prompt", PROMPT, *flags, *size, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "seed0-1-round1.png").size == (96, 64)


def test_an_aligner_for_flux_is_trained_without_transformer_text_encoder_or_vae(flux, tmp_path, monkeypatch, call):
    def never(*_, **__):
        raise AssertionError("a model that draws was loaded for training")

    for model in (FluxPipeline, FluxTransformer2DModel):
        monkeypatch.setattr(model, "from_pretrained", never)
    where = {k: v for k, v in locations(flux).items() if k != "aligner"}
    flags = [f"--{name.replace('_', '-')}={path}" for name, path in where.items()]
    pairs = write(tmp_path / "pairs", rows(24))
    done = call(
        "train.py", "--model", "flux", *flags, "--pairs", pairs, "--steps", 2, "--batch-size", 4, "--dtype", "fp32",
        "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "plan: an aligner for flux" in done.stdout
    assert ImplicitAligner.from_file(tmp_path / "run" / "aligner.safetensors").width == D


# Files of other models


def refused(flux: Path, **changed: object) -> str:
    with pytest.raises(UserError) as caught:
        load_img(preset(flux, **changed))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_aligner_of_the_other_backbone_is_refused_both_ways(flux, release, tmp_path):
    from release_folder import preset as sdxl

    said = refused(flux, aligner=str(release / "aligner_sdxl.pth"))
    assert "image tokens of width 64" in said and "have width 48" in said
    with pytest.raises(UserError, match="image tokens of width 48.*have width 64"):
        load_img(sdxl(release, aligner=str(flux / "aligner_flux.pth")))


def test_other_adapters_are_refused_with_what_to_use(flux, release, tmp_path):
    state = load_file(flux / "ip_adapter.safetensors")
    sixteen = public_names(TokenProjection(24, D, tokens=16), ImageBranch.for_transformer(new_transformer()))
    cases = {
        "v2": (sixteen, "makes 16 tokens of an image, expected 4"),
        "unknown": (state | {"single_blocks.0.x.weight": torch.zeros(1)}, "unknown key 'single_blocks.0.x.weight'"),
        "half": ({k: v for k, v in state.items() if "proj_model" not in k}, "has no 'ip_adapter_proj_model.' weights"),
        "short": ({k: v for k, v in state.items() if "double_blocks.1." not in k}, "lacks '1.to_k_ip.bias'"),
    }
    for name, (content, words) in cases.items():
        save_file(content, tmp_path / f"{name}.safetensors")
        said = refused(flux, ip_adapter=str(tmp_path / f"{name}.safetensors"))
        assert words in said and f"{name}.safetensors" in said
    said = refused(flux, ip_adapter=str(release / "ip-adapter-whole.bin"))  # InstantX nests its parts like this
    assert "unknown key" in said and "XLabs-AI/flux-ip-adapter" in said


def test_other_flux_models_are_refused_before_anything_is_loaded(flux, tmp_path, monkeypatch):
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    for name, path, values, words in (
        ("schnell", "transformer/config.json", {"guidance_embeds": False}, "no guidance embedding.*FLUX.1-dev"),
        ("flux2", "model_index.json", {"_class_name": "Flux2Pipeline"}, "is a Flux2Pipeline.*FLUX.1-dev"),
    ):
        shutil.copytree(flux / "base", tmp_path / name)
        edit(tmp_path / name / path, **values)
        with pytest.raises(UserError, match=words):
            load_backbone(preset(flux, base=str(tmp_path / name)))


def test_a_size_that_is_no_multiple_of_16_and_a_unet_are_refused(flux):
    with pytest.raises(UserError, match="--height is 100.*multiples of 16"):
        load_backbone(preset(flux, height=100))
    with pytest.raises(UserError, match="no UNet"):
        load_backbone(preset(flux, unet=str(flux / "base" / "transformer")))


def test_a_prompt_that_t5_does_not_read_to_its_end_is_told(flux):
    backbone = load_backbone(preset(flux))
    assert backbone.truncated_part(PROMPT) == ("", 24)
    cut, limit = backbone.truncated_part("a red circle " * 10)
    assert limit == 24 and cut.startswith("circle") or cut.startswith("a") or cut.startswith("red")


# The true size


@pytest.fixture(scope="module")
def true_parts() -> dict[str, nn.Module]:
    return parts()


def test_the_public_files_fill_our_modules_at_true_size_and_nothing_is_left_over(true_parts, tmp_path):
    shapes = {"ip_adapter_proj_model.proj.weight": (16384, 768), "ip_adapter_proj_model.proj.bias": (16384,),
              "ip_adapter_proj_model.norm.weight": (4096,), "ip_adapter_proj_model.norm.bias": (4096,)}  # fmt: skip
    for i in range(19):
        for kind in "kv":
            name = f"double_blocks.{i}.processor.ip_adapter_double_stream_{kind}_proj"
            shapes |= {f"{name}.weight": (3072, 4096), f"{name}.bias": (3072,)}
    assert len(shapes) == 80
    ours = public_names(true_parts["projection"], true_parts["branch"])
    assert {key: tuple(value.shape) for key, value in ours.items()} == shapes
    counts = {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656, "text_encoder": 123_060_480,
              "image_encoder": 303_966_208, "branch": 478_267_392, "projection": 12_607_488,
              "vae": 83_819_683}  # fmt: skip
    assert {name: parameters(model) for name, model in true_parts.items()} == counts


def test_the_released_aligner_fills_ours_at_true_size():
    with torch.device("meta"):
        aligner = ImplicitAligner(4096, 5120)
        state = {key: torch.empty(value.shape) for key, value in aligner.state_dict().items()}
        fill(ImplicitAligner(4096, 5120), state, "aligner_flux.pth")
    assert parameters(aligner) == 675_401_728
    with pytest.raises(WeightsError, match="unknown key"), torch.device("meta"):
        fill(ImplicitAligner(4096, 5120), state | {"more": torch.empty(1)}, "aligner_flux.pth")


def test_an_adapter_file_gives_its_two_parts(flux):
    projection, branch = load_ip_adapter(flux / "ip_adapter.safetensors")
    assert set(projection) == {"proj.weight", "proj.bias", "norm.weight", "norm.bias"}
    assert set(branch) == {f"{i}.to_{kind}_ip.{name}" for i in (0, 1) for kind in "kv" for name in ("weight", "bias")}


def test_flux_and_sdxl_differ_in_a_preset_and_not_in_code():
    flux, sdxl = find_preset("flux"), find_preset("sdxl")
    differ = {name for name in vars(flux) if getattr(flux, name) != getattr(sdxl, name)}
    assert differ == {"name", "backbone", "base", "image_encoder", "ip_adapter", "resampler", "aligner",
                      "stock_aligner", "text_aligner", "sampling_steps", "guidance_scale", "true_cfg_scale",
                      "dtype"}  # fmt: skip
