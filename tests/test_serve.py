"""The page in the browser: its inputs and outputs, and where it can be reached."""

import sys
from unittest.mock import MagicMock

import pytest
from refusals import refused

import sample
from img_minimal.cli import UserError


@pytest.fixture
def gradio(monkeypatch) -> MagicMock:
    """Replace the package, which need not be installed."""
    gradio = MagicMock(Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    return gradio


def test_the_page_draws_looks_and_draws_again_on_this_computer_alone(gradio, twin):
    sample.serve(twin, "IMG", ["a red circle"])
    [draw], page = gradio.Interface.call_args
    assert gradio.Interface.return_value.launch.call_args.kwargs["server_name"] == "127.0.0.1"
    assert (len(page["inputs"]), len(page["outputs"])) == (2, 3)
    first, said, again = draw("a red circle", 1.0)
    out = twin("a red circle", seed=1)
    assert said == out.said[0]
    assert (first.tobytes(), again.tobytes()) == (out.initial[0].tobytes(), out.images[0].tobytes())


def test_the_command_serves_and_draws_nothing_itself(gradio, call, tmp_path):
    done = call("sample.py", "--serve", "--output", tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    gradio.Interface.return_value.launch.assert_called_once()


def test_an_error_is_shown_on_the_page(gradio):
    refuse = MagicMock(side_effect=UserError("no such colour"))
    sample.serve(refuse, "IMG", ["a red circle"])
    with pytest.raises(RuntimeError, match="no such colour"):
        gradio.Interface.call_args.args[0]("a pink circle", 0)


def test_without_gradio_it_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with refused("pip install gradio"):
        sample.page(None, "IMG", ["a red circle"])
