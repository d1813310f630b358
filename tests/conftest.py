"""No test reaches for a network: a missing file must fail here as it would on a plane."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of the Hugging Face libraries, which read it once

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that `--model sdxl` needs, small and random, in the public layouts."""
    from release_folder import write_release

    folder = tmp_path_factory.mktemp("release")
    write_release(folder)
    return folder
