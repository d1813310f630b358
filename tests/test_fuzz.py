"""Two thousand damaged files: each is read or refused in one line, soon, in little memory."""

import json
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import flux_folder
import numpy as np
import pytest
import release_folder
import torch
from pair_files import pairs_of, rows, write_as
from PIL import Image
from test_judges import make_clip

from img_minimal.aligner import ImplicitAligner
from img_minimal.backbone import open_backbone
from img_minimal.cli import UserError
from img_minimal.data.features import FeatureCache
from img_minimal.data.pairs import pair_stream
from img_minimal.evaluate.judges import find_judges
from img_minimal.evaluate.prompts import read_prompts
from img_minimal.files import check_provenance, decode
from img_minimal.hub.adapters import read_ip_adapter
from img_minimal.hub.questions import find_questions
from img_minimal.mllm import MLLM
from img_minimal.run import Run

Reader = Callable[[], object]
ODD = [None, True, 0, -1, 1e308, 10**30, "", "x", [], {}, [[]], {"a": 1}, [None], float("nan")]
ODD += ["\ud800", "../.."]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, double, zero or overwrite a part."""
    whole = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        at, size = rng.randrange(len(whole) + 1), rng.choice((1, 4, 64, 1000))
        part = whole[at : at + size]
        kind = rng.randrange(5)
        if kind == 0 and part:
            whole[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del whole[at:]
        elif kind == 2:
            whole[at:at] = part
        elif kind == 3:
            whole[at : at + size] = bytes(len(part))
        else:
            whole[at : at + size] = rng.randbytes(size)
    return bytes(whole)


def other_json(value: object, rng: random.Random) -> object:
    """Drop one value, or make it another kind, wherever it stands."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(ODD)
    changed = value.copy()
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.2:
        del changed[key]
    else:
        changed[key] = other_json(value[key], rng)
    return changed


def fuzz(path: Path, read: Reader, count: int) -> None:
    """Read a file in `count` damaged versions."""
    whole, rng = path.read_bytes(), random.Random(path.name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(count):
        if path.suffix == ".json" and rng.random() < 0.7:
            data = json.dumps(other_json(json.loads(whole), rng)).encode()
        else:
            data = damaged(whole, rng)
        path.unlink()  # what an earlier version still maps stays as it was
        path.write_bytes(data)
        began = time.monotonic()
        try:
            read()
        except (UserError, OSError) as error:
            assert "\n" not in str(error).strip() or isinstance(error, OSError), error
        except Exception as error:
            raise AssertionError(f"{path.name}, version {k}: {error!r}") from error
        assert time.monotonic() - began < 10, f"{path.name}, version {k}: slow"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20, f"{path.name}: {grown / 2**20:.1f} GiB more"  # ru_maxrss is in KiB


# Each function writes files into a folder and returns a reader of them.


def aligner(folder: Path, name: str) -> Reader:
    ImplicitAligner(16, 24, depth=1, heads=2, head_dim=8).save(folder / name)
    return lambda: ImplicitAligner.from_file(folder / name)


def adapter(folder: Path, name: str) -> Reader:
    changed = {"resampler": str(folder / name)}
    if name != "resampler.pth":
        changed = {"ip_adapter": str(folder / name), "resampler": None}
    files = release_folder.preset(folder, **changed).models
    return lambda: read_ip_adapter(files)


def run_folder(folder: Path, name: str) -> Reader:
    settings = {"preset": {"lr": 1.0, "finetuning": {"lr": 2.0}}, "compute": "fp32"}
    run = Run(folder, settings)
    log = "".join(f'{{"step": {k + 1}, "loss": 0.5}}\n' for k in range(3))
    run.metrics.write_text(log)
    run.save({"step": 3, "logged": len(log), "data": [{}], "weights": {"0": torch.zeros(300)}})
    run.lock.close()
    kept = {other: (folder / other).read_bytes() for other in ("checkpoint.pt", "metrics.jsonl")}

    def resume() -> None:
        for other in kept.keys() - {name}:
            (folder / other).write_bytes(kept[other])
        run = Run(folder, settings, resume=True)
        run.lock.close()
        run.restore({}, 3)

    return resume


def picture(folder: Path, name: str) -> Reader:
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / name, name.split(".")[1])

    def read() -> None:
        try:
            decode((folder / name).read_bytes())
        except (MemoryError, AssertionError):
            raise
        except Exception as error:  # any other of a decoder is counted as a damaged image
            raise OSError(str(error)) from None

    return read


