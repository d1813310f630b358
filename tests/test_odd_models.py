"""Models as people have them: their settings are respected, and what cannot serve is refused."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from mllm_folders import edit
from PIL import Image
from refusals import refused
from release_folder import PROMPT, UNET, lively, preset
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from img_minimal.backbone import open_backbone
from img_minimal.mllm import MLLM

PICTURE = Image.new("RGB", (90, 60), "red")


def with_unet(release, tmp_path, **changes: object):
    lively(UNet2DConditionModel(**(UNET | changes)), 4).save_pretrained(tmp_path / "unet")
    return preset(release, unet=str(tmp_path / "unet"))


def test_a_unet_that_takes_guidance_as_an_embedding_sees_no_doubled_batch(release, tmp_path):
    backbone, batches = open_backbone(with_unet(release, tmp_path, time_cond_proj_dim=8)), []
    hook = lambda module, inputs, output: batches.append(len(inputs[0]))  # noqa: E731
    backbone.pipe.unet.register_forward_hook(hook)
    tokens = torch.randn(1, *backbone.image_prompt.token_shape)
    plain, changed = (backbone.draw([PROMPT], [3], t) for t in (None, tokens))
    assert set(batches) == {1} and not torch.equal(plain, changed)


@pytest.mark.parametrize(
    "changes",
    [
        {"in_channels": 9},
        {"out_channels": 8},
        {"in_channels": 16, "out_channels": 16},
        {"projection_class_embeddings_input_dim": 64},
    ],
)
def test_a_unet_that_does_not_draw_from_text_with_these_parts_is_refused(
    release, tmp_path, changes
):
    with refused(f"{tmp_path / 'unet'}: its UNet does not fit", "inpainting, the refiner's"):
        open_backbone(with_unet(release, tmp_path, **changes))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_refused_and_no_black_picture(release, part):
    backbone = open_backbone(preset(release))
    for weight in getattr(backbone.pipe, part).parameters():
        weight.data.flatten()[0] = torch.nan
    with refused("image 0 is not finite: check --scale"):
        backbone.draw([PROMPT], [0])


@pytest.fixture
def llava(mllms, tmp_path):
    shutil.copytree(mllms["hf"], tmp_path / "hf")
    return tmp_path / "hf"


def replace_weights(folder, model) -> None:
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        old.unlink()
    model.save_pretrained(folder)


def test_a_llava_with_a_siglip_tower_opens_and_sees_every_patch(llava):
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    edit(
        llava / "config.json", vision_config=vision.to_dict(), vision_feature_select_strategy="full"
    )
    config = LlavaConfig(**json.loads((llava / "config.json").read_text()))
    replace_weights(llava, lively(LlavaForConditionalGeneration(config), 1))
    mllm = MLLM.from_pretrained(llava)
    pictures = PICTURE, Image.new("RGB", (90, 60), "blue")
    assert not torch.equal(*[mllm.guidance([picture], [PROMPT], [0])[0] for picture in pictures])
    ids = mllm.inputs([PICTURE], ["what?"])["input_ids"]
    assert (ids == mllm.processor.image_token_id).sum() == 16


def test_an_image_size_other_than_the_towers_in_the_processors_settings_does_not_matter(llava):
    expected = MLLM.from_pretrained(llava).guidance([PICTURE], [PROMPT], [0])[0]
    sizes = {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224}}
    edit(llava / "preprocessor_config.json", **sizes)
    assert torch.equal(MLLM.from_pretrained(llava).guidance([PICTURE], [PROMPT], [0])[0], expected)


def test_lora_folders_are_refused_by_name(mllms, tmp_path):
    lora, saved = tmp_path / "lora", tmp_path / "saved"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copytree(mllms["original"], saved)  # as LLaVA's own training saves LoRA weights
    torch.save({}, saved / "non_lora_trainables.bin")
    for folder, words in ((lora, "LoRA adapter"), (saved, "merge")):
        with refused(str(folder), words):
            MLLM.from_pretrained(folder)
