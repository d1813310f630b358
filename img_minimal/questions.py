"""How the MLLM is asked what is wrong with an image: one of many phrasings, drawn at random.

It is finetuned and asked with a hundred of them (Fig. 11), so that it learns the question and not a string. `{}` is the
prompt. An MLLM has to be asked as it was finetuned: a bank goes with its weights.
"""

import random
from itertools import product
from pathlib import Path

from img_minimal.runtime.errors import UserError
from img_minimal.runtime.json_files import read_json

_OPENINGS = ("How to", "How would you", "What edit would", "Say how to", "Find a way to")
_REQUESTS = (
    "make the image match",
    "make the picture agree with",
    "correct the image so that it fits",
    "change the picture to show",
    "bring the image in line with",
)
_NAMES = ("the prompt: {}", "the caption: {}", "the text: {}", "this description: {}")
# 5 openings x 5 requests x 4 names for the prompt.
QUESTIONS = tuple(" ".join(parts) for parts in product(_OPENINGS, _REQUESTS, _NAMES))

_VERBS = ("make", "modify", "change", "edit", "adjust", "alter", "correct", "revise", "update", "transform")
_AIMS = (
    "match", "fit", "agree with", "follow", "align with", "correspond to", "conform to", "reflect", "satisfy", "depict",
)  # fmt: skip
# The form in which the authors ask their finetuned LLaVA, in our words; the exact list is a file of theirs.
RELEASED = tuple(
    f"How to make the image {aim} the prompt: {{}}?" if verb == "make"
    else f"How to {verb} the image to {aim} the prompt: {{}}?"
    for verb, aim in product(_VERBS, _AIMS)
)  # fmt: skip
BANKS = {"own": QUESTIONS, "released": RELEASED}
PLACES = ("{}", "{prompt}", "<prompt>", "[prompt]", "{caption}", "<caption>", "[caption]")  # of the prompt in a file


def find_questions(name: str) -> tuple[str, ...]:
    """A bank by its name, or from a JSON file: a list of phrasings, each with {} or <prompt> where the prompt goes.

    Raises UserError in one line if the file is no such list.
    """
    if name in BANKS:
        return BANKS[name]
    path = Path(name).expanduser()
    wanted = 'expected a JSON list of phrasings such as "How to make the image match the prompt: {}?"'
    listed = read_json(path, list, wanted)
    if not listed or not all(isinstance(question, str) for question in listed):
        raise UserError(f"{path}: no list of texts; {wanted}")
    return tuple(_with_one_place(question, f"{path}, entry {k + 1}") for k, question in enumerate(listed))


def _with_one_place(question: str, what: str) -> str:
    """The phrasing with its place for the prompt as `{}`. Raises UserError unless there is exactly one."""
    places = [place for place in PLACES for _ in range(question.count(place))]
    if len(places) != 1:
        raise UserError(f"{what}: has {len(places)} places for the prompt, expected one {{}}: {question[:80]!r}")
    return question.replace(places[0], "{}")


def ask(prompt: str, rng: random.Random, bank: tuple[str, ...] = QUESTIONS) -> str:
    """A question about `prompt`, in one of the phrasings."""
    return rng.choice(bank).replace("{}", prompt)
