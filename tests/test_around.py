"""IMG wraps a pipeline of one's own: its first picture stays diffusers', bit for bit."""

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
from refusals import refused
from release_folder import PROMPT, locations

from img_minimal import IMG
from img_minimal.aligner import ImplicitAligner
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


CHANGES = {
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


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("negative", [None, "blurry"])
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


def test_lists_generators_and_pictures_are_taken_as_diffusers_takes_them(files, pipe):
    img, size = IMG(pipe, **files), {"height": 64, "width": 32}
    prompts = [PROMPT, "two red squares"]
    out = img(prompts, generator=torch.Generator().manual_seed(7), **size, **ASKED)
    alone = img(prompts[1], seed=8, **size, **ASKED)
    assert [image.size for image in out.initial + out.images] == [(32, 64)] * 4
    assert differ(out.initial[1], alone.initial[0]) <= 2

    picture = Image.new("RGB", (300, 200), "red")
    tokens = img.align(picture, PROMPT)
    assert torch.equal(tokens, img.align([picture], [PROMPT], [0]))
    assert not torch.equal(tokens, img.align(picture, "a blue square"))


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
