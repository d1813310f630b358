"""Curves of several runs over each other."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from img_minimal import plots
from img_minimal.runtime import cli


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    for k in (1, 2):
        (tmp_path / f"run{k}").mkdir()
        rows = [{"step": s, "error": 1 / (s + k), "stage": "x"} | ({"nearer": 0.5} if s % 10 == 0 else {}) for s in
                range(1, 41)]  # fmt: skip
        (tmp_path / f"run{k}" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [tmp_path / "run1", tmp_path / "run2"]


def called(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["plots", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.run(plots.main)
    return ended.value.code


def test_runs_are_drawn_over_each_other(runs, tmp_path, monkeypatch, capsys):
    both, one = tmp_path / "both.png", tmp_path / "one.png"
    assert called(monkeypatch, *runs, "--output", both) == 0
    assert called(monkeypatch, runs[0], "--output", one) == 0
    assert "saved to" in capsys.readouterr().out
    assert Image.open(both).size == Image.open(one).size and both.read_bytes() != one.read_bytes()
    assert called(monkeypatch, *runs, "--only", "nearer", "--output", one) == 0
    assert Image.open(one).width < Image.open(both).width


def test_a_cut_last_row_is_left_out_and_said(runs, tmp_path, monkeypatch, capsys):
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "err')
    assert called(monkeypatch, *runs, "--output", tmp_path / "a.png") == 0
    assert "1 damaged rows are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere/metrics.jsonl: not there"),
        (["--only", "colour"], "colour: no run has that; they have error"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(runs, tmp_path, monkeypatch, capsys, words, said):
    assert called(monkeypatch, *runs, *words, "--output", tmp_path / "a.png") == 2
    assert said in capsys.readouterr().err


def test_every_number_is_written_for_tensorboard(runs, tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder: str):
            self.folder = Path(folder).name

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((self.folder, name, step))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer
    assert called(monkeypatch, *runs, "--output", tmp_path / "a.png", "--tensorboard", tmp_path / "tb") == 0
    assert len(written) == 2 * (40 + 4) and written[0] == ("run1", "error", 1)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert called(monkeypatch, *runs, "--output", tmp_path / "a.png", "--tensorboard", tmp_path / "tb") == 2
