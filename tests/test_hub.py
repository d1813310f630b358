"""Locations on a model hub, against a small server on this machine that answers as the hub does."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from mllm_folders import edit
from pair_files import rows, write
from refusals import refused
from release_folder import PROMPT, flags, locations

from img_minimal.hub.mllms import read_config
from img_minimal.hub.where import chosen, fetch, fetch_file, fetch_folder, split_hub_id
from img_minimal.presets import find_preset

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    """Serves repositories root/owner/name; those of "gated" may be listed, but not read."""

    root: Path
    asked: list[str]  # all paths so far

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.split("?")[0].strip("/").removeprefix("datasets/")
        parts = path.split("/")
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            return self.describe(self.root / parts[2] / parts[3], "tree" in parts)
        file = self.root.joinpath(*parts[:2], *parts[4:])  # owner/name/resolve/revision/path
        if parts[0] == "gated":
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="restricted")
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        data = file.read_bytes()
        self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    def describe(self, repo: Path, tree: bool) -> None:
        if not repo.is_dir():
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="not found")
        listing = []
        for path in sorted(repo.rglob("*")):
            if path.is_file():
                name, size = path.relative_to(repo).as_posix(), path.stat().st_size
                listing.append({"type": "file", "path": name, "size": size, "oid": COMMIT})
        siblings = [{"rfilename": file["path"]} for file in listing]
        summary = {"id": "/".join(repo.parts[-2:]), "sha": COMMIT, "siblings": siblings}
        body = json.dumps(listing if tree else summary).encode()
        self.answer(200, body, Content_Type="application/json")

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        wanted = self.headers.get("Range")
        if wanted and code == 200:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            headers["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
            code, body = 206, body[first : last + 1]
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**5},
        {"text_config": {"num_hidden_layers": 12}, "vision_config": {"depth": 4000}},
        {"layers_per_block": 200, "transformer_layers_per_block": [1, 200]},
        {"num_single_layers": 10**30},
        {"layers_per_block": [2, 2, 5000]},
    ],
)
def test_an_architecture_that_would_take_minutes_to_build_is_refused(tmp_path, settings):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    for path in (tmp_path / "config.json", tmp_path / "unet" / "config.json"):
        path.write_text(json.dumps(settings))
        (path.parent / "model.safetensors").touch()
    with refused("config.json: ", "asks for too many layers"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    with refused("unet/config.json: ", "asks for too many layers"):
        fetch_folder(str(tmp_path), "--base")


@pytest.fixture(scope="module")
def hub(release, tmp_path_factory) -> Iterator[dict]:
    """Serve the release, and yield the environment of a program with a cache of its own.

    Its variable `root` is the folder of what is served.
    """
    root = tmp_path_factory.mktemp("hub")
    (root / "org").mkdir()
    (root / "org" / "release").symlink_to(release, target_is_directory=True)
    (root / "gated" / "model").mkdir(parents=True)
    (root / "gated" / "model" / "aligner.pth").write_bytes(b"secret")
    other = root / "org" / "other"
    for name, change in (("gpt", {"model_type": "gpt2"}), ("wide", {})):
        (other / name).mkdir(parents=True)
        shutil.copy(release / "llava" / "config.json", other / name)
        edit(other / name / "config.json", **change)
        (other / name / "model.safetensors").write_bytes(b"gigabytes")
    config = json.loads((other / "wide" / "config.json").read_text())
    edit(other / "wide" / "config.json", text_config=config["text_config"] | {"hidden_size": 96})
    state = torch.load(locations(release)["ip_adapter"])
    state["ip_adapter"].popitem()
    torch.save(state, other / "adapter.bin")
    Hub.root, Hub.asked = root, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield os.environ | {
        "root": str(root),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    server.shutdown()
    server.server_close()


def python(environment: dict, *arguments: object) -> subprocess.CompletedProcess:
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


def refusals(environment: dict, *locations: str) -> list[str]:
    """Return the message for each location, asked for as an aligner's file or an MLLM's folder."""
    program = """
