"""Files of prompts to evaluate on: one a line, or as the public benchmarks publish theirs.

| extension | what is read | for example |
|---|---|---|
| .txt | one prompt a line | |
| .jsonl | a JSON string or object a line | GenEval's evaluation_metadata.jsonl: `prompt`, and `tag` as category |
| .tsv | columns named in the first line | PartiPrompts.tsv: `Prompt`, `Category` |
| .json | one list of strings or objects | HPD's anime.json, concept-art.json, paintings.json, photo.json |

Column and key names are looked up without regard to case. Blank lines are skipped. Every other line counts: a damaged
one is an error with its number, because an evaluation with fewer prompts than its file is another evaluation.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from img_minimal.runtime.errors import UserError

CATEGORY_KEYS = ("category", "tag")


@dataclass(frozen=True)
class FilePrompt:
    """A prompt, where it stands among its file's prompts (from 0), and its category ("" where the file has none)."""

    index: int
    text: str
    category: str = ""


def read_prompts(path: str | Path, count: int | None = None, seed: int = 0) -> list[FilePrompt]:
    """The prompts of a file in its order; with `count`, so many of them drawn by `seed`, still in the file's order.

    Drawn and not the first ones, because benchmarks are sorted by category. Raises UserError, with the line's number,
    if the file is missing, is of no known format, holds no prompt, or if any line of it is damaged.
    """
    path = Path(path)
    readers = {".txt": _text_lines, ".jsonl": _json_lines, ".tsv": _table, ".json": _json_list}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: unknown kind of prompt file; expected {', '.join(readers)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check --prompt-file") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    prompts = []
    for where, row in readers[path.suffix.lower()](path, text):
        prompt, category = _prompt_and_category(row)
        if not prompt:
            raise UserError(f"{path}, {where}: no prompt; expected a text, or an object whose `prompt` is one")
        prompts.append(FilePrompt(len(prompts), prompt, category))
    if not prompts:
        raise UserError(f"{path}: holds no prompt")
    if count is None or count >= len(prompts):
        return prompts
    return [prompts[k] for k in sorted(random.Random(seed).sample(range(len(prompts)), count))]


def _prompt_and_category(row: object) -> tuple[str, str]:
    if isinstance(row, str):
        return row.strip(), ""
    if not isinstance(row, dict):
        return "", ""
    values = {str(key).strip().lower(): value for key, value in row.items()}
    prompt = values.get("prompt")
    category = next((values[key] for key in CATEGORY_KEYS if isinstance(values.get(key), str)), "")
    return prompt.strip() if isinstance(prompt, str) else "", category.strip()


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1. Only newlines end a line, not every Unicode separator."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _text_lines(path: Path, text: str) -> Iterator[tuple[str, object]]:
    for number, line in _lines(text):
        yield f"line {number}", line


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, object]]:
    for number, line in _lines(text):
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg}); mend or remove the line") from None


def _table(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """Tab-separated without quoting: PartiPrompts has quotation marks inside its prompts, and they mean themselves."""
    lines = _lines(text)
    _, header = next(lines, (1, ""))
    columns = header.split("\t")
    if "prompt" not in (column.strip().lower() for column in columns):
        raise UserError(f"{path}, line 1: no column `Prompt`; expected the columns' names, separated by tabs")
    for number, line in lines:
        cells = line.split("\t")
        if len(cells) > len(columns):
            raise UserError(f"{path}, line {number}: {len(cells)} columns, the first line names {len(columns)}")
        yield f"line {number}", dict(zip(columns, cells))


def _json_list(path: Path, text: str) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}); if every line is JSON of its own, name it .jsonl"
        ) from None
    if not isinstance(rows, list):
        raise UserError(f"{path}, line 1: expected a list of prompts, found {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield f"item {number}", row
