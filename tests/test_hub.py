"""Locations on a model hub, against a small server on this machine that answers as the hub does."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from release_folder import PROMPT, locations

from img_minimal.hub.where import chosen, fetch_file, fetch_folder, on_hub
from img_minimal.hub.weights import WeightsError
from img_minimal.pipeline import fetch
from img_minimal.presets import find_preset, with_overrides
from img_minimal.cli import UserError

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    """Repositories are `root/owner/name`; those of the owner "gated" may be listed, but not read."""

    root: Path

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        place = self.path.split("?")[0].strip("/").split("/")
        if place[:2] == ["api", "models"]:
            return self.describe(self.root / place[2] / place[3], "tree" in place)
        target = self.root.joinpath(*place[:2], *place[4:])  # owner/name/resolve/revision/path
        if place[0] == "gated":
            return self.answer(403, b"", X_Error_Code="GatedRepo", X_Error_Message="restricted")
        if not target.is_file():
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        data = target.read_bytes()
        self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    def describe(self, repo: Path, tree: bool) -> None:
        if not repo.is_dir():
            return self.answer(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        files = {p.relative_to(repo).as_posix(): p for p in sorted(repo.rglob("*")) if p.is_file()}
        listing = [
            {"type": "file", "path": k, "size": p.stat().st_size, "oid": hashlib.sha1(k.encode()).hexdigest()}
            for k, p in files.items()
        ]
        summary = {"id": "/".join(repo.parts[-2:]), "sha": COMMIT, "siblings": [{"rfilename": k} for k in files]}
        self.answer(200, json.dumps(listing if tree else summary).encode(), Content_Type="application/json")

    def answer(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub(release, tmp_path_factory) -> Iterator[dict]:
    """The environment of a program that is to use this hub, with a cache of its own."""
    root = tmp_path_factory.mktemp("hub")
    (root / "org").mkdir()
    (root / "org" / "release").symlink_to(release, target_is_directory=True)
    (root / "gated" / "model").mkdir(parents=True)
    (root / "gated" / "model" / "aligner.pth").write_bytes(b"secret")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), {"root": root}))
    Thread(target=server.serve_forever, daemon=True).start()
    cache = tmp_path_factory.mktemp("cache")
    address = f"http://127.0.0.1:{server.server_port}"
    changed = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    yield os.environ | changed
    server.shutdown()
    server.server_close()


def sample(environment: dict, output: Path, folder: str, **changed: object) -> subprocess.CompletedProcess:
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in (locations(Path(folder)) | changed).items()]
    line = ["sample.py", "--model=sdxl", f"--prompt={PROMPT}", "--steps=2", "--no-explain", f"--output={output}"]
    return subprocess.run(
        [sys.executable, *line, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


def refusals(environment: dict, *locations: str) -> list[str]:
    """What the user is told about each location, asked for as aligner files or MLLM folders by one program."""
    program = (
        "import sys\nfrom img_minimal.cli import UserError\n"
        "from img_minimal.hub.where import fetch_file, fetch_folder\n"
        "for place in sys.argv[1:]:\n"
        "    try: print(fetch_file(place, '--aligner') if '.' in place else fetch_folder(place, '--mllm'))\n"
        "    except UserError as error: print('error:', error)\n"
    )
    line = [sys.executable, "-c", program, *locations]
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    said = result.stdout.splitlines()
    assert len(said) == len(locations) and all(line.startswith("error: ") for line in said), result
    return said


def test_sample_runs_from_hub_locations_and_again_from_their_cache_without_the_hub(hub, tmp_path):
    for name, environment in {"online": hub, "offline": hub | {"HF_ENDPOINT": "http://127.0.0.1:1"}}.items():
        result = sample(environment, tmp_path / name, "org/release", unet="org/release/dpo/unet")
        assert result.returncode == 0, result.stderr
    images = [(tmp_path / k / "seed0-1-round1.png").read_bytes() for k in ("online", "offline")]
    assert images[0] == images[1]
    [snapshot] = Path(hub["HF_HOME"]).glob("hub/models--org--release/snapshots/*")
    cached = {p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()}
    assert "aligner_sdxl.pth" in cached and "aligner.safetensors" not in cached, "only what is needed is fetched"
    assert not any(name.startswith("base/unet/") and name.endswith(".safetensors") for name in cached)


def test_what_the_hub_does_not_give_is_explained_in_one_line(hub):
    expected = {
        "gated/model/aligner.pth": ["restricted", "huggingface.co/gated/model", "hf auth login", "with --aligner"],
        "nobody/nothing/aligner.pth": ["no such model", "hf auth login", "with --aligner"],
        "nobody/nothing": ["no such model", "hf auth login", "with --mllm"],
        "org/release/absent.pth": ["org/release has no such file"],
        "org/release/absent": ["holds no config.json", "--mllm"],
        "org/release": ["holds no config.json", "llava"],
    }
    for (location, words), said in zip(expected.items(), refusals(hub, *expected)):
        assert location in said and all(word in said for word in words), said


@pytest.mark.parametrize("change", [{"HF_ENDPOINT": "http://127.0.0.1:1"}, {"HF_HUB_OFFLINE": "1"}])
def test_no_network_is_one_line_and_says_how_to_go_on(hub, tmp_path, change):
    file_said, folder_said = refusals(hub | {"HF_HOME": str(tmp_path)} | change, "org/release/a.pth", "org/release/b")
    assert "org/release/a.pth" in file_said and "with --aligner" in file_said
    assert "org/release/b" in folder_said and "with --mllm" in folder_said
    assert all("cannot be reached" in said and "go online" in said for said in (file_said, folder_said))


def test_a_repository_alone_is_no_file():
    with pytest.raises(UserError, match="org/release: is a repository, --aligner needs a file in it"):
        fetch_file("org/release", "--aligner")


def test_a_name_that_is_neither_path_nor_repository_is_refused_without_asking_the_hub(tmp_path):
    for location in ("/nowhere/model", "./model", "~/nowhere", "model", "tests/absent.pth", "C:\\x"):
        with pytest.raises(WeightsError, match="no such file or folder; check --aligner"):
            fetch_file(location, "--aligner")
    with pytest.raises(UserError, match="neither a local path nor owner/name on the hub; check --aligner"):
        fetch_file("a--b..c/d/e.pth", "--aligner")


def test_a_folder_that_is_called_like_an_owner_hides_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shi-labs" / "notes").mkdir(parents=True)
    assert on_hub("shi-labs/IMG/aligner_sdxl.pth", "--aligner") == ("shi-labs/IMG", "aligner_sdxl.pth")
    with pytest.raises(WeightsError, match="no such file or folder"):
        on_hub("shi-labs/notes/aligner_sdxl.pth", "--aligner")


def test_a_mistyped_local_path_shows_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr("img_minimal.files.hub.snapshot_download", lambda *_, **__: pytest.fail("it fetched"))
    preset = with_overrides(find_preset("sdxl"), mllm="/nowhere/llava")
    with pytest.raises(WeightsError, match="/nowhere/llava.*--mllm"):
        fetch(preset, ("aligner", "base", "mllm"))


def test_one_set_of_weights_is_chosen_where_a_folder_holds_several(tmp_path):
    both = ["config.json", "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "model.onnx"]
    assert chosen(tmp_path, both, half=False) == ["model.safetensors"]
    assert chosen(tmp_path, both, half=True) == ["model.fp16.safetensors"]
    assert chosen(tmp_path, ["pytorch_model.bin", "training_args.bin"], half=True) == ["pytorch_model.bin"]
    assert chosen(tmp_path, ["model.fp16.safetensors"], half=False) == ["model.fp16.safetensors"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert chosen(tmp_path, [*shards, "sd_xl_base_1.0.safetensors"], half=True) == shards
    names = ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model", "extra/model"]
    files = [f"{name}{kind}.safetensors" for name in names for kind in ("", ".fp16", ".non_ema")]
    listed = {"_class_name": "X", "unet": ["d", "U"], "vae": ["d", "V"], "text_encoder": ["t", "T"], "none": [None] * 2}
    (tmp_path / "model_index.json").write_text(json.dumps(listed))
    assert chosen(tmp_path, files, True, ("unet",)) == [
        "text_encoder/model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"
    ]  # fmt: skip


def test_a_missing_shard_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="has 1 of 3 files model-\\*-of-00003"):
        fetch_folder(str(tmp_path), "--mllm")
