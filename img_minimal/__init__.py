"""Implicit Multimodal Guidance (arXiv 2509.26231): draw, look with an MLLM, draw better aligned.

from img_minimal import IMG
out = IMG(preset="tiny-sdxl")("a red circle above a blue square", seed=1)
out.initial, out.said, out.images
"""

import os
from importlib import import_module

# transformers warns on import that torchvision is missing, which none of our processors needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__all__ = ["IMG", "ImplicitAligner", "load_img"]
_MODULES = {"IMG": "pipeline", "ImplicitAligner": "aligner", "load_img": "pipeline"}


def __getattr__(name: str) -> object:
    """Import a public name when it is used: torch takes seconds, which `--help` should not."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
