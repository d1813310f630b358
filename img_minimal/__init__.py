"""Implicit Multimodal Guidance (arXiv 2509.26231): draw, look at it with an MLLM, draw it again better aligned.

from img_minimal import IMG
out = IMG(preset="tiny-sdxl")("a red circle above a blue square", seed=1)
out.initial, out.said, out.images
"""

import os
from importlib import import_module

# transformers notes on import that torchvision is missing; we name the processors that do not need it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__all__ = ["IMG", "ImplicitAligner", "load_img"]
_PLACES = {"IMG": "pipeline", "ImplicitAligner": "aligner", "load_img": "pipeline"}


def __getattr__(name: str) -> object:
    """The public names, imported when they are asked for: torch takes seconds, and `--help` should not."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
