"""Command lines generated from dataclasses, and one place where errors become one line."""

import argparse
import dataclasses
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import NoneType, TracebackType
from typing import Any, NoReturn, TypeVar

from img_minimal.runtime.errors import UserError

Config = TypeVar("Config")
LARGEST = 2**32 - 1  # number on a command line, where an option has no bound of its own
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")  # what a picture may be saved as


def option(default: Any, text: str, **extra: Any) -> Any:
    """A dataclass field with its default and its line of `--help`; `most` bounds a number, `choices` lists values."""
    return dataclasses.field(default=default, metadata={"help": text, **extra})


def parse(config: type[Config], description: str, argv: list[str] | None = None) -> Config:
    """Fill a flat dataclass from the command line; `some_field` becomes `--some-field`, bool fields get --no- forms.

    Unknown options, values of the wrong type and numbers that nothing can be done with end the program with a line and
    exit code 2. Options are not guessed from their beginnings. "~/" is the home folder, also after an "=".
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kinds = [t for t in typing.get_args(hints[field.name]) if t is not NoneType] or [hints[field.name]]
        required = field.default is dataclasses.MISSING
        default = "" if required or field.default is None else f" (default: {field.default})"
        settings: dict[str, Any] = {"help": field.metadata["help"] + default, "required": required}
        if not required:
            settings["default"] = field.default
        if kinds[0] is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": kinds[0], "choices": field.metadata.get("choices")}
            settings["metavar"] = None if settings["choices"] else kinds[0].__name__.upper()
        parser.add_argument("--" + field.name.replace("_", "-"), **settings)
    values = vars(parser.parse_args(argv))
    chosen = config(
        **{k: os.path.expanduser(v) if isinstance(v, str) and v[:2] == "~/" else v for k, v in values.items()}
    )
    for field in dataclasses.fields(config):
        value, most = getattr(chosen, field.name), field.metadata.get("most", LARGEST)
        if isinstance(value, (int, float)) and not abs(value) <= most:  # so that NaN is caught, too
            print(f"error: --{field.name.replace('_', '-')} is {value}, expected at most {most:,}", file=sys.stderr)
            sys.exit(2)
    return chosen


def quiet_libraries() -> None:
    """Keep the loading bars and deprecation notes of transformers and diffusers out of our output."""
    import diffusers.utils.logging
    import huggingface_hub.utils.logging
    import transformers.utils.logging

    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # of autocast over FLUX's RMSNorm
    huggingface_hub.utils.logging.set_verbosity_error()
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit; what the user can put right becomes one line on stderr and exit code 2."""
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = one_line(error)
        if message is None:
            raise
    end_with(message)  # not above, where the error would be kept, and with it what it holds: a locked run folder


def end_scripts_in_one_line() -> None:
    """For scripts that have no `main`: what `run` does for those that have."""

    def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            sys.exit(130)
        message = one_line(error)
        if message is None:
            sys.__excepthook__(kind, error, trace)
        else:
            end_with(message)

    sys.excepthook = _hook


def end_with(message: str) -> NoReturn:
    """Exit with one line."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def one_line(error: BaseException) -> str | None:
    """What to tell the user, or None for a bug, whose traceback is needed."""
    if isinstance(error, UserError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, named without importing torch
        return "the GPU's memory is full; try --offload, --dtype fp16 or bf16, or close what else uses the GPU"
    if isinstance(error, RuntimeError) and re.search("can't allocate memory|not enough memory", str(error)):
        return "the computer's memory is full; try --dtype bf16, which halves the models"
    # Missing, unreadable or read-only files, a full disk, a model hub that cannot be reached.
    return " ".join(str(error).split()) if isinstance(error, OSError) else None


def printable(text: str) -> str:
    """A text that can be printed, saved and tokenized: halves of characters, as a cut file has them, become a mark."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def hush_other_ranks() -> None:
    """Of several processes that torchrun started only the first one prints and shows progress; call it first."""
    if int(os.environ.get("RANK", 0)):
        os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives


def warn(message: str) -> None:
    """One line on stderr about something that does not stop the program."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: {message}", file=sys.stderr)


def check(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def writable_folder(path: str | Path) -> Path:
    """Create the folder and prove that it can be written, before any work is done for it. Raises UserError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path):  # a name of its own: another run may try the same folder right now
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    return path


def writable_file(path: str | None, flag: str, kinds: tuple[str, ...] = ()) -> None:
    """Prove, before the work, that a file can be written there, and that its name ends in one of `kinds` if any.

    Raises UserError; None is no file.
    """
    if path is None:
        return
    suffix = Path(path).suffix.lower()
    check(
        not kinds or suffix in kinds, f"{path}: cannot be drawn as {suffix or 'that'}; {flag} takes {', '.join(kinds)}"
    )
    check(not Path(path).is_dir(), f"{path}: is a folder; choose another {flag}")
    try:
        with NamedTemporaryFile(dir=Path(path).parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another {flag}") from None
