"""LLaVA in its authors' layout is the same model as LLaVA in transformers' layout, and is asked as the release asks."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import sentencepiece
import torch
from mllm_folders import CLIP, LLAMA, LLAVA, llava_shapes, square, write_clip, write_llava_hf, write_original_llava
from PIL import Image
from torch.nn.functional import gelu, linear
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from img_minimal.hub.mllms import rename, transformers_config
from img_minimal.mllm import MLLM
from img_minimal.mllm import ask
from img_minimal.cli import UserError

PROMPTS = ["a red circle", "two blue squares and a red circle"]
SHAPES = [(60, 90), (200, 100)]  # height, width


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    g = np.random.default_rng(0)
    return [Image.fromarray(g.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in SHAPES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("llava")


@pytest.fixture(scope="module")
def weights(folder) -> dict[str, torch.Tensor]:
    state = write_original_llava(folder / "original")
    write_llava_hf(folder / "hf", state, folder / "original")
    return state


@pytest.fixture(scope="module")
def mllm(folder, weights) -> MLLM:
    return MLLM.from_pretrained(folder / "original")


def question_of_the_release(prompt: str, seed: int) -> str:
    return (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the human's questions.###Human: <image>\n{ask(prompt, random.Random(seed))}"
        "###Assistant:"
    )


def test_hidden_states_equal_those_of_the_transformers_layout_of_the_same_weights(mllm, folder, images):
    reference = LlavaForConditionalGeneration.from_pretrained(folder / "hf", dtype=torch.float32)
    inputs = mllm.inputs(images, PROMPTS)
    expected = reference(**inputs, output_hidden_states=True).hidden_states[-1]
    assert (mllm.model.model(**inputs).last_hidden_state - expected).abs().max() <= 1e-6


def test_guidance_equals_llava_put_together_by_hand_from_sentencepiece_clip_and_llama(mllm, folder, weights, images):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "original" / "tokenizer.model"))
    clip, llama = CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval(), LlamaModel(LlamaConfig(**LLAMA, rms_norm_eps=1e-5))
    inside = "model.vision_tower.vision_tower.vision_model."
    clip.load_state_dict({k.removeprefix(inside): v for k, v in weights.items() if k.startswith(inside)})
    own = ("model.embed_tokens", "model.layers", "model.norm")
    llama.eval().load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith(own)})
    for k, (image, prompt) in enumerate(zip(images, PROMPTS)):
        before, after = question_of_the_release(prompt, k).split("<image>")
        patches = clip(square(image), output_hidden_states=True).hidden_states[-2][:, 1:]
        for layer in (0, 2):
            patches = gelu(patches) if layer else patches
            name = f"model.mm_projector.{layer}"
            patches = linear(patches, weights[f"{name}.weight"], weights[f"{name}.bias"])
        ids = torch.tensor([[1, *pieces.encode(before)]]), torch.tensor([pieces.encode(after)])
        words = [llama.embed_tokens(part) for part in ids]
        expected = llama(inputs_embeds=torch.cat([words[0], patches, words[1]], 1)).last_hidden_state
        states, mask = mllm.guidance([image], [prompt], [k])
        assert mask.all() and states.shape == expected.shape
        assert (states - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "prompt",
    ["a  red   cat", " a cat", "a cat  ", "a </s> cat", "</s>a cat", "<s> a <unk> cat", "a\n\n cat", "  ", "</s>"],
)
def test_spaces_and_special_tokens_in_a_prompt_are_tokenised_as_the_release_does(mllm, folder, images, prompt):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "original" / "tokenizer.model"))
    specials = {"<s>": 1, "</s>": 2, "<unk>": 0}

    def slow(text: str) -> list[int]:
        """A tokenizer of that time: special tokens cut the text, sentencepiece encodes each piece."""
        cut = [part for part in re.split("(<s>|</s>|<unk>)", text) if part]
        return [i for part in cut for i in ([specials[part]] if part in specials else pieces.encode(part))]

    before, after = question_of_the_release(prompt, 0).split("<image>")
    ids = mllm.inputs(images[:1], [ask(prompt, random.Random(0))])["input_ids"][0].tolist()
    marker = mllm.processor.image_token_id
    assert ids[: ids.index(marker)] == [1, *slow(before)]
    assert ids[len(ids) - ids[::-1].index(marker) :] == slow(after)


def test_the_image_path_equals_transformers_own_and_the_plain_one_on_images_that_are_not_square(mllm, images):
    pixels = mllm.inputs(images, PROMPTS)["pixel_values"]
    assert (pixels - torch.cat([square(image) for image in images])).abs().max() < 1e-5
    own = LlavaProcessor(mllm.processor.image_processor, mllm.processor.tokenizer, patch_size=14,
                         vision_feature_select_strategy="default", num_additional_image_tokens=1)  # fmt: skip
    text = ["<image>\nx", "<image>\ny"]
    assert torch.equal(own(images=images, text=text, return_tensors="pt")["pixel_values"], pixels)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("change", [{"prefix": "module."}, {"tower": False}])
def test_other_ways_to_store_the_same_weights_give_the_same_features(
    mllm, tmp_path, images, kind, change, weights
):  # fmt: skip
    write_original_llava(tmp_path / "other", kind=kind, **change)
    other = MLLM.from_pretrained(tmp_path / "other")
    expected, _ = mllm.guidance(images, PROMPTS, range(len(PROMPTS)))
    assert torch.equal(other.guidance(images, PROMPTS, range(len(PROMPTS)))[0], expected)


def test_nothing_is_written_into_the_folder(folder, mllm):
    names = {p.name for p in (folder / "original").iterdir()}
    assert names == {"config.json", "tokenizer.model", "tokenizer_config.json", "pytorch_model.bin.index.json",
                     "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"}  # fmt: skip


TRUE_CLIP = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096,
             "num_hidden_layers": 24, "num_attention_heads": 16}  # fmt: skip
TRUE_SIZES = {
    "7b": (4096, 11008, 32, 6_738_415_616),
    "13b": (5120, 13824, 40, 13_015_864_320),
}


@pytest.mark.parametrize("size", TRUE_SIZES)
def test_every_key_of_a_true_size_file_finds_its_place(size):
    width, inner, depth, parameters_of_llama = TRUE_SIZES[size]
    heads = width // 128
    llama = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": depth, "vocab_size": 32000,
             "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 4096}  # fmt: skip
    config = {**LLAVA, **llama, "mm_hidden_size": 1024, "mm_vision_tower": "/trainer/clip-vit-large-patch14-336"}
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(transformers_config(config, "config.json"))
        file = {name: torch.empty(shape) for name, shape in llava_shapes(llama, TRUE_CLIP).items()}
    expected = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in {rename(k): v for k, v in file.items()}.items()} == expected
    language = model.model.language_model
    assert sum(p.numel() for p in [*language.parameters(), *model.lm_head.parameters()]) == parameters_of_llama
    assert {layer.variance_epsilon for layer in language.modules() if hasattr(layer, "variance_epsilon")} == {1e-5}
    assert (
        model.config.vision_config.hidden_act == "quick_gelu" and language.config.rope_parameters["rope_theta"] == 1e4
    )
    assert model.config.image_seq_length == 576 and model.config.vision_feature_layer == -2


def edit_config(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def without(key: str):
    def change(folder):
        for path in folder.glob("*.bin"):
            state = torch.load(path)
            state.pop(key, None)
            torch.save(state, path)

    return change


def with_extra(folder):
    path = folder / "pytorch_model-00002-of-00002.bin"
    torch.save({**torch.load(path), "model.layers.7.extra.weight": torch.ones(2)}, path)


def cut(name: str):
    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return change


def forget_tower(folder):
    for path in folder.glob("*.bin"):
        torch.save({k: v for k, v in torch.load(path).items() if "vision_tower" not in k}, path)
    edit_config(folder, mm_vision_tower="openai/clip-vit-large-patch14-336")


WRONG = {
    "a key is missing": (
        without("model.layers.1.mlp.up_proj.weight"),
        r"lacks 'model.language_model.layers.1.mlp.up_proj.weight', so it is not",
    ),
    "a key is left over": (with_extra, r"unknown keys: 'model.language_model.layers.7.extra.weight', so it is not"),
    "another width": (lambda f: edit_config(f, hidden_size=64), r"has shape \(.*\), its config.json says \(.*64.*\)"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("pytorch*")], "holds settings but no weights"),
    "a shard is missing": (
        lambda f: (f / "pytorch_model-00002-of-00002.bin").unlink(),
        "has 1 of 2 files pytorch_model-\\*-of-00002.bin; download the others",
    ),
    "a shard is cut short": (cut("pytorch_model-00001-of-00002.bin"), "00001-of-00002.bin: unreadable .* again"),
    "the index is cut short": (cut("pytorch_model.bin.index.json"), "index.json: unreadable"),
    "config.json is cut short": (cut("config.json"), "config.json: unreadable"),
    "no config.json": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "has no tokenizer.model; download it again"),
    "the tokenizer is cut short": (cut("tokenizer.model"), "cannot be opened as a tokenizer"),
    "a LLaVA of tiles": (lambda f: edit_config(f, image_aspect_ratio="anyres"), "'anyres', expected 'pad'"),
    "an older LLaVA": (lambda f: edit_config(f, mm_projector_type="linear"), "'linear', expected 'mlp2x_gelu'"),
    "another model": (lambda f: edit_config(f, model_type="llava_mpt"), "'llava_mpt' is no MLLM known here; expected"),
    "no tower and no network": (
        forget_tower,
        "comes without the weights of its vision tower; openai/clip-vit-large-patch14-336: not a local path.*reached",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(case, folder, weights, tmp_path):
    change, expected = WRONG[case]
    shutil.copytree(folder / "original", tmp_path / "llava")
    change(tmp_path / "llava")
    with pytest.raises(UserError) as caught:
        MLLM.from_pretrained(tmp_path / "llava")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    assert re.search(expected, message), message


def test_a_vision_tower_that_is_no_clip_is_said_in_one_line(tmp_path):
    write_original_llava(tmp_path / "llava", tower=False)
    shutil.rmtree(tmp_path / "llava-clip")
    write_clip(tmp_path / "llava-clip", {"something": torch.ones(1)})
    (tmp_path / "llava-clip" / "pytorch_model.bin").unlink()
    torch.save({"something.else": torch.ones(1)}, tmp_path / "llava-clip" / "pytorch_model.bin")
    with pytest.raises(UserError, match="is not the CLIP that LLaVA's config.json says"):
        MLLM.from_pretrained(tmp_path / "llava")
