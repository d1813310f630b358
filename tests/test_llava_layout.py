"""LLaVA in its authors' layout is the same model as in transformers', asked as the release asks."""

import random
import re
import shutil

import pytest
import sentencepiece
import torch
from mllm_folders import (
    CLIP,
    IMAGES,
    LLAMA,
    LLAVA,
    TOWER,
    edit,
    llava_shapes,
    random_weights,
    square,
    write_original_llava,
)
from refusals import refused
from torch.nn.functional import gelu, linear
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    LlavaForConditionalGeneration,
)

from img_minimal.hub.mllms import RENAMES, transformers_config
from img_minimal.mllm import MLLM, ask

PROMPTS = ["a red circle", "two blue squares and a red circle"]
IMAGES = IMAGES[:2]


@pytest.fixture(scope="module")
def mllm(mllms) -> MLLM:
    return MLLM.from_pretrained(mllms["original"])


@pytest.fixture(scope="module")
def pieces(mllms) -> sentencepiece.SentencePieceProcessor:
    model = mllms["original"] / "tokenizer.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def question_of_the_release(prompt: str, seed: int) -> list[str]:
    """Return the text before the image and after it."""
    text = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the human's questions.###Human: <image>\n"
        f"{ask(prompt, random.Random(seed))}###Assistant:"
    )
    return text.split("<image>")


def test_hidden_states_equal_those_of_the_transformers_layout(mllm, mllms):
    reference = LlavaForConditionalGeneration.from_pretrained(mllms["hf"], dtype=torch.float32)
    inputs = mllm.inputs(IMAGES, PROMPTS)
    expected = reference(**inputs, output_hidden_states=True).hidden_states[-1]
    assert (mllm.model.model(**inputs).last_hidden_state - expected).abs().max() <= 1e-6


def test_guidance_equals_llava_put_together_from_sentencepiece_clip_and_llama(mllm, pieces):
    clip = CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval()
    llama = LlamaModel(LlamaConfig(**LLAMA, rms_norm_eps=1e-5)).eval()
    weights = random_weights(llava_shapes(LLAMA, CLIP))
    vision, text = {}, {}
    for key, value in weights.items():
        if key.startswith(TOWER):
            vision[key.removeprefix(f"{TOWER}vision_model.")] = value
        elif key.startswith(("model.embed_tokens", "model.layers", "model.norm")):
            text[key.removeprefix("model.")] = value
    clip.load_state_dict(vision)
    llama.load_state_dict(text)
    projector = {}
    for layer in (0, 2):
        name = f"model.mm_projector.{layer}"
        projector[layer] = weights[f"{name}.weight"], weights[f"{name}.bias"]
    for k, (image, prompt) in enumerate(zip(IMAGES, PROMPTS)):
        before, after = question_of_the_release(prompt, k)
        patches = clip(square(image), output_hidden_states=True).hidden_states[-2][:, 1:]
        patches = linear(gelu(linear(patches, *projector[0])), *projector[2])
        first = llama.embed_tokens(torch.tensor([[1, *pieces.encode(before)]]))
        last = llama.embed_tokens(torch.tensor([pieces.encode(after)]))
        expected = llama(inputs_embeds=torch.cat([first, patches, last], 1)).last_hidden_state
        states, mask = mllm.guidance([image], [prompt], [k])
        assert mask.all() and states.shape == expected.shape
        assert (states - expected).abs().max() < 1e-4


PROMPTS_TO_SPLIT = (
    *("a  red   cat", " a cat", "a cat  ", "a </s> cat", "</s>a cat"),
    *("<s> a <unk> cat", "a\n\n cat", "  ", "</s>"),
)


@pytest.mark.parametrize("prompt", PROMPTS_TO_SPLIT)
def test_spaces_and_special_tokens_are_tokenised_as_the_release_does(mllm, pieces, prompt):
    specials = {"<s>": 1, "</s>": 2, "<unk>": 0}

    def encode(text: str) -> list[int]:
        """Cut at special tokens, as tokenizers of that time, and encode each piece."""
        ids = []
        for part in filter(None, re.split("(<s>|</s>|<unk>)", text)):
            ids += [specials[part]] if part in specials else pieces.encode(part)
        return ids

    before, after = question_of_the_release(prompt, 0)
    ids = mllm.inputs(IMAGES[:1], [ask(prompt, random.Random(0))])["input_ids"][0].tolist()
    marker = mllm.processor.image_token_id
    assert [i for i in ids if i != marker] == [1, *encode(before), *encode(after)]
    assert ids.index(marker) == 1 + len(encode(before))


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("change", [{"prefix": "module."}, {"tower": False}])
def test_other_ways_to_store_the_same_weights_give_the_same_features(mllm, tmp_path, kind, change):
    write_original_llava(tmp_path / "other", kind=kind, **change)
    other = MLLM.from_pretrained(tmp_path / "other")
    expected, _ = mllm.guidance(IMAGES, PROMPTS, [0, 1])
    assert torch.equal(other.guidance(IMAGES, PROMPTS, [0, 1])[0], expected)


