"""JSON from outside, checked where it comes in: of the kind that was expected, or an error of one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from img_minimal.runtime.errors import UserError

KINDS = {dict: "an object", list: "a list"}


def read_json(
    path: str | Path, kind: type, instead: str, error: type[UserError] = UserError, check: Callable[[Any], Any] = id
) -> Any:
    """The content of a JSON file. `check` may look into it; what it raises is a wrong content like any other.

    Raises `error` in one line, with what to do `instead`, if the file is missing, damaged or of another kind.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(content, kind):
            raise TypeError(f"expected {KINDS[kind]}, found {type(content).__name__}")
        check(content)
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror}); {instead}") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as reason:
        said = str(reason).splitlines()[0] if isinstance(reason, TypeError) and str(reason) else type(reason).__name__
        raise error(f"{path}: unreadable ({said}); {instead}") from None
    return content
