"""Run folders and training checkpoints: everything a killed run needs to go on to the same numbers."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch

from img_minimal.runtime.atomic import replacing
from img_minimal.runtime.cli import check, warn, writable_folder
from img_minimal.runtime.errors import UserError

# Settings that may change when a run goes on, because no number depends on them.
FREE = set("train_steps steps resume overwrite output_dir cache_dir cache_gb save_every eval_prompts".split())


@dataclass
class RunFolder:
    """Where a run keeps config.json, metrics.jsonl and checkpoint.pt; `saved` is the checkpoint to go on from."""

    path: Path
    settings: dict[str, dict]
    saved: dict | None

    @classmethod
    def open(cls, path: str, settings: dict[str, dict], resume: bool, overwrite: bool) -> "RunFolder":
        """Create or reopen a folder before any work is done for it.

        Raises UserError if it holds a run and neither is meant, if there is nothing to resume, or if `settings` would
        change a resumed run's numbers.
        """
        folder = writable_folder(path)
        if resume:
            saved = load_checkpoint(folder / "checkpoint.pt")
            check_same_run(_began_with(folder / "config.json"), settings)
            return cls(folder, settings, saved)
        taken = not overwrite and (folder / "checkpoint.pt").exists()
        check(not taken, f"{folder} holds a run; go on with --resume, or choose --overwrite or another --output-dir")
        return cls(folder, settings, None)

    def begin(self, step: int) -> None:
        """Write the settings, and drop what a killed run logged after its last checkpoint, at `step`."""
        metrics = self.path / "metrics.jsonl"
        rows = metrics.read_text().splitlines() if step and metrics.exists() else []
        kept = (row for row in rows if row.endswith("}") and json.loads(row)["step"] <= step)  # the last may be cut
        metrics.write_text("".join(f"{row}\n" for row in kept))
        (self.path / "config.json").write_text(json.dumps(self.settings, indent=1))


def _began_with(path: Path) -> dict[str, dict]:
    """What `RunFolder.begin` wrote. Raises UserError if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{path}: missing or damaged, so the run cannot go on; start without --resume") from None


def check_same_run(before: dict, now: dict) -> None:
    """Raises UserError if a run would be resumed with settings that change its numbers."""
    for name, value in now.items():
        known = before.get(name, value)  # a setting that was not there yet had its present default
        if name == "compute":
            if known != value:
                warn(f"the run began with {known['products']}, now {value['products']}: numbers differ in rounding")
            continue
        if isinstance(value, dict):
            check_same_run(known, value)
        elif name not in FREE and known != value:
            raise UserError(
                f"cannot resume with {name} {value!r}: the run began with {known!r}; "
                "repeat its options (config.json in the run folder), or choose another --output-dir"
            )


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write `state` so that `path` is at any moment either the old checkpoint or the whole new one.

    Raises UserError if it cannot be written.
    """
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
        return torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise UserError(
            f"{path}: unreadable checkpoint ({type(error).__name__}); it is cut short or no checkpoint; "
            "start without --resume"
        ) from None
