"""Every tutorial runs to its end in quick mode and leaves a picture that says it was quick."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted(path.stem for path in (ROOT / "tutorials").glob("[0-9]*.py"))


def tutorial(name: str, *flags: str) -> subprocess.CompletedProcess:
    """Run a tutorial as its reader does, without a hub."""
    return subprocess.run(
        [sys.executable, f"tutorials/{name}.py", *flags],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"},
    )  # fmt: skip


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs_quickly_and_says_that_it_did(name, tmp_path):
    done = tutorial(name, "--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "quick mode" in done.stdout
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert picture.width >= 900


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_opens_with_a_question_and_its_help_says_the_rest(name):
    done = tutorial(name, "--help")
    assert done.returncode == 0, done.stderr
    text = (ROOT / "tutorials" / f"{name}.py").read_text()
    question = text.split('"""')[1].split("\n\n")[0]
    assert question.endswith("?")
    assert question.splitlines()[0] in done.stdout and "--quick" in done.stdout


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_that_cannot_save_its_picture_says_so_at_once(name, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = tutorial(name, "--quick", "--output", str(blocked))
    assert done.returncode == 2
    assert "error:" in done.stderr and "Traceback" not in done.stderr
