"""Every tutorial runs to its end in quick mode and leaves a picture that says it was quick."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from img_minimal.runtime import cli

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted(path.stem for path in (ROOT / "tutorials").glob("[0-9]*.py"))


@pytest.fixture
def tutorial(monkeypatch, capsys):
    """Run a tutorial in this process, as its reader does."""
    monkeypatch.syspath_prepend(str(ROOT / "tutorials"))
    monkeypatch.chdir(ROOT)

    def run(name: str, *flags: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [name, *flags])
        spec = importlib.util.spec_from_file_location(f"tutorial_{name}", ROOT / "tutorials" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        with pytest.raises(SystemExit) as ended:
            cli.run(module.main)
        said = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=said.out, stderr=said.err)

    return run


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs_quickly_and_says_that_it_did(tutorial, name, tmp_path):
    done = tutorial(name, "--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "quick mode" in done.stdout
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert picture.width >= 900


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_opens_with_a_question_and_its_help_says_the_rest(tutorial, name):
    done = tutorial(name, "--help")
    assert done.returncode == 0, done.stderr
    question = (ROOT / "tutorials" / f"{name}.py").read_text().split('"""')[1].split("\n\n")[0]
    assert question.endswith("?")
    assert question.splitlines()[0] in done.stdout and "--quick" in done.stdout


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_that_cannot_save_its_picture_says_so_at_once(tutorial, name, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = tutorial(name, "--quick", "--output", str(blocked))
    assert done.returncode == 2
    assert "error:" in done.stderr


def test_a_tutorial_is_a_script_that_runs_from_anywhere(tmp_path):
    script = ROOT / "tutorials" / "05_preference_objective.py"
    command = [sys.executable, str(script), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "05_preference_objective.png").exists()


def test_a_tutorial_that_cannot_show_a_model_says_so_in_one_line(tutorial):
    for name, words in (("03_image_prompt", "cross-attentions of SDXL"), ("09_plug_and_play", "exact oracle")):
        done = tutorial(name, "--quick", "--model", "flux")
        assert done.returncode == 2 and words in done.stderr.strip().splitlines()[-1]
