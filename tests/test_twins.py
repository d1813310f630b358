"""The shipped twins are ordinary folders and files: standard libraries open them without our code."""

import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionXLPipeline,
)
from pair_files import read_pairs
from transformers import (
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    T5EncoderModel,
)

from img_minimal.sdxl import load_ip_adapter
from img_minimal.hub.weights import read_weights
from img_minimal.load import load_img
from img_minimal.presets import TINY, find_preset
from img_minimal.files import to_pil
from img_minimal.tiny.build.tokenizers import WORDS
from img_minimal.tiny.diagnose import oracle_accuracy
from img_minimal.tiny.grammar import HELD_OUT, benchmark, parse
from img_minimal.tiny.oracle import judge
from img_minimal.tiny.world import place, render

PRESET = find_preset("tiny-sdxl")


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(PRESET.base, dtype=torch.float32)


def test_diffusers_opens_the_base_as_an_sdxl_pipeline(pipe):
    assert isinstance(pipe.vae, AutoencoderKL) and isinstance(pipe.scheduler, EulerDiscreteScheduler)
    assert pipe.vae_scale_factor == 8
    assert pipe.unet.config.addition_embed_type == "text_time"
    assert pipe.unet.config.sample_size * 8 == 64 and pipe.vae.config.latent_channels == 4


@pytest.mark.parametrize(("kind", "name"), [(StableDiffusionXLPipeline, "tiny-sdxl"), (FluxPipeline, "tiny-flux")])
def test_a_pipeline_that_is_opened_without_a_word_about_types_draws(kind, name):
    drawn = kind.from_pretrained(find_preset(name).base)("a red circle", num_inference_steps=2, height=64, width=64)
    assert drawn.images[0].size == (64, 64)


def test_both_tokenizers_read_every_word_as_one_token_and_the_end_of_text_is_not_id_two(pipe):
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        assert all(len(tokenizer.tokenize(word)) == 1 for word in WORDS)
        assert tokenizer.eos_token_id != 2, "CLIPTextModel takes id 2 for a legacy file and pools at another place"
        longest = max(len(tokenizer(str(p)).input_ids) for p in benchmark(400))
        assert longest <= tokenizer.model_max_length


def test_diffusers_own_ip_adapter_loader_takes_our_file(pipe):
    state = read_weights(PRESET.ip_adapter)
    image_proj, ip_adapter = load_ip_adapter(PRESET.ip_adapter)
    assert len(image_proj) + len(ip_adapter) == len(state)
    own = StableDiffusionXLPipeline.from_pretrained(PRESET.base, dtype=torch.float32)
    own.image_encoder = CLIPVisionModelWithProjection.from_pretrained(PRESET.image_encoder, dtype=torch.float32)
    nested = {"image_proj": {k: v.float() for k, v in image_proj.items()},
              "ip_adapter": {k: v.float() for k, v in ip_adapter.items()}}  # fmt: skip
    own.load_ip_adapter(nested, subfolder=None, weight_name=None, image_encoder_folder=None,
                        low_cpu_mem_usage=False)  # fmt: skip
    names = {type(p).__name__ for p in own.unet.attn_processors.values()}
    assert "IPAdapterAttnProcessor2_0" in names


def test_transformers_opens_both_llavas(pipe):
    for folder in (PRESET.mllm, PRESET.stock_mllm):
        model = LlavaForConditionalGeneration.from_pretrained(folder)
        processor = LlavaProcessor.from_pretrained(folder)
        assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")


def test_the_preference_pairs_have_pick_a_pics_columns_and_no_ties():
    table = pq.read_table(PRESET.pairs)
    assert {"caption", "jpg_0", "jpg_1", "label_0", "label_1"} <= set(table.column_names)
    first, second = table["label_0"].to_pylist(), table["label_1"].to_pylist()
    assert len(first) >= 10_000
    assert all({a, b} == {0.0, 1.0} for a, b in zip(first, second))
    assert 0.4 < sum(first) / len(first) < 0.6, "the winner must not always stand first"


