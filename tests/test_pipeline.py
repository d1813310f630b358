"""The whole method on the shipped twin: drawing, looking, aligning, drawing again."""

import json
import re

import pytest
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from refusals import refused
from transformers.utils import logging as transformers_logging

from img_minimal.files import to_pil
from img_minimal.hub.parts import open_guide
from img_minimal.hub.questions import RELEASED, find_questions
from img_minimal.pipeline import IMG, load_img
from img_minimal.presets import PRESETS, find_preset
from img_minimal.sdxl import cross_attentions
from img_minimal.tiny.grammar import benchmark

PRESET = find_preset("tiny-sdxl")
PROMPTS = [str(prompt) for prompt in benchmark(5, "validation", seed=3)]
SEEDS = [11, 3, 7, 3, 900]


@pytest.fixture(scope="module")
def images(twin) -> torch.Tensor:
    return twin.backbone.draw(PROMPTS, SEEDS)


def test_a_seed_gives_the_same_image_alone_and_in_a_batch(twin, images):
    alone = twin.backbone.draw(PROMPTS[2:3], SEEDS[2:3])
    assert images.shape == (5, 3, 64, 64) and 0 <= images.min() and images.max() <= 1
    # Sums of another batch size are rounded otherwise: within one grey level in 50.
    assert (alone[0] - images[2]).abs().mean() < 0.02


def test_a_seeds_picture_is_asked_about_and_aligned_alone_as_in_a_batch(twin, images):
    together = twin.align(images, PROMPTS, SEEDS)
    for k in range(5):
        one = slice(k, k + 1)
        alone = twin.align(images[one], PROMPTS[one], SEEDS[one])
        assert (alone - together[one]).abs().max() < 0.05, "another question moves tokens by .5"
    untouched = twin.backbone.tokens(to_pil(images))
    assert (together - untouched).abs().max() > 0.1, "the shipped aligner should do something"


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (None, [1.0, 0.8, 0.6, 0.4, 0.2]),
        # Calls the UNet twice in every step but the last.
        (HeunDiscreteScheduler, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),
    ],
)
def test_the_scale_of_the_image_tokens_falls_linearly_over_the_calls_of_each_batch(
    twin, images, monkeypatch, scheduler, expected
):
    tokens, scales = twin.backbone.tokens(to_pil(images)), []
    pipe, unet = twin.backbone.pipe, twin.backbone.pipe.unet
    if scheduler:
        monkeypatch.setattr(pipe, "scheduler", scheduler.from_config(pipe.scheduler.config))
    layer = next(iter(cross_attentions(unet).values()))
    hook = unet.register_forward_pre_hook(lambda *_: scales.append(float(layer.processor.scale)))
    with twin.drawing(steps=5, draw_batch=3):
        twin.backbone.draw(PROMPTS, SEEDS, tokens, scale=1.0, scale_end=0.2)
    hook.remove()
    assert scales == pytest.approx(expected * 2)


def test_img_opens_in_its_three_ways_and_gives_the_same_images_every_time(twin, capsys):
    def drawn(img: IMG) -> list[Image.Image]:
        out = img(PROMPTS[:2], seed=1, num_inference_steps=4)
        return [image.tobytes() for image in out.initial + out.images]

    expected = drawn(twin)
    assert drawn(IMG(twin.backbone, twin.guide, twin.aligner)) == expected
    for library in (transformers_logging, diffusers_logging):
        library.enable_progress_bar()
    loaded = load_img(PRESET)
    assert "Loading" not in capsys.readouterr().err, "35 lines of other libraries' bars"
    assert transformers_logging.is_progress_bar_enabled()
    assert diffusers_logging.is_progress_bar_enabled()
    assert drawn(loaded) == expected
    pipe = StableDiffusionXLPipeline.from_pretrained(PRESET.models.base, add_watermarker=False)
    around = IMG(pipe, PRESET.models.mllm, PRESET.sampling.aligner, preset="tiny-sdxl")
    assert drawn(around) == expected


FIXED = ("base", "unet", "offload")  # of a pipeline that is loaded


def test_settings_that_could_have_no_effect_are_refused(twin):
    for words, settings in (
        (
            "SDXL's and FLUX.1's pipelines (text, img2img, inpaint, ControlNet)",
            {"pipe": "sdxl"},
        ),
        ("'scale' is a setting of this backbone", {"pipe": twin.backbone, "scale": 0.3}),
        ("'questions' is a setting", {"mllm": twin.guide, "questions": "own"}),
        *(
            (f"{name!r} is a setting", {"pipe": twin.backbone.pipe, name: "models"})
            for name in FIXED
        ),
        ("guidance by text needs no mllm", {"preset": PRESET, "guidance": "text", "mllm": "x"}),
        ("unknown setting 'colour'", {"preset": PRESET, "colour": 1}),
    ):
        with refused(words):
            IMG(**settings)
    tokens = twin.backbone.negative_tokens()
    with pytest.raises(ValueError, match=r"shape \(1, 16, 128\), expected \(2, 16, 128\)"):
        twin.backbone.draw(PROMPTS[:2], SEEDS[:2], tokens)


def test_each_round_looks_at_the_latest_images(twin):
    with twin.drawing(steps=3):
        stages = twin.stages(PROMPTS[:2], [1, 2], rounds=2)
        first, second, third = map(torch.stack, stages)
        tokens = twin.align(second, PROMPTS[:2], [2, 3])
        assert torch.equal(twin.backbone.draw(PROMPTS[:2], [1, 2], tokens), third)
    assert not torch.equal(first, second)


