"""IMG wraps a pipeline of one's own: its first picture stays diffusers', bit for bit."""

from collections.abc import Callable
from itertools import cycle
from threading import Thread

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FluxPipeline,
    LCMScheduler,
    StableDiffusionXLPipeline,
)
from peft import LoraConfig
from PIL import Image, ImageChops
from refusals import refused
from release_folder import PROMPT, locations
from torch import nn

from img_minimal import IMG
from img_minimal.aligner import ImplicitAligner
from img_minimal.files import as_pictures, open_image
from img_minimal.mllm import MLLM
from img_minimal.presets import find_preset

ASKED = {"num_inference_steps": 3, "guidance_scale": 5.0}


@pytest.fixture
def pipe(release) -> StableDiffusionXLPipeline:
    return opened(StableDiffusionXLPipeline, release / "base", add_watermarker=False)


@pytest.fixture
def files(release) -> dict[str, str]:
    """Name what IMG needs in addition to a pipeline."""
    files = locations(release)
    del files["base"]
    return files


def opened(kind: type, folder: object, **options: bool) -> DiffusionPipeline:
    pipe = kind.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler(kind: type) -> Callable[[DiffusionPipeline], None]:
    def change(pipe: DiffusionPipeline) -> None:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)

    return change


def lora(pipe: DiffusionPipeline) -> None:
    torch.manual_seed(0)
    targets = ["to_k", "to_q", "to_v"]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def other_vae(pipe: DiffusionPipeline) -> None:
    """Exchange the VAE by one with other settings and no upcast, as sdxl-vae-fp16-fix is."""
    settings = dict(pipe.vae.config) | {"force_upcast": False, "scaling_factor": 0.5}
    pipe.vae = AutoencoderKL.from_config(settings).eval()


def slicing(pipe: DiffusionPipeline) -> None:
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()


def fp8(pipe: DiffusionPipeline) -> None:
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


class Quantized(nn.Linear):
    """Keep the weight in another type and shape than it computes in, as quantizers do."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features)
        self.bias, self.step = linear.bias, linear.weight.abs().max().item() / 127
        packed = (linear.weight / self.step).round().to(torch.int8).view(torch.uint8).flatten()
        self.weight = nn.Parameter(packed[:, None], requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.view(torch.int8).view(self.out_features, self.in_features)
        return nn.functional.linear(x, weight.to(x.dtype) * self.step, self.bias)


def quantize(pipe: DiffusionPipeline) -> None:
    for module in list(pipe.unet.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Quantized(child))


def offload(pipe: DiffusionPipeline) -> None:
    """Leave the UNet's weights on the meta device between calls, as sequential offloading does."""
    cpu_offload(pipe.unet, "cpu", offload_buffers=True)


CHANGES = {
    "fp8": fp8,
    "quantized": quantize,
    "offload": offload,
    "ancestral": scheduler(EulerAncestralDiscreteScheduler),
    "dpm++": scheduler(DPMSolverMultistepScheduler),
    "lcm": scheduler(LCMScheduler),
    "lora": lora,
    "vae": other_vae,
    "slicing": slicing,
}


def differ(one: Image.Image, other: Image.Image) -> int:
    """Return the largest difference between two images in grey levels."""
    extrema = ImageChops.difference(one, other).getextrema()
    return max(most for _, most in extrema)


@pytest.mark.parametrize(("change", "negative"), zip(CHANGES, cycle([None, "blurry"])))
def test_the_first_picture_is_diffusers_own_and_the_second_is_drawn(files, pipe, change, negative):
    def plain() -> bytes:
        noise = torch.Generator().manual_seed(3)
        return pipe(PROMPT, negative_prompt=negative, generator=noise, **ASKED).images[0].tobytes()

    CHANGES[change](pipe)
    before, parts = plain(), dict(pipe.components)
    processors = list(pipe.unet.attn_processors.values())
    out = IMG(pipe, **files)(PROMPT, seed=3, negative_prompt=negative, **ASKED)
    assert out.initial[0].tobytes() == before
    assert differ(out.images[0], out.initial[0]), "the tokens change nothing"
    assert len(out.said) == 1 and isinstance(out.said[0], str)
    assert all(pipe.components[name] is part for name, part in parts.items())
    assert processors == list(pipe.unet.attn_processors.values())
    assert plain() == before


