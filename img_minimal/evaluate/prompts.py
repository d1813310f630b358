"""Read files of prompts: one prompt a line, or the formats of public benchmarks.

| extension | format | for example |
|---|---|---|
| .txt | one prompt a line | |
| .csv | columns named in the first line, of which one is `prompt`, or the only one | DrawBench |
| .tsv | the same with tabs, and without quoting | PartiPrompts.tsv: `Prompt`, `Category` |
| .jsonl | a JSON string or object a line | GenEval's metadata: `prompt`, and `tag` as category |
| .json | a list of strings or objects, also under a key; lines as in .jsonl | HPD's anime.json |

Column and key names are looked up without regard to case; `prompts`, `caption` and `text` mean
`prompt`, too. Blank lines are skipped. Every other line counts: a damaged one is an error with its
number, because an evaluation with fewer prompts than its file is another evaluation.
"""

import csv
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from img_minimal.cli import UserError, check, printable

KINDS = (".txt", ".csv", ".tsv", ".json", ".jsonl")
NAMES = ("prompt", "prompts", "caption", "text")


@dataclass(frozen=True, order=True)
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
    path, prompts = Path(path), []
    for where, row in _rows(path):
        cells = row if isinstance(row, dict) else {"prompt": row}
        texts = {key.strip().lower(): v.strip() for key, v in cells.items() if isinstance(v, str)}
        text = printable(next((texts[name] for name in NAMES if name in texts), ""))
        check(text, f"{where}: no prompt, a text or an object whose `prompt` is one")
        check("\0" not in text, f"{where}: holds a NUL; save the file as UTF-8 text")
        category = texts.get("category", texts.get("tag", ""))
        prompts.append(FilePrompt(len(prompts), text, category))
    check(prompts, f"{path}: holds no prompt")
    count = min(count or len(prompts), len(prompts))
    return sorted(random.Random(seed).sample(prompts, count))


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield where each row stands and what it holds, without blank lines."""
    kind, text = path.suffix.lower(), _read(path)
    # Only line ends of the three systems end a line, not every Unicode separator.
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            lines.append((f"{path}, line {number}", line))
    if kind in (".csv", ".tsv"):
        yield from _table(path, kind, text)
    elif kind == ".txt":
        yield from lines
    elif len(lines) > 1 and re.fullmatch(r'\s*["{].*["}]\s*', lines[0][1]):  # JSON line by line
        for where, line in lines:
            yield where, _parse(line, where)
    else:
        for number, item in enumerate(_items(_parse(text, path)), 1):
            yield f"{path}, item {number}", item


def _items(content: object) -> list:
    """Find the list in a JSON file: itself, the only one in an object, or an object by number."""
    if isinstance(content, dict) and not any(isinstance(content.get(name), str) for name in NAMES):
        lists = [value for value in content.values() if isinstance(value, list)]
        return lists[0] if len(lists) == 1 else list(content.values())
    return content if isinstance(content, list) else [content]


def _table(path: Path, kind: str, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield where each row of a table stands, and its cells by column."""
    # An only column may hold commas; "\x1f", a separator that no text has, is what then remains.
    delimiter, quoting = max("\x1f,;\t", key=text.partition("\n")[0].count), csv.QUOTE_MINIMAL
    if kind == ".tsv":  # PartiPrompts has quotation marks inside its prompts
        delimiter, quoting = "\t", csv.QUOTE_NONE
    reader = csv.reader(StringIO(text), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        columns = [name.strip().lower() for name in next(reader, ())]
        if len(columns) == 1 and " " not in columns[0]:  # or it is a prompt
            columns = ["prompt"]
        named = max(columns.count(name) for name in NAMES)
        advice = "expected one among the names in the first line"
        check(named == 1, f"{path}, line 1: {named} columns `Prompt`, {advice}")
        for row in reader:
            where, found = f"{path}, line {reader.line_num}", len(row)
            check(found <= len(columns), f"{where}: {found} columns, the first line names fewer")
            if any(row):
                yield where, dict(zip(columns, row))
    except csv.Error as error:
        advice = "correct the line's quotation marks"
        raise UserError(f"{path}, line {reader.line_num}: {error}; {advice}") from None


def _read(path: Path) -> str:
    check(
        path.suffix.lower() in KINDS, f"{path}: unknown kind of file; expected {', '.join(KINDS)}"
    )
    try:
        return path.read_text(encoding="utf-8-sig")  # with line ends of Windows and of old Macs
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check --prompt-file") from None
    except UnicodeDecodeError as error:
        line = len((error.object[: error.start] + b".").splitlines())
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


def _parse(text: str, where: object) -> object:
    """Parse JSON. Raises UserError that begins with `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, deep brackets
        raise UserError(f"{where}: not JSON ({error}); correct or remove it") from None
