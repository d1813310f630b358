"""Captions of the tiny world: a grammar with five categories, named after GenEval's.

    single    a red circle
    counting  three red circles
    two       a red circle and a blue square
    position  a red circle above a blue square
    complex   a red circle, a blue square and a green cross
              two red circles left of a blue square

A `Prompt` is one to three groups (count, colour, form) and an optional relation between two groups.
"""

import hashlib
import random
import re
from dataclasses import dataclass

from img_minimal.cli import UserError

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
FORMS = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = ("single", "counting", "two", "position", "complex")
SPLITS = ("train", "validation", "test")
# Kept out of all training data, images and words alike, to measure compositional generalisation.
HELD_OUT = frozenset(
    {("red", "cross"), ("blue", "triangle"), ("green", "circle"), ("yellow", "square")}
)
EXAMPLES = (
    "a red circle above a blue square",
    "three green squares",
    "a blue circle, a red square and a purple cross",
)
Kind = tuple[str, str]  # colour and form


class PromptError(UserError):
    """Raised for a prompt outside the grammar; says why, and what the grammar covers."""


@dataclass(frozen=True)
class Group:
    """`count` shapes of one colour and form.

    `str()` also names things that only images hold: "two unclear shapes", "5 red circles".
    """

    count: int
    colour: str
    form: str

    def __str__(self) -> str:
        if self.count > 1:
            number = NUMBERS.get(self.count, self.count)
            return f"{number} {self.colour} {PLURALS.get(self.form, f'{self.form}s')}"
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.form}"

    @property
    def kind(self) -> Kind:
        """(colour, form)."""
        return self.colour, self.form


@dataclass(frozen=True)
class Prompt:
    """Groups of shapes, and an optional relation between the first two. `str()` is the caption."""

    groups: tuple[Group, ...]
    relation: str | None = None

    def __str__(self) -> str:
        *others, last = map(str, self.groups)
        if self.relation:
            return f"{others[0]} {self.relation} {last}"
        return f"{', '.join(others)} and {last}" if others else last

    @property
    def kinds(self) -> list[Kind]:
        """(colour, form) of every shape, in the order of the caption."""
        kinds = []
        for group in self.groups:
            kinds += [group.kind] * group.count
        return kinds

    @property
    def is_distinct(self) -> bool:
        """True if no two groups are of the same kind."""
        return len(set(self.kinds)) == len(self.groups)

    @property
    def category(self) -> str:
        """One of CATEGORIES."""
        several = max(group.count for group in self.groups) > 1
        if len(self.groups) == 1:
            return "counting" if several else "single"
        if len(self.groups) == 3 or several:
            return "complex"
        return "position" if self.relation else "two"

    @property
    def held_out(self) -> bool:
        """True if the prompt names a colour-form pair that is kept out of all training data."""
        return not HELD_OUT.isdisjoint(self.kinds)

    @property
    def split(self) -> str:
        """One of SPLITS (70, 10 and 20 % of prompts), by a hash of the caption.

        Prompts with a held-out pair never train.
        """
        bucket = int(hashlib.sha256(str(self).encode()).hexdigest(), 16) % 10
        if bucket < 7 and not self.held_out:
            return "train"
        return "validation" if bucket in (0, 1, 7) else "test"


def sample_prompt(
    rng: random.Random,
    category: str | None = None,
    split: str = "train",
    held_out: bool | None = False,
) -> Prompt:
    """Draw a prompt of a split, from a random category by default.

    `held_out` selects prompts with (True) or without (False) a held-out pair; None takes both.
    Raises ValueError if there are no such prompts.
    """
    category = category or rng.choice(CATEGORIES)
    exists = category in CATEGORIES and split in SPLITS and not (split == "train" and held_out)
    if not exists:
        asked = f"category={category!r}, split={split!r} and held_out={held_out}"
        raise ValueError(f"there are no prompts with {asked}")
    while True:
        prompt = _random_prompt(rng, category)
        fits = prompt.split == split and held_out in (None, prompt.held_out)
        if prompt.is_distinct and fits:
            return prompt


def _random_prompt(rng: random.Random, category: str) -> Prompt:
    """Draw a prompt of a category; two of its groups may be of the same kind."""
    counts, relation = [1], None
    if category == "counting":
        counts = [rng.choice((2, 3, 4))]
    elif category in ("two", "position"):
        counts = [1, 1]
    elif category == "complex":
        counts = [1, 1, 1] if rng.random() < 0.5 else [rng.choice((2, 3)), 1]
    if category == "position" or (category == "complex" and len(counts) == 2):
        relation = rng.choice(RELATIONS)
    groups = [Group(count, rng.choice(COLOURS), rng.choice(FORMS)) for count in counts]
    return Prompt(tuple(groups), relation)


def benchmark(count: int, split: str = "test", seed: int = 0) -> list[Prompt]:
    """Draw evaluation prompts of a split.

    Categories take turns; in one round of turns in four, every prompt has a held-out pair.
    """
    rng = random.Random(f"{split} {seed}")
    prompts = []
    for k in range(count):
        turns, turn = divmod(k, len(CATEGORIES))
        prompts.append(sample_prompt(rng, CATEGORIES[turn], split, held_out=turns % 4 == 3))
    return prompts


def parse(text: str) -> Prompt:
    """Read a caption. Raises PromptError, in one line, if the grammar does not cover it."""
    try:
        return _read_prompt(" ".join(text.lower().strip().rstrip(".").split()))
    except PromptError as error:
        examples = "; ".join(map(repr, EXAMPLES))
        raise PromptError(
            f"the tiny world cannot draw {text!r}: {error}. Numbers: "
            f"{', '.join(NUMBERS.values())}; colours: {', '.join(COLOURS)}; shapes: "
            f"{', '.join(FORMS)}; relations: "
            f"{', '.join(RELATIONS)}; at most three kinds and four shapes. Try {examples} - or a "
            "real model, for any prompt: --model sdxl"
        ) from None


_RELATION = re.compile(rf" ({'|'.join(RELATIONS)}) ")
_NOUNS = "|".join([*PLURALS.values(), *FORMS])
_GROUP = re.compile(rf"(an?|one|two|three|four) ({'|'.join(COLOURS)}) ({_NOUNS})")


def _read_prompt(words: str) -> Prompt:
    if not words:
        raise PromptError("the prompt is empty")
    relation = _RELATION.search(words)
    if relation:
        parts = [words[: relation.start()], words[relation.end() :]]
    else:
        parts = re.split(r", and |, | and ", words)
    groups = tuple(map(_read_group, parts))
    prompt = Prompt(groups, relation and relation[1])
    if len(groups) > 3 or len(prompt.kinds) > 4:
        raise PromptError("it names too many")
    if not prompt.is_distinct:
        raise PromptError("it names the same kind twice; say 'two red circles' instead")
    return prompt


def _read_group(words: str) -> Group:
    words = words.strip()
    match = _GROUP.fullmatch(words)
    if not match:
        raise PromptError(f"{words!r} is not 'a COLOUR SHAPE' or 'NUMBER COLOUR SHAPEs'")
    number, colour, noun = match.groups()
    count = {"two": 2, "three": 3, "four": 4}.get(number, 1)
    form = next(form for form in FORMS if noun in (form, PLURALS[form]))
    if (noun == form) != (count == 1):
        raise PromptError(f"{words!r} mixes singular and plural")
    return Group(count, colour, form)
