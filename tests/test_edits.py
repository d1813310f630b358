"""The smallest correction is right by the oracle, always the same, and no larger than necessary."""

import random
from collections import Counter
from functools import cache

import pytest

from img_minimal.tiny.edits import NOTHING, correct, instruction
from img_minimal.tiny.grammar import CATEGORIES, parse, sample_prompt
from img_minimal.tiny.oracle import detect, judge
from img_minimal.tiny.world import Shape, overlap, place, render, satisfied


@cache
def scenes_and_other_prompts():
    """Pair 300 scenes with the prompts of others; every two categories meet."""
    rng = random.Random(0)
    pairs = []
    for k in range(300):
        drawn, wanted = CATEGORIES[k % 5], CATEGORIES[k // 5 % 5]
        scene = place(sample_prompt(rng, drawn, "test", held_out=None), rng)
        pairs.append((scene, sample_prompt(rng, wanted, "test", held_out=None)))
    return pairs


def corrections():
    return [(s, p, *correct(s, p)) for s, p in scenes_and_other_prompts()]


@pytest.mark.parametrize("seen", [False, True], ids=["known", "seen"])
def test_a_corrected_scene_is_right_whether_it_was_known_or_seen(seen):
    scenes, prompts = zip(*scenes_and_other_prompts())
    if seen:
        scenes = detect(render(scenes))
    corrected = [correct(scene, prompt)[1] for scene, prompt in zip(scenes, prompts)]
    verdicts = judge(render(corrected), prompts)
    assert sum(verdict.strict for verdict in verdicts) >= 0.995 * len(prompts)
    for scene, prompt in zip(corrected, prompts):
        assert [shape.kind for shape in scene] == prompt.kinds


def test_a_right_scene_needs_no_edit_and_is_left_alone():
    rng = random.Random(1)
    for k in range(300):
        prompt = sample_prompt(rng, CATEGORIES[k % 5], "test", held_out=None)
        scene = place(prompt, rng)
        assert correct(scene, prompt) == ([], scene)
        shuffled = tuple(rng.sample(scene, len(scene)))
        assert Counter(correct(shuffled, prompt)[1]) == Counter(scene)
        assert instruction(shuffled, prompt) == NOTHING


def test_shapes_keep_everything_that_need_not_change():
    for scene, prompt, edits, corrected in corrections():
        if prompt.relation and edits and edits[-1].startswith("move"):
            continue
        needed = Counter(shape.kind for shape in scene) & Counter(prompt.kinds)
        assert Counter(shape.kind for shape in set(scene) & set(corrected)) == needed
        positions = [{(s.x, s.y, s.r) for s in shapes} for shapes in (scene, corrected)]
        assert len(positions[0] & positions[1]) == min(len(scene), len(corrected))


def test_added_and_moved_shapes_overlap_nothing():
    for scene, prompt, _, corrected in corrections():
        for new in set(corrected) - set(scene):
            assert not any(overlap(new, other) for other in corrected if new is not other)
        assert satisfied(prompt, corrected, judging=True)


def row(*names):
    """Lay shapes out from left to right, in the middle of the image."""
    return tuple(Shape(*name.split(), x, 32.0, 8.0) for name, x in zip(names, (11.5, 32.0, 52.5)))


@pytest.mark.parametrize(
    ("scene", "caption", "words"),
    [
        (row("red circle"), "a red circle", "nothing"),
        (row("orange square"), "an orange circle", "change the orange square to an orange circle"),
        (row("unclear shape"), "a red circle", "change the unclear shape to a red circle"),
        (row("red circle"), "a red circle and an orange square", "add an orange square"),
        (row("red circle", "blue square"), "a blue square", "remove the red circle"),
        (
            row("red circle", "red circle", "blue square"),
            "a blue square",
            "remove two red circles",
        ),
        (
            row("blue square", "red circle"),
            "a red circle left of a blue square",
            "move the red circle left of the blue square",
        ),
        (
            row("red circle", "blue square", "red circle"),
            "two red circles left of a blue square",
            "move the two red circles left of the blue square",
        ),
        (
            row("red circle", "green cross"),
            "a red circle, a blue cross and a yellow triangle",
            "change the green cross to a blue cross, add a yellow triangle",
        ),
    ],
)
def test_corrections_in_words(scene, caption, words):
    assert instruction(scene, parse(caption)) == words


def test_two_shapes_on_the_wrong_sides_change_places():
    scene = row("blue square", "red circle")
    _, corrected = correct(scene, parse("a red circle left of a blue square"))
    assert [(s.x, s.y) for s in corrected] == [(s.x, s.y) for s in scene]


def test_an_added_shape_goes_to_the_free_cell_nearest_the_middle():
    _, (_, added) = correct(row("red circle"), parse("a red circle and a blue square"))
    assert (added.x, added.y) == (32.0, 32.0)
