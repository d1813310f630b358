"""The page in the browser: its inputs and outputs, and where it can be reached."""

import sys
from types import SimpleNamespace

import pytest
from refusals import refused

import sample
from img_minimal.cli import UserError


class Shown(Exception):
    """Raised to show a message on the page."""


@pytest.fixture
def pages(monkeypatch) -> list[SimpleNamespace]:
    """Replace Gradio as far as it is used; collects the pages that are made."""
    pages: list[SimpleNamespace] = []

    def interface(draw: object, **settings: object) -> SimpleNamespace:
        page = SimpleNamespace(draw=draw, **settings)
        page.launch = lambda **how: setattr(page, "launched", how)
        pages.append(page)
        return page

    def part(*_: object, label: str = "", **__: object) -> str:
        return label

    parts = {"Textbox": part, "Number": part, "Image": part}
    monkeypatch.setitem(
        sys.modules, "gradio", SimpleNamespace(Interface=interface, Error=Shown, **parts)
    )
    return pages


def test_the_page_draws_looks_and_draws_again_on_this_computer_alone(pages, twin):
    sample.serve(twin, "IMG", ["a red circle"])
    [page] = pages
    assert page.launched["server_name"] == "127.0.0.1"
    assert page.inputs == ["prompt", "seed"] and len(page.outputs) == 3
    first, said, again = page.draw("a red circle", 1.0)
    out = twin("a red circle", seed=1)
    assert said == out.said[0]
    assert (first.tobytes(), again.tobytes()) == (out.initial[0].tobytes(), out.images[0].tobytes())


def test_the_command_serves_and_draws_nothing_itself(pages, call, tmp_path):
    done = call("sample.py", "--serve", "--output", tmp_path)
    assert done.returncode == 0 and pages[0].launched and not list(tmp_path.iterdir())


def test_an_error_is_shown_on_the_page(pages):
    def refuse(*_: object, **__: object) -> None:
        raise UserError("no such colour")

    sample.serve(refuse, "IMG", ["a red circle"])
    with pytest.raises(Shown, match="no such colour"):
        pages[0].draw("a pink circle", 0)


def test_without_gradio_it_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with refused("pip install gradio"):
        sample.page(None, "IMG", ["a red circle"])
