"""Every MLLM behind the one interface: features that no batch changes, answers that end, clear errors."""

import json
import random
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mllm_folders import LLAMA, square, write_llava_hf, write_original_llava, write_qwen
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor, Qwen2_5_VLForConditionalGeneration

from img_minimal.hub.mllms import CONVERSATION, FAMILIES, find_family
from img_minimal.mllm import MLLM, without_markers, without_tautologies
from img_minimal.presets import find_preset
from img_minimal.mllm import QUESTIONS, ask
from img_minimal.cli import UserError

PROMPTS = ["a red circle", "two blue squares and a red circle over {a} line", "a dog"]
TWIN = find_preset("tiny-sdxl")
KINDS = ["original", "hf", "qwen", "twin"]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    g = np.random.default_rng(0)
    sizes = [(60, 90), (200, 100), (64, 64)]
    return [Image.fromarray(g.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("mllms")
    state = write_original_llava(folder / "original")
    write_llava_hf(folder / "hf", state, folder / "original")
    write_qwen(folder / "qwen")
    return {kind: folder / kind for kind in KINDS} | {"twin": TWIN.mllm}


@pytest.fixture(scope="module", params=KINDS)
def mllm(request, folders) -> MLLM:
    return MLLM.from_pretrained(folders[request.param])


def test_features_of_a_padded_batch_equal_those_of_each_prompt_alone(mllm, images):
    together, mask = mllm.guidance(images, PROMPTS, range(5, 5 + len(PROMPTS)))
    assert together.shape == (*mask.shape, mllm.width) and mask.dtype == torch.bool
    assert not mask.all(), "the prompts should differ in length, or this test shows nothing"
    assert all(row.sort(descending=True)[0].equal(row) for row in mask.int()), "padding stands on the right"
    for k, (image, prompt) in enumerate(zip(images, PROMPTS)):
        alone, whole = mllm.guidance([image], [prompt], [5 + k])
        assert whole.all() and (alone[0] - together[k][mask[k]]).abs().max() < 1e-4


def test_features_are_the_full_models_last_hidden_states_after_the_norm(mllm, images):
    states, mask = mllm.guidance(images, PROMPTS, range(5, 5 + len(PROMPTS)))
    asked = [mllm.question(prompt, 5 + k) for k, prompt in enumerate(PROMPTS)]
    everything = mllm.model(**mllm.inputs(images, asked), output_hidden_states=True)
    assert (states - everything.hidden_states[-1])[mask].abs().max() < 1e-5
    assert (mllm.model.lm_head(states) - everything.logits)[mask].abs().max() < 1e-4


def test_features_cost_one_prefill_that_keeps_neither_layers_nor_a_cache(mllm, images):
    outputs, layers = [], []
    inner = mllm.model.model
    hooks = [inner.register_forward_hook(lambda module, inputs, output: outputs.append(output)),
             inner.language_model.layers[0].register_forward_hook(lambda *_: layers.append(1))]  # fmt: skip
    mllm.guidance(images, PROMPTS, range(len(PROMPTS)))
    for hook in hooks:
        hook.remove()
    assert len(outputs) == len(layers) == 1
    assert outputs[0].hidden_states is None and outputs[0].past_key_values is None


def test_a_seed_reproduces_the_questions_and_another_asks_otherwise(mllm, images):
    first, again, other = (mllm.guidance(images, PROMPTS, [seed] * len(PROMPTS))[0] for seed in (3, 3, 5))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_the_model_is_frozen_and_in_the_dtype_that_was_asked_for(folders, images):
    for kind in KINDS:
        mllm = MLLM.from_pretrained(folders[kind], torch.bfloat16)
        assert {p.dtype for p in mllm.model.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in mllm.model.parameters()) and not mllm.model.training
        assert mllm.guidance(images, PROMPTS, range(len(PROMPTS)))[0].dtype == torch.bfloat16


def test_a_prompt_that_names_the_image_token_stands_for_no_image(mllm, images):
    prompt = f"a cat {mllm.processor.image_token} on a mat"
    states, _ = mllm.guidance(images[:1], [prompt], [0])
    plain, _ = mllm.guidance(images[:1], ["a cat  on a mat"], [0])
    assert torch.equal(states, plain)


@pytest.mark.parametrize(
    "spelling", ["<image>", "<IMAGE>", "< image >", "<im<image>age>", "<|image_pad|>", "<|vision_start|>", "</image>",
                 "<|video_pad|>", "<image_0>", "<img>", "<im_start>", "<im<im<image>age>age>"],
)  # fmt: skip
def test_an_image_marker_in_a_prompt_is_left_out_in_any_spelling(spelling):
    assert without_markers(f"a cat {spelling} on a mat") == "a cat  on a mat"
    assert without_markers("an <imaginary> cat, a < b, <3") == "an <imaginary> cat, a < b, <3"


def test_a_prompt_with_half_a_character_is_asked_about(mllm, images):
    states, _ = mllm.guidance(images[:1], ["a cat \ud83d on a mat"], [0])
    assert states.isfinite().all()


class Scripted(torch.nn.Module):
    """A head that wants to say the given tokens, whatever the states."""

    def __init__(self, tokens: list[int], vocabulary: int):
        super().__init__()
        self.tokens, self.vocabulary, self.said = tokens, vocabulary, 0

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*states.shape[:2], self.vocabulary)
        logits[..., self.tokens[self.said]] = 9.0
        self.said += 1
        return logits


def explained(folder, images, text: str, end: str | int) -> tuple[str, Scripted, int]:
    """The answer of a model that would say `text`, `end` (a string, or a token) and then go on."""
    mllm = MLLM.from_pretrained(folder)
    encode = lambda words: mllm.processor.tokenizer(words, add_special_tokens=False).input_ids  # noqa: E731
    until = encode(text + end) if isinstance(end, str) else encode(text) + [end]
    script = Scripted(until + encode(" two blue squares" * 4), mllm.model.config.text_config.vocab_size)
    mllm.model.lm_head = script
    return mllm.explain(images[:1], PROMPTS[:1], [0])[0], script, len(until)


def test_the_answer_of_the_released_llava_ends_at_its_separator(folders, images):
    answer, script, until = explained(folders["original"], images, "remove the cat", "###")
    assert answer == "remove the cat" and script.said == until, "it should have stopped right there"


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_ends_with_the_models_own_end_token(folders, images, kind):
    end = MLLM.from_pretrained(folders[kind]).processor.tokenizer.eos_token_id
    answer, script, until = explained(folders[kind], images, "add a red circle", end)
    assert answer == "add a red circle" and script.said == until


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("change the red circle to a red circle", "nothing"),
        ("add a red cross, change the orange square to an orange square", "add a red cross"),
        ("change the red circle to a red circle, add a red cross", "add a red cross"),
        ("remove the cross, change the red circle to a red circle, add a cross", "remove the cross, add a cross"),
        ("change the red circle to a red cross", None),
        ("change the red circle to an orange circle, add a red circle", None),
        ("change the red circle to a red circle with a hat", None),
        ("nothing", None),
    ],
)
def test_a_change_of_something_to_itself_never_leaves_the_model(answer, left):
    assert without_tautologies(answer) == (left or answer)


