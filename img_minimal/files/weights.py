"""Weight files: read and write safetensors and torch files, and say clearly what is wrong with a file."""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import OutOfMemoryError, Tensor, load, nn, save, strided

from img_minimal.runtime.atomic import replacing
from img_minimal.runtime.errors import UserError, would_run_code

NOTES = "_metadata"  # torch's own name for what a state dict carries beside its tensors


class WeightsError(UserError):
    """A weight file is missing, damaged, or of another model; the message is one line and says what to do."""


def read_weights(path: str | Path, holds: str | None = None) -> dict:
    """The state dict of a .safetensors file, or of a torch file (.pth, .bin, .pt), on the CPU.

    Torch files are read with `weights_only=True`, so that a file cannot run code. The `module.` that distributed
    training puts before every key is dropped. Some torch files nest dicts: those are returned as they are, or, if
    `holds` names a key, the first dict that has this key is returned, at whatever depth it is (the whole if none has).
    Raises WeightsError if the file is missing or unreadable.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected .safetensors or torch weights, check the path")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:  # mapped, as safetensors are: memory is touched where a tensor is read; old torch files cannot be mapped
            state = load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # A damaged pickle can fail in any of these ways, depending on where it was cut.
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError, LookupError, ValueError) as error:
        if would_run_code(error):
            raise WeightsError(
                f"{path}: a pickle that holds more than weights and could run code, refused; save its state dict alone"
            ) from error
        raise WeightsError(
            f"{path}: unreadable as {path.suffix or 'torch'} weights ({type(error).__name__}); it is cut short, "
            "a Git LFS pointer or no weight file: download it again"
        ) from error
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path}: expected a state dict, found {type(state).__name__}; pass a file of weights only")
    state = _without_prefix(state)
    return (_find(state, holds) if holds else None) or state


def _without_prefix(state: dict) -> dict:
    plain = {str(key).removeprefix("module."): value for key, value in state.items()}
    return {key: _without_prefix(value) if isinstance(value, dict) else value for key, value in plain.items()}


def _find(state: dict, key: str) -> dict | None:
    if key in state:
        return state
    inner = (_find(value, key) for value in state.values() if isinstance(value, dict))
    return next(filter(None, inner), None)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The notes that were written into a file; empty where there are none.

    Call it after `read_weights`, which reports a damaged file.
    """
    if Path(path).suffix != ".safetensors":
        notes = getattr(load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)), NOTES, {})
        return notes.get(NOTES, {}) if isinstance(notes, dict) else {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def write_safetensors(path: str | Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `state` so that `path` is at any moment either the old file or the whole new one.

    Parent folders are created. `metadata` holds a note, see `read_metadata`; with one the same weights give the same
    bytes, for several come in any order.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    _replace(path, lambda partial: save_file(tensors, partial, metadata=metadata or {"format": "pt"}))


def write_torch(path: str | Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """The same as a torch file (.pth), the form in which the authors publish theirs: a plain state dict.

    The notes go where modules put their versions, so that whoever loads the file does not meet them among the weights.
    """
    tensors = OrderedDict((key, value.detach().cpu()) for key, value in state.items())
    setattr(tensors, NOTES, {NOTES: metadata or {}})
    _replace(path, lambda partial: save(tensors, partial))


def _replace(path: str | Path, write: Callable[[Path], object]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with writing(path), replacing(path) as partial:
        write(partial)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Within this context a full disk, which safetensors reports in its own way, becomes a WeightsError."""
    try:
        yield
    except SafetensorError as error:
        raise WeightsError(f"{path}: cannot be written ({str(error).splitlines()[0]}); is the disk full?") from error


@contextmanager
def opening(location: str | Path, what: str) -> Iterator[None]:
    """Within this context a library's complaint about bad files becomes a WeightsError in one line."""
    try:
        yield
    except (UserError, OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise nearly anything here, from KeyError to SafetensorError
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{location}: cannot be opened as a {what} ({type(error).__name__}: {reason})") from error


def fill(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Make `state` the parameters of `module` (which may be on the meta device), keeping the state's dtypes.

    `what` names the source in messages. Raises WeightsError at the first key that is missing, unknown, or of another
    shape.
    """
    expected = module.state_dict()
    for key in sorted(expected.keys() | state.keys()):
        if key not in state or key not in expected:
            how = "lacks" if key in expected else "has an unknown key"
            raise WeightsError(f"{what}: {how} {key!r}, so it is not a {type(module).__name__}; check which file it is")
        if not isinstance(state[key], Tensor) or not state[key].is_floating_point() or state[key].layout != strided:
            raise WeightsError(f"{what}: {key!r} holds no plain floating-point weights; save the state dict anew")
        if state[key].shape != expected[key].shape:
            found, right = tuple(state[key].shape), tuple(expected[key].shape)
            raise WeightsError(f"{what}: {key!r} has shape {found}, expected {right}; it belongs to another model")
    module.load_state_dict(state, assign=True)
