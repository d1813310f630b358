"""Weight files: read safetensors or torch files, write safetensors, and say clearly what is wrong with a file."""

import os
import pickle
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, load, nn

from img_minimal.errors import UserError


class WeightsError(UserError):
    """A weight file is missing, damaged, or of another model; the message is one line and says what to do."""


def read_weights(path: str | Path) -> dict:
    """The state dict of a .safetensors file, or of a torch file (.pth, .bin, .pt), on the CPU.

    Torch files are read with `weights_only=True`, so that a file cannot run code. The `module.` that distributed
    training puts before every key is dropped. Some torch files nest dicts: those are returned as they are.
    Raises WeightsError if the file is missing or unreadable.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected .safetensors or torch weights, check the path")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else load(path, map_location="cpu", weights_only=True)
    # A damaged pickle can fail in any of these ways, depending on where it was cut.
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError, LookupError, ValueError) as error:
        raise WeightsError(
            f"{path}: unreadable as {path.suffix or 'torch'} weights ({type(error).__name__}); it is cut short, "
            "a Git LFS pointer or no weight file: download it again"
        ) from error
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path}: expected a state dict, found {type(state).__name__}; pass a file of weights only")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The notes that `write_safetensors` put into a file; empty for other files.

    Call it after `read_weights`, which reports a damaged file.
    """
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def write_safetensors(path: str | Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `state` so that `path` is at any moment either the old file or the whole new one.

    Parent folders are created. `metadata` holds short notes, see `read_metadata`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # same folder, so that the rename is atomic
    try:
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(tensors, partial, metadata={"format": "pt", **(metadata or {})})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
        if state[key].shape != expected[key].shape:
            found, right = tuple(state[key].shape), tuple(expected[key].shape)
            raise WeightsError(f"{what}: {key!r} has shape {found}, expected {right}; it belongs to another model")
    module.load_state_dict(state, assign=True)