def table(folder: Path, name: str) -> Reader:
    write_as(name.split(".")[1], folder / "table", rows(8))
    return lambda: pairs_of(pair_stream(folder / "table"))


def backbone(folder: Path, _: str) -> Reader:
    files = release_folder.preset(folder)
    return lambda: open_backbone(files)


def mllm(folder: Path, _: str) -> Reader:
    return lambda: MLLM.from_pretrained(folder / "llava")


def judge(folder: Path, _: str) -> Reader:
    [files] = find_judges("clipscore", None, clipscore_model=str(make_clip(folder)))
    return files.open


def flux(folder: Path, name: str) -> Reader:
    flux_folder.write_flux(folder)
    files = flux_folder.preset(folder)
    if name == "aligner_flux.pth":
        return lambda: ImplicitAligner.from_file(files.sampling.aligner)
    return lambda: open_backbone(files)


def note(folder: Path, name: str) -> Reader:
    settings = {"seed": "0", "prompts": [{"index": 0, "text": "a"}]}
    content = {
        "cache.json": json.dumps({"making": {"seed": "0"}, "shards": 1, "full": 3.5}),
        "settings.json": json.dumps(settings),
        "questions.json": '["How to fix {}?", "What is wrong with {}?"]',
        "prompts.json": '[{"prompt": "a", "category": "b"}, "c"]',
        "prompts.jsonl": '{"prompt": "a", "tag": "b"}\n"c"\n',
        "prompts.tsv": "Prompt\tCategory\na\tb\n",
        "prompts.csv": 'Prompt,Category\n"a, a",b\n',
    }
    (folder / name).write_text(content[name])
    readers = {
        "cache": lambda: FeatureCache(folder, {"seed": "0"}, 1e9).complete,
        "settings": lambda: check_provenance(folder / name, settings, "advice", True),
        "questions": lambda: find_questions(str(folder / name)),
        "prompts": lambda: read_prompts(folder / name),
    }
    return readers[name.split(".")[0]]


FILES = [
    (aligner, 200, ["a.safetensors", "a.pth"]),
    (adapter, 120, ["ip-adapter.safetensors", "ip-adapter-whole.bin", "resampler.pth"]),
    (run_folder, 200, ["checkpoint.pt", "metrics.jsonl"]),
    (picture, 100, [f"a.{kind}" for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]),
    (table, 150, ["table/train-00000.parquet", "table/00000.tar"]),
    (table, 150, ["table/train.json", "table/train.jsonl"]),
    (backbone, 25, ["base/model_index.json", "base/unet/config.json", "base/vae/config.json"]),
    (backbone, 25, ["base/tokenizer/tokenizer_config.json", "image_encoder/config.json"]),
    (backbone, 25, ["base/scheduler/scheduler_config.json"]),
    (backbone, 25, ["base/unet/diffusion_pytorch_model.safetensors"]),
    (mllm, 40, ["llava/config.json", "llava/tokenizer.json", "llava/model.safetensors"]),
    (mllm, 40, ["llava/processor_config.json"]),
    (judge, 40, ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"]),
    (flux, 25, ["base/model_index.json", "base/transformer/config.json", "ip_adapter.safetensors"]),
    (flux, 25, ["base/scheduler/scheduler_config.json", "aligner_flux.pth"]),
    (note, 100, ["cache.json", "settings.json", "questions.json"]),
    (note, 100, ["prompts.json", "prompts.jsonl", "prompts.tsv", "prompts.csv"]),
]
CASES = [(write, name, count) for write, count, names in FILES for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(("write", "name", "count"), CASES)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, release, write, name, count):
    if write in (adapter, backbone, mllm):
        shutil.copytree(release, tmp_path, dirs_exist_ok=True)
    read = write(tmp_path, name)
    read()
    fuzz(tmp_path / name, read, count)
