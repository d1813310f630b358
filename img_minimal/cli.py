"""Generate command lines from dataclasses and turn user errors into a single line."""

import argparse
import glob
import os
import platform
import re
import shutil
import sys
import typing
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import NoneType, TracebackType
from typing import IO, Any, NoReturn, TypeVar

Config = TypeVar("Config")
LARGEST = 2**32 - 1  # upper bound of numeric flags that set no bound of their own
# Words for memory that is short, of the system, Python, numpy, torch, oneDNN, pyarrow, safetensors.
OUT_OF_MEMORY = re.compile(
    r"(can(no|')t|could not|unable to|failed to) (allocate|mmap|map segment)|not enough memory"
    r"|bad_alloc|(malloc|realloc) of size|could not create a (primitive|memory)|paging file",
    re.IGNORECASE,
)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


class UserError(ValueError):
    """Raised for user mistakes: says what was wrong, what was expected, and what to do next."""


def check(condition: object, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def option(default: Any, text: str = "", **extra: Any) -> Any:
    """Declare a dataclass field together with its `--help` line.

    `least` and `most` bound a number; `choices` lists the accepted values, of which `bare` is meant
    by the flag alone or True, and the default by its `--no-` form or False.
    """
    return field(default=default, metadata={"help": text, **extra})


def parse(
    config: type[Config], description: str, *parts: type, argv: list[str] | None = None
) -> tuple[Config, dict[str, Any]]:
    """Read the command line into a dataclass, plus the preset fields it overrides.

    `some_field` becomes `--some-field`; booleans also get a `--no-` form. Of `parts` (dataclasses
    of a preset), every field with a help line is a flag; those given are returned as a dict. Flags
    cannot be abbreviated, and "~/" expands to the home folder. Unknown flags, wrong types and
    numbers out of bounds end the program with one line and exit code 2.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flags: dict[str, Field] = {f.name: f for f in fields(config)}
    own = set(flags)
    types = typing.get_type_hints(config)
    for part in parts:
        types = typing.get_type_hints(part) | types
        for f in fields(part):
            if f.metadata.get("help"):
                flags.setdefault(f.name, f)
    for name, flag in flags.items():
        _add_flag(parser, flag, types[name], from_preset=name not in own)

    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        try:
            if value is not None:
                check_value(flags[name], value)
        except UserError as error:
            end_with(str(error))
        if isinstance(value, str) and value.startswith("~/"):
            values[name] = os.path.expanduser(value)
    changes = {name: v for name, v in values.items() if name not in own and v is not None}
    return config(**{name: values[name] for name in own}), changes


def _add_flag(parser: argparse.ArgumentParser, flag: Field, kind: Any, from_preset: bool) -> None:
    """Add one dataclass field to the parser."""
    alternatives = [t for t in typing.get_args(kind) if t is not NoneType]
    kind = alternatives[0] if alternatives else kind
    required = flag.default is MISSING and not from_preset
    text = flag.metadata["help"]
    if from_preset and flag.default is not None:
        text += " (default: the preset's)"
    elif not required and flag.default is not None:
        text += f" (default: {flag.default})"
    settings: dict[str, Any] = {"help": text.replace("%", "%%"), "required": required}
    settings["default"] = None if from_preset or required else flag.default
    choices = flag.metadata.get("choices")
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        metavar = None if choices else kind.__name__.upper()
        settings |= {"type": kind, "choices": choices, "metavar": metavar}
    if "bare" in flag.metadata:
        settings |= {"nargs": "?", "const": flag.metadata["bare"]}
        off = {"action": "store_const", "const": flag.default, "help": argparse.SUPPRESS}
        parser.add_argument(_flag_name(f"no_{flag.name}"), dest=flag.name, **off)
    parser.add_argument(_flag_name(flag.name), **settings)


def check_value(field: Field, value: object) -> None:
    """Raise UserError for a value of another type, out of bounds, or NaN."""
    name, kind = _flag_name(field.name), field.type
    fits = isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))
    fits |= isinstance(value, os.PathLike) and isinstance("", kind)
    kinds = typing.get_args(kind) or (kind,)
    expected = " or ".join(k.__name__ for k in kinds if k is not NoneType)
    check(fits, f"{name} is {value!r}, expected {expected}")
    choices = field.metadata.get("choices")
    known = not choices or value is None or value in choices
    check(known, f"{name} is {value!r}, expected one of: {', '.join(choices or ())}")
    least, most = field.metadata.get("least", 0), field.metadata.get("most", LARGEST)
    # The negated comparison also catches NaN.
    bounded = not isinstance(value, int | float) or least <= value <= most
    check(bounded, f"{name} is {value}, expected {least:g} to {most:,}")


def _flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit; report user errors as one line on stderr with exit code 2."""
    steady_output()
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = one_line(error)
        if message is None:
            raise
    # Outside the handler, which would keep the error alive and with it a locked run folder.
    end_with(message)


def install_error_hook() -> None:
    """Report user errors as `run` does, in a script without a `main` function."""
    steady_output()

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            sys.exit(130)
        message = one_line(error)
        if message is None:
            sys.__excepthook__(kind, error, trace)
        else:
            end_with(message)

    sys.excepthook = hook


def end_with(message: str) -> NoReturn:
    """Print one line to stderr and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def one_line(error: BaseException) -> str | None:
    """Return the message for a user error, or None for a bug, whose traceback is needed."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, recognised without importing torch
        return (
            "the GPU's memory is full; try --offload layers, --dtype fp16 or bf16, or close other "
            "programs that use the GPU"
        )
    cause: BaseException | None = error
    while cause is not None:  # a library's error may be wrapped in one of ours
        if isinstance(cause, MemoryError) or OUT_OF_MEMORY.search(str(cause)):
            reason = " ".join(f"{type(cause).__name__}: {error}".split())[:300]
            advice = "try --dtype bf16, which halves the models"
            return f"the computer's memory is full; {advice} ({reason})"
        cause = cause.__cause__ or cause.__context__
    # OSError covers missing or read-only files, a full disk, an unreachable model hub.
    if isinstance(error, OSError | UserError):
        return " ".join(str(error).split())
    return None


def quiet_libraries() -> None:
    """Silence loading bars and deprecation notes of transformers and diffusers."""
    import diffusers.utils.logging
    import huggingface_hub.utils.logging
    import transformers.utils.logging

    # Raised for FLUX's RMSNorm under autocast.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    huggingface_hub.utils.logging.set_verbosity_error()
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def rank() -> int:
    """Return the number of this process among those that torchrun started, 0 for a single one."""
    number, alone = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "") in ("", "1")
    return int(number) if number.isdecimal() and not alone else 0


