"""Every MLLM behind the one interface: features that no batch changes, answers that end."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from mllm_folders import square, write_llava_hf, write_original_llava, write_qwen
from PIL import Image
from refusals import refused
from transformers import LlavaProcessor

from img_minimal.mllm import MLLM, QUESTIONS, ask, drop_no_op_edits, strip_placeholders
from img_minimal.presets import find_preset

PROMPTS = ["a red circle", "two blue squares and a red circle over {a} line", "a dog"]
SEEDS = [5, 6, 7]
TWIN = find_preset("tiny-sdxl")
KINDS = ["original", "hf", "qwen", "twin"]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    shapes = [(60, 90, 3), (200, 100, 3), (64, 64, 3)]
    return [Image.fromarray(generator.integers(0, 255, s, dtype=np.uint8)) for s in shapes]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("mllms")
    state = write_original_llava(folder / "original")
    write_llava_hf(folder / "hf", state, folder / "original")
    write_qwen(folder / "qwen")
    return {kind: folder / kind for kind in KINDS} | {"twin": TWIN.models.mllm}


@pytest.fixture(scope="module", params=KINDS)
def mllm(request, folders) -> MLLM:
    return MLLM.from_pretrained(folders[request.param])


def test_features_of_a_padded_batch_equal_those_of_each_prompt_alone(mllm, images):
    together, mask = mllm.guidance(images, PROMPTS, SEEDS)
    assert together.shape == (*mask.shape, mllm.width) and not mask.all()
    for k, (image, prompt) in enumerate(zip(images, PROMPTS)):
        alone, whole = mllm.guidance([image], [prompt], SEEDS[k : k + 1])
        length = whole.sum()
        assert mask[k, :length].all() and not mask[k, length:].any(), "padded on the right"
        assert (alone[0] - together[k, :length]).abs().max() < 1e-4


def test_features_are_the_last_hidden_states_after_the_norm(mllm, images):
    states, mask = mllm.guidance(images, PROMPTS, SEEDS)
    questions = [mllm.question(prompt, seed) for prompt, seed in zip(PROMPTS, SEEDS)]
    full = mllm.model(**mllm.inputs(images, questions), output_hidden_states=True)
    assert (states - full.hidden_states[-1])[mask].abs().max() < 1e-5
    assert (mllm.model.lm_head(states) - full.logits)[mask].abs().max() < 1e-4


def test_satisfaction_is_the_log_probability_of_nothing_as_the_next_word(mllm, images):
    scores = mllm.satisfaction(images, PROMPTS, SEEDS, batch_size=2)
    nothing = mllm.processor.tokenizer("nothing", add_special_tokens=False).input_ids[0]
    for image, prompt, seed, score in zip(images, PROMPTS, SEEDS, scores, strict=True):
        logits = mllm.model(**mllm.inputs([image], [mllm.question(prompt, seed)])).logits
        assert abs(score - logits[0, -1].log_softmax(-1)[nothing].item()) < 1e-3


def test_a_seed_draws_one_of_a_hundred_questions(mllm, images):
    assert len(set(QUESTIONS)) >= 100
    first, again, other = (mllm.guidance(images, PROMPTS, [seed] * 3)[0] for seed in (3, 3, 5))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_image_tokens_and_half_characters_in_a_prompt_do_no_harm(mllm, images):
    marked = f"a cat {mllm.processor.image_token} on a mat"
    states = [mllm.guidance(images[:1], [p], [0])[0] for p in (marked, "a cat  on a mat")]
    assert torch.equal(*states)
    assert mllm.guidance(images[:1], ["a cat \ud83d"], [0])[0].isfinite().all()


SPELLINGS = (
    *("<image>", "<IMAGE>", "< image >", "</image>", "<image_0>", "<img>", "<im_start>"),
    *("<|image_pad|>", "<|vision_start|>", "<|video_pad|>", "<im<image>age>"),
    "<im<im<image>age>age>",
)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_image_placeholder_in_a_prompt_is_left_out_in_any_spelling(spelling):
    assert strip_placeholders(f"a cat {spelling} on a mat") == "a cat  on a mat"
    assert strip_placeholders("an <imaginary> cat, a < b, <3") == "an <imaginary> cat, a < b, <3"


class Scripted(torch.nn.Module):
    """A head that wants to say the given tokens, whatever the states."""

    def __init__(self, tokens: list[int], vocabulary: int):
        super().__init__()
        self.tokens, self.vocabulary, self.count = tokens, vocabulary, 0

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*states.shape[:2], self.vocabulary)
        logits[..., self.tokens[self.count]] = 9.0
        self.count += 1
        return logits


@pytest.mark.parametrize("kind", [*KINDS, "release"])
def test_an_answer_ends_with_the_end_token_or_the_releases_separator(folders, images, kind):
    mllm = MLLM.from_pretrained(folders["original" if kind == "release" else kind])
    tokenizer = mllm.processor.tokenizer
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    answer = "add a red circle"
    end = encode(f"{answer}###") if kind == "release" else [*encode(answer), tokenizer.eos_token_id]
    vocabulary = mllm.model.config.text_config.vocab_size
    script = Scripted(end + encode(" two blue squares" * 4), vocabulary)
    mllm.model.lm_head = script
    assert mllm.explain(images[:1], PROMPTS[:1], [0]) == [answer]
    assert script.count == len(end), "it should have stopped right there"


def test_answers_decoded_together_are_those_of_each_alone(folders, images):
    mllm = MLLM.from_pretrained(folders["twin"])
    pictures, prompts = images * 2, [*PROMPTS, *PROMPTS[::-1]]
    together = mllm.explain(pictures, prompts, range(6))
    alone = [mllm.explain([pictures[k]], [prompts[k]], [k])[0] for k in range(6)]
    assert together == alone and len(set(together)) > 1


@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        ("change the red circle to a red circle", "nothing"),
        ("add a cross, change the orange square to an orange square", "add a cross"),
        ("change the red circle to a red circle, add a cross", "add a cross"),
        ("remove the cross, change the dot to a dot, add a cross", "remove the cross, add a cross"),
        ("change the red circle to a red cross", None),
        ("change the red circle to an orange circle, add a red circle", None),
        ("change the red circle to a red circle with a hat", None),
        ("nothing", None),
    ],
)
def test_a_change_of_something_to_itself_is_dropped_from_an_answer(answer, rest):
    assert drop_no_op_edits(answer) == (rest or answer)


def test_llava_hf_is_asked_as_transformers_asks_it_but_sees_the_whole_image(folders, images):
    mllm = MLLM.from_pretrained(folders["hf"])
    processor = LlavaProcessor.from_pretrained(folders["hf"])
    processor.patch_size, processor.num_additional_image_tokens = 14, 1  # as in public folders
    processor.vision_feature_select_strategy = "default"
    processor.tokenizer.padding_side = "right"
    questions = [ask(prompt, random.Random(1)) for prompt in PROMPTS]
    text = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
    ours = mllm.inputs(images, questions)
    theirs = processor(images=images, text=text, padding=True, return_tensors="pt")
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    pixels = ours["pixel_values"]
    assert torch.equal(pixels[2], theirs["pixel_values"][2]), "a square image needs no padding"
    assert not torch.equal(pixels[1], theirs["pixel_values"][1]), "that folder's settings crop it"
    assert (pixels - torch.cat([square(image) for image in images])).abs().max() < 1e-5


def test_qwen_is_asked_with_its_chat_template_and_one_token_for_each_four_patches(folders, images):
    mllm = MLLM.from_pretrained(folders["qwen"])
    inputs = mllm.inputs(images, ["what?"] * 3)
    # Sides are rounded to multiples of 28.
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 14, 8], [1, 4, 4]]
    for ids, mask, count in zip(inputs["input_ids"], inputs["attention_mask"], (6, 28, 4)):
        image = "<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>"
        assert mllm.processor.tokenizer.decode(ids[mask.bool()]) == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"{image}what?<|im_end|>\n<|im_start|>assistant\n"
        )
    frames = inputs["pixel_values"].view(-1, 3, 2, 14, 14)
    assert len(frames) == 4 * (6 + 28 + 4) and torch.equal(frames[:, :, 0], frames[:, :, 1])


FIRST_SHARD = "model-00001-of-00002.safetensors"
WRONG = {
    "a shard is missing": ("qwen", lambda f: (f / FIRST_SHARD).unlink(), "has 1 of 2 files"),
    "a shard of another model": (
        "hf",
        lambda f: shutil.copy(f.with_name("qwen") / FIRST_SHARD, f),
        "more problems, so it is not the LlavaForConditionalGeneration",
    ),
    "no tokenizer": (
        "qwen",
        lambda f: (f / "tokenizer.json").unlink(),
        "lacks the model's image token; download the tokenizer again",
    ),
    "another kind of model": (
        "hf",
        lambda f: (f / "config.json").write_text(json.dumps({"model_type": "llama"})),
        "model_type 'llama' is no MLLM known here; expected one of: llava, ",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_or_foreign_folder_is_refused(case, folders, tmp_path):
    kind, change, words = WRONG[case]
    for name in ("hf", "qwen"):
        shutil.copytree(folders[name], tmp_path / name)
    change(tmp_path / kind)
    with refused(str(tmp_path / kind), words):
        MLLM.from_pretrained(tmp_path / kind)
