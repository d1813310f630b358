"""Two thousand damaged files: each is read or refused in one line, soon, and without filling the memory."""

import io
import json
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import flux_folder
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pair_files import jpeg, pairs_of, rows
from PIL import Image
from release_folder import preset
from test_judges import make_clip

from img_minimal.aligner import ImplicitAligner
from img_minimal.sdxl import load_ip_adapter
from img_minimal.data.features import FeatureCache
from img_minimal.data.pairs import pair_stream
from img_minimal.evaluate.compare import ImageFolder
from img_minimal.evaluate.judges import ClipJudge, JudgeFiles
from img_minimal.evaluate.prompts import read_prompts
from img_minimal.hub.where import fetch_folder
from img_minimal.hub.mllms import read_config
from img_minimal.load import load_backbone
from img_minimal.mllm import MLLM
from img_minimal.mllm import find_questions
from img_minimal.run import RunFolder, save_checkpoint
from img_minimal.cli import UserError
from img_minimal.files import decode

pytestmark = pytest.mark.slow
ODD = [None, True, 0, -1, 1e308, 10**30, "", "x", [], {}, [[]], {"a": 1}, [None], "\ud800", "../..", float("nan")]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bits flipped, a part cut off, doubled, zeroed, or overwritten with something else."""
    whole = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        at, size = rng.randrange(len(whole) + 1), rng.choice((1, 4, 64, 1000))
        kind = rng.randrange(5)
        if kind == 0 and at < len(whole):
            whole[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del whole[at:]
        elif kind == 2:
            whole[at:at] = whole[at : at + size]
        elif kind == 3:
            whole[at : at + size] = bytes(len(whole[at : at + size]))
        else:
            whole[at : at + size] = rng.randbytes(size)
    return bytes(whole)


def other_json(value: object, rng: random.Random) -> object:
    """The same JSON with one value, wherever it stands, of another kind or gone."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        if rng.random() < 0.2:
            return {k: v for k, v in value.items() if k != key} if isinstance(value, dict) else value[:key]
        copy = dict(value) if isinstance(value, dict) else list(value)
        copy[key] = other_json(value[key], rng)
        return copy
    return rng.choice(ODD)


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutated(data, rng)
    return json.dumps(other_json(json.loads(data), rng)).encode()


def fuzz(path: Path, read: Callable[[], object], change: Callable[[bytes, random.Random], bytes], count: int) -> int:
    """Read a file in `count` damaged versions. Returns how many were refused."""
    whole, rng, refused = path.read_bytes(), random.Random(path.name), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(count):
        data = change(whole, rng)
        path.unlink()  # what an earlier version still maps stays as it was
        path.write_bytes(data)
        began = time.monotonic()
        try:
            read()
        except (UserError, OSError) as error:
            refused += 1
            assert "\n" not in str(error).strip() or isinstance(error, OSError), error
        except Exception as error:
            raise AssertionError(f"{path.name}, version {k}: {type(error).__name__}: {error}") from error
        assert time.monotonic() - began < 10, f"{path.name}, version {k}: slow"
    path.write_bytes(whole)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20, f"{path.name}: {grown / 2**20:.1f} GiB more"  # ru_maxrss is in KiB
    return refused


@pytest.fixture
def folder(release, tmp_path) -> Path:
    shutil.copytree(release, tmp_path / "release")
    return tmp_path / "release"


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.json"])
def test_aligners(tmp_path, name):
    aligner = ImplicitAligner(16, 24, depth=1, heads=2, head_dim=8)
    aligner.save(tmp_path / ("a.pth" if name == "a.pth" else "a.safetensors"))
    if name == "a.json":
        torch.save(dict(aligner.state_dict()), tmp_path / "a.pth")
    weights = tmp_path / ("a.pth" if name == "a.json" else name)
    change = mutated_json if name == "a.json" else mutated
    assert fuzz(tmp_path / name, lambda: ImplicitAligner.from_file(weights), change, 200) > 50


@pytest.mark.parametrize("name", ["ip-adapter.safetensors", "ip-adapter-whole.bin", "resampler.pth"])
def test_adapters(folder, name):
    resampler = str(folder / name) if name == "resampler.pth" else None
    adapter = str(folder / ("ip-adapter-half.bin" if resampler else name))
    assert fuzz(folder / name, lambda: load_ip_adapter(adapter, resampler), mutated, 120) > 20


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json", "metrics.jsonl"])
def test_run_folders(tmp_path, name):
    settings = {"config": {"seed": 0}, "preset": {"lr": 1.0, "finetuning": {"lr": 2.0}}, "compute": "fp32"}

    def resume() -> None:
        run = RunFolder.open(tmp_path, settings, resume=True, overwrite=False)
        run.begin(int(run.saved["step"]) if isinstance(run.saved.get("step"), int) else 2)

    run = RunFolder.open(tmp_path, settings, resume=False, overwrite=True)
    run.begin(0)
    save_checkpoint(tmp_path / "checkpoint.pt", {"step": 3, "weights": torch.zeros(300)})
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {k + 1}, "loss": 0.5}}\n' for k in range(3)))
    run.lock.close()
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def from_the_start() -> None:
        for other, data in kept.items():
            if other not in (name, ".lock"):
                (tmp_path / other).write_bytes(data)
        resume()

    change = mutated_json if name == "config.json" else mutated
    fuzz(tmp_path / name, from_the_start, change, 200)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image", kind)

    def read() -> None:
        try:
            decode((tmp_path / "image").read_bytes())
        except Exception as error:  # a stream counts any error of a decoder as a damaged image
            if isinstance(error, (MemoryError, AssertionError)):
                raise
            raise OSError(str(error)) from None

    fuzz(tmp_path / "image", read, mutated, 100)


