"""Read files of prompts: one prompt a line, or the formats of public benchmarks.

| extension | format | for example |
|---|---|---|
| .txt | one prompt a line | |
| .jsonl | a JSON string or object a line | GenEval's metadata: `prompt`, and `tag` as category |
| .tsv | columns named in the first line | PartiPrompts.tsv: `Prompt`, `Category` |
| .json | one list of strings or objects | HPD's anime.json, photo.json, ... |

Column and key names are looked up without regard to case. Blank lines are skipped. Every other line
counts: a damaged one is an error with its number, because an evaluation with fewer prompts than its
file is another evaluation.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from img_minimal.cli import UserError, check, printable

KINDS = (".txt", ".jsonl", ".tsv", ".json")


@dataclass(frozen=True)
class FilePrompt:
    """A prompt of a file, with its number there from 0, and its category or ""."""

    index: int
    text: str
    category: str = ""


def read_prompts(path: str | Path, count: int | None = None, seed: int = 0) -> list[FilePrompt]:
    """Read the prompts of a file in its order, or `count` of them drawn by `seed`.

    Drawn and not the first ones, because benchmarks are sorted by category. Raises UserError with
    the line's number if the file is missing, of no known format, without prompts, or damaged.
    """
    path = Path(path)
    expected = f"expected {', '.join(KINDS)}"
    check(path.suffix.lower() in KINDS, f"{path}: unknown kind of file; {expected}")
    prompts = []
    for where, row in _rows(path):
        cells = row if isinstance(row, dict) else {"prompt": row}
        texts = {key.strip().lower(): v.strip() for key, v in cells.items() if isinstance(v, str)}
        text = printable(texts.get("prompt", ""))
        check(text, f"{where}: no prompt, a text or an object whose `prompt` is one")
        check("\0" not in text, f"{where}: holds a NUL; save the file as UTF-8 text")
        category = texts.get("category", texts.get("tag", ""))
        prompts.append(FilePrompt(len(prompts), text, category))
    check(prompts, f"{path}: holds no prompt")
    if count is None or count >= len(prompts):
        return prompts
    chosen = random.Random(seed).sample(range(len(prompts)), count)
    return [prompts[k] for k in sorted(chosen)]


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield where each row stands and what it holds, blank lines left out."""
    kind, text = path.suffix.lower(), _read(path)
    if kind == ".json":
        rows = _parse(text, path, "if every line is JSON of its own, name it .jsonl")
        expected = f"expected a list of prompts, found {type(rows).__name__}"
        check(isinstance(rows, list), f"{path}: {expected}")
        for number, row in enumerate(rows, 1):
            yield f"{path}, item {number}", row
        return
    columns = None
    # Only line ends of the three systems end a line, not every Unicode separator.
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        if kind == ".txt":
            yield where, line
        elif kind == ".jsonl":
            yield where, _parse(line, where, "correct or remove the line")
        # Without quoting: PartiPrompts has quotation marks inside its prompts.
        elif columns is None:
            columns = line.split("\t")
            named = [column.strip().lower() for column in columns].count("prompt")
            found = f"{named} columns `Prompt`, expected one among names separated by tabs"
            check(named == 1, f"{where}: {found}")
        else:
            cells = line.split("\t")
            found = f"{len(cells)} columns, the first line names {len(columns)}"
            check(len(cells) <= len(columns), f"{where}: {found}")
            yield where, dict(zip(columns, cells))


def _read(path: Path) -> str:
    data = b""
    try:
        # Of Windows and of old Macs.
        data = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check --prompt-file") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


def _parse(text: str, where: object, advice: str) -> object:
    """Parse JSON. Raises UserError that begins with `where` and ends in `advice`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, deep brackets
        raise UserError(f"{where}: not JSON ({error}); {advice}") from None
