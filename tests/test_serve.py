"""The page in the browser: what it asks, what it shows, and where it can be reached."""

import sys
from types import SimpleNamespace

import pytest

from img_minimal import serve as module
from img_minimal.load import load_img
from img_minimal.cli import UserError


class Shown(Exception):
    """What the page says in place of a picture."""


@pytest.fixture
def made(monkeypatch) -> list[SimpleNamespace]:
    """Gradio in its place, as far as it is used; the pages that were made."""
    pages: list[SimpleNamespace] = []

    def interface(draw, **settings):
        page = SimpleNamespace(draw=draw, launched=None, **settings)
        page.launch = lambda **how: setattr(page, "launched", how)
        pages.append(page)
        return page

    part = lambda *_, label="", **__: label  # noqa: E731
    stand_in = SimpleNamespace(Interface=interface, Textbox=part, Number=part, Image=part, Error=Shown)
    monkeypatch.setitem(sys.modules, "gradio", stand_in)
    return pages


def test_the_page_draws_looks_and_draws_again_on_this_computer_alone(made):
    img = load_img("tiny-sdxl")
    module.serve(img, "IMG", ["a red circle"])
    [page] = made
    assert page.launched["server_name"] == "127.0.0.1"
    assert page.inputs == ["prompt", "seed"] and len(page.outputs) == 3
    first, said, again = page.draw("a red circle", 1.0)
    out = img("a red circle", seed=1)
    assert (first.tobytes(), said, again.tobytes()) == (
        out.initial[0].tobytes(), out.said[0], out.images[0].tobytes()
    )  # fmt: skip


def test_an_error_is_shown_on_the_page(made):
    def refuse(*_, **__):
        raise UserError("no such colour")

    module.serve(refuse, "IMG", ["a red circle"])
    with pytest.raises(Shown, match="no such colour"):
        made[0].draw("a pink circle", 0)


def test_without_gradio_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="pip install gradio"):
        module.page(None, "IMG", ["a red circle"])
