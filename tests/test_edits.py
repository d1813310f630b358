"""The smallest correction: right by the oracle, the same every time, and no larger than it must be."""

import random
from collections import Counter
from functools import cache

import pytest

from img_minimal.tiny.build.triplets import sample_triplet
from img_minimal.tiny.edits import NOTHING, correct, instruction
from img_minimal.tiny.grammar import CATEGORIES, COLOURS, FORMS, HELD_OUT, Prompt, parse, sample_prompt
from img_minimal.tiny.oracle import detect, judge
from img_minimal.tiny.world import Scene, Shape, overlap, place, render, satisfied


@cache
def scenes_and_other_prompts() -> list[tuple[Scene, Prompt]]:
    """300 scenes, each with the prompt of another; every two categories meet."""
    rng = random.Random(0)
    pairs = []
    for k in range(300):
        drawn, wanted = CATEGORIES[k % 5], CATEGORIES[k // 5 % 5]
        scene = place(sample_prompt(rng, drawn, "test", held_out=None), rng)
        pairs.append((scene, sample_prompt(rng, wanted, "test", held_out=None)))
    return pairs


def right(scenes: list[Scene], prompts: list[Prompt]) -> float:
    return sum(verdict.strict for verdict in judge(render(scenes), prompts)) / len(prompts)


def test_a_corrected_scene_is_right():
    scenes, prompts = zip(*scenes_and_other_prompts())
    corrected = [correct(scene, prompt)[1] for scene, prompt in zip(scenes, prompts)]
    assert all([s.kind for s in scene] == prompt.kinds for scene, prompt in zip(corrected, prompts))
    assert right(corrected, list(prompts)) >= 0.995


def test_a_scene_is_corrected_as_well_when_it_was_seen_and_not_known():
    scenes, prompts = zip(*scenes_and_other_prompts())
    corrected = [correct(seen, prompt)[1] for seen, prompt in zip(detect(render(list(scenes))), prompts)]
    assert right(corrected, list(prompts)) >= 0.995


def test_a_right_scene_needs_no_edit_and_is_left_alone():
    rng = random.Random(1)
    for k in range(300):
        prompt = sample_prompt(rng, CATEGORIES[k % 5], "test", held_out=None)
        scene = place(prompt, rng)
        assert correct(scene, prompt) == ([], scene)
        shuffled = tuple(rng.sample(scene, len(scene)))
        assert Counter(correct(shuffled, prompt)[1]) == Counter(scene)
        assert instruction(shuffled, prompt) == NOTHING


def test_a_wrong_scene_needs_an_edit():
    for scene, prompt in scenes_and_other_prompts():
        if Counter(shape.kind for shape in scene) != Counter(prompt.kinds):
            assert instruction(scene, prompt) != NOTHING


def test_a_correction_is_a_function_without_dice():
    random.seed(0)
    state = random.getstate()
    for scene, prompt in scenes_and_other_prompts()[:100]:
        before = tuple(scene)
        assert correct(scene, prompt) == correct(scene, prompt)
        assert scene == before
    assert random.getstate() == state


def test_shapes_that_need_no_change_stay_where_they_are():
    for scene, prompt in scenes_and_other_prompts():
        edits, corrected = correct(scene, prompt)
        if any(edit.startswith("move") for edit in edits):
            continue
        needed = Counter(shape.kind for shape in scene) & Counter(prompt.kinds)
        untouched = Counter(shape.kind for shape in set(scene) & set(corrected))
        assert untouched == needed


def test_shapes_that_change_keep_their_place_and_size():
    for scene, prompt in scenes_and_other_prompts():
        edits, corrected = correct(scene, prompt)
        if any(edit.startswith("move") for edit in edits):
            continue
        places = {(s.x, s.y, s.r) for s in scene} & {(s.x, s.y, s.r) for s in corrected}
        assert len(places) == min(len(scene), len(corrected))


def test_only_a_relation_moves_shapes():
    for scene, prompt in scenes_and_other_prompts():
        moves = [edit for edit in correct(scene, prompt)[0] if edit.startswith("move")]
        assert len(moves) <= (prompt.relation is not None)


def test_what_is_added_or_moved_overlaps_nothing():
    for scene, prompt in scenes_and_other_prompts():
        _, corrected = correct(scene, prompt)
        new = set(corrected) - set(scene)
        assert not any(overlap(a, b) for a in new for b in corrected if a is not b)
        assert satisfied(prompt, corrected, judging=True)


def row(*names: str) -> Scene:
    """Shapes from left to right, in the middle of the picture."""
    return tuple(Shape(*name.split(), x, 32.0, 8.0) for name, x in zip(names, (11.5, 32.0, 52.5)))


@pytest.mark.parametrize(
    ("scene", "caption", "words"),
    [
        (row("red circle"), "a red circle", "nothing"),
        (row("red circle"), "a blue circle", "change the red circle to a blue circle"),
        (row("orange square"), "an orange circle", "change the orange square to an orange circle"),
        (row("red circle"), "a blue square", "change the red circle to a blue square"),
        (row("red circle"), "a red circle and an orange square", "add an orange square"),
        (row("red circle"), "three red circles", "add two red circles"),
        (row("red circle", "blue square"), "a blue square", "remove the red circle"),
        (row("red circle", "red circle", "blue square"), "a blue square", "remove two red circles"),
        (row("red circle", "red circle"), "a red circle", "remove the red circle"),
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
            row("red circle", "blue square"),
            "a red square and a blue circle",
            "change the red circle to a red square, change the blue square to a blue circle",
        ),
        (
            row("red circle", "green cross"),
            "a red circle, a blue cross and a yellow triangle",
            "change the green cross to a blue cross, add a yellow triangle",
        ),
        (row("unclear shape"), "a red circle", "change the unclear shape to a red circle"),
    ],
)
def test_corrections_in_words(scene, caption, words):
    assert instruction(scene, parse(caption)) == words


def test_two_shapes_on_the_wrong_sides_exchange_places():
    scene = row("blue square", "red circle")
    corrected = correct(scene, parse("a red circle left of a blue square"))[1]
    assert [(s.x, s.y) for s in corrected] == [(s.x, s.y) for s in scene]


def test_an_added_shape_goes_to_the_free_place_nearest_the_middle():
    added = correct(row("red circle"), parse("a red circle and a blue square"))[1][1]
    assert (added.x, added.y) == (32.0, 32.0)


def test_triplets_hold_no_held_out_pair_in_picture_prompt_or_words():
    rng = random.Random(2)
    unseen = [f"{colour} {form}" for colour, form in HELD_OUT]
    instructions = []
    for _ in range(400):
        scene, prompt, words = sample_triplet(rng)
        assert not {shape.kind for shape in scene} & HELD_OUT
        assert prompt.split == "train"
        assert not any(kind in words for kind in unseen)
        instructions.append(words)
    assert 0.25 < instructions.count(NOTHING) / 400 < 0.6
    assert {words.split()[0] for words in instructions} == {NOTHING, "change", "add", "remove", "move"}


def test_the_words_of_instructions_are_few_enough_to_learn():
    rng = random.Random(3)
    words = {word for _ in range(400) for word in sample_triplet(rng)[2].replace(",", "").split()}
    plurals = {"circles", "squares", "triangles", "crosses"}
    grammar = {"a", "an", "the", "to", "two", "three", "four", "left", "right", "of", "above", "below"}
    assert words <= {NOTHING, "change", "add", "remove", "move", *grammar, *plurals, *COLOURS, *FORMS}
