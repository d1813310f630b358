"""Captions and prompts are two views of one thing, and held-out pairs stay out of training."""

import random
from itertools import permutations, product

import pytest

from img_minimal.cli import UserError
from img_minimal.tiny.grammar import (
    CATEGORIES,
    COLOURS,
    EXAMPLES,
    FORMS,
    HELD_OUT,
    RELATIONS,
    SPLITS,
    Group,
    Prompt,
    PromptError,
    benchmark,
    parse,
    sample_prompt,
)

KINDS = list(product(COLOURS, FORMS))


def every_prompt():
    """List all 19,416 prompts that can be sampled."""
    prompts = [Prompt((Group(n, *kind),)) for n in (1, 2, 3, 4) for kind in KINDS]
    for first, second in permutations(KINDS, 2):
        b = Group(1, *second)
        prompts.append(Prompt((Group(1, *first), b)))
        for n in (1, 2, 3):
            prompts += [Prompt((Group(n, *first), b), relation) for relation in RELATIONS]
    for kinds in permutations(KINDS, 3):
        prompts.append(Prompt(tuple(Group(1, *kind) for kind in kinds)))
    return prompts


EVERY = every_prompt()


def test_every_prompt_is_read_back_from_a_caption_of_its_own():
    assert all(parse(str(prompt)) == prompt for prompt in EVERY)
    assert len({str(prompt) for prompt in EVERY}) == len(EVERY) == 19_416


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize(
    ("split", "held_out"),
    [("train", False), ("validation", False), ("validation", True), ("test", None)],
)
def test_a_sampled_prompt_is_as_asked_for(category, split, held_out):
    rng = random.Random(0)
    for _ in range(50):
        prompt = sample_prompt(rng, category, split, held_out)
        assert (prompt.category, prompt.split) == (category, split)
        assert held_out in (None, prompt.held_out)


def test_the_same_seed_samples_the_same_prompts_of_all_categories():
    first, second = random.Random(3), random.Random(3)
    prompts = [sample_prompt(first) for _ in range(100)]
    assert prompts == [sample_prompt(second) for _ in range(100)]
    assert {prompt.category for prompt in prompts} == set(CATEGORIES)


@pytest.mark.parametrize(
    "impossible",
    [
        {"split": "train", "held_out": True},
        {"split": "tset"},
        {"category": "colour attribution"},
    ],
)
def test_asking_for_prompts_that_do_not_exist_fails_at_once(impossible):
    with pytest.raises(ValueError, match="there are no prompts with"):
        sample_prompt(random.Random(0), **impossible)


@pytest.mark.parametrize(
    ("caption", "category"),
    [
        ("a red circle", "single"),
        ("three orange crosses", "counting"),
        ("a red circle above a blue square", "position"),
        ("two red circles left of a blue square", "complex"),
    ],
)
def test_captions_are_english(caption, category):
    prompt = parse(caption)
    assert str(prompt) == caption
    assert prompt.category == category


@pytest.mark.parametrize(
    "text",
    [
        "A Red Circle and a blue square.",
        "  a red circle\n and one blue square ",
        "a red circle, and a blue square",
    ],
)
def test_reading_forgives_case_spaces_a_full_stop_and_a_comma(text):
    assert str(parse(text)) == "a red circle and a blue square"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (" . ", "the prompt is empty"),
        ("a red circles", "mixes singular and plural"),
        ("a pink circle", "'a pink circle' is not"),
        ("an astronaut\nriding a horse", "'an astronaut riding a horse' is not"),
        ("a red circle above a blue square below a green cross", "below a green cross' is not"),
        ("a red circle, a blue square, a green cross and a purple cross", "names too many"),
        ("three red circles and two blue squares", "at most three kinds and four shapes"),
        ("five red circles", "Numbers: a, two, three, four; colours"),
        ("a red circle next to a blue square", "relations: left of, right of, above, below; at"),
        ("a red circle and a red circle", "same kind twice"),
    ],
)
def test_a_prompt_outside_the_grammar_is_refused_in_one_line_with_advice(text, why):
    with pytest.raises(UserError) as raised:
        parse(text)
    message = str(raised.value)
    assert raised.type is PromptError
    assert why in message and "\n" not in message
    assert all(repr(example) in message for example in EXAMPLES)
    assert "--model sdxl" in message


def test_the_examples_of_the_message_work():
    assert tuple(str(parse(example)) for example in EXAMPLES) == EXAMPLES


def test_the_split_of_a_caption_is_fixed_for_good():
    # The shipped weights were trained on one side and measured on the other.
    for colour in ("red", "blue", "yellow"):
        assert parse(f"a {colour} circle").split == "train"
    for colour in ("green", "purple"):
        assert parse(f"a {colour} circle").split == "validation"


def test_each_split_has_its_share():
    seen = [prompt.split for prompt in EVERY if not prompt.held_out]
    shares = {split: seen.count(split) / len(seen) for split in SPLITS}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.01)


def test_training_prompts_name_every_kind_colour_and_form_but_no_held_out_pair():
    known = set()
    for prompt in EVERY:
        if prompt.split == "train":
            known |= set(prompt.kinds)
    assert known == set(KINDS) - HELD_OUT
    assert {colour for colour, _ in known} == set(COLOURS)
    assert {form for _, form in known} == set(FORMS)


def test_in_the_benchmark_categories_take_turns_and_one_round_in_four_is_held_out():
    prompts = benchmark(40)
    assert [prompt.category for prompt in prompts] == list(CATEGORIES) * 8
    assert [prompt.held_out for prompt in prompts] == ([False] * 15 + [True] * 5) * 2
    assert {prompt.split for prompt in prompts} == {"test"}
    assert benchmark(40) == prompts != benchmark(40, seed=1)
