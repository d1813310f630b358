"""Every tutorial runs to its end in quick mode and leaves a picture that says it was quick."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from PIL import Image

from img_minimal import cli, rounds
from img_minimal.data import load as data_load
from img_minimal.presets import find_preset

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted(path.stem for path in (ROOT / "tutorials").glob("[0-9]*.py"))


def notebook_cells(script: Path) -> list[tuple[str, str]]:
    """Split a tutorial into the cells of its notebook, as jupytext does: what each is, its text."""
    before, *cells = re.split(r"^# %%", script.read_text(), flags=re.M)
    assert not before
    return [tuple(cell.split("\n", 1)) for cell in cells]


def run_notebook(script: str, **_) -> None:
    """Run the cells of code one after the other: without the script's docstring and file name."""
    names = {"__name__": "__main__", "__doc__": "IPython has one, too."}
    for kind, text in notebook_cells(Path(script)):
        if kind != " [markdown]":
            exec(text, names)


@pytest.fixture
def tutorial(monkeypatch, capsys):
    """Run a tutorial in this process, as its reader does: returncode, stdout, stderr."""
    monkeypatch.syspath_prepend(str(ROOT / "tutorials"))
    monkeypatch.chdir(ROOT)

    def run(name: str, *flags: object, how=runpy.run_path) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        # A tutorial replaces these for its own process.
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        monkeypatch.setattr(rounds, "GATE_PROMPTS", rounds.GATE_PROMPTS)
        path = str(ROOT / "tutorials" / f"{name}.py")
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: how(path, run_name="__main__") and None)
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=printed.out, stderr=printed.err)

    return run


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorials_notebook_runs_quickly_and_says_that_it_did(tutorial, name, tmp_path):
    done = tutorial(name, "--quick", "--output", tmp_path, how=run_notebook)
    assert done.returncode == 0, done.stderr
    assert "quick mode" in done.stdout
    assert re.search(r"^[\d.]+ s: .+ \d+%", done.stdout, re.M), "what its steps have cost"
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert picture.width >= 900


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_notebook_has_every_heading_and_all_text_in_its_markdown_cells(name):
    (first, head), *cells = notebook_cells(ROOT / "tutorials" / f"{name}.py")
    if cells[0][0] == " Options":
        pytest.skip("not converted yet")
    assert first == " [markdown]" and re.fullmatch(r'"""# [^\n]+\?\n\n.+"""\n+', head, re.S)
    assert "minute" in head, "what a full run costs"
    assert {kind for kind, _ in cells} == {"", " [markdown]"}, "a notebook drops other words"
    sections = [text.strip() for kind, text in cells if kind]
    for k, text in enumerate(sections, 1):
        assert text.startswith(f"# ## {k}. ")
        assert all(line.startswith("#") for line in text.splitlines())
    assert re.search(r"\]\(\w+\.(py|md)", sections[-1]), "where it goes on"


def test_a_tutorial_is_a_script_that_runs_from_anywhere(tmp_path):
    script = ROOT / "tutorials" / "08_ablations.py"
    command = [sys.executable, str(script), "--output", str(tmp_path), "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "saved" in done.stdout, done.stderr
    assert (tmp_path / "08_ablations.png").exists()


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("05_preference_objective", ["--output", __file__], "cannot be written"),
        ("01_misalignment", ["--prompts", "5"], "--prompts is 5, expected 20"),
        ("03_image_prompt", ["--model", "flux"], "cross-attentions of SDXL"),
        ("09_plug_and_play", ["--model", "flux"], "exact oracle"),
        ("08_ablations", ["--only", "colour"], "invalid choice: 'colour'"),
    ],
)
def test_what_a_tutorial_cannot_do_it_says_at_once_in_one_line(tutorial, name, flags, words):
    done = tutorial(name, *flags)
    assert done.returncode == 2
    assert words in done.stderr.strip().splitlines()[-1]


def test_a_script_shows_user_errors_in_one_line_and_bugs_whole(tmp_path):
    script = tmp_path / "script.py"
    start = "from img_minimal import cli\ncli.install_error_hook()\n"
    for error, code, words in (
        ("cli.UserError('too few')", 2, "error: too few"),
        ("FileNotFoundError(2, 'not there', 'x')", 2, "error: [Errno 2] not there: 'x'"),
        ("KeyboardInterrupt()", 130, ""),
        ("ValueError('a bug')", 1, "ValueError: a bug"),
    ):
        script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{start}raise {error}\n")
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
        assert done.returncode == code and done.stderr.strip().endswith(words)
        assert ("Traceback" in done.stderr) == (code == 1)


def test_the_ablations_show_the_results_of_a_file_and_name_the_rows_that_it_lacks(
    tutorial, tmp_path
):
    results = json.loads((ROOT / "tutorials" / "08_ablations.json").read_text())
    kept = {name: row for name, row in results["right"].items() if not name.startswith("text")}
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results | {"right": kept}))
    flags = "--results", file, "--output", tmp_path
    done = tutorial("08_ablations", *flags, "--only", "guidance")
    assert done.returncode == 0 and "not among these results: text embedding\n" in done.stdout
    assert "stock MLLM minus base model: " in done.stdout
    for broken in ({}, {"settings": {}, "right": {}}, results | {"right": {}}):
        file.write_text(json.dumps(broken))
        done = tutorial("08_ablations", *flags)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_ablations_go_on_share_features_and_do_not_mix_pairs_in_a_folder(
    tutorial, tmp_path, monkeypatch
):
    opened = []

    load = data_load.load_training_data

    def load_training_data(preset, guidance, seed, *rest):
        opened.append((guidance, seed))
        return load(preset, guidance, seed, *rest)

    monkeypatch.setattr(data_load, "load_training_data", load_training_data)
    small = "--prompts", 5, "--seeds", 2, "--steps", 2, "--max-pairs", 400
    flags = "--fresh", *small, "--only", "passes", "--output", tmp_path
    first = tutorial("08_ablations", *flags)
    assert first.returncode == 0, first.stderr
    assert opened == [("mllm", 0)], "training seeds share the features of one data seed"
    [prediction] = tmp_path.glob("*/prediction.json")
    rows = list(tmp_path.glob("*/*-seed*.json"))
    assert {row.stem[-5:] for row in rows} == {"seed0", "seed1"} and len(rows) == 6
    written = {file: file.stat().st_mtime_ns for file in [prediction, *rows]}
    assert written[prediction] < min(written[row] for row in rows)
    rows[0].unlink()  # as if the first call had been stopped before this row
    again = tutorial("08_ablations", *flags)
    assert len(opened) == 2, "the row that is lacking, and no other"
    assert {file: file.stat().st_mtime_ns for file in written if file != rows[0]} == {
        file: time for file, time in written.items() if file != rows[0]
    }
    printed = [text.stdout.split("test prompts")[1].split(" s: ")[0] for text in (first, again)]
    assert printed[0].splitlines()[:-1] == printed[1].splitlines()[:-1]
    pairs = pq.read_table(find_preset("tiny-sdxl").data.pairs)
    pq.write_table(pairs.slice(0, 500), tmp_path / "pairs.parquet")
    done = tutorial("08_ablations", *flags, "--pairs", tmp_path / "pairs.parquet")
    assert done.returncode == 2
    assert "made with another pairs" in done.stderr and "choose another --output" in done.stderr