def test_several_images_take_one_negative_prompt_or_one_each_and_consecutive_seeds(files, pipe):
    img, prompts = IMG(pipe, **files), [PROMPT, "two red squares"]
    size, negatives = {"height": 64, "width": 32}, ["blurry", "a blue square"]
    out = img(prompts, seed=7, negative_prompt=negatives, **size, **ASKED)
    assert [image.size for image in out.initial + out.images] == [(32, 64)] * 4
    for k in range(2):
        alone = img(prompts[k], 7 + k, negative_prompt=negatives[k], **size, **ASKED)
        for pictures, expected in ((out.initial, alone.initial), (out.images, alone.images)):
            assert differ(pictures[k], expected[0]) <= 2
    again = img(PROMPT, seed=7, num_images_per_prompt=2, negative_prompt="blurry", **size, **ASKED)
    assert len(again.images) == 2 and differ(again.images[0], out.images[0]) <= 2
    for count, negative in ((2, ["a", "b", "c"]), (1, ["a", "b"])):
        with refused("negative_prompt has", f"one for each prompt: {count}"):
            img(prompts[:count], negative_prompt=negative, **ASKED)


def test_a_generator_means_its_state_and_is_advanced_as_in_diffusers(files, pipe):
    def used(seed: int = 3) -> torch.Generator:
        noise = torch.Generator().manual_seed(seed)
        torch.randn(16, generator=noise)
        return noise

    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    img, ours, theirs = IMG(pipe, **files), used(), used()
    prompts, seen = [PROMPT] * 2, []
    for _ in range(2):
        out = img(prompts, generator=ours, **ASKED)
        expected = pipe(prompts, generator=theirs, **ASKED).images
        assert [differ(*pair) for pair in zip(out.initial, expected)] == [0, 0]
        assert torch.equal(ours.get_state(), theirs.get_state())
        seen += out.initial
    assert differ(seen[0], seen[2]), "the next call has other noise"
    out = img(prompts, generator=[used(3), used(4)], **ASKED)
    expected = pipe(PROMPT, generator=used(4), **ASKED).images[0]
    assert differ(out.initial[1], expected) <= 2
    with refused("one generator draws all images together"):
        img(prompts, generator=used(), one_look=True, **ASKED)


def test_arguments_of_the_pipelines_call_reach_both_drawings_and_others_are_refused(files, pipe):
    img, steps = IMG(pipe, **files), []

    def watch(running: DiffusionPipeline, step: int, *_: object) -> dict:
        steps.append(step)
        return {}

    names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds"
    names += ("negative_pooled_prompt_embeds",)
    embeds = dict(zip(names, pipe.encode_prompt("two red squares", negative_prompt="blurry")))
    more = {"guidance_rescale": 0.3, "crops_coords_top_left": (8, 8), "timesteps": [900, 500, 90]}
    more |= {"cross_attention_kwargs": {"scale": 1.0}, "callback_on_step_end": watch}
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    noise = {"generator": torch.Generator().manual_seed(3)}
    expected = pipe(**embeds, **more, **noise, guidance_scale=5.0).images[0]
    out = img(PROMPT, seed=3, guidance_scale=5.0, **embeds, **more)
    assert differ(out.initial[0], expected) == 0 and differ(out.images[0], expected)
    assert steps == [0, 1, 2] * 3
    for name in ("colour", "output_type", "ip_adapter_image", "kwargs"):
        with refused(f"unknown argument {name!r}", "StableDiffusionXLPipeline's call"):
            img(PROMPT, **{name: 1})


def test_requests_that_cannot_be_drawn_as_they_say_are_refused_as_by_the_command(files, pipe):
    img, picture = IMG(pipe, **files), Image.new("RGB", (64, 64), "red")
    for words, more in (
        ("expected words", {"prompt": " "}),
        ("expected words", {"prompt": None}),
        ("there are no prompts", {"prompt": []}),
        ("a seed is '3'", {"seed": "3"}),
        ("a seed is 1.5", {"seed": 1.5}),
        ("--steps is 0", {"num_inference_steps": 0}),
        ("--height is 0", {"height": 0}),
        ("--width is 60, this model draws multiples of 8", {"width": 60}),
        ("--guidance-scale is -1", {"guidance_scale": -1}),
        ("--passes is 0", {"passes": 0}),
        ("saves nothing where timesteps", {"draft_steps": 1, "timesteps": [9, 5]}),
        ("there are no prompts", {"num_images_per_prompt": 0}),
    ):
        with refused(words):
            img(**{"prompt": PROMPT, **more})
    for pictures, prompts, seeds in ((3, 2, 3), (1, 1, 2), (64, 70, 70)):
        with refused("expected one for each"):
            img.align([picture] * pictures, [PROMPT] * prompts, [0] * seeds)
    with pytest.raises(ValueError, match="passes is 0"):
        img.align(picture, PROMPT, passes=0)
    with refused("2 prompts and 3 seeds"):
        img.stages([PROMPT] * 2, [1, 2, 3])
    pipe.unet.encoder_hid_proj = nn.Identity()
    with refused("has an IP-Adapter", "unload_ip_adapter"):
        IMG(pipe, **files)


