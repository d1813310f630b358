"""`sample.py --model sdxl` with files that are missing, damaged or do not belong together: one line each, and soon."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from release_folder import command
from transformers import LlavaForConditionalGeneration

import sample
from img_minimal.aligner import ImplicitAligner
from img_minimal.sdxl import SDXLBackbone
from img_minimal.sdxl import Resampler, load_ip_adapter
from img_minimal.cli import run


def refusal(monkeypatch, capsys, folder: Path, *arguments: object, **changed: object) -> str:
    """The one line that a bad request ends with."""
    command(monkeypatch, folder, *arguments, **changed)
    with pytest.raises(SystemExit) as ended:
        run(sample.main)
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and said.startswith("error: ") and "\n" not in said, said
    return said


@pytest.fixture
def nothing_big_is_loaded(monkeypatch):
    def never(*_, **__):
        raise AssertionError("a big model was loaded before the mistake was noticed")

    for model in (UNet2DConditionModel, StableDiffusionXLPipeline, LlavaForConditionalGeneration):
        monkeypatch.setattr(model, "from_pretrained", never)


def cut(path: Path, share: float = 0.6) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])


@pytest.mark.parametrize(
    "path",
    ["base/unet", "base/vae", "base/text_encoder_2", "image_encoder", "llava", "aligner.safetensors", "resampler.pth"],
)
def test_a_truncated_file_is_named_in_one_line(release, tmp_path, path, monkeypatch, capsys, nothing_big_is_loaded):
    shutil.copytree(release, tmp_path / "r")
    target = tmp_path / "r" / path
    if target.is_dir():
        [target] = [p for p in target.iterdir() if p.suffix in (".safetensors", ".bin")]
    cut(target)
    changed = {"aligner": tmp_path / "r" / "aligner.safetensors"}
    said = refusal(monkeypatch, capsys, tmp_path / "r", "--output", tmp_path, **changed)
    assert target.name in said or "image_encoder" in said
    assert re.search("download it again|cannot be opened", said)


@pytest.mark.parametrize("name", ["base", "image_encoder", "ip_adapter", "resampler", "mllm", "aligner", "unet"])
def test_a_missing_file_is_named_in_one_line_with_its_flag(
    release, tmp_path, name, monkeypatch, capsys, nothing_big_is_loaded
):
    said = refusal(monkeypatch, capsys, release, "--output", tmp_path, **{name: tmp_path / "absent"})
    assert f"{tmp_path}/absent: no such file or folder" in said and f"--{name.replace('_', '-')}" in said


def test_an_mllm_of_another_width_is_refused_before_anything_big_is_loaded(
    release, tmp_path, monkeypatch, capsys, nothing_big_is_loaded
):
    ImplicitAligner(64, 5120, depth=1, heads=1).save(tmp_path / "a.pth")
    said = refusal(monkeypatch, capsys, release, "--output", tmp_path, aligner=tmp_path / "a.pth")
    assert "trained for an MLLM of width 5120" in said and "has width 160" in said and "LLaVA-1.5-7B" in said


def test_files_of_different_models_are_refused_in_one_line(
    release, tmp_path, monkeypatch, capsys, nothing_big_is_loaded
):
    ImplicitAligner(48, 160, depth=1, heads=1).save(tmp_path / "a.pth")
    said = refusal(monkeypatch, capsys, release, "--output", tmp_path, aligner=tmp_path / "a.pth")
    assert "image tokens of width 48" in said and "have width 64" in said
    torch.save(Resampler(40, 64, tokens=4, width=64, depth=2, heads=1).state_dict(), tmp_path / "r.pth")
    said = refusal(monkeypatch, capsys, release, "--output", tmp_path, resampler=tmp_path / "r.pth")
    assert "features have width 48, the Resampler expects 40" in said
    said = refusal(monkeypatch, capsys, release, "--output", tmp_path, image_encoder=release / "base" / "text_encoder")
    assert "text_encoder" in said
    said = refusal(monkeypatch, capsys, release, "--output", tmp_path, mllm=release)
    assert "holds no config.json" in said and "llava" in said


def test_an_adapter_of_another_unet_is_refused_in_one_line(release, tmp_path, monkeypatch, capsys):
    branch = dict(list(load_ip_adapter(release / "ip-adapter-other.bin")[1].items())[:4])
    torch.save({"ip_adapter": branch}, tmp_path / "ip.bin")
    said = refusal(monkeypatch, capsys, release, "--output", tmp_path, ip_adapter=tmp_path / "ip.bin")
    assert "ip.bin: lacks" in said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"), "--offload, --dtype"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes"), "--dtype bf16"),
    ],
)
def test_full_memory_is_one_line_that_says_what_to_try(release, tmp_path, monkeypatch, capsys, error, words):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(SDXLBackbone, "draw", full)
    assert words in refusal(monkeypatch, capsys, release, "--output", tmp_path)


def test_an_error_that_is_ours_is_not_hidden(release, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a mistake in the program")

    monkeypatch.setattr(SDXLBackbone, "draw", broken)
    command(monkeypatch, release, "--output", tmp_path)
    with pytest.raises(RuntimeError, match="a mistake"):
        run(sample.main)
