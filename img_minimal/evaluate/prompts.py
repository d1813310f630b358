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

from img_minimal.cli import UserError, check, printable

KINDS = (".txt", ".jsonl", ".tsv", ".json")


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
    kind = path.suffix.lower()
    check(kind in KINDS, f"{path}: unknown kind of prompt file; expected {', '.join(KINDS)}")
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check --prompt-file") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    prompts = []
    for where, row in _rows(path, kind, text):
        row = row if isinstance(row, dict) else {"prompt": row}
        texts = {str(key).strip().lower(): value.strip() for key, value in row.items() if isinstance(value, str)}
        prompt, category = printable(texts.get("prompt", "")), texts.get("category", texts.get("tag", ""))
        check(bool(prompt), f"{path}, {where}: no prompt; expected a text, or an object whose `prompt` is one")
        prompts.append(FilePrompt(len(prompts), prompt, category))
    check(bool(prompts), f"{path}: holds no prompt")
    if count is None or count >= len(prompts):
        return prompts
    return [prompts[k] for k in sorted(random.Random(seed).sample(range(len(prompts)), count))]


def _rows(path: Path, kind: str, text: str) -> Iterator[tuple[str, object]]:
    """What stands at each place that is not blank. Only newlines end a line, not every Unicode separator."""
    if kind == ".json":
        rows = _json(text, f"{path}", "if every line is JSON of its own, name it .jsonl")
        check(isinstance(rows, list), f"{path}, line 1: expected a list of prompts, found {type(rows).__name__}")
        yield from ((f"item {k}", row) for k, row in enumerate(rows, 1))
        return
    lines = [(f"line {k}", line.removesuffix("\r")) for k, line in enumerate(text.split("\n"), 1) if line.strip()]
    if kind == ".tsv":  # no quoting: PartiPrompts has quotation marks inside its prompts, and they mean themselves
        columns = lines.pop(0)[1].split("\t") if lines else []
        named = "prompt" in [column.strip().lower() for column in columns]
        check(named, f"{path}, line 1: no column `Prompt`; expected the columns' names, separated by tabs")
    for where, line in lines:
        if kind == ".jsonl":
            yield where, _json(line, f"{path}, {where}", "correct or remove the line")
        elif kind == ".tsv":
            cells = line.split("\t")
            fits = len(cells) <= len(columns)
            check(fits, f"{path}, {where}: {len(cells)} columns, the first line names {len(columns)}")
            yield where, dict(zip(columns, cells))
        else:
            yield where, line


def _json(text: str, where: str, instead: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, brackets 100,000 deep
        where += f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) and ", line" not in where else ""
        raise UserError(f"{where}: not JSON ({getattr(error, 'msg', type(error).__name__)}); {instead}") from None
