"""img_minimal: Implicit Multimodal Guidance (arXiv 2509.26231), from scratch and small enough to read."""

import os

# transformers notes on import that torchvision is missing; we name the processors that do not need it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
