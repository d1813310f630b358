"""Check the one form of every refusal: one line that says what was wrong and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from img_minimal.cli import UserError


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """Expect a UserError of one line that holds all these words."""
    with pytest.raises(UserError) as caught:
        yield
    assert_one_line(str(caught.value), words)


def assert_refused(result: SimpleNamespace, *words: str) -> None:
    """Expect a command (of the fixture `call`) to end with one line and exit code 2."""
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert "error: " in last
    assert_one_line(last, words)


def assert_one_line(message: str, words: tuple[str, ...]) -> None:
    """Check a message's form and words."""
    assert "\n" not in message
    for word in words:
        assert word in message, message