import sys
from img_minimal.cli import UserError
from img_minimal.hub.where import fetch_file, fetch_folder
for location in sys.argv[1:]:
    try:
        fetch_file(location, "--aligner") if "." in location else fetch_folder(location, "--mllm")
    except UserError as error:
        print("error:", error)
"""
    result = python(environment, "-c", program, *locations)
    messages = result.stdout.splitlines()
    assert len(messages) == len(locations), result
    assert all(message.startswith("error: ") for message in messages), result
    return messages


def test_sample_draws_from_the_hub_and_again_from_its_cache_without_the_hub(hub, tmp_path):
    given = {"model": "sdxl", "prompt": PROMPT, "steps": 2, "unet": "org/release/dpo/unet"}
    given |= locations(Path("org/release"))
    images = []
    for name, endpoint in (("online", hub["HF_ENDPOINT"]), ("offline", "http://127.0.0.1:1")):
        line = ["sample.py", *flags(given), "--no-explain", f"--output={tmp_path / name}"]
        result = python(hub | {"HF_ENDPOINT": endpoint}, *line)
        assert result.returncode == 0, result.stderr
        images.append((tmp_path / name / "seed0-1-round1.png").read_bytes())
    assert images[0] == images[1]
    [snapshot] = Path(hub["HF_HOME"]).glob("hub/models--org--release/snapshots/*")
    assert (snapshot / "aligner_sdxl.pth").exists()
    assert not (snapshot / "aligner.safetensors").exists(), "only what is needed is fetched"
    assert not list(snapshot.glob("base/unet/*.safetensors"))


def test_what_does_not_fit_is_refused_before_weights_are_downloaded(hub, tmp_path):
    program = """
import json, sys
from img_minimal.cli import UserError
from img_minimal.pipeline import IMG
for given in sys.argv[1:]:
    try:
        IMG(preset="sdxl", **json.loads(given))
    except UserError as error:
        print(error)
"""
    wrong = [
        ("mllm", "gpt", "'gpt2' is no MLLM known here"),
        ("mllm", "wide", "trained for an MLLM of width 160, this one has width 96"),
        ("ip_adapter", "adapter.bin", "check which file it is (RuntimeError"),
    ]
    right, cases = locations(Path("org/release")), []
    for name, path, _ in wrong:
        cases.append(json.dumps(right | {name: f"org/other/{path}"}))
    Hub.asked.clear()
    result = python(hub | {"HF_HOME": str(tmp_path)}, "-c", program, *cases)
    messages = result.stdout.splitlines()
    assert len(messages) == 3, result.stderr
    for message, (_, _, words) in zip(messages, wrong):
        assert words in message
    assert any("config.json" in path for path in Hub.asked)
    weights = [path for path in Hub.asked if path.endswith((".safetensors", "model.bin"))]
    assert not weights


def test_a_refusal_of_the_hub_is_explained_in_one_line(hub):
    login = "hf auth login"
    expected = {
        "gated/model/aligner.pth": ["restricted", "huggingface.co/gated/model", login, "--aligner"],
        "nobody/nothing/aligner.pth": ["no such model", login, "with --aligner"],
        "nobody/nothing": ["no such model", login, "with --mllm"],
        "org/release/absent.pth": ["org/release has no such file"],
        "org/release/absent": ["holds no config.json", "--mllm"],
        "org/release": ["holds no config.json", "llava"],
    }
    for (location, words), message in zip(expected.items(), refusals(hub, *expected)):
        for word in (location, *words):
            assert word in message


@pytest.mark.parametrize("change", [{"HF_ENDPOINT": "http://127.0.0.1:1"}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_network_one_line_says_how_to_go_on(hub, tmp_path, change):
    environment = hub | {"HF_HOME": str(tmp_path)} | change
    messages = refusals(environment, "org/release/a.pth", "org/release/b")
    for message, words in zip(messages, (("a.pth", "with --aligner"), ("b", "with --mllm"))):
        for word in (*words, "org/release/", "cannot be reached", "go online"):
            assert word in message


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("org/release", "is a repository, --aligner needs a file in it"),
        ("/nowhere/model", "no such file or folder; check --aligner"),
        ("~/nowhere", "no such file or folder; check --aligner"),
        ("model", "no such file or folder; check --aligner"),
        ("tests/absent.pth", "no such file or folder; check --aligner"),
        ("C:\\x", "no such file or folder; check --aligner"),
        (
            "a--b..c/d/e.pth",
            "no such file or folder; check --aligner (a path,",
        ),
    ],
)
def test_a_name_that_is_no_file_is_refused_without_asking_the_hub(location, words):
    with refused(location, words):
        fetch_file(location, "--aligner")


def test_a_folder_that_is_named_like_an_owner_hides_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shi-labs" / "notes").mkdir(parents=True)
    location = "shi-labs/IMG/aligner_sdxl.pth"
    assert split_hub_id(location, "--aligner") == ("shi-labs/IMG", "aligner_sdxl.pth")
    with refused("no such file or folder"):
        split_hub_id("shi-labs/notes/aligner_sdxl.pth", "--aligner")


def test_a_mistyped_local_path_is_found_before_anything_is_fetched():
    with refused("/nowhere/llava", "--mllm"):  # the others would fail otherwise, without a network
        fetch(find_preset("sdxl").changed(mllm="/nowhere/llava"), "aligner", "base", "mllm")


def test_pairs_of_the_hub_are_streamed_from_any_chunk_and_no_further_than_needed(hub, tmp_path):
    tables = [rows(20, 20 * k) for k in range(3)]
    tables[1][3]["jpg_0"] = b"<html>"
    tables[2][4]["label_1"] = None
    for name in ("pairs", "prompts"):
        write(Path(hub["root"]) / "org" / name, *tables)
    program = """
