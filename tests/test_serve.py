"""The page in the browser: what it draws and refuses, and where it can be reached."""

import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from subprocess import DEVNULL, Popen
from unittest.mock import MagicMock

import pytest
from PIL import Image
from refusals import refused

import sample

CONFIG = sample.Config()
BAD = {
    ("a pink <b>circle</b>", 0): "a pink <b>circle</b>",
    ("  ", 0): "prompt is empty",
    ("a red circle", None): "seed",
    ("a red circle", -1): "seed is -1",
    ("a red circle", 1.5): "seed is 1.5",
    ("a red circle", 10**12): "seed is 1000000000000",
}


class Shown(Exception):
    """Stands for Gradio's error, which the page shows as HTML."""

    def __init__(self, message: str, print_exception: bool):
        super().__init__(message)


@pytest.fixture
def gradio(monkeypatch) -> MagicMock:
    """Replace the package, which need not be installed."""
    gradio = MagicMock(Error=Shown)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
        monkeypatch.setenv(name, "elsewhere")
    return gradio


def test_the_page_draws_looks_and_draws_again_on_this_computer_alone(gradio, twin):
    sample.serve(twin, CONFIG, ["a red circle"])
    [draw], page = gradio.Interface.call_args
    launched = gradio.Interface.return_value.launch.call_args.kwargs
    assert launched["server_name"] == "127.0.0.1" and launched["share"] is False
    assert (len(page["inputs"]), len(page["outputs"])) == (2, 3)
    first, said, again = draw("a red circle", 1)
    out = twin("a red circle", seed=1)
    assert said == out.said[0]
    for shown, image in ((first, out.initial[0]), (again, out.images[0])):
        assert shown.size == (512, 512) and shown.resize((64, 64), 0).tobytes() == image.tobytes()


def test_the_command_serves_and_draws_nothing_itself(gradio, call, tmp_path):
    done = call("sample.py", "--serve", "--output", tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    gradio.Interface.return_value.launch.assert_called_once()


def test_what_the_command_refuses_is_refused_on_the_page_in_words_that_are_no_html(gradio, twin):
    sample.serve(twin, CONFIG, ["a red circle"])
    for asked, words in BAD.items():
        with pytest.raises(Shown) as shown:
            gradio.Interface.call_args.args[0](*asked)
        assert sample.escape(words) in str(shown.value) and "<" not in str(shown.value)


@pytest.mark.parametrize("reason", ["No module named 'gradio'", "cannot import name 'HfFolder'"])
def test_a_gradio_that_cannot_be_imported_is_refused_with_the_reason(monkeypatch, tmp_path, reason):
    (tmp_path / "gradio.py").write_text(f"raise ImportError({reason!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gradio", raising=False)
    with refused(reason, "pip install -r requirements.txt gradio=="):
        sample.serve(None, CONFIG, ["a red circle"])


# The real thing


class Browser:
    """Chromium without a window, driven by ChromeDriver's HTTP interface."""

    arguments = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update"
    )

    def __init__(self, url: str, profile: Path):
        self.url = url
        options = {"args": [*self.arguments.split(), f"--user-data-dir={profile}"]}
        asked = {"alwaysMatch": {"goog:chromeOptions": options}}
        session = self.ask("", {"capabilities": asked})
        self.url += "/" + session["sessionId"]

    def ask(self, path: str, body: dict) -> object:
        return post(self.url + path, body)["value"]

    def run(self, script: str) -> object:
        return self.ask("/execute/sync", {"script": script, "args": []})

    def type(self, selector: str, text: str) -> None:
        """Replace the text of an input as by hand: select all, delete, type."""
        find = {"using": "css selector", "value": selector}
        [element] = self.ask("/element", find).values()
        self.ask(f"/element/{element}/value", {"text": "\ue009a\ue000\ue003" + text})

    def submit(self, prompt: str, seed: str) -> None:
        """Remove earlier messages, fill in the page, and send it off."""
        self.run("document.querySelectorAll('.toast-close').forEach(x => x.click())")
        wait(lambda: not self.message())
        self.type("textarea", prompt)
        self.type("input[type=number]", seed)
        self.run(
            "[...document.querySelectorAll('button')].find(x => x.innerText == 'Submit').click()"
        )

    def message(self) -> str:
        return self.run("return document.querySelector('.toast-body')?.innerText ?? ''")


