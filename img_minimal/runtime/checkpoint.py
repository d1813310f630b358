"""Run folders and training checkpoints: everything a killed run needs to go on to the same numbers."""

import fcntl
import json
import os
import pickle
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from uuid import uuid4

import torch

from img_minimal.runtime.atomic import replacing, sweep, write_whole
from img_minimal.runtime.cli import check, warn, writable_folder
from img_minimal.runtime.errors import UserError, would_run_code
from img_minimal.runtime.json_files import read_json

# Settings that may change when a run goes on, because no number depends on them.
FREE = set("resume overwrite output_dir cache_dir cache_gb save_every eval_prompts rounds".split())
SAID = {"compute": "numbers will differ in rounding", "steps": "the learning rate's decay follows the number of steps",
        "train_steps": "the learning rate's decay follows the number of steps"}  # fmt: skip


@dataclass
class RunFolder:
    """Where a run keeps config.json, metrics.jsonl and checkpoint.pt; `saved` is the checkpoint to go on from."""

    path: Path
    settings: dict
    saved: dict | None
    lock: IO | None = field(repr=False)  # held as long as the process lives; None: another process writes here

    @classmethod
    def open(cls, path: str, settings: dict, resume: bool, overwrite: bool) -> "RunFolder":
        """Create or reopen a folder before any work is done for it.

        Raises UserError if another process writes there, if the folder holds a run and neither is meant, if there is
        nothing to resume, if its parts are of two runs, or if `settings` would change a resumed run's numbers.
        """
        folder = writable_folder(path)
        lock = _locked(folder)
        sweep(folder)
        settings = portable(settings)
        if resume:
            saved = load_checkpoint(folder / "checkpoint.pt")
            began = _began_with(folder / "config.json")
            same = saved.get("run") == began.get("run")
            check(same, f"{folder}: checkpoint.pt and config.json are of two runs; start without --resume")
            check_same_run(began, settings)
            return cls(folder, settings | {"run": began.get("run")}, saved, lock)
        taken = not overwrite and (folder / "checkpoint.pt").exists()
        check(not taken, f"{folder} holds a run; go on with --resume, or choose --overwrite or another --output-dir")
        return cls(folder, settings | {"run": uuid4().hex}, None, lock)

    @classmethod
    def follow(cls, path: str, settings: dict, resume: bool) -> "RunFolder":
        """The same folder for a process that only reads there, because rank 0 has opened it."""
        return cls(Path(path), settings, load_checkpoint(Path(path) / "checkpoint.pt") if resume else None, None)

    def begin(self, step: int) -> None:
        """Write the settings, and drop what a killed run logged after its last checkpoint, at `step`.

        Whenever this is interrupted, the folder holds the old run, no run, or the new one; never parts of two.
        """
        if self.lock is None:
            return
        if step == 0:
            (self.path / "checkpoint.pt").unlink(missing_ok=True)  # an overwritten run cannot be resumed by mistake
            shutil.rmtree(self.path / "rounds", ignore_errors=True)  # nor its rounds gone on with
        metrics = self.path / "metrics.jsonl"
        rows = metrics.read_text(errors="replace").splitlines() if step and metrics.exists() else []
        rows = [row for row in rows if 0 < _step(row) <= step]
        if len(rows) < step:
            warn(f"{metrics}: has {len(rows)} of the {step} steps before; curves and log begin later")
        write_whole(metrics, "".join(f"{row}\n" for row in rows))
        write_whole(self.path / "config.json", json.dumps(self.settings, indent=1))


def _step(row: str) -> int:
    """The step of a row of metrics; 0 if it is damaged: the last one may be cut."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, TypeError, LookupError, RecursionError, OverflowError):
        return 0


def _locked(folder: Path) -> IO:
    """An open file that only this process holds. Raises UserError, naming who does, if another one has it."""
    lock = (folder / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise UserError(f"{folder}: {holder} writes there now; stop it, or choose another --output-dir") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()}")
    lock.flush()
    return lock


def portable(settings: dict) -> dict:
    """Settings whose paths into this package do not depend on where it lies, so that a checkout may move."""
    package = str(Path(__file__).parent.parent)
    text = json.dumps(settings).replace(json.dumps(package)[1:-1], "img_minimal")
    return json.loads(text)


def _began_with(path: Path) -> dict:
    """What `RunFolder.begin` wrote. Raises UserError if it is missing or damaged."""
    return read_json(path, dict, "so the run cannot go on; start without --resume")


def check_same_run(before: dict, now: dict) -> None:
    """Raises UserError if a run would be resumed with settings that change its numbers; says what may be changed."""
    for name, value in now.items():
        known = before.get(name, value)  # a setting that was not there yet had its present default
        if name in SAID:
            if known is not None and value is not None and known != value:
                warn(f"the run began with {name} {known}, now {value}: {SAID[name]}")
        elif isinstance(value, dict) and isinstance(known, dict):
            check_same_run(known, value)
        elif name not in FREE and known != value:
            raise UserError(
                f"cannot resume with {name} {value!r}: the run began with {known!r}; "
                "repeat its options (config.json in the run folder), or choose another --output-dir"
            )


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write `state` so that `path` is at any moment either the old checkpoint or the whole new one.

    The identity of the run in the config.json beside it goes along. Raises UserError if it cannot be written.
    """
    note = Path(path).with_name("config.json")
    state = state | {"run": _began_with(note).get("run") if note.exists() else None}
    try:
        with replacing(path) as partial:
            torch.save(state, partial)
    except (OSError, RuntimeError) as error:  # torch calls a full disk a RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path}: cannot be written ({reason}); an older one is still whole: free some space and --resume"
        ) from None


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint, on the CPU, with `weights_only=True`. Raises UserError if it is missing or cut short."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint to resume from; start without --resume, or check --output-dir")
    try:
        with zipfile.ZipFile(path) as file:
            flipped = file.testzip()  # torch writes checksums and does not read them
        check(flipped is None, f"{path}: damaged at {flipped}; start without --resume, or restore a copy")
        saved = torch.load(path, weights_only=True, map_location="cpu")
        check(isinstance(saved, dict), f"{path}: holds no run; start without --resume")
        return saved
    except UserError:
        raise
    except (
        zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError,
    ) as error:  # fmt: skip
        if would_run_code(error):
            raise UserError(f"{path}: a pickle that could run code, refused; start without --resume") from None
        raise UserError(
            f"{path}: unreadable checkpoint ({type(error).__name__}); it is cut short or no checkpoint; "
            "start without --resume"
        ) from None
