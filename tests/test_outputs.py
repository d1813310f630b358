"""Output files: links, pipes and modes stay, debris of dead processes goes, results come first."""

import ast
import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from refusals import refused
from safetensors import SafetensorError

import sample
from img_minimal.cli import UserError, one_line, partial_of, writable_file, writable_folder
from img_minimal.files import replacing, write_whole
from img_minimal.plots import curves
from img_minimal.presets import find_preset
from img_minimal.run import lock_folder

ROOT = Path(__file__).parent.parent


def write_curve(path: Path) -> None:
    curves({"": [{"step": k, "loss": 1 / (1 + k)} for k in range(3)]}, {"x": ("loss",)}, path)


@pytest.mark.parametrize("write", [lambda path: write_whole(path, "{}"), write_curve])
@pytest.mark.parametrize("kind", ["link", "link to a link", "link to nothing", "link elsewhere"])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path, write, kind):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "file.png", tmp_path / "link.png"
    if kind == "link elsewhere":
        target = tmp_path / "far" / "file.png"
    if kind != "link to nothing":
        target.write_text("old")
    link.symlink_to(target.relative_to(tmp_path))
    if kind == "link to a link":
        (tmp_path / "again.png").symlink_to(link)
        link = tmp_path / "again.png"
    writable_file(str(link), "--json")
    write(link)
    assert link.is_symlink() and target.is_file() and target.read_bytes() != b"old"
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("write", [lambda path: write_whole(path, "{}"), write_curve])
def test_a_pipe_and_a_device_are_written_to(tmp_path, write):
    pipe, got = tmp_path / "pipe.png", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    writable_file(str(pipe), "--picture")
    write(pipe)
    reader.join(10)
    assert pipe.is_fifo() and got[0][:2] in (b"{}", b"\x89P")
    (tmp_path / "null.png").symlink_to("/dev/null")
    for device in (tmp_path / "null.png", Path("/dev/null")):
        writable_file(str(device), "--picture")
        write(device)
        assert device.is_char_device()


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_a_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "results.json"
    path.touch()
    path.chmod(mode)
    write_whole(path, "{}")
    with replacing(path) as partial:
        partial.touch(0o400)
    assert path.stat().st_mode & 0o777 == mode


def test_debris_of_dead_processes_goes_and_files_of_living_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = platform.node()
    stay = [f".a.json.{here}.{os.getppid()}.partial", partial_of(tmp_path / "b.png").name]
    stay += [f".new.elsewhere{here}.{dead.pid}.partial", ".notes.partial", "mine.1.partial"]
    for prove in (writable_folder, lambda folder: writable_file(str(folder / "a"), "--json")):
        for name in [f".a.json.{here}.{dead.pid}.partial", *stay]:
            (tmp_path / name).touch()
        (tmp_path / f".folder.{here}.{dead.pid}.partial" / "model").mkdir(parents=True)
        prove(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {*stay}
    lock_folder(tmp_path).close()  # nobody else can be writing there
    assert {path.name for path in tmp_path.iterdir()} == {"mine.1.partial", ".lock"}


@pytest.mark.parametrize("path", ["/dev/nowhere/x.json", "/proc/self/x.json"])
def test_what_cannot_be_written_is_refused_before_any_work(path):
    with refused(path, "cannot be written", "--json"):
        writable_file(path, "--json")


# A laptop without Unix's modules, in a notebook, whose terminal knows ASCII, behind `head -2`.
ODD_MACHINE = """
import psutil, sys  # a library that has a Windows of its own
sys.modules["fcntl"] = sys.modules["resource"] = None
from img_minimal import cli, files, plots
from img_minimal.run import Run
files.Path = lambda _: type("NoProc", (), {"exists": lambda self: False})()
def main():
    peak = files.peak_memory()
    print(f"caf\\u00e9 \\U0001f600 {peak}")
    files.Path = cli.Path
    files.write_whole("/dev/stdout", "a result\\n")
    run = Run(sys.argv[1], {})
    plots.curves({"": [{"step": 1, "loss": 1.0}]}, {"loss": ("loss",)}, run.path / "a.png")
    for _ in range(20_000):
        print("a line that nobody reads any more")
    (run.path / "done").touch()
cli.run(main)
"""


def test_a_run_goes_on_without_locks_a_backend_for_pictures_unicode_or_a_reader(tmp_path):
    environment = os.environ | {"MPLBACKEND": "module://inline_of_a_notebook"}
    environment |= {"PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-c", ODD_MACHINE, str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, text=True, **pipes)
    lines = [process.stdout.readline() for _ in range(2)]
    process.stdout.close()  # as `| head -2` does
    errors = process.stderr.read()
    assert process.wait(60) == 0, errors
    assert lines == ["caf\\xe9 \\U0001f600 memory not measured\n", "a result\n"]
    assert "cannot be locked" in errors and "Traceback" not in errors and "rror" not in errors
    assert (tmp_path / "run" / "done").exists() and (tmp_path / "run" / "a.png").exists()


UNIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix", "crypt"}


@pytest.mark.parametrize("path", ["*.py", "img_minimal/**/*.py"])
def test_no_module_imports_one_that_windows_lacks(path):
    files = list(ROOT.glob(path))
    assert len(files) > 1
    for file in files:
        for node in ast.parse(file.read_text()).body:
            names = {alias.name for alias in getattr(node, "names", ())}
            assert not ({getattr(node, "module", None)} | names) & UNIX, file


def test_a_folder_that_cannot_be_locked_is_said_and_used(tmp_path, monkeypatch, capsys):
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / ".a.elsewhere.1.partial").touch()
    lock_folder(tmp_path).close()
    assert "cannot be locked" in capsys.readouterr().err
    assert list(tmp_path.glob("*.partial")), "another process may be writing it"


def test_results_are_written_before_anything_is_printed(tmp_path, monkeypatch):
    def gone(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", gone)
    config, sampling = sample.Config(num_images=1), find_preset("tiny-sdxl").sampling
    stages = [[Image.new("RGB", (64, 64))], [Image.new("RGB", (64, 64), "red")]]
    with pytest.raises(KeyboardInterrupt):
        sample.save(config, sampling, tmp_path, ["a red circle"], [0], stages, [[""]] * 2)
    assert json.loads((tmp_path / "results.json").read_text())["results"]
    assert (tmp_path / "side-by-side.png").exists()


def caused(error: Exception, cause: Exception) -> Exception:
    """Wrap an error as our readers do."""
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive"),  # oneDNN
        RuntimeError("could not create a memory object"),
        pa.ArrowMemoryError("malloc of size 1073741888 failed"),
        RuntimeError("unable to mmap 9 bytes from file <a>: Cannot allocate memory (12)"),
        OSError(12, "Cannot allocate memory"),
        SafetensorError("I/O error: Cannot allocate memory (os error 12)"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
        caused(UserError("a: cannot be opened"), MemoryError()),
    ],
)
def test_memory_that_is_short_is_one_line_whoever_says_so(error):
    line = one_line(error)
    assert line.startswith("the computer's memory is full; try --dtype bf16") and "\n" not in line
    assert one_line(RuntimeError("could not find a primitive")) is None  # ours is not hidden
