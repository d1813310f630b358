"""Implicit Multimodal Guidance (arXiv 2509.26231): draw, look with an MLLM, draw better aligned.

from img_minimal import IMG
out = IMG(preset="tiny-sdxl")("a red circle above a blue square", seed=1)
out.initial, out.said, out.images
"""

import os
import sys
from importlib import import_module

if sys.version_info < (3, 11):  # noqa: UP036 - others start this, too
    sys.exit("error: IMG needs Python 3.11 or later, and this is " + sys.version.split()[0])

# transformers warns on import that torchvision is missing, which none of our processors needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__all__ = ["IMG", "ImplicitAligner", "load_img"]
_MODULES = {"IMG": "pipeline", "ImplicitAligner": "aligner", "load_img": "pipeline"}


def __getattr__(name: str) -> object:
    """Import a public name when it is used: torch takes seconds, which `--help` should not."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
