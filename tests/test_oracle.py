"""The oracle is right about right images, wrong images and images of nothing in particular."""

import random
from dataclasses import replace
from functools import cache

import pytest
import torch

from img_minimal.tiny.build.tables import damaged
from img_minimal.tiny.diagnose import agreement, readings
from img_minimal.tiny.edits import NOTHING
from img_minimal.tiny.grammar import benchmark, parse, sample_prompt
from img_minimal.tiny.oracle import BLOB, detect, judge
from img_minimal.tiny.world import BACKGROUND, PALETTE, Shape, place, render


def paint(colour):
    return torch.tensor(colour).view(3, 1, 1)


GREY = paint((0.5, 0.5, 0.5))  # no colour of the palette is near
RED = paint(PALETTE["red"])
GROUND = paint(BACKGROUND)


@cache
def right_scenes():
    """Lay out 1,000 scenes of all categories, one in four with a held-out pair."""
    rng, prompts = random.Random(0), benchmark(1000)
    return prompts, [place(prompt, rng) for prompt in prompts]


def share_right(images, prompts):
    return sum(verdict.strict for verdict in judge(images, prompts)) / len(prompts)


def circle(x=32, y=32, colour="red"):
    return Shape(colour, "circle", x, y, 8)


def kinds(image):
    return [shape.kind for shape in detect(image)[0]]


def test_right_images_of_every_category_are_judged_right():
    prompts, scenes = right_scenes()
    for k in range(5):
        assert share_right(render(scenes[k::5]), prompts[k::5]) >= 0.99, prompts[k].category


def test_shapes_are_found_at_their_positions_and_sizes():
    _, scenes = right_scenes()
    for scene, found in zip(scenes, detect(render(scenes[:300]))):
        assert len(found) == len(scene)
        for shape in scene:
            (seen,) = [s for s in found if s.squared_distance(shape.x, shape.y) < 4]
            assert seen.kind == shape.kind
            assert seen.r == pytest.approx(shape.r, abs=1.5)


def test_a_single_mistake_is_seen():
    rng = random.Random(1)
    prompts = [sample_prompt(rng) for _ in range(1000)]
    wrong = [damaged(place(prompt, rng), prompt, rng) for prompt in prompts]
    assert share_right(render(wrong), prompts) <= 0.005


def test_a_shape_of_no_known_colour_counts_against_an_image():
    image, prompt = render([[circle(12, 12)]]), parse("a red circle")
    assert judge(image, [prompt])[0].strict
    image[0, :, 40:52, 40:52] = GREY
    verdict = judge(image, [prompt])[0]
    assert verdict.unclear and not verdict.strict
    assert verdict.soft == pytest.approx(1 / 1.5)
    assert verdict.words == "remove the unclear square"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(
    "pair", [("red", "orange"), ("orange", "yellow"), ("purple", "red"), ("blue", "green")]
)
def test_a_colour_half_way_between_two_has_no_name(pair, share):
    mixed = []
    for a, b in zip(PALETTE[pair[0]], PALETTE[pair[1]]):
        mixed.append(a * (1 - share) + b * share)
    cover = (render([[circle(colour="red")]])[0] - GROUND)[1] / (RED - GROUND)[1]
    image = GROUND * (1 - cover) + paint(mixed) * cover
    colour = "unclear" if share == 0.5 else pair[round(share)]
    assert kinds(image[None]) == [(colour, "circle")]


@pytest.mark.parametrize("second", ["yellow circle", "purple circle", "yellow square"])
def test_shapes_that_touch_are_read_one_by_one(second):
    scene = circle(20, 30, "yellow"), Shape(*second.split(), 36, 30, 8.5)
    assert set(kinds(render([scene]))) == {shape.kind for shape in scene}


def test_the_oracle_reads_drawn_images_as_a_person_does():
    pictures = readings()
    fresh = [picture for picture in pictures if picture.fresh]
    assert (len(pictures), len(fresh)) == (360, 120)
    for some in (pictures, fresh):
        alike = agreement(some)
        assert alike["strict"] >= 0.97 and alike["meant"] >= 0.95, alike
    # Agreement by chance: with the readings of other images.
    moved = [replace(a, by_eye=b.by_eye) for a, b in zip(pictures, pictures[1:])]
    assert agreement(moved)["strict"] < 0.6


def test_an_image_and_its_png_are_judged_alike_alone_and_in_a_batch():
    torch.manual_seed(0)
    prompts, scenes = right_scenes()
    images = (render(scenes[:60]) + 0.1 * torch.randn(60, 3, 64, 64)).clamp(0, 1)
    verdicts = judge(images, prompts[:60])
    png = (images * 255).round().byte().float() / 255
    assert judge(png, prompts[:60]) == verdicts
    alone = [judge(image[None], [prompt])[0] for image, prompt in zip(images, prompts)]
    assert alone == verdicts


def test_a_clearer_image_has_the_higher_grade():
    prompt, images = parse("a red circle"), render([[circle()]] * 3)
    images[1, :, 24:34, 30:33] = RED  # a flat nose
    images[2] = images[0] * 0.9 + 0.1 * paint(PALETTE["orange"])
    best, *others = judge(images, [prompt] * 3)
    assert best.soft == 1
    for verdict in others:
        assert verdict.soft == 1 and verdict.graded < best.graded


@pytest.mark.parametrize("random_images", [torch.rand, torch.zeros, torch.ones])
def test_images_of_nothing_in_particular_are_wrong_and_no_accident(random_images):
    torch.manual_seed(0)
    for verdict in judge(random_images(3, 3, 64, 64), [parse("a red circle")] * 3):
        assert not verdict.strict and 0 <= verdict.soft < 1


def test_only_right_images_score_1_and_need_nothing():
    prompts, scenes = right_scenes()
    prompts = prompts[5:200] + prompts[:5] + prompts[200:400]  # others of the same category first
    verdicts = judge(render(scenes[:400]), prompts)
    assert {verdict.strict for verdict in verdicts} == {True, False}
    for verdict in verdicts:
        assert 0 <= verdict.soft <= 1
        assert (verdict.soft == 1) is (verdict.words == NOTHING) is verdict.strict


@pytest.mark.parametrize(
    ("caption", "soft"),
    [
        ("a red circle left of a blue square", 1.0),
        ("a red circle right of a blue square", 0.7),  # the shapes are right, the relation is not
        ("a red circle", 1 / 1.5),  # one shape too many
        ("a red circle, a blue square and a green cross", 2 / 3),  # one missing
        ("a red circle and a green cross", 1 / 2.5),  # one right, one wrong
        ("two green crosses", 0.0),
    ],
)
def test_soft_scores_count_what_is_right(caption, soft):
    image = render([[circle(12), Shape("blue", "square", 52, 32, 8)]])
    assert judge(image, [parse(caption)])[0].soft == pytest.approx(soft)


@pytest.mark.parametrize(
    ("areas", "found"),
    [
        ([(4, 12, 4, 12), (12, 20, 12, 20)], 1),  # meet at a corner
        ([(40, 60, 40, 43), (40, 60, 57, 60), (40, 43, 40, 60), (57, 60, 40, 60)], 1),  # a frame
        ([(40, 48, 4, 12), (49, 57, 4, 12)], 2),  # a row of ground between
    ],
)
def test_a_connected_area_is_one_shape_of_any_form(areas, found):
    image = render([()])
    for top, bottom, left, right in areas:
        image[0, :, top:bottom, left:right] = RED
    shapes = detect(image)[0]
    assert len(shapes) == found
    assert {shape.colour for shape in shapes} == {"red"}
    if found == 1:
        assert shapes[0].form == BLOB
