"""Models as people have them: what a pipeline does of its own settings is left to it; what cannot serve is one line."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from mllm_folders import LLAMA, write_llava_hf, write_original_llava, write_weights
from PIL import Image
from release_folder import PROMPT, UNET, lively, preset
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from img_minimal.sdxl import draw
from img_minimal.load import load_backbone, load_img
from img_minimal.mllm import MLLM
from img_minimal.cli import UserError


def with_unet(release, tmp_path, **changed: object):
    lively(UNet2DConditionModel(**(UNET | changed)), 4).save_pretrained(tmp_path / "unet")
    return preset(release, unet=str(tmp_path / "unet"))


def test_a_unet_that_takes_guidance_as_an_embedding_is_not_called_with_a_doubled_batch(release, tmp_path, monkeypatch):
    backbone, seen = load_backbone(with_unet(release, tmp_path, time_cond_proj_dim=8)), []
    unet = backbone.pipe.unet
    unet.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    tokens = torch.randn(1, *backbone.token_shape)
    plain, changed = (backbone.draw([PROMPT], [3], t) for t in (None, tokens))
    assert set(seen) == {1} and not torch.equal(plain, changed)


@pytest.mark.parametrize(
    "changed, words",
    [({"in_channels": 9}, "takes 9 channels.*inpainting"), ({"out_channels": 8}, "gives 8.*inpainting"),
     ({"in_channels": 16, "out_channels": 16}, "another VAE"),
     ({"projection_class_embeddings_input_dim": 24 + 5 * 8}, "the refiner's or of another model")],
)  # fmt: skip
def test_a_unet_that_does_not_draw_from_text_with_these_parts_is_one_line(release, tmp_path, changed, words):
    with pytest.raises(UserError, match=words) as caught:
        load_backbone(with_unet(release, tmp_path, **changed))
    assert "\n" not in str(caught.value) and str(tmp_path / "unet") in str(caught.value)


@torch.no_grad()
def test_a_vae_with_means_and_deviations_of_its_latents_decodes_as_in_its_own_pipeline(release, tmp_path):
    shutil.copytree(release / "base", tmp_path / "base")
    vae = AutoencoderKL.from_pretrained(tmp_path / "base" / "vae", dtype=torch.float32)
    vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[0.5, 2.0, 1.0, 1.5])
    vae.save_pretrained(tmp_path / "base" / "vae")
    ours = load_backbone(preset(release, base=str(tmp_path / "base"))).draw([PROMPT], [3])
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "base", dtype=torch.float32, add_watermarker=False)
    theirs = pipe(PROMPT, num_inference_steps=2, guidance_scale=7.5, output_type="pt",
                  generator=torch.Generator().manual_seed(3)).images  # fmt: skip
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_an_error_and_no_black_picture(release, part, value):
    pipe = load_backbone(preset(release)).pipe
    for weight in getattr(pipe, part).parameters():
        weight.data.flatten()[0] = value
    with pytest.raises(UserError, match="image 0 is not finite"):
        draw(pipe, [PROMPT], [0], steps=2, guidance_scale=7.5)


def test_a_scale_that_overflows_is_an_error_and_no_black_picture(release):
    backbone = load_backbone(preset(release))
    with pytest.raises(UserError, match="image 0 is not finite: check --scale"):
        backbone.draw([PROMPT], [0], torch.randn(1, *backbone.token_shape), scale=1e38)


def write_siglip_llava(folder, tmp_path) -> None:
    """A LLaVA whose tower has no class token, as the newer ones'."""
    write_original_llava(tmp_path / "original")
    write_llava_hf(folder, write_original_llava(tmp_path / "again"), tmp_path / "original")
    settings = json.loads((folder / "config.json").read_text())
    vision = SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                                image_size=56, patch_size=14)  # fmt: skip
    config = LlavaConfig(**(settings | {"vision_config": vision.to_dict(), "vision_feature_select_strategy": "full"}))
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.index.json")]:
        old.unlink()
    lively(LlavaForConditionalGeneration(config), 1).save_pretrained(folder)