@pytest.mark.parametrize("kind", ["parquet", "json", "tar"])
def test_tables(tmp_path, kind):
    table = rows(8)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(table), tmp_path / "train.parquet", row_group_size=4)
    elif kind == "json":
        (tmp_path / "1.jpg").write_bytes(jpeg(1))
        (tmp_path / "train.json").write_text(json.dumps([{"prompt": "a", "path1": "1.jpg", "path2": "1.jpg"}] * 3))
    else:
        import tarfile

        with tarfile.open(tmp_path / "train.tar", "w") as file:
            for k, row in enumerate(table):
                for name, value in row.items():
                    data = value if isinstance(value, bytes) else str(value).encode()
                    info = tarfile.TarInfo(f"{k}.{name}")
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
    path = tmp_path / f"train.{kind}"
    fuzz(path, lambda: pairs_of(pair_stream(path)), mutated_json if kind == "json" else mutated, 150)


@pytest.mark.parametrize(
    "name", ["base/model_index.json", "base/unet/config.json", "base/vae/config.json", "image_encoder/config.json",
             "base/scheduler/scheduler_config.json", "base/unet/diffusion_pytorch_model.safetensors",
             "base/tokenizer/tokenizer_config.json"],
)  # fmt: skip
def test_backbones(folder, name):
    files = preset(folder, height=64, width=64)
    fuzz(folder / name, lambda: load_backbone(files), mutated_json if name.endswith("json") else mutated, 25)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json", "model.safetensors"])
def test_mllms(folder, name):
    path = folder / "llava" / name
    fuzz(path, lambda: MLLM.from_pretrained(folder / "llava"), mutated_json if name.endswith("json") else mutated, 40)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"])
def test_judges(tmp_path, name):
    make_clip(tmp_path)
    files = JudgeFiles.find("clipscore", str(tmp_path))
    fuzz(tmp_path / name, lambda: ClipJudge.open(files), mutated_json if name.endswith("json") else mutated, 40)


@pytest.mark.parametrize(
    "name", ["base/model_index.json", "base/transformer/config.json", "ip_adapter.safetensors", "aligner_flux.pth",
             "image_encoder/config.json", "base/scheduler/scheduler_config.json"],
)  # fmt: skip
def test_flux(tmp_path, name):
    flux_folder.write_flux(tmp_path)
    files = flux_folder.preset(tmp_path)

    def read() -> None:
        load_backbone(files)
        ImplicitAligner.from_file(files.aligner)

    fuzz(tmp_path / name, read, mutated_json if name.endswith("json") else mutated, 25)


def test_notes_lists_and_prompts(tmp_path):
    cache = tmp_path / "cache" / "x"
    cache.mkdir(parents=True)
    (cache / "cache.json").write_text('{"making": {"seed": "0"}, "complete": true, "full_at": 3.5}')
    images = ImageFolder(tmp_path, [], 0, 1)
    images.claim({"seed": 0, "prompts": [{"index": 0, "text": "a"}]})
    (tmp_path / "p00000-s0-base.png").write_bytes(b"")  # there is something to mix with
    (tmp_path / "questions.json").write_text('["How to fix {}?", "What is wrong with {}?"]')
    (tmp_path / "p.json").write_text('[{"prompt": "a", "category": "b"}, "c"]')
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "tag": "b"}\n"c"\n')
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\na\tb\n")
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "config.json").write_text('{"model_type": "llava", "text_config": {"hidden_size": 4}}')
    (tmp_path / "settings" / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    readers = {
        cache / "cache.json": lambda: FeatureCache(tmp_path / "cache" / "x", {"seed": "0"}, 1e9).complete,
        tmp_path / "settings.json": lambda: images.claim({"seed": 0, "prompts": [{"index": 0, "text": "a"}]}),
        tmp_path / "questions.json": lambda: find_questions(str(tmp_path / "questions.json")),
        tmp_path / "p.json": lambda: read_prompts(tmp_path / "p.json"),
        tmp_path / "p.jsonl": lambda: read_prompts(tmp_path / "p.jsonl"),
        tmp_path / "p.tsv": lambda: read_prompts(tmp_path / "p.tsv"),
        tmp_path / "settings" / "config.json": lambda: read_config(fetch_folder(str(tmp_path / "settings"), "--mllm")),
    }
    for path, read in readers.items():
        by_value = path.suffix == ".json"
        fuzz(path, read, mutated_json if by_value else mutated, 100)