def test_pictures_of_any_form_give_the_tokens_of_the_file_that_holds_them(files, pipe, tmp_path):
    backbone, pixels = IMG(pipe, **files).backbone, np.random.default_rng(0).random((20, 30, 3))
    rgb = Image.fromarray((pixels * 255).astype(np.uint8))
    clear, turned = rgb.copy(), rgb.copy()
    clear.putalpha(Image.fromarray((pixels[..., 0] * 255).astype(np.uint8)))
    turned.getexif()[0x0112] = 6
    dark = Image.fromarray((pixels[..., 0] * 200).astype(np.uint16))  # of 16 bits
    for k, picture in enumerate((rgb, clear, turned, dark, rgb.convert("P"), rgb.convert("L"))):
        picture.save(tmp_path / f"{k}.png", exif=picture.getexif())
        opened = open_image(str(tmp_path / f"{k}.png"))
        assert np.array_equal(opened, as_pictures(picture)[0]), picture.mode
    assert np.asarray(as_pictures(dark)[0]).max() == 1
    tensor = torch.from_numpy(np.asarray(rgb).copy()).permute(2, 0, 1)
    for same in (tensor, tensor[None] / 255, [tensor / 255]):
        assert np.array_equal(as_pictures(same)[0], rgb)
    assert torch.equal(backbone.tokens(as_pictures(turned)), backbone.tokens([turned]))
    for other in (tensor.float(), tensor / 127.5 - 1, tensor / 255 * np.nan, tensor.int(), "a.png"):
        with refused("a picture", "floats in [0, 1]"):
            as_pictures(other if isinstance(other, str) else other[None])
    for other in (torch.rand(1, 4, 8, 8), torch.rand(1, 8, 8), torch.rand(8, 8)):
        with refused("a picture"):
            as_pictures(other)
    with refused("32 bits"):
        as_pictures(Image.fromarray(pixels[..., 0].astype(np.float32)))


def test_two_threads_share_a_pipeline_and_an_error_leaves_it_as_it_was(files, pipe):
    imgs = [IMG(pipe, **files), IMG(pipe, **files)]
    imgs[1].guide, found = imgs[0].guide, {}
    expected = [img(PROMPT, seed=k, **ASKED) for k, img in enumerate(imgs)]
    before = list(pipe.unet.attn_processors.values())

    def draw(k: int) -> None:
        found[k] = imgs[k](PROMPT, seed=k, **ASKED)

    threads = [Thread(target=draw, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        for pictures in ("initial", "images"):
            pair = (getattr(found[k], pictures)[0], getattr(expected[k], pictures)[0])
            assert differ(*pair) == 0

    def stop(*_: object) -> dict:
        raise KeyboardInterrupt

    tokens = imgs[0].backbone.negative_tokens()
    with pytest.raises(KeyboardInterrupt):
        imgs[0].backbone.draw([PROMPT], [0], tokens, call={"callback_on_step_end": stop})
    assert before == list(pipe.unet.attn_processors.values())
    again = imgs[1](PROMPT, seed=1, **ASKED)
    assert differ(again.images[0], expected[1].images[0]) == 0


def test_objects_that_are_loaded_already_are_not_loaded_again(files, pipe, monkeypatch):
    mllm = MLLM.from_pretrained(files.pop("mllm"))
    aligner = ImplicitAligner.from_file(files.pop("aligner"))
    monkeypatch.setattr(MLLM, "from_pretrained", None)
    img = IMG(pipe, mllm, aligner, **files)
    assert img.guide is mllm and img.aligner is aligner and img.backbone.pipe is pipe


def test_a_preset_of_another_kind_is_refused(pipe):
    with refused("preset 'flux' is for flux, and the pipeline is of sdxl"):
        IMG(pipe, preset="flux")


@pytest.mark.parametrize(
    ("kind", "name"), [(StableDiffusionXLPipeline, "tiny-sdxl"), (FluxPipeline, "tiny-flux")]
)
def test_it_goes_around_the_twins_of_both_models(kind, name):
    loaded = opened(kind, find_preset(name).models.base)
    out = IMG(loaded, preset=name)(PROMPT, seed=1, num_inference_steps=4)
    assert out.initial[0].size == out.images[0].size == (64, 64)
    assert differ(out.images[0], out.initial[0])
