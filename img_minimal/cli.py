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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import Field, field, fields
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import NoneType, TracebackType
from typing import Any, NoReturn, TypeVar

Config = TypeVar("Config")
AnyPath = str | Path
LARGEST = 2**32 - 1  # upper bound of numeric flags that set no bound of their own
# Words for memory that is short, of the system, Python, numpy, torch, oneDNN, pyarrow, safetensors.
OUT_OF_MEMORY = re.compile(
    r"(can(no|')t|could not|unable to|failed to) (allocate|mmap|map segment)|not enough memory"
    r"|MemoryError|bad_alloc|(malloc|realloc) of size|could not create a (primitive|memory)"
    r"|paging file",
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
    by the flag alone or True, and the default by False.
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
    flags = {f.name: f for f in fields(config)}
    own = set(flags)
    for part in parts:
        for f in fields(part):
            if f.metadata.get("help"):
                flags.setdefault(f.name, f)
    for name, flag in flags.items():
        _add_flag(parser, flag, from_preset=name not in own)

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


def _add_flag(parser: argparse.ArgumentParser, flag: Field, from_preset: bool) -> None:
    """Add one dataclass field to the parser."""
    kind, text, shown = _kinds(flag)[0], flag.metadata["help"], flag.default
    if from_preset:
        shown = "the preset's"
    if flag.default is not None:
        text += f" (default: {shown})"
    settings = {"help": text.replace("%", "%%")}
    settings["default"] = None if from_preset else flag.default
    choices = flag.metadata.get("choices")
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        metavar = None if choices else kind.__name__.upper()
        settings |= {"type": kind, "choices": choices, "metavar": metavar}
    if "bare" in flag.metadata:
        settings |= {"nargs": "?", "const": flag.metadata["bare"]}
    parser.add_argument(flag_name(flag.name), **settings)


def check_value(field: Field, value: object) -> None:
    """Raise UserError for a value of another type, out of bounds, or NaN."""
    kinds, choices = _kinds(field), field.metadata.get("choices")
    fits = isinstance(value, field.type) or (isinstance(value, int) and float in kinds)
    fits |= isinstance(value, os.PathLike) and str in kinds
    expected = " or ".join(kind.__name__ for kind in kinds)
    if fits and choices:
        fits, expected = value in (None, *choices), f"one of: {', '.join(choices)}"
    elif fits and isinstance(value, int | float):
        least, most = field.metadata.get("least", 0), field.metadata.get("most", LARGEST)
        # NaN is not in between, either.
        fits, expected = least <= value <= most, f"{least:g} to {most:,}"
    check(fits, f"{flag_name(field.name)} is {value!r}, expected {expected}")


def _kinds(field: Field) -> list[type]:
    """Return the types that a value may have, None apart."""
    return [kind for kind in typing.get_args(field.type) or [field.type] if kind is not NoneType]


def flag_name(field_name: str) -> str:
    """Return the command-line flag of a field."""
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
    for cause in causes(error):  # a library's error may be wrapped in one of ours
        if OUT_OF_MEMORY.search(repr(cause)):
            reason = " ".join(f"{type(cause).__name__}: {error}".split())[:300]
            return (
                "the computer's memory is full; try --dtype bf16, which halves the models "
                f"({reason})"
            )
    # OSError covers missing or read-only files, a full disk, an unreachable model hub. Without its
    # library: safetensors' error of writing to a full disk.
    if isinstance(error, OSError | UserError) or type(error).__name__ == "SafetensorError":
        return " ".join(str(error).split())
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


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


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Hide transformers' and diffusers' loading bars within this context, for a bar of our own."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = diffusers.utils.logging, transformers.utils.logging
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def is_main() -> bool:
    """Return True in the process that speaks: the first of torchrun's, or a single one."""
    alone = os.environ.get("WORLD_SIZE", "") in ("", "1")
    return alone or os.environ.get("RANK") == "0"


def silence_nonzero_ranks() -> None:
    """Let only rank 0 of a torchrun job print and show progress; call before importing torch."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else pages while ranks look for others
    if not is_main():
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open as long as the process lives


def warn(message: str) -> None:
    """Print one warning line to stderr, on rank 0 only."""
    if is_main():
        print(f"warning: {message}", file=sys.stderr)


def steady_output() -> None:
    """Let a program go on when nobody reads its output (`| head`); escape what cannot be shown."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a notebook's takes anything
            stream.reconfigure(errors="backslashreplace")
            stream.write = partial(_write, stream, stream.write)


def _write(stream: TextIOWrapper, write: Callable[[str], int], text: str) -> None:
    try:
        write(text)
        stream.flush()
    except OSError:
        # What is buffered still, and all that follows, goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text: str) -> str:
    """Replace lone surrogates, which cannot be printed, saved or tokenized, by U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def writable_folder(path: AnyPath, name: str = "") -> Path:
    """Create a folder, prove that it can be written to, and clear it of unfinished files.

    Raises UserError, which calls the folder `name`, or by its path.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path):  # a unique name: another run may test the same folder
            pass
    except OSError as error:
        raise UserError(
            f"{name or path}: cannot be written ({error.strerror}); choose another place"
        ) from None
    remove_partial(path)
    return path


def writable_file(path: str | None, flag: str, kinds: tuple[str, ...] = ()) -> None:
    """Prove, before any work is done, that a file can be written; `kinds` are allowed endings.

    Raises UserError. None stands for no file.
    """
    if path is None:
        return
    file = Path(path)
    suffix, folder = file.suffix.lower(), file.resolve().parent
    fits = not kinds or suffix in kinds
    check(fits, f"{path}: cannot be drawn as {suffix or 'that'}; {flag} takes {', '.join(kinds)}")
    fits = folder.is_dir() and not file.is_dir()
    check(fits, f"{path}: cannot be written (a folder, or in none); choose another {flag}")
    if not is_stream(file):
        writable_folder(folder, f"{flag} {path}")


def is_stream(path: Path) -> bool:
    """Return True for what is written to and cannot be replaced: a device or a pipe."""
    return path.exists() and not path.is_file()


def partial_of(path: Path) -> Path:
    """Return the name of a file until it is whole; it tells machine and process."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.partial")


def remove_partial(folder: Path) -> None:
    """Remove what dead processes of this machine left unfinished in a folder."""
    for debris in folder.glob(f".*.{glob.escape(platform.node())}.*.partial"):
        try:
            if os.name != "nt":  # there, it would end the process
                os.kill(int(debris.name.split(".")[-2]), 0)
        except ProcessLookupError:
            remove(debris)
        except (OSError, ValueError):  # another user's process, or none of our names
            continue


def remove(path: Path) -> None:
    """Remove a file or folder if it is there and may be removed."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # a folder, which is gone, or another user's
        path.unlink()
