"""The phrasings of the MLLM's question, and texts that may not do what they say."""

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from img_minimal.cli import check, printable
from img_minimal.files import read_json

# The twin's phrasings: 5 openings x 5 requests x 4 names of the prompt. `{}` is the prompt.
_OPENINGS = ("How to", "How would you", "What edit would", "Say how to", "Find a way to")
_REQUESTS = (
    "make the image match",
    "make the picture agree with",
    "correct the image so that it fits",
    "change the picture to show",
    "bring the image in line with",
)
_NAMES = ("the prompt: {}", "the caption: {}", "the text: {}", "this description: {}")
QUESTIONS = tuple(" ".join(parts) for parts in product(_OPENINGS, _REQUESTS, _NAMES))

# The form of the authors' questions, in our words; their exact list is a file of theirs.
_VERBS = "make modify change edit adjust alter correct revise update transform".split()
_AIMS = (
    *("match", "fit", "agree with", "follow", "align with"),
    *("correspond to", "conform to", "reflect", "satisfy", "depict"),
)
RELEASED = tuple(
    f"How to {verb} the image {'' if verb == 'make' else 'to '}{aim} the prompt: {{}}?"
    for verb, aim in product(_VERBS, _AIMS)
)
BANKS = {"own": QUESTIONS, "released": RELEASED}

NOTHING = "nothing"  # the answer for an image that matches its prompt
PLACEHOLDER = re.compile(r"<\|?\s*/?\s*(image|img|im_|video|vision)[^<>]*>", re.IGNORECASE)
NO_OP_EDIT = re.compile(r"(?:^|, )change (?:the|an?) ([^,]+?) to (?:the|an?) \1(?=,|$)")
# Spellings of the place for the prompt in a file of questions.
PROMPT_PLACE = re.compile(r"\{(?:prompt|caption|)\}|<(?:prompt|caption)>|\[(?:prompt|caption)\]")


def find_questions(name: str) -> tuple[str, ...]:
    """Return the phrasings "own" or "released", or those of a JSON file; they go with the MLLM.

    Raises UserError if the file is no list of texts, each with one place for the prompt, as `{}`.
    """
    if name in BANKS:
        return BANKS[name]
    path = Path(name).expanduser()
    expected = (
        'expected a JSON list of phrasings such as "How to make the image match the prompt: {}?"'
    )
    questions = read_json(path, list, expected)
    check(questions, f"{path}: holds no phrasing; {expected}")
    for phrasing in questions:
        fits = isinstance(phrasing, str) and len(PROMPT_PLACE.findall(phrasing)) == 1
        check(fits, f"{path}: {phrasing!r:.80} has not one place for the prompt; {expected}")
    return tuple(PROMPT_PLACE.sub("{}", phrasing) for phrasing in questions)


def strip_placeholders(text: str, marks: Sequence[str] = ()) -> str:
    """Strip image placeholders (`<image>`, `<|image|>`, ...) and `marks` until none is left."""
    shorter = PLACEHOLDER.sub("", text)
    for mark in marks:
        shorter = shorter.replace(mark, "")
    return printable(text) if shorter == text else strip_placeholders(shorter, marks)


def drop_no_op_edits(answer: str) -> str:
    """Drop clauses that change something into itself; returns "nothing" if no other is left.

    Greedy decoding may begin with "change the ..." and then copy the prompt for what is there now.
    """
    if not NO_OP_EDIT.search(answer):
        return answer
    return NO_OP_EDIT.sub("", answer).lstrip(", ") or NOTHING
