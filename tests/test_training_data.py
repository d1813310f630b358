"""Training from the command line: its plan, what is loaded, streamed, cached and encoded once."""

import json
import shutil
from pathlib import Path

import diffusers
import pyarrow.parquet as pq
import torch
from mllm_folders import write_original_llava
from pair_files import read_pairs, rows, tie, write
from refusals import refused
from release_folder import flags, locations

from img_minimal.aligner import ImplicitAligner
from img_minimal.bench.memory import SIZES
from img_minimal.bench.plan import aligner_plan
from img_minimal.data.features import distinct
from img_minimal.data.load import load_encoder
from img_minimal.mllm import MLLM
from img_minimal.plots import read_rows
from img_minimal.presets import find_preset
from train import Config

TWIN, SDXL = find_preset("tiny-sdxl"), find_preset("sdxl")


def metrics(folder: Path) -> list[dict]:
    return read_rows(folder / "metrics.jsonl")


def test_streamed_and_cached_training_print_a_plan_load_nothing_that_draws_and_agree(
    tmp_path, monkeypatch, call, capsys
):
    def refuse(*_, **__):
        raise AssertionError("a diffusion model was loaded for training")

    for name in ("StableDiffusionXLPipeline", "UNet2DConditionModel", "AutoencoderKL"):
        monkeypatch.setattr(getattr(diffusers, name), "from_pretrained", refuse)
    open_mllm, plans = MLLM.from_pretrained, []

    def watched(*args, **options) -> MLLM:
        plans.append(capsys.readouterr().out)
        return open_mllm(*args, **options)

    monkeypatch.setattr(MLLM, "from_pretrained", watched)
    pq.write_table(pq.read_table(TWIN.data.pairs).slice(0, 60), tmp_path / "pairs.parquet")
    words = ["--pairs", tmp_path / "pairs.parquet", "--steps", 3, "--eval-prompts", 0]
    for run, cache in (("a", "none"), ("b", tmp_path / "cache"), ("c", tmp_path / "cache")):
        result = call("train.py", *words, "--cache-dir", cache, "--output-dir", tmp_path / run)
        assert result.returncode == 0, result.stderr
        assert metrics(tmp_path / run) == metrics(tmp_path / "a")
    assert len(plans) == 2, "a complete cache needs no MLLM"
    for plan, kept in zip(plans, ("streamed", "at most 70 GB")):
        for words in (
            *("an aligner for tiny-sdxl, 3 steps of 64", "1.93M parameters", "nothing that draws"),
            *("a sample: 41.1kB guidance", "checkpoint.pt 13.5MB", kept, "is seen 3.2 times"),
        ):
            assert words in plan


def test_sdxl_trains_from_a_stream_with_flags_that_point_at_the_released_files(
    release, tmp_path, call
):
    write_original_llava(tmp_path / "llava")
    tables = [rows(12), rows(12, 12)]
    tables[0][3]["jpg_0"] = b"<html>"
    tie(tables[1][5])
    names = ("image_encoder", "ip_adapter", "resampler")
    files = {name: locations(release)[name] for name in names} | {"mllm": tmp_path / "llava"}
    files |= {"pairs": write(tmp_path / "pairs", *tables), "output_dir": tmp_path / "run"}
    result = call("train.py", *flags(files), "--model=sdxl", "--batch-size=4", "--steps=4")
    assert result.returncode == 0 and "skips rows with damaged" in result.stderr
    for words in ("streamed", "nothing that draws", "1 ties", "1 with damaged images"):
        assert words in result.stdout
    aligner = ImplicitAligner.from_file(tmp_path / "run" / "aligner.safetensors")
    assert (aligner.width, aligner.guidance_width, len(aligner.layers)) == (64, 48, 4)


def test_the_plan_of_the_real_models_shows_their_costs(tmp_path):
    mllm = SIZES["llava-13b"] | {"model_type": "llava"}
    for name, settings in (("mllm", mllm), ("encoder", SIZES["sdxl"]["image_encoder"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    mllm, encoder = str(tmp_path / "mllm"), str(tmp_path / "encoder")
    preset = SDXL.changed(mllm=mllm, image_encoder=encoder, dtype="bf16")
    plan = aligner_plan(preset, "mllm", tmp_path, 70.0)
    assert Config().refresh_after == 10
    for words in (
        *("13.4G parameters  26.7GB", "632M parameters", "195M parameters  3.90GB"),
        *("100,000 steps of 8", "6.55MB guidance (about 640 x 5120, bf16) + 262kB tokens"),
        *("all pairs of data-is-better-together/", "streamed", "none on disk"),
        *("checkpoint.pt 3.12GB", "aligner.safetensors 780MB"),
    ):
        assert words.replace(" ", "") in plan.replace(" ", ""), plan
    assert "each pair" not in plan, "how many the hub holds is not known"
    cached = preset.changed(("data",), cache_dir=str(tmp_path), max_pairs=10_000)
    plan = aligner_plan(cached, "mllm", tmp_path, 70.0)
    assert "at most 70 GB (10,269 pairs)" in plan and "each pair is seen 80.0 times" in plan


def test_a_disk_that_is_too_small_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with refused("1.00kB are free there, the run writes"):
        aligner_plan(TWIN, "mllm", tmp_path, 70.0)


def test_equal_images_are_encoded_once_and_some_winners_become_identity_samples():
    pairs, _ = read_pairs(TWIN.data.pairs, 24)
    losers = [pair.loser for pair in pairs]
    assert len(distinct(losers)[0]) == len({image.tobytes() for image in losers}) < 24
    encoder = load_encoder(TWIN, "mllm", 0)
    features = encoder(pairs)
    alone = torch.cat([encoder.tokenizer.tokens([image]) for image in losers])
    assert (features.loser[:24] - alone).abs().max() < 1e-5

    count = len(features) - 24
    assert 0 < count <= 24 * TWIN.data.identity_share + 1
    assert features.is_identity.tolist() == [False] * 24 + [True] * count
    assert torch.equal(features.loser[24:], features.winner[24:])
    for winner in features.winner[24:]:
        assert any(torch.equal(winner, loser) for loser in features.loser[:24]), "loses nowhere"
    other = encoder(pairs, chunk=1).guidance
    same = other.shape == features.guidance.shape and torch.equal(other, features.guidance)
    assert not same, "each chunk draws other questions"
    next(encoder.tokenizer.head.parameters()).data.flatten()[0] = torch.nan
    with refused("the loser features of chunk 0 are not finite; check the model"):
        encoder(pairs[:2])
