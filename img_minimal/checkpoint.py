"""Training checkpoints: everything a killed run needs to go on to the same numbers, written atomically."""

import os
import pickle
from pathlib import Path

import torch

from img_minimal.errors import UserError


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write `state` so that `path` is at any moment either the old checkpoint or the whole new one."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint with `weights_only=True`. Raises UserError if it is missing or cut short."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint to resume from; start without --resume, or check --output-dir")
    try:
        return torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise UserError(
            f"{path}: unreadable checkpoint ({type(error).__name__}); it is cut short or no checkpoint; "
            "start without --resume"
        ) from None
