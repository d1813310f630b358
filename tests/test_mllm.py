"""Every MLLM behind the one interface: features that no batch changes, answers that end."""

import copy
import random
import shutil

import pytest
import torch
from mllm_folders import IMAGES, edit, square
from mllm_kinds import KINDS as TODAY
from PIL import Image
from refusals import refused
from transformers import AutoModelForImageTextToText, LlavaProcessor
from transformers.quantizers import HfQuantizer, auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from img_minimal.files import model_name
from img_minimal.hub.questions import QUESTIONS, drop_no_op_edits, strip_placeholders
from img_minimal.mllm import MLLM, ask
from img_minimal.pipeline import IMG
from img_minimal.presets import find_preset

PROMPTS = ["a red circle", "two blue squares and a red circle over {a} line", "a dog"]
SEEDS = [5, 6, 7]
TWIN = find_preset("tiny-sdxl")
SPECIAL = ["original", "hf", "qwen", "twin"]


@pytest.fixture(scope="module", params=[*SPECIAL, *TODAY])
def mllm(request, mllm_of) -> MLLM:
    mllm = MLLM.from_pretrained(mllm_of(request.param))
    mllm.plain = mllm.model
    if request.param in TODAY:
        folder = mllm_of(request.param)
        mllm.plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return mllm


def asked_alone(mllm: MLLM, k: int) -> dict:
    """Ask about one image as transformers' documentation does."""
    question = mllm.question(PROMPTS[k], SEEDS[k])
    content = [{"type": "image", "image": IMAGES[k]}, {"type": "text", "text": question}]
    return mllm.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@torch.no_grad()
def test_a_padded_batch_is_seen_as_transformers_sees_each_image_alone(mllm):
    together, mask = mllm.guidance(IMAGES, PROMPTS, SEEDS)
    scores = mllm.satisfaction(IMAGES, PROMPTS, SEEDS, batch_size=2)
    nothing = mllm.processor.tokenizer("nothing", add_special_tokens=False).input_ids[0]
    questions = [mllm.question(prompt, seed) for prompt, seed in zip(PROMPTS, SEEDS)]
    ids = mllm.inputs(IMAGES, questions)["input_ids"]
    assert together.shape == (*mask.shape, mllm.width) and not mask.all()
    for k, score in enumerate(scores):
        inputs = asked_alone(mllm, k)
        if "gemma" not in mllm.model.config.model_type:
            inputs.pop("token_type_ids", None)  # for which other kinds have no use
        alone = mllm.plain(**inputs, output_hidden_states=True)
        length = inputs["input_ids"].shape[1]
        assert mask[k, :length].all() and not mask[k, length:].any(), "padded on the right"
        assert torch.equal(ids[k, :length], inputs["input_ids"][0])
        assert (alone.hidden_states[-1][0] - together[k, :length]).abs().max() < 1e-5
        assert abs(score - alone.logits[0, -1].log_softmax(-1)[nothing].item()) < 1e-4


def test_a_seed_draws_one_of_a_hundred_questions(mllm):
    assert len(set(QUESTIONS)) >= 100
    first, again, other = (mllm.guidance(IMAGES, PROMPTS, [seed] * 3)[0] for seed in (3, 3, 5))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_image_tokens_and_half_characters_in_a_prompt_do_no_harm(mllm):
    marks = "".join(mllm.marks) or mllm.processor.image_token
    marked = f"a cat {marks} on a mat"
    states = [mllm.guidance(IMAGES[:1], [p], [0])[0] for p in (marked, "a cat  on a mat")]
    assert torch.equal(*states)
    assert mllm.guidance(IMAGES[:1], ["a cat \ud83d"], [0])[0].isfinite().all()


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


@pytest.mark.parametrize("kind", [*SPECIAL, *TODAY, "release"])
def test_an_answer_ends_with_the_end_token_or_the_releases_separator(mllm_of, kind):
    mllm = MLLM.from_pretrained(mllm_of("original" if kind == "release" else kind))
    tokenizer = mllm.processor.tokenizer
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    answer = "add a red circle"
    end = encode(f"{answer}###") if kind == "release" else [*encode(answer), tokenizer.eos_token_id]
    vocabulary = mllm.model.config.get_text_config().vocab_size
    script = Scripted(end + encode(" two blue squares" * 4), vocabulary)
    mllm.model.set_output_embeddings(script)
    assert mllm.explain(IMAGES[:1], PROMPTS[:1], [0]) == [answer]
    assert script.count == len(end), "it should have stopped right there"


def test_answers_decoded_together_are_those_of_each_alone(mllms):
    mllm = MLLM.from_pretrained(mllms["twin"])
    pictures, prompts = IMAGES * 2, [*PROMPTS, *PROMPTS[::-1]]
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


