"""Read and write weight files (safetensors, torch), and say in one line what is wrong with one."""

import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from img_minimal.cli import AnyPath, UserError, check
from img_minimal.files import replacing

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
WEIGHT_FILE = "weight file; if it is cut short or a Git LFS pointer, download it again"
NOTES = "_metadata"  # torch's own attribute for what a state dict carries beside its tensors


def read_weights(path: AnyPath, holds: str | None = None) -> dict:
    """Read a state dict from a .safetensors or torch file to the CPU.

    Torch files are read with `weights_only=True`, so they cannot run code. The `module.` prefix of
    distributed training is dropped. Torch files may nest dicts: they are returned as they are, or,
    if `holds` names a key, the innermost dict with that key is. Raises UserError.
    """
    path = Path(path)
    with opening(path, WEIGHT_FILE):
        state = load_file(path) if path.suffix == ".safetensors" else _load_torch(path)
    check(
        isinstance(state, dict) and state,
        f"{path}: expected a state dict, found {type(state).__name__}; pass weights only",
    )
    state = _drop_prefix(state)
    return (_find(state, holds) if holds else None) or state


def _load_torch(path: Path) -> object:
    # Memory-mapped like safetensors, which old torch files do not allow.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _drop_prefix(state: dict) -> dict:
    plain = OrderedDict()
    for key, value in state.items():
        value = _drop_prefix(value) if isinstance(value, dict) else value
        plain[str(key).removeprefix("module.")] = value
    setattr(plain, NOTES, getattr(state, NOTES, {}))
    return plain


def _find(state: dict, key: str) -> dict | None:
    """Search nested dicts for the first one that has this key."""
    if key in state:
        return state
    for value in state.values():
        found = _find(value, key) if isinstance(value, dict) else None
        if found:
            return found
    return None


def read_metadata(path: AnyPath, state: dict | None = None) -> dict[str, str]:
    """Read the notes written with a file, {} if there are none; `read_weights` must come first.

    A torch file may nest dicts, each with notes of its own: `state` is the one that was found.
    """
    if Path(path).suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    return getattr(state or _load_torch(Path(path)), NOTES, {}).get(NOTES, {})


def write_weights(
    path: AnyPath, state: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Replace a weight file atomically; creates parent folders.

    .pth, .pt and .bin become torch files, anything else safetensors. `metadata` holds notes for
    `read_metadata`; with at most one, the same weights give the same bytes. In a torch file they go
    where modules keep their versions, out of sight of whoever loads the weights.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = OrderedDict((key, value.detach().cpu()) for key, value in state.items())
    with replacing(path) as partial:
        if path.suffix in TORCH_SUFFIXES:
            setattr(tensors, NOTES, {NOTES: metadata or {}})
            torch.save(tensors, partial)
        else:
            tensors = {key: value.contiguous() for key, value in tensors.items()}
            save_file(tensors, partial, metadata=metadata or {"format": "pt"})


@contextmanager
def opening(location: AnyPath, what: str) -> Iterator[None]:
    """Convert exceptions of loading libraries into a one-line UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise nearly anything, from KeyError to SafetensorError
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if isinstance(error, UnpicklingError):  # which advises to load it all the same
            reason = "damaged, or a pickle that could run code, refused"
        raise UserError(f"{location}: cannot be opened as a {what} ({reason})") from error


def fill(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Make `state` the parameters of a module (possibly on the meta device), in the state's dtypes.

    Raises UserError, naming `source` and the missing, unknown or misshapen keys.
    """
    with opening(source, f"{type(module).__name__}; check which file it is"):
        module.load_state_dict(dict(state), assign=True)  # without a file's notes
