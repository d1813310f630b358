"""The whole method on the shipped twin: drawing, tokens, guidance, alignment."""

import json
import random
import re
from dataclasses import replace

import pytest
import torch

from img_minimal.aligner import align
from img_minimal.sdxl import DecoupledAttention
from img_minimal.sdxl import draw
from img_minimal.load import load_guide, load_img
from img_minimal.mllm import MLLM, guidance_features
from img_minimal.pipeline import IMG
from img_minimal.presets import PRESETS, find_preset
from img_minimal.mllm import QUESTIONS, RELEASED, ask, find_questions
from img_minimal.cli import UserError
from img_minimal.files import from_pil, to_pil
from img_minimal.tiny.grammar import benchmark

PRESET = find_preset("tiny-sdxl")
PROMPTS = [str(p) for p in benchmark(5, "validation", seed=3)]


@pytest.fixture(scope="module")
def img() -> IMG:
    return load_img(PRESET)


@pytest.fixture(scope="module")
def images(img) -> torch.Tensor:
    return img.backbone.draw(PROMPTS, [7] * 5)


def test_a_seed_gives_the_same_image_alone_and_in_a_batch(img, images):
    alone = img.backbone.draw(PROMPTS[2:3], [7])
    assert images.shape == (5, 3, 64, 64) and 0 <= images.min() and images.max() <= 1
    # bf16 sums in another order for another batch size: within one grey level in 50
    assert (alone[0] - images[2]).abs().mean() < 0.02


def test_image_tokens_at_scale_zero_change_nothing_and_leave_no_trace(img, images):
    tokens = img.backbone.tokens(to_pil(images))
    assert torch.equal(img.backbone.draw(PROMPTS, [7] * 5, tokens, scale=0.0), images)
    changed = img.backbone.draw(PROMPTS, [7] * 5, tokens, scale=1.0)
    assert not torch.equal(changed, images)
    assert torch.equal(img.backbone.draw(PROMPTS, [7] * 5), images)


def test_the_scale_of_the_image_tokens_changes_linearly_over_the_steps(img, images, monkeypatch):
    tokens, heard = img.backbone.tokens(to_pil(images)), []
    plain = DecoupledAttention.__call__

    def watched(self, attn, *inputs, **named):
        heard.append(float(self.scale))
        return plain(self, attn, *inputs, **named)

    monkeypatch.setattr(DecoupledAttention, "__call__", watched)
    pipe, layers = img.backbone.pipe, len(img.backbone.branch)
    settings = {"branch": img.backbone.branch, "tokens": tokens, "negative": tokens[:1], "steps": 5}
    settings["guidance_scale"] = 4
    falling = draw(pipe, PROMPTS, [7] * 5, scale=1.0, scale_end=0.2, batch_size=3, **settings)
    each_step = [1.0, 0.8, 0.6, 0.4, 0.2] * 2  # two batches, and the second one starts anew
    assert heard == pytest.approx([s for s in each_step for _ in range(layers)])
    constant = draw(pipe, PROMPTS, [7] * 5, scale=1.0, batch_size=3, **settings)
    assert set(heard[-5 * layers :]) == {1.0} and not torch.equal(falling, constant)


def test_an_infinite_scale_is_an_error_and_no_black_picture(img, images):
    tokens = img.backbone.tokens(to_pil(images))
    with pytest.raises(UserError, match="image 0 is not finite: check --scale"):
        img.backbone.draw(PROMPTS[:1], [7], tokens[:1], scale=float("inf"))


def test_the_whole_method_gives_the_same_images_twice(img):
    first, second = (img.stages(PROMPTS[:2], [1, 2], rounds=2) for _ in range(2))
    assert len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_guidance_features_of_a_padded_batch_equal_those_of_each_prompt_alone(img, images):
    pictures = to_pil(images)
    mllm = MLLM.from_pretrained(PRESET.mllm)  # in fp32: bf16 rounds by the shape of the batch
    together, mask = mllm.guidance(pictures, PROMPTS, range(5, 5 + len(PROMPTS)))
    assert together.shape[-1] == mllm.width == img.aligner.guidance_width
    assert not mask.all(), "the prompts should differ in length, or this test shows nothing"
    for k, (picture, prompt) in enumerate(zip(pictures, PROMPTS)):
        alone, _ = mllm.guidance([picture], [prompt], [5 + k])
        assert (alone[0] - together[k][mask[k]]).abs().max() < 1e-4


def test_guidance_features_are_the_last_hidden_states_after_the_final_norm(img, images):
    states, _ = img.guide.guidance(to_pil(images)[:1], PROMPTS[:1], [5])
    inputs = img.guide.inputs(to_pil(images)[:1], [img.guide.question(PROMPTS[0], 5)])
    everything = img.guide.model(**inputs, output_hidden_states=True)
    assert torch.allclose(states, everything.hidden_states[-1], atol=1e-5)
    assert torch.allclose(img.guide.model.lm_head(states), everything.logits, atol=1e-4)