def test_llava_hf_is_asked_as_transformers_asks_it_but_sees_the_whole_image(mllms):
    mllm = MLLM.from_pretrained(mllms["hf"])
    processor = LlavaProcessor.from_pretrained(mllms["hf"])
    processor.patch_size, processor.num_additional_image_tokens = 14, 1  # as in public folders
    processor.vision_feature_select_strategy = "default"
    processor.tokenizer.padding_side = "right"
    questions = [ask(prompt, random.Random(1)) for prompt in PROMPTS]
    text = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
    ours = mllm.inputs(IMAGES, questions)
    theirs = processor(images=IMAGES, text=text, padding=True, return_tensors="pt")
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    pixels = ours["pixel_values"]
    assert torch.equal(pixels[2], theirs["pixel_values"][2]), "a square image needs no padding"
    assert not torch.equal(pixels[1], theirs["pixel_values"][1]), "that folder's settings crop it"
    assert (pixels - torch.cat([square(image) for image in IMAGES])).abs().max() < 1e-5


def test_qwen_is_asked_with_its_chat_template_and_one_token_for_each_four_patches(mllms):
    mllm = MLLM.from_pretrained(mllms["qwen"])
    inputs = mllm.inputs(IMAGES, ["what?"] * 3)
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


def test_a_shard_of_another_model_and_a_folder_without_a_tokenizer_are_refused(mllms, tmp_path):
    for name in ("hf", "qwen"):
        shutil.copytree(mllms[name], tmp_path / name)
    shutil.copy(tmp_path / "qwen" / FIRST_SHARD, tmp_path / "hf")
    with refused("so it is not the LlavaForConditionalGeneration"):
        MLLM.from_pretrained(tmp_path / "hf")
    (tmp_path / "qwen" / "tokenizer.json").unlink()
    with refused(str(tmp_path / "qwen")):
        MLLM.from_pretrained(tmp_path / "qwen")


CASES = {
    "two networks": (
        {"model_type": "udop"},
        "",
        "'udop' reads image and question in two",
    ),
    "text alone": ({"model_type": "gpt2"}, "", "'gpt2' is no MLLM known here"),
    "no chat template": ({}, None, "does not have a chat template"),
    "no image": ({}, "{{ messages[0].content[1].text }}", "number of <image> tokens"),
    "no question": ({}, "<image>", "leaves out the image or the question"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_kind_that_cannot_serve_is_refused_before_its_weights_are_read(case, mllm_of, tmp_path):
    config, template, words = CASES[case]
    folder = tmp_path / "mllm"
    shutil.copytree(mllm_of("idefics3"), folder)
    edit(folder / "config.json", **config)
    if template is None:
        (folder / "chat_template.jinja").unlink()
    elif template:
        (folder / "chat_template.jinja").write_text(template)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000] + bytes(1000))
    with refused(str(folder), words):
        MLLM.from_pretrained(folder)


def test_a_large_image_takes_no_more_tokens_than_one_of_a_million_pixels(mllm_of):
    for kind, side in (("qwen", 1024), ("hf", 2048)):
        mllm = MLLM.from_pretrained(mllm_of(kind))
        large, small = Image.new("RGB", (2048, 2048)), Image.new("RGB", (side, side))
        [first], [second] = (mllm.inputs([x], ["what?"])["input_ids"] for x in (large, small))
        assert torch.equal(first, second)


class Rounding(HfQuantizer):
    """Stands for a library that changes weights a little."""

    is_serializable, is_trainable = True, False

    def _process_model_after_weight_loading(self, model, **_):
        for weight in model.parameters():
            weight.data = weight.data.bfloat16().float()
        return model


def test_a_quantized_folder_opens_with_a_warning_or_says_what_is_missing(
    mllms, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "rounding", Rounding)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "rounding", QuantizationConfigMixin)
    shutil.copytree(mllms["hf"], tmp_path / "hf")
    edit(tmp_path / "hf" / "config.json", quantization_config={"quant_method": "rounding"})
    whole, rounded = (MLLM.from_pretrained(path) for path in (mllms["hf"], tmp_path / "hf"))
    assert "hf is quantized: its features differ a little" in capsys.readouterr().err
    whole, rounded = (x.guidance(IMAGES, PROMPTS, SEEDS)[0] for x in (whole, rounded))
    assert 0 < (rounded - whole).norm() < 0.1 * whole.norm()
    edit(tmp_path / "hf" / "config.json", quantization_config={"load_in_4bit": True})
    with refused("requires bitsandbytes"):
        MLLM.from_pretrained(tmp_path / "hf")


def test_an_aligner_says_which_mllm_it_was_trained_with(twin, tmp_path, capsys):
    aligner, path = copy.deepcopy(twin.aligner), tmp_path / "aligner.safetensors"
    for guide, warned in (("", False), (model_name(TWIN.models.mllm), False), ("x 123", True)):
        aligner.guide = guide
        aligner.save(path)
        opened = IMG(twin.backbone, twin.guide, path)
        assert opened.aligner.guide == guide
        line = "this aligner was trained with x 123, and is guided by llava-detector"
        assert (line in capsys.readouterr().err) == warned
    with refused("trained with x 123, and is guided by text", "--guidance mllm, or stock"):
        IMG(twin.backbone, aligner=path, guidance="text")
    aligner.guide = "text"
    with refused("trained with text, and is guided by llava-detector", "--guidance text"):
        IMG(twin.backbone, twin.guide, aligner)
