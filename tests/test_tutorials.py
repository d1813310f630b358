"""Every tutorial runs to its end in quick mode and leaves a picture that says it was quick."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from PIL import Image

from img_minimal import rounds
from img_minimal.presets import find_preset
from img_minimal.runtime import cli

ROOT = Path(__file__).parent.parent
PATHS = {**os.environ, "PYTHONPATH": str(ROOT)}
TUTORIALS = sorted(path.stem for path in (ROOT / "tutorials").glob("[0-9]*.py"))


@pytest.fixture
def tutorial(monkeypatch, capsys):
    """Run a tutorial in this process, as its reader does."""
    monkeypatch.syspath_prepend(str(ROOT / "tutorials"))
    monkeypatch.chdir(ROOT)

    def run(name: str, *flags: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [name, *flags])
        # What a tutorial replaces for its own process.
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        monkeypatch.setattr(rounds, "GATE_PROMPTS", rounds.GATE_PROMPTS)
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: runpy.run_path(str(ROOT / "tutorials" / f"{name}.py"), run_name="__main__") and None)
        said = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=said.out, stderr=said.err)

    return run


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs_quickly_and_says_that_it_did(tutorial, name, tmp_path):
    done = tutorial(name, "--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "quick mode" in done.stdout
    assert re.search(r"^\d+ s: .+ \d+\.\d s", done.stdout, re.M), "what its steps have cost"
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


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_is_read_from_top_to_bottom_in_cells_and_its_picture_is_drawn_elsewhere(name):
    text = (ROOT / "tutorials" / f"{name}.py").read_text()
    assert text.startswith('# %% [markdown]\n"""')
    assert len(re.findall(r"^# %% \d\. ", text, re.M)) >= 3
    assert "def main" not in text and "plt." not in text


def test_a_script_says_in_one_line_what_its_user_can_put_right_and_shows_bugs_whole(tmp_path):
    script = tmp_path / "script.py"
    start = "from img_minimal.runtime import cli, errors\ncli.end_scripts_in_one_line()\n"
    for error, code, words in (
        ("errors.UserError('too few')", 2, "error: too few"),
        ("FileNotFoundError(2, 'not there', 'x')", 2, "error: [Errno 2] not there: 'x'"),
        ("KeyboardInterrupt()", 130, ""),
        ("ValueError('a bug')", 1, "ValueError: a bug"),
    ):
        script.write_text(f"{start}raise {error}\n")
        done = subprocess.run([sys.executable, str(script)], cwd=ROOT, env=PATHS, capture_output=True, text=True)
        assert done.returncode == code and done.stderr.strip().splitlines()[-1:] == ([words] if words else [])
        assert ("Traceback" in done.stderr) == (code == 1)


def test_the_ablations_show_the_results_of_a_file_and_name_the_rows_that_it_lacks(tutorial, tmp_path):
    results = json.loads((ROOT / "tutorials" / "08_ablations.json").read_text())
    results["right"] = {name: row for name, row in results["right"].items() if not name.startswith("text")}
    (tmp_path / "results.json").write_text(json.dumps(results))
    flags = "--results", str(tmp_path / "results.json"), "--output", str(tmp_path)
    done = tutorial("08_ablations", *flags, "--only", "guidance")
    assert done.returncode == 0 and "not among these results: text embedding\n" in done.stdout
    assert "stock MLLM minus base model: " in done.stdout and "finetuned MLLM minus stock MLLM: " in done.stdout
    for broken in ({}, {"settings": {}, "right": {}}, results | {"right": {}}):
        (tmp_path / "results.json").write_text(json.dumps(broken))
        done = tutorial("08_ablations", *flags)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_ablations_of_other_pairs_are_not_mixed_into_a_folder(tutorial, tmp_path):
    flags = "--quick", "--only", "passes", "--output", str(tmp_path)
    assert tutorial("08_ablations", *flags).returncode == 0
    pairs = pq.read_table(find_preset("tiny-sdxl").pairs)
    pq.write_table(pairs.slice(0, 500), tmp_path / "pairs.parquet")
    done = tutorial("08_ablations", *flags, "--pairs", str(tmp_path / "pairs.parquet"))
    assert done.returncode == 2 and "made with another pairs; choose another --output" in done.stderr


def test_a_tutorial_that_cannot_show_a_model_says_so_in_one_line(tutorial):
    for name, words in (("03_image_prompt", "cross-attentions of SDXL"), ("09_plug_and_play", "exact oracle")):
        done = tutorial(name, "--quick", "--model", "flux")
        assert done.returncode == 2 and words in done.stderr.strip().splitlines()[-1]