def test_no_instruction_that_the_twin_learns_from_is_a_tautology():
    words = pq.read_table(TWIN.triplets, columns=["edit_prompt"])["edit_prompt"].to_pylist()
    assert [w for w in words if without_tautologies(w) != w] == []


def test_answers_decoded_together_are_those_of_each_alone(images):
    mllm = MLLM.from_pretrained(TWIN.mllm)
    pictures, prompts = images * 2, [*PROMPTS, *PROMPTS[::-1]]
    together = mllm.explain(pictures, prompts, range(len(prompts)))
    alone = [mllm.explain([p], [q], [k])[0] for k, (p, q) in enumerate(zip(pictures, prompts))]
    assert together == alone and len(set(together)) > 1


def test_satisfaction_is_the_log_probability_of_nothing_as_the_next_word(mllm, images):
    scores = mllm.satisfaction(images, PROMPTS, range(5, 5 + len(PROMPTS)), batch_size=2)
    nothing = mllm.processor.tokenizer("nothing", add_special_tokens=False).input_ids[0]
    for k, (image, prompt, score) in enumerate(zip(images, PROMPTS, scores, strict=True)):
        logits = mllm.model(**mllm.inputs([image], [mllm.question(prompt, 5 + k)])).logits
        assert abs(score - logits[0, -1].log_softmax(-1)[nothing].item()) < 1e-3


def test_a_llava_hf_folder_is_asked_as_transformers_asks_it_but_sees_the_whole_image(folders, images):
    mllm = MLLM.from_pretrained(folders["hf"])
    processor = LlavaProcessor.from_pretrained(folders["hf"])
    processor.patch_size, processor.num_additional_image_tokens = 14, 1  # public folders say so, too
    processor.vision_feature_select_strategy = "default"
    questions = [ask(prompt, random.Random(1)) for prompt in PROMPTS]
    text = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
    ours = mllm.inputs(images, questions)
    processor.tokenizer.padding_side = "right"
    theirs = processor(images=images, text=text, padding=True, return_tensors="pt")
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["pixel_values"][2], theirs["pixel_values"][2]), "a square image needs no padding"
    assert not torch.equal(ours["pixel_values"][1], theirs["pixel_values"][1]), "that folder's settings cut it"
    assert (ours["pixel_values"] - torch.cat([square(image) for image in images])).abs().max() < 1e-5