def test_no_training_data_names_a_held_out_pair_or_an_evaluation_prompt():
    captions = set(pq.read_table(PRESET.pairs, columns=["caption"])["caption"].to_pylist())
    triplets = pq.read_table(TINY / "triplets.parquet", columns=["edited_prompt", "edit_prompt"]).to_pydict()
    captions |= set(triplets["edited_prompt"])
    assert {parse(c).split for c in captions} == {"train"}
    tested = {str(p) for split in ("test", "validation") for p in benchmark(2000, split)}
    assert not captions & tested
    edits = " ".join(set(triplets["edit_prompt"]))
    assert not any(f"{colour} {form}" in edits for colour, form in HELD_OUT)


def test_damaged_images_and_ties_in_a_pairs_file_are_skipped_and_counted(tmp_path):
    rows = pq.read_table(PRESET.pairs).slice(0, 6).to_pylist()
    rows[1]["jpg_0"] = rows[1]["jpg_0"][:40]
    rows[3]["label_0"] = rows[3]["label_1"] = 0.5
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    pairs, skipped = read_pairs(tmp_path / "pairs.parquet")
    assert len(pairs) == 4 and skipped == 2


def test_the_oracle_is_right_of_rendered_scenes_and_after_the_vaes_round_trip():
    shares = oracle_accuracy(count=400, seed=5)
    assert shares["as rendered"] >= 0.995
    assert shares["after the VAE"] >= 0.97
    assert shares["after the VAE, seen pairs"] >= 0.99


def test_the_twins_and_their_data_take_no_more_than_a_hundred_and_ten_megabytes():
    assert sum(p.stat().st_size for p in Path(TINY).rglob("*") if p.is_file()) <= 110e6


FLUX = find_preset("tiny-flux")


def test_diffusers_opens_flux_s_twin_as_a_flux_pipeline_and_draws_with_it():
    pipe = FluxPipeline.from_pretrained(FLUX.base, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    settings = pipe.transformer.config
    assert settings.guidance_embeds and settings.num_layers >= 2 and settings.num_single_layers >= 2
    assert isinstance(pipe.text_encoder_2, T5EncoderModel) and isinstance(pipe.text_encoder, CLIPTextModel)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    assert {"scaling_factor", "shift_factor"} <= pipe.vae.config.keys()
    small = dict(height=64, width=64, num_inference_steps=2)
    [image] = pipe("a red circle", negative_prompt="", true_cfg_scale=3.5, **small).images
    assert image.size == (64, 64)
    for word in WORDS:
        assert len(pipe.tokenizer_2.tokenize(word)) <= 2, word
    longest = max(len(pipe.tokenizer_2(str(p)).input_ids) for p in benchmark(400))
    assert longest <= pipe.tokenizer_2.model_max_length


def test_diffusers_own_loader_takes_the_adapter_of_flux_s_twin(tmp_path):
    pipe = FluxPipeline.from_pretrained(FLUX.base, dtype=torch.float32)
    pipe.load_ip_adapter(
        str(TINY), weight_name="flux_ip_adapter.safetensors",
        image_encoder_pretrained_model_name_or_path=FLUX.image_encoder,
    )  # fmt: skip
    names = {type(block.attn.processor).__name__ for block in pipe.transformer.transformer_blocks}
    assert names == {"FluxIPAdapterAttnProcessor"}


def test_flux_s_twin_draws_better_with_a_right_picture_s_tokens_than_without():
    img, rng = load_img("tiny-flux"), random.Random(0)
    prompts = benchmark(60, "validation", seed=5)
    tokens = img.backbone.tokens(to_pil(render([place(p, rng) for p in prompts])))
    captions, seeds = [str(p) for p in prompts], list(range(60))
    right = [sum(v.strict for v in judge(img.backbone.draw(captions, seeds, t), prompts)) for t in (None, tokens)]
    assert right[1] >= right[0] + 6  # of 60; 15 points and more on larger samples
