"""Scenes are right for their prompts, and images show what the scenes say."""

import random
from itertools import combinations

import pytest
import torch

from img_minimal.tiny.grammar import CATEGORIES, COLOURS, FORMS, RELATIONS, sample_prompt
from img_minimal.tiny.world import (
    BACKGROUND,
    PALETTE,
    SIZE,
    Shape,
    overlap,
    place,
    related,
    render,
    satisfied,
)

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Left, top, right and bottom of each form's box, in units of its radius.
BOXES = {
    "circle": (-1.0, -1.0, 1.0, 1.0),
    "square": (-0.88, -0.88, 0.88, 0.88),
    "triangle": (-0.925, -1.1, 0.925, 0.75),
    "cross": (-1.0, -1.0, 1.0, 1.0),
}


def box(shape):
    centre = shape.x, shape.y, shape.x, shape.y
    return [c + side * shape.r for c, side in zip(centre, BOXES[shape.form])]


def scenes(count, category=None):
    rng = random.Random(0)
    prompts = [sample_prompt(rng, category, "test", held_out=None) for _ in range(count)]
    return [(prompt, place(prompt, rng)) for prompt in prompts]


def circle(x, y):
    return Shape("red", "circle", x, y, 8.0)


def relations(a, b, judging=False):
    return [name for name in RELATIONS if related(name, [a], [b], judging)]


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_placed_scene_is_right_for_its_prompt(category):
    for prompt, scene in scenes(100, category):
        assert [shape.kind for shape in scene] == prompt.kinds
        assert satisfied(prompt, scene) and satisfied(prompt, scene, judging=True)


def test_placed_shapes_lie_within_the_image_and_never_overlap():
    for _, scene in scenes(300):
        assert not any(overlap(a, b) for a, b in combinations(scene, 2))
        for shape in scene:
            assert min(box(shape)) >= 0 and max(box(shape)) <= SIZE


def test_images_are_rgb_of_64_pixels_between_0_and_1_and_independent_of_their_batch():
    some = [scene for _, scene in scenes(20)]
    images = render(some)
    assert images.shape == (20, 3, 64, 64) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, torch.cat([render([scene]) for scene in some]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_shape_is_painted_in_its_colour_inside_its_box_alone(colour, form):
    shape = Shape(colour, form, 30.3, 33.8, 8.6)
    image = render([(shape,)])[0]
    assert image[:, 33, 30].tolist() == pytest.approx(PALETTE[colour])
    difference = (image - torch.tensor(BACKGROUND).view(3, 1, 1)).abs().sum(0)
    rows, columns = difference.gt(0.02).nonzero().T.tolist()
    painted = min(columns), min(rows), max(columns) + 1, max(rows) + 1
    assert painted == pytest.approx(box(shape), abs=1.5)


@pytest.mark.parametrize(
    ("relation", "second"),
    [("left of", (52, 30)), ("right of", (12, 34)), ("above", (30, 52)), ("below", (34, 12))],
)
def test_a_relation_holds_one_way_and_no_other(relation, second):
    a, b = circle(32, 32), circle(*second)
    assert relations(a, b) == [relation]
    assert relations(b, a) == [OPPOSITE[relation]]


def test_a_shape_on_a_diagonal_is_judged_to_be_left_and_above_but_never_placed_so():
    a, diagonal = circle(12, 12), circle(32, 32)
    assert relations(a, diagonal) == []
    assert relations(a, diagonal, judging=True) == ["left of", "above"]
    assert relations(a, circle(52, 32), judging=True) == ["left of"]


def test_judging_forgives_a_pixel():
    a, b = circle(32, 32), circle(37.5, 32)
    assert relations(a, b) == []
    assert relations(a, b, judging=True) == ["left of"]


def test_every_shape_of_a_group_must_stand_in_the_relation():
    square = [circle(32, 32)]
    assert related("left of", [circle(12, 22), circle(12, 42)], square)
    assert not related("left of", [circle(12, 22), circle(34, 52)], square)