import json
from itertools import islice
from img_minimal.data.pairs import pair_stream, prompts_of
stream = pair_stream("org/pairs", size=8, seed=1)
chunks = list(stream.chunks())
again = next(stream.chunks(chunks[4].position))
prompts = list(islice(prompts_of(pair_stream("org/prompts")), 3))
found = [[pair.prompt for pair in chunk.items] for chunk in [*chunks, again]]
print(json.dumps([found, stream.skips(), prompts]))
"""
    result = python(hub, "-c", program)
    assert result.returncode == 0, result.stderr
    [*chunks, again], skips, prompts = json.loads(result.stdout)
    assert [len(chunk) for chunk in chunks] == [8] * 7 + [2] and again == chunks[4]
    expected = {f"prompt {k}" for k in range(60)} - {"prompt 23", "prompt 44"}
    assert {prompt for chunk in chunks for prompt in chunk} == expected
    assert (
        skips == "rows skipped: 1 with damaged images, 1 without label_1"
        and set(prompts) < expected
    )
    read = {path for path in Hub.asked if "org/prompts/" in path and path.endswith(".parquet")}
    assert len(read) <= 2, "of three files, the first for its columns"


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BOTH = ["config.json", "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("names", "half", "expected"),
    [
        (BOTH, False, ["model.safetensors"]),
        (BOTH, True, ["model.fp16.safetensors"]),
        (["pytorch_model.bin", "training_args.bin"], True, ["pytorch_model.bin"]),
        (["model.fp16.safetensors"], False, ["model.fp16.safetensors"]),
        ([*SHARDS, "sd_xl_base_1.0.safetensors"], True, SHARDS),
    ],
)
def test_one_set_of_weights_is_chosen_where_a_folder_holds_several(tmp_path, names, half, expected):
    assert chosen(tmp_path, names, half) == expected


def test_of_a_pipeline_only_the_listed_parts_are_chosen(tmp_path):
    listed = {"_class_name": "X", "unet": ["d", "U"], "vae": ["d", "V"], "none": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(listed))
    names = []
    for part in ("unet", "vae", "extra"):
        for kind in ("", ".fp16", ".non_ema"):
            names.append(f"{part}/diffusion_pytorch_model{kind}.safetensors")
    expected = ["vae/diffusion_pytorch_model.fp16.safetensors"]
    assert chosen(tmp_path, names, True, ("unet",)) == expected