def test_the_twin_is_read_as_transformers_reads_it(folders, images):
    mllm = MLLM.from_pretrained(folders["twin"])
    model = LlavaForConditionalGeneration.from_pretrained(folders["twin"], dtype=torch.float32)
    processor = LlavaProcessor.from_pretrained(folders["twin"])
    text = [CONVERSATION.format(question=ask(prompt, random.Random(2))) for prompt in PROMPTS[:1]]
    inputs = processor(images=images[:1], text=text, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
    states, _ = mllm.guidance(images[:1], PROMPTS[:1], [2])
    assert torch.equal(states, expected)


def test_qwen_is_asked_with_its_chat_template_and_one_token_for_each_four_patches(folders, images):
    mllm = MLLM.from_pretrained(folders["qwen"])
    inputs = mllm.inputs(images, ["what?"] * 3)
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 14, 8], [1, 4, 4]]  # sides to multiples of 28
    tokens = [6, 28, 4]
    for row, mask, count in zip(inputs["input_ids"], inputs["attention_mask"], tokens):
        text = mllm.processor.tokenizer.decode(row[mask.bool()])
        image = "<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>"
        assert text == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"{image}what?<|im_end|>\n<|im_start|>assistant\n"
        )
    pixels = inputs["pixel_values"]
    assert pixels.shape == (4 * sum(tokens), 3 * 2 * 14 * 14)
    assert torch.equal(pixels.view(-1, 3, 2, 14, 14)[:, :, 0], pixels.view(-1, 3, 2, 14, 14)[:, :, 1])


def test_qwens_public_names_all_find_their_place(folders, images):
    ours = MLLM.from_pretrained(folders["qwen"]).model.state_dict()
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folders["qwen"], dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_family_is_told_by_config_json_and_each_has_a_place_for_image_and_question():
    assert find_family({"model_type": "llava", "text_config": {}}, "x") is FAMILIES["llava"]
    for kind in ("llava", "llava_llama"):
        assert find_family({"model_type": kind, "mm_vision_tower": "y"}, "x") is FAMILIES["llava, original layout"]
    assert find_family({"model_type": "qwen2_5_vl"}, "x") is FAMILIES["qwen2_5_vl"]
    for family in FAMILIES.values():
        assert family.conversation.count("{question}") == 1
        assert ("<image>" in family.conversation) != ("<|image_pad|>" in family.conversation)


def test_there_are_at_least_one_hundred_questions_and_a_seed_draws_the_same_ones():
    assert len(set(QUESTIONS)) >= 100
    draw = lambda seed: [ask("x", rng) for rng in [random.Random(seed)] for _ in range(20)]  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WRONG = {
    "no such folder": ("hf", None, "no such file or folder; check --mllm"),
    "a shard is cut short": ("hf", lambda f: truncate(f / "model-00001-of-00002.safetensors"), "unreadable .* again"),
    "a shard is missing": ("qwen", lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "has 1 of 2 files"),
    "a shard of another model": (
        "hf",
        lambda f: shutil.copy(f.with_name("qwen") / "model-00001-of-00002.safetensors", f),
        "lacks 'model.*' and .* more, so it is not the LlavaForConditionalGeneration",
    ),
    "no tokenizer": ("qwen", lambda f: (f / "tokenizer.json").unlink(), "lacks the model's image token; download"),
    "no tokenizer in LLaVA": ("hf", lambda f: (f / "tokenizer.json").unlink(), "cannot be opened as a LLaVA"),
    "no image processor": (
        "qwen",
        lambda f: (f / "preprocessor_config.json").unlink(),
        "cannot be opened as a Qwen2.5-VL",
    ),
    "another kind of model": (
        "hf",
        lambda f: (f / "config.json").write_text(json.dumps({"model_type": "llama"})),
        "model_type 'llama' is no MLLM known here; expected one of: llava, ",
    ),
    "settings of another model": (
        "hf",
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"llama"', '"nonsense"')),
        "cannot be opened as a LLaVA",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(case, folders, tmp_path):
    kind, change, expected = WRONG[case]
    for name in ("hf", "qwen"):
        shutil.copytree(folders[name], tmp_path / name)
    if change:
        change(tmp_path / kind)
    with pytest.raises(UserError, match=expected) as caught:
        MLLM.from_pretrained(tmp_path / kind if change else tmp_path / "nowhere")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_hub_that_cannot_be_reached_is_said_in_one_line():
    with pytest.raises(UserError, match="llava-hf/llava-1.5-13b-hf: not a local path.*cannot be reached.*--mllm"):
        MLLM.from_pretrained("llava-hf/llava-1.5-13b-hf")


def test_the_width_is_that_of_the_language_model(folders):
    assert MLLM.from_pretrained(folders["original"]).width == LLAMA["hidden_size"]
    assert MLLM.from_pretrained(folders["qwen"]).width == 64
