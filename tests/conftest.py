"""Settings and fixtures of all tests: no network, and no more threads than cores."""

import os

# Before any import of torch and of the Hugging Face libraries, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"  # a missing file must fail here as it would on a plane
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
# Spinning threads cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import importlib  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import pytest  # noqa: E402

from img_minimal import cli  # noqa: E402

MODULES = {
    "sample.py": "sample",
    "train.py": "train",
    "evaluate": "img_minimal.evaluate.__main__",
    "plots": "img_minimal.plots",
}


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., SimpleNamespace]:
    """Run a command in this process as its user would: returncode, stdout, stderr."""

    def run(name: str, *arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.run(importlib.import_module(MODULES[name]).main)
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=printed.out, stderr=printed.err)

    return run


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write everything that `--model sdxl` needs, small and random, in the public layouts."""
    from release_folder import write_release

    folder = tmp_path_factory.mktemp("release")
    write_release(folder)
    return folder


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write everything that `--model flux` needs, small and random, in the public layouts."""
    from flux_folder import write_flux

    folder = tmp_path_factory.mktemp("flux")
    write_flux(folder)
    return folder


@pytest.fixture(scope="session")
def mllms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write tiny random MLLMs as the public ones are stored; "twin" is the shipped one."""
    from mllm_folders import write_llava_hf, write_original_llava, write_qwen

    from img_minimal.presets import TWINS

    folder = tmp_path_factory.mktemp("mllms")
    state = write_original_llava(folder / "original")
    write_llava_hf(folder / "hf", state, folder / "original")
    write_qwen(folder / "qwen")
    kinds = {kind: folder / kind for kind in ("original", "hf", "qwen")}
    return kinds | {"twin": TWINS / "llava-detector"}


@pytest.fixture(scope="session")
def mllm_of(
    mllms: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Give the folder of one of `mllms`, or of today's `mllm_kinds`, written when first asked."""
    from mllm_kinds import write_kind

    folders, root = dict(mllms), tmp_path_factory.mktemp("kinds")

    def folder_of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = root / kind
            write_kind(folders[kind], kind)
        return folders[kind]

    return folder_of


@pytest.fixture(scope="session")
def twin() -> object:
    """Open the shipped twin."""
    from img_minimal.pipeline import IMG

    return IMG(preset="tiny-sdxl")
