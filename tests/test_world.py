"""Scenes are right for their prompts, and pictures show what the scenes say."""

import random
from itertools import combinations

import pytest
import torch

from img_minimal.tiny.grammar import CATEGORIES, COLOURS, FORMS, RELATIONS, Prompt, parse, sample_prompt
from img_minimal.tiny.world import (
    BACKGROUND,
    PALETTE,
    SIZE,
    Scene,
    Shape,
    overlap,
    place,
    related,
    render,
    satisfied,
    signed_distance,
)

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# Left, top, right and bottom of each form's box, in units of its radius.
BOXES = {
    "circle": (-1.0, -1.0, 1.0, 1.0),
    "square": (-0.88, -0.88, 0.88, 0.88),
    "triangle": (-0.925, -1.1, 0.925, 0.75),
    "cross": (-1.0, -1.0, 1.0, 1.0),
}


def scenes(count: int, category: str | None = None) -> list[tuple[Prompt, Scene]]:
    rng = random.Random(0)
    prompts = [sample_prompt(rng, category, "test", held_out=None) for _ in range(count)]
    return [(prompt, place(prompt, rng)) for prompt in prompts]


def shape_at(x: float, y: float) -> Shape:
    return Shape("red", "circle", x, y, 8.0)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_placed_scene_is_right_for_its_prompt(category):
    for prompt, scene in scenes(100, category):
        assert [shape.kind for shape in scene] == prompt.kinds
        assert satisfied(prompt, scene)


def test_placed_shapes_never_overlap():
    for _, scene in scenes(300):
        assert not any(overlap(a, b) for a, b in combinations(scene, 2))


def test_placed_shapes_lie_within_the_picture():
    for _, scene in scenes(300):
        for shape in scene:
            left, top, right, bottom = (side * shape.r for side in BOXES[shape.form])
            assert shape.x + left >= 0 and shape.y + top >= 0
            assert shape.x + right <= SIZE and shape.y + bottom <= SIZE


def test_the_same_seed_places_the_same_scene():
    prompt = parse("two red circles left of a blue square")
    assert place(prompt, random.Random(1)) == place(prompt, random.Random(1)) != place(prompt, random.Random(2))


def test_pictures_are_rgb_of_64_pixels_between_0_and_1():
    images = render([scene for _, scene in scenes(50)])
    assert images.shape == (50, 3, 64, 64)
    assert images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1


def test_an_empty_scene_is_ground_and_no_scenes_are_no_pictures():
    assert torch.equal(render([()]), torch.tensor(BACKGROUND).view(1, 3, 1, 1).expand(1, 3, 64, 64))
    assert render([]).shape == (0, 3, 64, 64)


def test_a_picture_does_not_depend_on_its_batch():
    some = [scene for _, scene in scenes(10)]
    assert torch.equal(render(some), torch.cat([render([scene]) for scene in some]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_shape_is_painted_in_its_colour_inside_its_box_and_nowhere_else(colour, form):
    x, y, r = 30.3, 33.8, 8.6
    image = render([(Shape(colour, form, x, y, r),)])[0]
    assert image[:, int(y), int(x)].tolist() == pytest.approx(PALETTE[colour])
    rows, columns = (image - torch.tensor(BACKGROUND).view(3, 1, 1)).abs().sum(0).gt(0.02).nonzero().T
    painted = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    box = [centre + side * r for centre, side in zip((x, y, x, y), BOXES[form])]
    assert [float(side) for side in painted] == pytest.approx(box, abs=1.5)


@pytest.mark.parametrize("form", FORMS)
def test_the_window_that_render_paints_cuts_nothing_visible_off(form):
    rng = random.Random(0)
    rows, columns = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    ground, colour = (torch.tensor(c).view(3, 1, 1) for c in (BACKGROUND, PALETTE["red"]))
    for _ in range(20):
        x, y, r = rng.uniform(11, 53), rng.uniform(11, 53), rng.uniform(7.5, 9)
        cover = (0.5 - signed_distance(form, columns - x, rows - y, r)).clamp(0, 1)
        whole = ground * (1 - cover) + colour * cover
        assert (render([(Shape("red", form, x, y, r),)])[0] - whole).abs().sum() < 1  # of 12,288 values


def test_an_unknown_form_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match="unknown form 'star'; known: circle, square"):
        signed_distance("star", torch.zeros(1), torch.zeros(1), 8.0)


@pytest.mark.parametrize(
    ("relation", "second"), [("left of", (52, 30)), ("right of", (12, 34)), ("above", (30, 52)), ("below", (34, 12))]
)
def test_a_relation_holds_one_way_and_no_other(relation, second):
    a, b = shape_at(32, 32), shape_at(*second)
    assert [name for name in RELATIONS if related(name, [a], [b])] == [relation]
    assert [name for name in RELATIONS if related(name, [b], [a])] == [OPPOSITE[relation]]


def test_nothing_is_laid_out_on_a_diagonal_but_what_lies_there_is_judged_to_be_beside_and_above():
    a, b = shape_at(12, 12), shape_at(32, 32)
    assert not any(related(relation, [a], [b]) for relation in RELATIONS)
    assert [name for name in RELATIONS if related(name, [a], [b], judging=True)] == ["left of", "above"]
    assert [name for name in RELATIONS if related(name, [a], [shape_at(52, 32)], judging=True)] == ["left of"]


def test_every_shape_of_a_group_must_stand_in_the_relation():
    square = [shape_at(32, 32)]
    assert related("left of", [shape_at(12, 22), shape_at(12, 42)], square)
    assert not related("left of", [shape_at(12, 22), shape_at(34, 52)], square)


def test_whoever_judges_forgives_pixels_and_never_condemns_what_was_laid_out():
    a, b = shape_at(32, 32), shape_at(37.5, 32)
    assert not related("left of", [a], [b])
    assert related("left of", [a], [b], judging=True)
    assert all(satisfied(prompt, scene, judging=True) for prompt, scene in scenes(100, "position"))


def test_a_prompt_without_a_relation_is_satisfied_by_any_places():
    prompt = parse("a red circle and a red square")
    assert satisfied(prompt, (shape_at(30, 30), shape_at(31, 31)))