def test_a_llava_with_a_siglip_tower_opens_and_sees_every_patch(tmp_path):
    write_siglip_llava(tmp_path / "llava", tmp_path)
    mllm = MLLM.from_pretrained(tmp_path / "llava")
    red, blue = (mllm.guidance([Image.new("RGB", (90, 60), c)], [PROMPT], [0])[0] for c in ("red", "blue"))
    assert red.shape[-1] == LLAMA["hidden_size"] and not torch.equal(red, blue)
    ids = mllm.inputs([Image.new("RGB", (8, 8))], ["what?"])["input_ids"]
    assert (ids == mllm.processor.image_token_id).sum() == 16


@pytest.fixture
def llava(tmp_path):
    state = write_original_llava(tmp_path / "original")
    write_llava_hf(tmp_path / "hf", state, tmp_path / "original")
    return tmp_path / "hf"


def test_an_image_processor_that_names_another_size_than_the_tower_s_does_not_matter(llava, tmp_path):
    picture = [Image.new("RGB", (90, 60), "red")]
    expected = MLLM.from_pretrained(llava).guidance(picture, [PROMPT], [0])[0]
    [file] = llava.glob("*processor_config.json")
    settings = json.loads(file.read_text())
    for part in (settings, settings.get("image_processor", {})):
        if "crop_size" in part:
            part |= {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224}}
    file.write_text(json.dumps(settings))
    assert torch.equal(MLLM.from_pretrained(llava).guidance(picture, [PROMPT], [0])[0], expected)


def test_a_whole_file_beside_old_shards_is_what_is_read_as_transformers_does_and_it_is_said(llava, capsys):
    expected = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)
    wrong = {key: value + 1 for key, value in expected.state_dict().items()}
    for old in [*llava.glob("*.safetensors"), *llava.glob("*.bin"), *llava.glob("*.index.json")]:
        old.unlink()
    expected.save_pretrained(llava)
    write_weights(llava, wrong, "safetensors")
    again = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)
    ours = MLLM.from_pretrained(llava).model
    for a, b, c in zip(ours.parameters(), again.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert "model.safetensors and model.safetensors.index.json; the whole file is read" in capsys.readouterr().err


def test_quantized_and_lora_folders_are_one_line_that_names_what_they_are(llava, tmp_path):
    settings = json.loads((llava / "config.json").read_text())
    (llava / "config.json").write_text(json.dumps(settings | {"quantization_config": {"load_in_4bit": True}}))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}')
    (tmp_path / "lora2").mkdir()
    (tmp_path / "lora2" / "config.json").write_text((tmp_path / "original" / "config.json").read_text())
    for name in ("non_lora_trainables.bin", "adapter_model.bin"):
        torch.save({}, tmp_path / "lora2" / name)
    for folder, words in (("hf", "quantized"), ("lora", "LoRA adapter.*merge"), ("lora2", "LoRA adapter.*merge")):
        with pytest.raises(UserError, match=words) as caught:
            MLLM.from_pretrained(tmp_path / folder)
        assert "\n" not in str(caught.value) and str(tmp_path / folder) in str(caught.value)


@pytest.mark.parametrize(
    "name, content",
    [("config.json", c) for c in ("[]", '"x"', "null", '{"model_type": ["llava"]}', '{"model_type": "llava"}',
                                  '{"model_type": "llava", "text_config": [1]}',
                                  '{"model_type": "llava", "text_config": {"hidden_size": "wide"}}',
                                  '{"model_type": "llava", "vision_config": 5}', "[" * 50_000, "\ufeff{}")],
)  # fmt: skip
def test_settings_of_another_kind_are_one_line(release, tmp_path, name, content):
    shutil.copytree(release / "llava", tmp_path / "llava")
    (tmp_path / "llava" / name).write_text(content)
    with pytest.raises(UserError) as caught:
        load_img(preset(release, mllm=str(tmp_path / "llava")))
    assert "\n" not in str(caught.value) and str(tmp_path / "llava") in str(caught.value)
