"""No test reaches for a network: a missing file must fail here as it would on a plane."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of the Hugging Face libraries, which read it once