def silence_nonzero_ranks() -> None:
    """Let only rank 0 of a torchrun job print and show progress; call before importing torch."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else pages about lost connections
    if rank():
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open as long as the process lives


def warn(message: str) -> None:
    """Print one warning line to stderr, on rank 0 only."""
    if rank() == 0:
        print(f"warning: {message}", file=sys.stderr)


class SteadyStream:
    """Wrap an output stream so that it never ends a run.

    What its reader does not want any more (`| head`), or its disk cannot take, goes nowhere.
    """

    def __init__(self, stream: IO[str]):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        """Write a text at once."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            # What is buffered still, and all that follows, goes there.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def steady_output() -> None:
    """Let output go on whatever becomes of its reader; what that cannot show is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # a notebook's stream takes any character
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, SteadyStream(stream))


def printable(text: str) -> str:
    """Replace lone surrogates, which cannot be printed, saved or tokenized, by U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def writable_folder(path: str | Path) -> Path:
    """Create a folder, prove that it can be written to, and clear it of unfinished files.

    Raises UserError.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path):  # a unique name: another run may test the same folder
            pass
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{path}: cannot be written ({reason}); choose another folder") from None
    remove_partial(path)
    return path


def writable_file(path: str | None, flag: str, kinds: tuple[str, ...] = ()) -> None:
    """Prove, before any work is done, that a file can be written; `kinds` are allowed endings.

    Raises UserError. None stands for no file.
    """
    if path is None:
        return
    suffix = Path(path).suffix.lower()
    fits = not kinds or suffix in kinds
    check(fits, f"{path}: cannot be drawn as {suffix or 'that'}; {flag} takes {', '.join(kinds)}")
    check(not Path(path).is_dir(), f"{path}: is a folder; choose another {flag}")
    target = Path(os.path.realpath(path))
    try:
        if is_stream(Path(path)):
            check(os.access(path, os.W_OK), f"{path}: cannot be written; choose another {flag}")
        else:
            with NamedTemporaryFile(dir=target.parent):
                pass
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{path}: cannot be written ({reason}); choose another {flag}") from None
    remove_partial(target.parent, target.name)


def is_stream(path: Path) -> bool:
    """Return True for what is written to and cannot be replaced: a device or a pipe."""
    return path.exists() and not (path.is_file() or path.is_dir())


def partial_of(path: Path) -> Path:
    """Return the name of a file until it is whole; it tells process and machine."""
    return path.with_name(f".{path.name}.{os.getpid()}@{platform.node()}.partial")


def remove_partial(folder: Path, name: str = "", locked: bool = False) -> None:
    """Remove the unfinished files and folders that killed processes left, of one name or of all.

    Those of living processes and of other machines stay, unless the folder is `locked`.
    """
    for debris in folder.glob(f".{glob.escape(name)}*.partial"):
        if locked or _is_abandoned(debris.name):
            remove(debris)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there and may be removed."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # a folder, which is gone, or another user's
        path.unlink()


def _is_abandoned(partial: str) -> bool:
    """Return True for the unfinished file of a process of this machine that is gone."""
    match = re.search(rf"\.(\d+)(@{re.escape(platform.node())})?\.partial$", partial)
    try:
        if match and os.name != "nt":  # there, it would end the process
            os.kill(int(match[1]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # it belongs to somebody else
        pass
    return False