def post(url: str, body: dict) -> dict:
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    return json.loads(read(urllib.request.Request(url, data, kind)))


def read(request: object) -> bytes:
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def wait(condition: Callable[[], object]) -> object:
    """Return what becomes true within three minutes."""
    for _ in range(1800):
        try:
            if value := condition():
                return value
        except OSError:  # not listening yet
            pass
        time.sleep(0.1)
    raise TimeoutError


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[str]:
    """Run the command; yield the page's address."""
    if not find_spec("gradio"):
        pytest.skip(f"needs Gradio: {sample.INSTALL}")
    folder = str(tmp_path_factory.mktemp("site"))
    # BROWSER=true opens none.
    more = {"GRADIO_SERVER_PORT": "8643", "BROWSER": "true", "TMPDIR": folder}
    command = [sys.executable, sample.__file__, "--serve", "--output", folder]
    with Popen(command, stdout=DEVNULL, stderr=DEVNULL, env=os.environ | more) as server:
        try:
            wait(lambda: read("http://127.0.0.1:8643"))
            yield "http://127.0.0.1:8643"
        finally:
            server.terminate()


@pytest.fixture
def browser(site, tmp_path) -> Iterator[Browser]:
    """Open the page in Chromium."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Chromium: apt install chromium chromium-driver")
    with Popen(["chromedriver", "--port=8644"], stdout=DEVNULL, stderr=DEVNULL) as driver:
        try:
            wait(lambda: read("http://127.0.0.1:8644/status"))
            browser = Browser("http://127.0.0.1:8644/session", tmp_path / "profile")
            browser.ask("/url", {"url": site})
            wait(lambda: browser.run("return document.querySelector('textarea') != null"))
            yield browser
        finally:
            driver.terminate()


@pytest.mark.slow
def test_in_a_browser_it_refuses_in_words_says_that_it_draws_and_shows_the_pictures(browser, twin):
    for (prompt, seed), words in BAD.items():
        browser.submit(prompt, "" if seed is None else str(seed))
        assert words in wait(browser.message)
    browser.run(
        "window.seen = ''; new MutationObserver(() => window.seen += document.body.innerText)"
        ".observe(document.body, {subtree: true, childList: true, characterData: true})"
    )
    browser.submit("a red circle above a blue square", "1")
    sources = (
        "return [...document.querySelectorAll('img')].map(x => x.src).filter(x => /file=/.test(x))"
    )
    wait(lambda: len(browser.run(sources)) == 2)
    assert "drawing" in browser.run("return window.seen")
    out = twin("a red circle above a blue square", seed=1)
    assert browser.run("return document.querySelectorAll('textarea')[1].value") == out.said[0]
    for source, image in zip(browser.run(sources), (out.initial[0], out.images[0])):
        assert Image.open(BytesIO(read(source))).tobytes() == image.tobytes()


@pytest.mark.slow
def test_the_page_is_for_this_computer_and_serves_no_other_file(site, tmp_path):
    with pytest.raises(OSError, match="refused"):
        read(site.replace("127.0.0.1", "127.0.0.2"))
    elsewhere = Path(sample.__file__)
    for path in (elsewhere, "sample.py", "/etc/passwd", tmp_path / "a.txt", "../../etc/passwd"):
        for route in ("gradio_api/file=", "gradio_api/file/", "static/", "assets/"):
            with pytest.raises(urllib.error.HTTPError):
                read(f"{site}/{route}{path}")
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n12\r\n--x--'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError):
        read(urllib.request.Request(f"{site}/gradio_api/upload", form, kind))


@pytest.mark.slow
def test_too_few_values_are_answered_in_words(site):
    call = f"{site}/gradio_api/call/draw"
    answer = post(call, {"data": ["a red circle"]})
    assert b"needed: 2, got: 1" in read(f"{call}/{answer['event_id']}")
