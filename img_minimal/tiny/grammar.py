"""What can be said in the tiny world: a caption grammar with five categories, named after GenEval's.

    single    a red circle
    counting  three red circles
    two       a red circle and a blue square
    position  a red circle above a blue square
    complex   a red circle, a blue square and a green cross  |  two red circles left of a blue square

A `Prompt` is one to three groups (count, colour, form) and an optional relation between the first two.
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
# Never drawn, said or asked in any training data, by any part: they measure compositional generalisation.
HELD_OUT = frozenset({("red", "cross"), ("blue", "triangle"), ("green", "circle"), ("yellow", "square")})
EXAMPLES = ("a red circle above a blue square", "three green squares", "a blue circle, a red square and a purple cross")


class PromptError(UserError):
    """A prompt that the grammar does not cover; the message says why and what it does cover."""


@dataclass(frozen=True)
class Group:
    """`count` shapes of one colour and form.

    `str()` also names what no caption asks for but a picture may hold: "two unclear shapes", "5 red circles".
    """

    count: int
    colour: str
    form: str

    def __str__(self) -> str:
        if self.count > 1:
            return f"{NUMBERS.get(self.count, self.count)} {self.colour} {PLURALS.get(self.form, f'{self.form}s')}"
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.form}"


@dataclass(frozen=True)
class Prompt:
    """Groups of shapes and, between the first two, an optional relation. `str()` gives the caption."""

    groups: tuple[Group, ...]
    relation: str | None = None

    def __str__(self) -> str:
        words = [str(group) for group in self.groups]
        if self.relation:
            return f"{words[0]} {self.relation} {words[1]}"
        return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """(colour, form) of every shape, in the order of the caption."""
        return [(g.colour, g.form) for g in self.groups for _ in range(g.count)]

    @property
    def category(self) -> str:
        """One of CATEGORIES."""
        counts = [g.count for g in self.groups]
        if len(counts) == 1:
            return "single" if counts == [1] else "counting"
        if len(counts) == 3 or max(counts) > 1:
            return "complex"
        return "position" if self.relation else "two"

    @property
    def held_out(self) -> bool:
        """Does it name a colour-form pair that no training data holds?"""
        return any(kind in HELD_OUT for kind in self.kinds)

    @property
    def split(self) -> str:
        """One of SPLITS (70, 10 and 20 % of prompts), by a hash of the caption; held-out pairs never train."""
        bucket = int(hashlib.sha256(str(self).encode()).hexdigest(), 16) % 10
        if bucket < 7 and not self.held_out:
            return "train"
        return "validation" if bucket in (0, 1, 7) else "test"


def sample_prompt(
    rng: random.Random, category: str | None = None, split: str = "train", held_out: bool | None = False
) -> Prompt:
    """Draw a prompt of a split; `held_out` picks those with (True) or without (False) a held-out pair, None either.

    Raises ValueError if there are none such.
    """
    category = category or rng.choice(CATEGORIES)
    if category not in CATEGORIES or split not in SPLITS or (split == "train" and held_out):
        raise ValueError(f"there are no prompts with category={category!r}, split={split!r} and held_out={held_out}")
    while True:
        counts, relation = [1], None
        if category == "counting":
            counts = [rng.choice((2, 3, 4))]
        elif category in ("two", "position"):
            counts = [1, 1]
        elif category == "complex":
            counts = [1, 1, 1] if rng.random() < 0.5 else [rng.choice((2, 3)), 1]
        if category == "position" or (category == "complex" and len(counts) == 2):
            relation = rng.choice(RELATIONS)
        kinds = [(rng.choice(COLOURS), rng.choice(FORMS)) for _ in counts]
        prompt = Prompt(tuple(Group(n, *kind) for n, kind in zip(counts, kinds)), relation)
        if len(set(kinds)) == len(kinds) and prompt.split == split and held_out in (None, prompt.held_out):
            return prompt


_NOUNS = "|".join([*PLURALS.values(), *FORMS])
_GROUP = re.compile(rf"(an?|one|two|three|four) ({'|'.join(COLOURS)}) ({_NOUNS})")


def _parse_group(words: str) -> Group:
    match = _GROUP.fullmatch(words.strip())
    if not match:
        raise PromptError(f"{words.strip()!r} is not 'a COLOUR SHAPE' or 'NUMBER COLOUR SHAPEs'")
    number, colour, noun = match.groups()
    count = {"two": 2, "three": 3, "four": 4}.get(number, 1)
    form = next(f for f in FORMS if noun in (f, PLURALS[f]))
    if (noun in FORMS) != (count == 1):
        raise PromptError(f"{words.strip()!r} mixes singular and plural")
    return Group(count, colour, form)


def parse(text: str) -> Prompt:
    """Read a caption. Raises PromptError, one line, when the grammar does not cover it."""
    words = " ".join(text.lower().strip().rstrip(".").split())
    try:
        if not words:
            raise PromptError("the prompt is empty")
        relation = re.search(rf" ({'|'.join(RELATIONS)}) ", words)
        if relation:
            parts = [words[: relation.start()], words[relation.end() :]]
        else:
            parts = re.split(r", and |, | and ", words)
        groups = tuple(_parse_group(part) for part in parts)
        prompt = Prompt(groups, relation.group(1) if relation else None)
        if len(groups) > 3 or len(prompt.kinds) > 4:
            raise PromptError("at most three kinds and four shapes fit a picture")
        if len({(g.colour, g.form) for g in groups}) < len(groups):
            raise PromptError("it names the same kind twice; say 'two red circles' instead")
        return prompt
    except PromptError as error:
        examples = "; ".join(repr(example) for example in EXAMPLES)
        raise PromptError(
            f"the tiny world cannot draw {text!r}: {error}. Colours: {', '.join(COLOURS)}; shapes: {', '.join(FORMS)}. "
            f"Try {examples} - or a real model, for any prompt: --model sdxl"
        ) from None


def benchmark(count: int, split: str = "test", seed: int = 0) -> list[Prompt]:
    """`count` evaluation prompts of a split: categories in turn, one round in four with a held-out pair."""
    rng = random.Random(f"{split} {seed}")
    categories = len(CATEGORIES)
    return [
        sample_prompt(rng, CATEGORIES[k % categories], split, held_out=(k // categories) % 4 == 3) for k in range(count)
    ]
