"""The block of diffusers' Modular Diffusers, loaded from its folder as from the hub."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import ModularPipelineBlocks, StableDiffusionXLAutoBlocks, StableDiffusionXLPipeline
from diffusers.utils import dynamic_modules_utils
from refusals import refused
from release_folder import PROMPT, diffusers_adapter, preset

import img_minimal
from img_minimal.files import to_pil
from img_minimal.pipeline import IMG

FOLDER = Path(img_minimal.__file__).parent / "modular"
PROMPTS, SEEDS = [PROMPT, "two blue squares"], [3, 4]


@pytest.fixture
def draw(tmp_path, monkeypatch) -> Callable:
    """Return a pipeline's call with the block; `draw.pipe` is the pipeline."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    blocks = StableDiffusionXLAutoBlocks()
    block = ModularPipelineBlocks.from_pretrained(FOLDER, trust_remote_code=True)
    blocks.sub_blocks.insert("img", block, 1)

    def draw(**more: object) -> list[torch.Tensor]:
        noise = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        asked = {"prompt": PROMPTS, "num_inference_steps": 2, "generator": noise, **more}
        return draw.pipe(**asked, output="images", output_type="pt")

    draw.pipe = blocks.init_pipeline()
    return draw


def test_both_pictures_of_a_modular_pipeline_equal_ours_in_every_byte(release, draw):
    # In fp32 one byte in 12,288 may be another: diffusers guides in two calls of the UNet, not one.
    pipe = StableDiffusionXLPipeline.from_pretrained(release / "base").to(torch.float64)
    img = IMG(pipe, preset=preset(release))
    before, after = map(to_pil, img.stages(PROMPTS, SEEDS))

    draw.pipe.update_components(img=img, **pipe.components)
    with refused("load_ip_adapter"):
        draw()
    draw.pipe.load_ip_adapter(diffusers_adapter(release), subfolder=None, weight_name=None)
    for ours, theirs in ((before, draw()), (after, draw(seen=before, seed=SEEDS[0]))):
        assert [x.tobytes() for x in to_pil(theirs)] == [x.tobytes() for x in ours]
    assert before[0].tobytes() != after[0].tobytes()

    with refused("repeat the prompts"):
        draw(seen=before, num_images_per_prompt=2)
    with img.drawing(scale_end=0.5), refused("scale_end=1"):
        draw(seen=before)
