"""The shipped twins are ordinary files that standard libraries open without our code."""

import random

import pyarrow.parquet as pq
import pytest
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from transformers import (
    CLIPVisionModelWithProjection,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from img_minimal.backbone import open_backbone
from img_minimal.files import to_pil
from img_minimal.hub.adapters import read_ip_adapter
from img_minimal.presets import TWINS, find_preset
from img_minimal.tiny.build.encoders import WORDS
from img_minimal.tiny.diagnose import oracle_accuracy
from img_minimal.tiny.grammar import HELD_OUT, benchmark, parse
from img_minimal.tiny.oracle import judge
from img_minimal.tiny.world import place, render

SDXL, FLUX = find_preset("tiny-sdxl"), find_preset("tiny-flux")
PIPELINES = {"tiny-sdxl": StableDiffusionXLPipeline, "tiny-flux": FluxPipeline}
processors = pytest.mark.parametrize("name", PIPELINES)


@pytest.fixture(scope="module")
def pipes():
    opened = {}
    for name, kind in PIPELINES.items():
        opened[name] = kind.from_pretrained(find_preset(name).models.base)
        opened[name].set_progress_bar_config(disable=True)
    return opened


@processors
def test_diffusers_opens_a_twin_without_a_word_about_types_and_draws_with_it(pipes, name):
    small = dict(height=64, width=64, num_inference_steps=2)
    if name == "tiny-flux":
        small |= dict(negative_prompt="", true_cfg_scale=3.5)
    assert pipes[name]("a red circle", **small).images[0].size == (64, 64)


@processors
@pytest.mark.parametrize("number", ["tokenizer", "tokenizer_2"])
def test_tokenizers_read_every_word_as_one_token_and_every_caption_whole(pipes, name, number):
    tokenizer = getattr(pipes[name], number)
    most = 1 if name == "tiny-sdxl" or number == "tokenizer" else 2  # T5 spells a comma
    assert all(len(tokenizer.tokenize(word)) <= most for word in WORDS)
    for prompt in benchmark(400):
        assert len(tokenizer(str(prompt)).input_ids) <= tokenizer.model_max_length
    # CLIPTextModel takes id 2 for an old file, and pools elsewhere.
    assert most == 2 or tokenizer.eos_token_id != 2


def test_diffusers_own_loader_takes_the_adapter_of_sdxls_twin(pipes):
    image_proj, ip_adapter, _ = read_ip_adapter(SDXL.models)
    pipe = StableDiffusionXLPipeline(**pipes["tiny-sdxl"].components, add_watermarker=False)
    pipe.image_encoder = CLIPVisionModelWithProjection.from_pretrained(SDXL.models.image_encoder)
    nested = {"image_proj": image_proj, "ip_adapter": ip_adapter}
    nowhere = dict(subfolder=None, weight_name=None, image_encoder_folder=None)
    pipe.load_ip_adapter(nested, **nowhere, low_cpu_mem_usage=False)
    kinds = {type(processor).__name__ for processor in pipe.unet.attn_processors.values()}
    assert "IPAdapterAttnProcessor2_0" in kinds


def test_diffusers_own_loader_takes_the_adapter_of_fluxs_twin(pipes):
    pipes["tiny-flux"].load_ip_adapter(
        str(TWINS),
        weight_name="flux_ip_adapter.safetensors",
        image_encoder_pretrained_model_name_or_path=FLUX.models.image_encoder,
    )
    blocks = pipes["tiny-flux"].transformer.transformer_blocks
    kinds = {type(block.attn.processor).__name__ for block in blocks}
    assert kinds == {"FluxIPAdapterAttnProcessor"}


@pytest.mark.parametrize("folder", [SDXL.models.mllm, SDXL.models.stock_mllm])
def test_transformers_opens_both_llavas(folder):
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    tokenizer = LlavaProcessor.from_pretrained(folder).tokenizer
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")


def test_the_preference_pairs_have_pick_a_pics_columns_and_no_ties():
    table = pq.read_table(SDXL.data.pairs)
    assert {"caption", "jpg_0", "jpg_1"} <= set(table.column_names)
    first, second = table["label_0"].to_numpy(), table["label_1"].to_numpy()
    assert len(first) >= 10_000
    assert set(first) == {0.0, 1.0} and (first + second == 1).all()
    assert 0.4 < first.mean() < 0.6, "the winner must not always come first"


def test_no_training_data_names_a_held_out_pair_or_an_evaluation_prompt():
    triplets = pq.read_table(SDXL.data.triplets)
    captions = set(triplets["edited_prompt"].to_pylist())
    captions |= set(pq.read_table(SDXL.data.pairs)["caption"].to_pylist())
    assert {parse(caption).split for caption in captions} == {"train"}
    for split in ("test", "validation"):
        assert captions.isdisjoint(map(str, benchmark(2000, split)))
    edits = " ".join(set(triplets["edit_prompt"].to_pylist()))
    assert not any(" ".join(kind) in edits for kind in HELD_OUT)


def test_the_oracle_is_right_about_right_scenes_before_and_after_the_vae():
    shares = oracle_accuracy(count=400, seed=5)
    assert shares["as rendered"] >= 0.995
    assert shares["after the VAE"] >= 0.97
    assert shares["after the VAE, seen pairs"] >= 0.99


def test_the_tokens_of_right_images_help_fluxs_twin():
    backbone, rng = open_backbone(FLUX), random.Random(0)
    prompts = benchmark(60, "validation", seed=5)
    tokens = backbone.tokens(to_pil(render([place(prompt, rng) for prompt in prompts])))
    right = []
    for given in (None, tokens):
        images = backbone.draw(list(map(str, prompts)), list(range(60)), given)
        right.append(sum(verdict.strict for verdict in judge(images, prompts)))
    assert right[1] >= right[0] + 6  # 15 points and more on larger samples


def test_the_twins_and_their_data_take_at_most_110_megabytes():
    assert sum(file.stat().st_size for file in TWINS.rglob("*") if file.is_file()) <= 110e6
