"""A run's folder is locked, resumed only as the run that began there, and whole at any moment."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from feature_sets import interrupt
from refusals import refused

from img_minimal.plots import read_rows
from img_minimal.run import Run, load_checkpoint, portable

SETTINGS = {
    "config": {"seed": 0, "output_dir": "a"},
    "preset": {"lr": 1.0, "steps": 5, "finetuning": {"lr": 1.0}},
    "compute": "products in fp32",
}


class Total:
    """Add up numbers; its state is the sum."""

    shared = True

    def __init__(self) -> None:
        self.sum = torch.zeros(1000)

    def state_dict(self) -> dict:
        return {"sum": self.sum.clone()}

    def load_state_dict(self, state: dict) -> None:
        self.sum = state["sum"]


def go(run: Run, last: int, save_every: int = 2, broken: int = -1, stopped: int = -1) -> Total:
    """Run to a step; the loss of step `broken` is NaN, a signal comes in step `stopped`."""
    total = Total()
    interrupt(run, stopped)
    for step in run.steps({"total": total, "data": Total()}, last, save_every):
        total.sum += torch.rand(())
        run.log(f"samples of step {step}", loss=torch.tensor(torch.nan if step == broken else 1.0))
    return total


def opened(folder: Path, **changed: object) -> Run:
    """Open a run, to resume it if there is one."""
    resume = (folder / "checkpoint.pt").exists()
    run = Run(folder, SETTINGS | changed, resume=resume)
    run.lock.close()
    return run


def test_a_resumed_run_goes_on_bitwise_and_drops_rows_after_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    whole = go(opened(tmp_path / "whole"), 5).sum
    torch.manual_seed(0)
    run, before = opened(tmp_path / "parts"), signal.getsignal(signal.SIGTERM)
    go(run, 5, save_every=5, stopped=1)
    assert run.stopped and signal.getsignal(signal.SIGTERM) == before
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 7}\n{"ste')  # of a process that was killed
    torch.manual_seed(99)
    assert torch.equal(go(opened(tmp_path / "parts"), 5).sum, whole)
    rows, expected = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("parts", "whole"))
    assert rows == expected and [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert json.loads((tmp_path / "parts" / "config.json").read_text()) == SETTINGS


def test_a_run_is_neither_overwritten_by_accident_nor_resumed_with_other_settings(tmp_path):
    go(opened(tmp_path), 2)
    with refused("holds a run", "--resume", "--overwrite"):
        Run(tmp_path, SETTINGS)
    opened(tmp_path, config={"seed": 0, "output_dir": "b", "new": 5})
    with refused("lr 2.0: the run began with 1.0"):
        opened(tmp_path, preset={"lr": 1.0, "steps": 5, "finetuning": {"lr": 2.0}})
    with refused("steps 1: the run began with 5, 2 steps are done"):
        opened(tmp_path, preset={"lr": 1.0, "steps": 1})


def test_what_may_change_on_resuming_is_said_in_one_line_each(tmp_path, capsys):
    go(opened(tmp_path), 2)
    (tmp_path / "metrics.jsonl").unlink()
    capsys.readouterr()
    preset = SETTINGS["preset"] | {"steps": 9}
    go(opened(tmp_path, compute="products in bf16", preset=preset), 2)
    words = "decay follows the number of steps", "differ in rounding", "has lost rows"
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 3 and all(word in line for word, line in zip(words, lines))


def test_an_overwritten_run_killed_before_its_first_checkpoint_leaves_no_old_one(tmp_path):
    go(opened(tmp_path), 2)
    results = ["rounds/1/pairs.parquet", "mllm/config.json", "aligner.safetensors", "curves.png"]
    for name in [*results, "notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    run = Run(tmp_path, SETTINGS, overwrite=True)
    for _ in run.steps({"data": Total()}, 2, 2):
        break
    run.lock.close()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".lock", "config.json", "metrics.jsonl", "notes.txt"}
    with refused("no checkpoint to resume from"):
        Run(tmp_path, SETTINGS, resume=True)


def test_two_runs_in_one_folder_are_refused_with_who_holds_it(tmp_path):
    first = Run(tmp_path, SETTINGS)
    with refused(f"process {os.getpid()} writes there now", "--output-dir"):
        Run(tmp_path, SETTINGS, overwrite=True)
    first.lock.close()
    Run(tmp_path, SETTINGS, overwrite=True)


def test_half_written_files_of_killed_runs_are_cleared_away(tmp_path):
    (tmp_path / ".checkpoint.pt.99.partial").write_bytes(b"half")
    (tmp_path / ".mllm.partial").mkdir()
    (tmp_path / ".mllm.partial" / "model.safetensors").write_bytes(b"half")
    opened(tmp_path)
    assert not list(tmp_path.glob(".*.partial"))


def test_a_loss_that_is_not_finite_names_step_and_samples_and_keeps_the_last_checkpoint(tmp_path):
    with refused("the loss of step 3 is nan (samples of step 3)", "--lr"):
        go(opened(tmp_path), 6, broken=3)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


@pytest.mark.parametrize("name", ["gradient_norm", "margin", "preference_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_or_metric_that_is_not_finite_is_refused_before_the_step(tmp_path, name, value):
    run = opened(tmp_path)
    with refused(f"the {name.replace('_', ' ')} of step 0 is {value} (these samples)"):
        for _ in run.steps({"data": Total()}, 1, 1):
            run.log("these samples", **{"loss": torch.tensor(1.0), name: torch.tensor(value)})
    assert not run.checkpoint.exists()


def test_a_checkout_that_moved_resumes_its_runs():
    package = Path(__file__).parent.parent / "img_minimal"
    settings = {"base": str(package / "tiny" / "twins" / "sdxl")}
    assert portable(settings) == {"base": "img_minimal/tiny/twins/sdxl"}


class Intruder:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("intruded",)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("flipped bit", "damaged at "),
        ("code", "could run code, refused"),
        ("no settings", "cannot be opened as a checkpoint"),  # of an older version
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path, monkeypatch, damage, words):
    monkeypatch.chdir(tmp_path)
    go(opened(tmp_path), 2)
    path = tmp_path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    if damage == "flipped bit":
        content[content.index(load_checkpoint(path)["total"]["sum"].numpy().tobytes()) + 1000] ^= 1
        path.write_bytes(content)
    else:
        torch.save(Intruder() if damage == "code" else {"step": 1}, path)
    with refused(words, "start without --resume"):
        opened(tmp_path)
    assert not Path("intruded").exists()


def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(tmp_path, monkeypatch):
    def full(*_: object) -> None:  # as torch reports it
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    go(opened(tmp_path), 2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with refused("cannot be written", "an older one is still whole", "--resume"):
        go(opened(tmp_path), 4)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*.partial"))