@pytest.mark.parametrize(
    ("width", "inner", "depth", "count"),
    [(4096, 11008, 32, 6_738_415_616), (5120, 13824, 40, 13_015_864_320)],
)
def test_every_weight_of_the_true_sizes_finds_its_place(width, inner, depth, count):
    heads = {"num_attention_heads": width // 128, "num_key_value_heads": width // 128}
    llama = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": depth}
    llama |= heads | {"vocab_size": 32000, "max_position_embeddings": 4096}
    clip = {"image_size": 336, "patch_size": 14, "hidden_size": 1024}
    clip |= {"intermediate_size": 4096, "num_hidden_layers": 24}
    tower = {"mm_vision_tower": "/trainer/clip-vit-large-patch14-336"}
    config = transformers_config({**LLAVA, **llama, **tower}, "config.json")
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    renamed = {}
    for key, shape in llava_shapes(llama, clip).items():
        for pattern, name in RENAMES.items():
            key = re.sub(pattern, name, key)
        renamed[key] = shape
    assert renamed == {key: tuple(value.shape) for key, value in model.state_dict().items()}
    language = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    assert sum(p.numel() for p in language) == count
    text, vision = config.text_config, config.vision_config
    assert (text.rms_norm_eps, text.rope_parameters["rope_theta"]) == (1e-5, 1e4)
    assert (vision.hidden_act, config.vision_feature_layer) == ("quick_gelu", -2)


def edited(**values):
    return lambda folder: edit(folder / "config.json", **values)


def edit_weights(change_state):
    """Change the state dict of each shard."""

    def change(folder):
        for path in folder.glob("*.bin"):
            state = torch.load(path)
            change_state(state)
            torch.save(state, path)

    return change


UP, EXTRA = "model.layers.1.mlp.up_proj.weight", "model.layers.7.extra.weight"
SECOND_SHARD = "pytorch_model-00002-of-00002.bin"
WRONG = {
    "a weight is missing": (
        edit_weights(lambda state: state.pop(UP, None)),
        ["lacks 'model.language_model.layers.1.mlp.up_proj.weight', so it is not"],
    ),
    "a weight is left over": (
        edit_weights(lambda state: state.update({EXTRA: torch.ones(2)})),
        ["has an unknown key 'model.language_model.layers.7.extra.weight', so it is not"],
    ),
    "another width": (edited(hidden_size=64), ["of shape", "not", "64", "download both"]),
    "a shard is missing": (
        lambda folder: (folder / SECOND_SHARD).unlink(),
        ["has 1 of 2 files pytorch_model-*-of-00002.bin; download the others"],
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.model").unlink(),
        ["has no tokenizer.model; download it again"],
    ),
    "tiles": (edited(image_aspect_ratio="anyres"), ["'anyres', expected 'pad'"]),
    "another model": (edited(model_type="llava_mpt"), ["'llava_mpt' is no MLLM known here"]),
    "no network": (
        edited(mm_vision_tower="openai/clip-vit-base-patch32"),
        ["openai/clip-vit-base-patch32: not a local path", "mm_vision_tower in LLaVA's config"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_or_foreign_folder_is_refused(case, mllms, tmp_path):
    change, words = WRONG[case]
    shutil.copytree(mllms["original"], tmp_path / "llava")
    change(tmp_path / "llava")
    with refused(*words):
        MLLM.from_pretrained(tmp_path / "llava")


def test_a_vision_tower_that_is_no_clip_is_refused(tmp_path):
    write_original_llava(tmp_path / "llava", tower=False)
    torch.save({"something": torch.ones(10**6)}, tmp_path / "llava-clip" / "pytorch_model.bin")
    with refused("so it is not the CLIPVisionModel that its config.json says"):
        MLLM.from_pretrained(tmp_path / "llava")
