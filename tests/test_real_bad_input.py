"""`sample.py --model sdxl` refuses files that are missing, damaged or do not belong together."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from refusals import assert_refused
from release_folder import flags, locations
from transformers import LlavaForConditionalGeneration

from img_minimal.aligner import ImplicitAligner
from img_minimal.sdxl import SDXL, Resampler


@pytest.fixture
def draw(call, tmp_path):
    """Draw with the files of a folder, some of them exchanged."""

    def draw(folder: Path, **changed: object):
        files = locations(folder) | changed
        return call(
            "sample.py", "--model=sdxl", "--output", tmp_path / "out", "--steps=2", *flags(files)
        )

    return draw


@pytest.fixture
def nothing_big_is_loaded(monkeypatch):
    for model in (UNet2DConditionModel, StableDiffusionXLPipeline, LlavaForConditionalGeneration):
        monkeypatch.setattr(model, "from_pretrained", lambda *_, **__: pytest.fail("was loaded"))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("base/unet/diffusion_pytorch_model.safetensors", "download it again"),
        ("base/text_encoder_2/model.safetensors", "download it again"),
        ("image_encoder/pytorch_model.bin", "cannot be opened"),
        ("llava/model.safetensors", "download it again"),
        ("aligner_sdxl.pth", "download it again"),
        ("resampler.pth", "download it again"),
    ],
)
@pytest.mark.usefixtures("nothing_big_is_loaded")
def test_a_truncated_file_is_named_before_anything_big_is_loaded(
    release, tmp_path, draw, path, words
):
    shutil.copytree(release, tmp_path / "release")
    whole = (release / path).read_bytes()
    (tmp_path / "release" / path).write_bytes(whole[: int(0.6 * len(whole))])
    name = path.split("/")[0] if "image_encoder" in path else Path(path).name
    assert_refused(draw(tmp_path / "release"), name, words)


NAMES = ("base", "image_encoder", "ip_adapter", "resampler", "mllm", "aligner", "unet")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("nothing_big_is_loaded")
def test_a_missing_file_is_named_with_its_flag(release, tmp_path, draw, name):
    done = draw(release, **{name: tmp_path / "absent"})
    flag = f"--{name.replace('_', '-')}"
    assert_refused(done, f"{tmp_path}/absent: no such file or folder", f"check {flag}")


@pytest.mark.usefixtures("nothing_big_is_loaded")
def test_files_of_different_models_are_refused_before_anything_big_is_loaded(
    release, tmp_path, draw
):
    aligner, resampler = tmp_path / "a.pth", tmp_path / "r.pth"
    ImplicitAligner(64, 5120, depth=1, heads=1).save(aligner)
    said = "trained for an MLLM of width 5120", "has width 160", "LLaVA-1.5-7B"
    assert_refused(draw(release, aligner=aligner), *said)
    ImplicitAligner(48, 160, depth=1, heads=1).save(aligner)
    assert_refused(draw(release, aligner=aligner), "image tokens of width 48", "have width 64")
    state = Resampler(40, 64, tokens=4, width=64, depth=2, heads=1).state_dict()
    torch.save(state, resampler)
    assert_refused(draw(release, resampler=resampler), "have width 48, the IP-Adapter expects 40")
    assert_refused(draw(release, image_encoder=release / "base" / "text_encoder"), "text_encoder")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nmore lines"), "--offload layers, --dtype"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 99 bytes"), "--dtype bf16"),
        (RuntimeError("a mistake in the program"), None),  # ours is not hidden
    ],
)
def test_full_memory_is_one_line_that_says_what_to_try(release, draw, monkeypatch, error, words):
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(SDXL, "draw", full)
    if words:
        assert_refused(draw(release), words)
    else:
        with pytest.raises(RuntimeError, match="a mistake"):
            draw(release)
