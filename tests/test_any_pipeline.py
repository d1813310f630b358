"""Pipelines x schedulers x switches: what diffusers draws is drawn, and then with image tokens."""

import inspect
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from flux_folder import new_pipeline
from flux_folder import preset as flux_preset
from PIL import Image
from release_folder import PROMPT, lively, new_base, new_unet
from release_folder import preset as sdxl_preset

from img_minimal.backbone import open_backbone

pytestmark = pytest.mark.slow
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SDXL = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")
SCHEDULERS = {
    "sdxl": ("DDIM", "LCM", "EDMEuler", "PNDM", "HeunDiscrete", "KDPM2Discrete"),
    "flux": ("FlowMatchEulerDiscrete", "UniPCMultistep", "DPMSolverMultistep", "DEISMultistep"),
}
SCHEDULERS["sdxl"] += ("KDPM2AncestralDiscrete", "DPMSolverSinglestep", "SASolver", "TCD")


def half(pipe: DiffusionPipeline) -> None:
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        if hasattr(pipe, name):
            getattr(pipe, name).to(torch.bfloat16)


SWITCHES = {
    "half": half,
    "first block": lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(0.1)),
    "taylor": lambda pipe: pipe.transformer.enable_cache(TaylorSeerCacheConfig()),
    "compiled": lambda pipe: pipe.transformer.compile_repeated_blocks(
        fullgraph=True, backend="eager"
    ),
    "offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
}
CASES = [("sdxl", name, "EulerDiscrete", "") for name in SDXL]
CASES += [("sdxl", "", name, switch) for name in SCHEDULERS["sdxl"] for switch in ("", "half")]
CASES += [("flux", name, "FlowMatchEulerDiscrete", "") for name in SDXL]
CASES += [("flux", "", name, "") for name in SCHEDULERS["flux"]]
CASES += [("flux", "", "FlowMatchEulerDiscrete", switch) for switch in SWITCHES]


def built(kind: str, name: str, scheduler: str) -> DiffusionPipeline:
    """Build a small random pipeline of a class, with a scheduler."""
    parts = (new_base() if kind == "sdxl" else new_pipeline()).components
    prefix = "StableDiffusionXL" if kind == "sdxl" else "Flux"
    made = getattr(diffusers, f"{prefix}{name}Pipeline")
    changes = FLOW if "Multistep" in scheduler and kind == "flux" else {}
    config = parts["scheduler"].config
    parts["scheduler"] = getattr(diffusers, f"{scheduler}Scheduler").from_config(config, **changes)
    if "ControlNet" in name and kind == "sdxl":
        parts["controlnet"] = lively(diffusers.ControlNetModel.from_unet(new_unet(4)), 20)
    elif "ControlNet" in name:
        copied = diffusers.FluxControlNetModel.from_transformer(
            parts["transformer"],
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
        )
        parts["controlnet"] = lively(copied, 21)
    taken = inspect.signature(made).parameters
    pipe = made(**{key: part for key, part in parts.items() if key in taken})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("kind", "name", "scheduler", "switch"), CASES)
def test_the_first_picture_is_diffusers_and_the_second_has_tokens(
    release: Path, flux: Path, kind: str, name: str, scheduler: str, switch: str
) -> None:
    pipe = built(kind, name, scheduler)
    if switch:
        SWITCHES[switch](pipe)
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    given = {"image": picture, "strength": 0.7, "mask_image": picture, "control_image": picture}
    taken = inspect.signature(type(pipe).__call__).parameters
    call = {key: value for key, value in given.items() if key in taken}
    if kind == "sdxl":
        preset = sdxl_preset(release, steps=4, height=64, width=64)
    else:
        preset = flux_preset(flux, steps=4, authors_sampler=False, true_cfg_scale=1.0)
    backbone = open_backbone(preset, pipe)
    first = backbone.draw([PROMPT], [3], call=call)
    tokens = torch.randn(1, *backbone.token_shape, generator=torch.Generator().manual_seed(2))
    second = backbone.draw([PROMPT], [3], tokens, scale=1.0, scale_end=0.5, call=call)
    assert (first - second).abs().max() > 1e-3 and second.isfinite().all()
    if switch == "half":
        return  # with its VAE in fp32, diffusers alone does not decode
    asked = {"num_inference_steps": 4, "height": 64, "width": 64, "output_type": "pt", **call}
    asked["guidance_scale"] = preset.sampling.guidance_scale
    if kind == "flux":
        asked["max_sequence_length"] = 24
    expected = pipe(PROMPT, generator=torch.Generator().manual_seed(3), **asked).images
    assert torch.equal(first, expected)
