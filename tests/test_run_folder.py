"""A run's folder: resumed only as the run that began there, locked while it runs, its checkpoint whole or refused."""

import json
import os
from pathlib import Path

import pytest
import torch

from img_minimal.run import RunFolder, load_checkpoint, portable, save_checkpoint
from img_minimal.cli import UserError

SETTINGS = {"config": {"seed": 0, "output_dir": "a"}, "preset": {"lr": 1.0, "steps": 5, "finetuning": {"lr": 1.0}},
            "compute": "products in fp32"}  # fmt: skip


def begun(folder: Path, step: int = 2) -> None:
    """A run of SETTINGS that was stopped after `step`."""
    run_folder = RunFolder.open(folder, SETTINGS, resume=False, overwrite=True)
    run_folder.begin(0)
    save_checkpoint(folder / "checkpoint.pt", {"step": step, "weights": torch.zeros(1000)})
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {k + 1}}}\n' for k in range(step + 1)) + '{"ste')
    run_folder.lock.close()


def resumed(folder: Path, **changed: object) -> RunFolder:
    run_folder = RunFolder.open(folder, SETTINGS | changed, resume=True, overwrite=False)
    run_folder.lock.close()
    return run_folder


def test_a_run_folder_is_not_resumed_with_other_settings_and_drops_rows_after_its_checkpoint(tmp_path):
    begun(tmp_path)
    with pytest.raises(UserError, match="--resume.*--overwrite"):
        RunFolder.open(tmp_path, SETTINGS, resume=False, overwrite=False)
    resumed(tmp_path, config={"seed": 0, "output_dir": "b", "new": 5}).begin(2)
    assert [json.loads(row)["step"] for row in (tmp_path / "metrics.jsonl").open()] == [1, 2]
    with pytest.raises(UserError, match=r"lr 2.0: the run began with 1.0"):
        resumed(tmp_path, preset={"lr": 1.0, "steps": 5, "finetuning": {"lr": 2.0}})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: unreadable"):
        resumed(tmp_path)


def test_what_may_change_on_resuming_is_said_in_one_line_each(tmp_path, capsys):
    begun(tmp_path)
    resumed(tmp_path, compute="products in bf16", preset={"lr": 1.0, "steps": 9, "finetuning": {"lr": 1.0}})
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "decay follows the number of steps" in said[0] and "differ in rounding" in said[1]
    (tmp_path / "metrics.jsonl").unlink()
    resumed(tmp_path).begin(2)
    assert "has 0 of the 2 steps before" in capsys.readouterr().err


def test_an_overwritten_run_killed_before_its_first_checkpoint_cannot_be_resumed_as_the_old_one(tmp_path):
    begun(tmp_path)
    fresh = RunFolder.open(tmp_path, SETTINGS, resume=False, overwrite=True)
    fresh.begin(0)
    fresh.lock.close()
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        resumed(tmp_path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        begun(tmp_path / name)
    (tmp_path / "one" / "checkpoint.pt").replace(tmp_path / "other" / "checkpoint.pt")
    with pytest.raises(UserError, match="of two runs"):
        resumed(tmp_path / "other")


def test_two_runs_in_one_folder_are_refused_with_who_holds_it(tmp_path):
    first = RunFolder.open(tmp_path, SETTINGS, resume=False, overwrite=False)
    with pytest.raises(UserError, match=f"process {os.getpid()} writes there now.*--output-dir"):
        RunFolder.open(tmp_path, SETTINGS, resume=False, overwrite=True)
    first.lock.close()
    RunFolder.open(tmp_path, SETTINGS, resume=False, overwrite=True).lock.close()


def test_what_killed_runs_left_half_written_is_cleared_away(tmp_path):
    (tmp_path / ".checkpoint.pt.99.partial").write_bytes(b"half")
    (tmp_path / ".mllm.partial").mkdir()
    (tmp_path / ".mllm.partial" / "model.safetensors").write_bytes(b"half")
    RunFolder.open(tmp_path, SETTINGS, resume=False, overwrite=False).lock.close()
    assert not list(tmp_path.glob(".*.partial"))


def test_a_checkout_that_moved_resumes_its_runs(tmp_path):
    package = Path(__file__).parent.parent / "img_minimal"
    settings = SETTINGS | {"preset": {"base": str(package / "tiny" / "twins" / "sdxl")}}
    assert portable(settings)["preset"] == {"base": "img_minimal/tiny/twins/sdxl"}


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    begun(tmp_path)
    content = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    place = content.index(bytes(2000))  # within the thousand zeros of the weights
    content[place + 1000] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(UserError, match="damaged at .*data") as caught:
        resumed(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_truncated_checkpoint_is_one_clear_line(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", {"step": 1, "weights": torch.zeros(1000)})
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut short") as caught:
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_cannot_be_written_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="cannot be written.*--resume") as caught:
        save_checkpoint(tmp_path / "gone" / "checkpoint.pt", {"step": 1})
    assert "\n" not in str(caught.value)
