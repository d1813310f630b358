"""One hundred ways to ask what is wrong with an image: 5 openings x 5 requests x 4 names for the prompt.

The MLLM is finetuned and asked with phrasings drawn at random (Fig. 11), so that it learns the question and not a
string. `{}` is the prompt.
"""

import random
from itertools import product

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


def ask(prompt: str, rng: random.Random) -> str:
    """A question about `prompt`, in one of the phrasings."""
    return rng.choice(QUESTIONS).format(prompt)