def test_the_mllm_answers_in_words_of_edits(img, images):
    answers = img.guide.explain(to_pil(images)[:2], PROMPTS[:2], [0, 1])
    verbs = {"change", "add", "remove", "move", "nothing"}
    assert all(answer.split()[0] in verbs for answer in answers)


def test_aligned_tokens_do_not_depend_on_the_batch(img, images):
    pictures = to_pil(images)
    features, mask = guidance_features(img.guide, pictures, PROMPTS, range(len(PROMPTS)))
    tokens = img.backbone.tokens(pictures)
    whole = align(img.aligner, tokens, features, mask, passes=2)
    parts = align(img.aligner, tokens, features, mask, passes=2, batch_size=2)
    assert torch.allclose(whole, parts, atol=1e-4)
    assert not torch.allclose(whole, tokens, atol=1e-2), "the shipped aligner should do something"


def test_a_nan_in_the_guidance_features_is_one_line_that_names_the_image(img, images):
    features = torch.zeros(3, 4, img.guide.width)
    features[1, 0, 0] = torch.nan
    with pytest.raises(UserError, match="image 1 are not finite"):
        align(img.aligner, img.backbone.tokens(to_pil(images)[:3]), features, torch.ones(3, 4).bool(), passes=1)


def test_an_mllm_of_another_width_is_one_line_that_says_what_to_do(img, images):
    with pytest.raises(UserError, match="trained for an MLLM of width"):
        align(img.aligner, img.backbone.tokens(to_pil(images)[:1]), torch.zeros(1, 4, 99), torch.ones(1, 4).bool(), 1)


def test_a_seed_s_picture_is_asked_about_and_aligned_alone_as_in_a_batch(img, images):
    seeds = [11, 3, 7, 3, 900]
    together = img.align(images, PROMPTS, seeds)
    for k in range(5):
        alone = img.align(images[k : k + 1], PROMPTS[k : k + 1], seeds[k : k + 1])
        assert (alone - together[k : k + 1]).abs().max() < 0.05, "another question moves tokens by .5"
    assert len({img.guide.question(PROMPTS[0], seed) for seed in range(50)}) > 30


@pytest.mark.parametrize("bank", [QUESTIONS, RELEASED], ids=["own", "released"])
def test_there_are_one_hundred_different_questions_that_all_hold_the_prompt(bank):
    assert len(set(bank)) == 100
    assert all(question.count("{}") == 1 for question in bank)
    asked = {ask("a red {circle}", random.Random(k), bank) for k in range(500)}
    assert len(asked) > 90 and all("a red {circle}" in question for question in asked)


def test_released_weights_are_asked_in_the_form_that_the_release_asks_in():
    assert all(re.fullmatch("How to .* the prompt: {}[?]", question) for question in RELEASED)
    assert all(preset.questions == ("own" if preset.world else "released") for preset in PRESETS.values())


def test_questions_come_from_a_file_with_the_prompt_s_place_in_any_of_its_spellings(tmp_path):
    file = tmp_path / "questions.json"
    listed = ["How to fix it for the prompt: {}?", "What about <prompt>?", "Why not {prompt}", "[caption]: how?"]
    file.write_text(json.dumps(listed))
    expected = ("How to fix it for the prompt: {}?", "What about {}?", "Why not {}", "{}: how?")
    assert find_questions(str(file)) == expected
    with_file = load_guide(replace(PRESET, questions=str(file)), "mllm")
    assert {with_file.question("x", seed) for seed in range(50)} == {q.replace("{}", "x") for q in expected}
    wrong = ["{}", "[]", "[1]", '["no place"]', '["{} and {}"]', "", "nonsense", "[" * 100_000, '{"a": "{}"}']
    for text in wrong:
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            find_questions(str(file))
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        find_questions(str(tmp_path / "none.json"))


def test_pictures_survive_the_way_to_pil_and_back():
    pixels = torch.rand(2, 3, 8, 8)
    assert (from_pil(to_pil(pixels)) - pixels).abs().max() <= 0.5 / 255 + 1e-6


def test_satisfaction_is_the_log_probability_of_nothing_as_the_first_word(img, images):
    scores = img.guide.satisfaction(to_pil(images), PROMPTS, range(len(PROMPTS)))
    assert len(scores) == 5 and all(score <= 0 for score in scores)


def test_the_better_of_two_images_is_the_one_that_the_mllm_is_more_content_with(img, images):
    pictures, seeds = to_pil(images), range(5)
    other = pictures[1:] + pictures[:1]
    own, theirs = (img.satisfaction(images, PROMPTS, seeds) for images in (pictures, other))
    assert img.better(pictures, other, PROMPTS, seeds) == [b > a for a, b in zip(own, theirs)]
    assert img.better(other, pictures, PROMPTS, seeds) == [a > b for a, b in zip(own, theirs)] != [False] * 5
    assert img.better(pictures, pictures, PROMPTS, seeds) == [False] * 5


def test_the_stock_mllm_is_another_model_of_the_same_kind(img):
    stock = MLLM.from_pretrained(PRESET.stock_mllm)
    assert stock.width == img.guide.width
    weights = [m.model.lm_head.weight for m in (stock, img.guide)]
    assert not torch.equal(*weights)
