"""IMG around a pipeline that somebody else has loaded: its first picture stays diffusers' own, bit for bit."""

from collections.abc import Callable

import pytest
import torch
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
from release_folder import PROMPT, locations

from img_minimal import IMG
from img_minimal.aligner import ImplicitAligner
from img_minimal.mllm import MLLM
from img_minimal.presets import find_preset
from img_minimal.cli import UserError

ASKED = {"num_inference_steps": 3, "guidance_scale": 5.0}


@pytest.fixture
def pipe(release) -> StableDiffusionXLPipeline:
    loaded = StableDiffusionXLPipeline.from_pretrained(release / "base", add_watermarker=False)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def files(release) -> dict[str, str]:
    """What IMG needs beside a pipeline."""
    return {name: path for name, path in locations(release).items() if name not in ("base", "unet")}


def scheduler(kind: type) -> Callable[[DiffusionPipeline], None]:
    def change(pipe: DiffusionPipeline) -> None:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)

    return change


def lora(pipe: DiffusionPipeline) -> None:
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q", "to_v"], init_lora_weights=False))


def other_vae(pipe: DiffusionPipeline) -> None:
    """As sdxl-vae-fp16-fix is: other settings, and no upcast."""
    pipe.vae = AutoencoderKL.from_config(dict(pipe.vae.config) | {"force_upcast": False, "scaling_factor": 0.5})
    pipe.vae.eval()


def slicing(pipe: DiffusionPipeline) -> None:
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()


CHANGES = [
    scheduler(EulerAncestralDiscreteScheduler), scheduler(DPMSolverMultistepScheduler), scheduler(LCMScheduler), lora,
    other_vae, slicing,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=["ancestral", "dpm++", "lcm", "lora", "vae", "slicing"])
@pytest.mark.parametrize("negative", [None, "blurry"])
def test_the_first_picture_is_diffusers_own_and_the_second_is_drawn(release, pipe, change, negative):
    change(pipe)
    before = pipe(PROMPT, negative_prompt=negative, generator=torch.Generator().manual_seed(3), **ASKED).images[0]
    parts = dict(pipe.components)
    processors = list(pipe.unet.attn_processors.values())
    img = IMG(pipe, **files(release))
    out = img(PROMPT, seed=3, negative_prompt=negative, **ASKED)
    assert out.initial[0].tobytes() == before.tobytes()
    assert ImageChops.difference(out.images[0], out.initial[0]).getbbox(), "the tokens change nothing"
    assert len(out.said) == 1 and isinstance(out.said[0], str)
    assert all(pipe.components[name] is part for name, part in parts.items()), "the pipeline is another one now"
    assert processors == list(pipe.unet.attn_processors.values())
    again = pipe(PROMPT, negative_prompt=negative, generator=torch.Generator().manual_seed(3), **ASKED).images[0]
    assert again.tobytes() == before.tobytes()


def test_a_list_of_prompts_and_a_generator_are_taken_as_diffusers_takes_them(release, pipe):
    img = IMG(pipe, **files(release))
    out = img([PROMPT, "two red squares"], generator=torch.Generator().manual_seed(7), height=64, width=32, **ASKED)
    alone = img("two red squares", seed=8, height=64, width=32, **ASKED)
    assert [image.size for image in out.initial + out.images] == [(32, 64)] * 4
    assert ImageChops.difference(out.initial[1], alone.initial[0]).getextrema()[0][1] <= 2


def test_a_picture_from_anywhere_becomes_aligned_tokens(release, pipe):
    img = IMG(pipe, **files(release))
    picture = Image.new("RGB", (300, 200), "red")
    tokens = img.align(picture, PROMPT)
    assert tokens.shape == (1, *img.backbone.token_shape)
    assert torch.equal(tokens, img.align([picture], [PROMPT], [0]))
    assert not torch.equal(tokens, img.align(picture, "a blue square"))


def test_things_that_are_loaded_already_are_not_loaded_again(release, pipe, monkeypatch):
    places = files(release)
    mllm = MLLM.from_pretrained(places.pop("mllm"))
    aligner = ImplicitAligner.from_file(places.pop("aligner"))
    monkeypatch.setattr(MLLM, "from_pretrained", None)
    img = IMG(pipe, mllm, aligner, **places)
    assert img.guide is mllm and img.aligner is aligner and img.backbone.pipe is pipe


def test_what_is_no_sdxl_or_flux_and_what_does_not_fit_is_one_line(release, pipe):
    with pytest.raises(UserError, match="goes around StableDiffusionXLPipeline or FluxPipeline, and this is a Odd"):
        IMG(type("Odd", (DiffusionPipeline,), {})())
    with pytest.raises(UserError, match="preset 'flux' is for flux, and the pipeline is of sdxl"):
        IMG(pipe, preset="flux")
    with pytest.raises(UserError, match="use the files of one base model"):
        IMG(pipe, **(files(release) | {"aligner": find_preset("tiny-sdxl").aligner}))


def test_it_goes_around_the_twins_of_both_models():
    for kind, name in ((StableDiffusionXLPipeline, "tiny-sdxl"), (FluxPipeline, "tiny-flux")):
        loaded = kind.from_pretrained(find_preset(name).base)
        loaded.set_progress_bar_config(disable=True)
        out = IMG(loaded, preset=name)("a red circle above a blue square", seed=1, num_inference_steps=4)
        assert out.initial[0].size == out.images[0].size == (64, 64)
        assert ImageChops.difference(out.images[0], out.initial[0]).getbbox()