def test_pictures_that_only_the_mllm_sees_are_drafts_and_the_last_ones_are_whole(twin):
    prompts, seeds = PROMPTS[:2], [1, 2]
    with twin.drawing(steps=3, draft_steps=2):
        draft, again, last = map(torch.stack, twin.stages(prompts, seeds, rounds=2))
        whole, _ = twin.stages(prompts, seeds, whole=True)
        tokens = twin.align(again, prompts, [2, 3])
        assert torch.equal(twin.backbone.draw(prompts, seeds, tokens), last)
        assert torch.equal(twin.backbone.draw(prompts, seeds), torch.stack(whole))
    with twin.drawing(steps=2):
        assert torch.equal(twin.backbone.draw(prompts, seeds), draft)
    for steps in (0, 11, -1):
        with refused("--draft-steps"):
            twin(PROMPTS[0], draft_steps=steps)


def test_one_look_at_one_draft_serves_all_seeds_of_a_prompt(twin):
    with twin.drawing(steps=3, draft_steps=2):
        out = twin([PROMPTS[0]] * 3, seed=5, one_look=True)
        [draft], images = twin.stages([PROMPTS[0]] * 3, [5, 6, 7], one_look=True)
        tokens = twin.align(draft[None], PROMPTS[0], [5]).expand(3, -1, -1)
        expected = twin.backbone.draw([PROMPTS[0]] * 3, [5, 6, 7], tokens)
    assert torch.equal(torch.stack(images), expected)
    assert len(out.initial) == len(out.said) == 1 and len(out.images) == 3
    with pytest.raises(ValueError, match="one look serves the seeds of one prompt"):
        twin(PROMPTS[:2], one_look=True)


def test_what_the_mllm_finds_right_is_not_corrected(twin, monkeypatch):
    prompts, seeds, verdicts = PROMPTS[:2], [1, 2], [True, False]
    monkeypatch.setattr(twin.guide, "finds_wrong", lambda *_: verdicts)
    with twin.drawing(steps=3, only_wrong=True):
        first, last = twin.stages(prompts, seeds)
        assert last[1] is first[1] and not torch.equal(first[0], last[0])
        with twin.drawing(draft_steps=2):
            _, drawn = twin.stages(prompts, seeds)
        assert torch.equal(drawn[1], twin.backbone.draw(prompts[1:], seeds[1:])[0])
    text = IMG(twin.backbone, guidance="text")
    with refused("guidance by text has none"):
        text(PROMPTS[0], only_wrong=True)


def test_the_mllm_finds_wrong_what_it_would_not_call_nothing(twin):
    images = to_pil(twin.backbone.draw(PROMPTS, SEEDS))
    words = twin.explain(images, PROMPTS, SEEDS)
    found = twin.finds_wrong(*twin.guidance(images, PROMPTS, SEEDS))
    assert found == [answer != "nothing" for answer in words]
    assert set(found) == {True, False}


def test_released_weights_are_asked_in_a_hundred_ways_of_the_form_that_the_release_asks_in():
    assert len(set(RELEASED)) == 100
    assert all(re.fullmatch("How to .* the prompt: {}[?]", question) for question in RELEASED)
    for preset in PRESETS.values():
        assert preset.models.questions == ("own" if preset.world else "released")


def test_questions_come_from_a_file_with_the_prompts_place_in_any_of_its_spellings(tmp_path):
    file = tmp_path / "questions.json"
    listed = ["How about {}?", "What about <prompt>?", "Why not {prompt}", "[caption]: how?"]
    file.write_text(json.dumps(listed))
    expected = ("How about {}?", "What about {}?", "Why not {}", "{}: how?")
    assert find_questions(str(file)) == expected
    guide = open_guide(PRESET.changed(questions=str(file)).models, "mllm")
    asked = {guide.question("x", seed) for seed in range(50)}
    assert asked == {question.replace("{}", "x") for question in expected}


@pytest.mark.parametrize(
    "text", ["{}", "[]", "[1]", '["no place"]', '["{} and {}"]', "", "[" * 10**5]
)
def test_a_file_of_no_questions_is_refused_with_an_example(tmp_path, text):
    file = tmp_path / "questions.json"
    file.write_text(text)
    with refused(str(file), "expected a JSON list of phrasings"):
        find_questions(str(file))


def test_the_better_of_two_images_is_the_one_that_the_mllm_is_more_content_with(twin, images):
    own = to_pil(images)
    anothers = own[1:] + own[:1]
    before, after = (twin.satisfaction(pictures, PROMPTS, SEEDS) for pictures in (anothers, own))
    better = twin.better(anothers, own, PROMPTS, SEEDS)
    assert better == [b > a for a, b in zip(before, after)] and any(better)
    assert twin.better(own, own, PROMPTS, SEEDS) == [False] * 5


def test_guidance_may_come_of_the_text_alone(twin, images):
    text = open_guide(PRESET.models, "text", twin.backbone)
    states, mask = text.guidance(to_pil(images), PROMPTS, SEEDS)
    assert states.shape[::2] == (5, text.width) and mask.all()
    assert torch.equal(states, twin.backbone.text_states(PROMPTS).float())
