"""Curves of several runs over each other, and sheets of images with any text."""

import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from PIL import Image
from refusals import assert_refused

from img_minimal.plots import line, read_rows, sheet


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    folders = [tmp_path / "run1", tmp_path / "run2"]
    for k, folder in enumerate(folders, 1):
        rows = []
        for step in range(1, 41):
            row = {"step": step, "error": 1 / (step + k), "stage": "x"}
            rows.append(row | ({"nearer": 0.5} if step % 10 == 0 else {}))
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folders


def test_runs_are_drawn_over_each_other(call, runs, tmp_path):
    both, one = tmp_path / "both.png", tmp_path / "one.png"
    done = call("plots", *runs, "--output", both)
    assert done.returncode == 0 and "saved to" in done.stdout
    call("plots", runs[0], "--output", one)
    assert Image.open(both).size == Image.open(one).size and both.read_bytes() != one.read_bytes()
    call("plots", *runs, "--only", "nearer", "--output", one)
    assert Image.open(one).width < Image.open(both).width


ODD_ROWS = [
    *(
        '{"step": 41, "err',
        '{"loss": 1}',
        '{"step": "two", "loss": 1}',
        '{"step": null}',
        '{"step": 2.5}',
        "[]",
        "17",
    ),
    *('{"step": true, "loss": 1}', '[["step", [1]]]', '{"step": 1e400}', "\x00", "[" * 100_000),
]


def test_odd_rows_are_left_out_and_said_and_odd_values_spoil_no_curve(call, runs, tmp_path):
    log = runs[0] / "metrics.jsonl"
    whole = read_rows(log)
    odd_values = [f"1{0:0400}", "1e400", "-Infinity", "NaN", '"x"', "[1]", "{}"]
    with log.open("a") as file:
        for row in ODD_ROWS:
            file.write(f"{row}\n")
        for k, value in enumerate(odd_values):
            file.write(f'{{"step": {41 + k}, "error": {value}, "nearer": 0.5}}\n')
    done = call("plots", *runs, "--output", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert f"{len(ODD_ROWS)} damaged rows are left out" in done.stderr
    rows = read_rows(log)
    assert rows[:40] == whole and len(rows) == 40 + len(odd_values)


def test_a_run_without_numbers_is_refused(call, runs):
    (runs[0] / "metrics.jsonl").write_text('{"step": 1}\n')
    assert_refused(call("plots", runs[0]), "no run has a number")


def test_curves_are_smoothed_unless_they_are_short_or_count_something():
    rows = []
    for step in range(1, 101):
        rows.append({"step": step, "loss": float(step % 2), "refreshes": step // 50})
    steps, counts, look = line(rows, "step", "refreshes")
    assert steps == list(range(1, 101)) and counts == [0] * 49 + [1] * 50 + [2] and look == "-"
    _, means, _ = line(rows, "step", "loss")
    assert means[:3] == pytest.approx([1, 0.95, 0.9525])
    assert line(rows[:10], "step", "loss")[1:] == ([1.0, 0.0] * 5, "o-")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere/metrics.jsonl: not there"),
        (["--only", "colour"], "colour: no run has that; they have error"),
        (["--output", "curves.doc"], "cannot be drawn as .doc"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, runs, tmp_path, words, said):
    assert_refused(call("plots", "--output", tmp_path / "a.png", *runs, *words), said)


def test_every_number_is_written_for_tensorboard(call, runs, tmp_path, monkeypatch):
    tensorboard = MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    words = ("--output", tmp_path / "a.png", "--tensorboard", tmp_path / "tb")
    assert call("plots", *runs, *words).returncode == 0
    folders = [Path(folder.args[0]).name for folder in tensorboard.SummaryWriter.call_args_list]
    writer = tensorboard.SummaryWriter.return_value.__enter__.return_value
    assert folders == ["run1", "run2"] and writer.add_scalar.call_count == 2 * (40 + 4)
    writer.add_scalar.assert_any_call("error", 1 / 2, 1)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert_refused(call("plots", *runs, *words), "pip install tensorboard")


@pytest.mark.parametrize("text", ["costs $5", r"$\frac{1}$", "$$", "a_b^{", "\ud83d half", "tab\t"])
def test_dollars_and_halves_of_characters_are_drawn_as_they_stand(tmp_path, text):
    sheet([[(Image.new("RGB", (8, 8)), text)]], tmp_path / "sheet.png", text, text)
    assert (tmp_path / "sheet.png").stat().st_size > 1000
