"""Training from the command line: the plan, what is loaded, what is streamed, cached and encoded once."""

import dataclasses
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from pair_files import numbers, read_pairs, rows, write

import train as script
from img_minimal.bench.plan import aligner_plan
from img_minimal.data.features import (
    CachedData,
    StreamedData,
    compute_guidance,
    compute_tokens,
    distinct,
    identity_samples,
)
from img_minimal.data.pairs import Place
from img_minimal.load import load_encoder, load_training_data
from img_minimal.mllm import MLLM
from img_minimal.presets import find_preset
from img_minimal.cli import UserError

TWIN = find_preset("tiny-sdxl")
PRESET = dataclasses.replace(TWIN, train_steps=6, batch_size=4, depth=1, heads=1, identity_share=0.25)


def small_twin_pairs(folder: Path, count: int = 60) -> Path:
    path = folder / "some.parquet"
    pq.write_table(pq.read_table(TWIN.pairs).slice(0, count), path)
    return path


def call(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
    return script.main()


@pytest.mark.parametrize("cache", ["none", "cache"])
def test_training_prints_its_plan_first_and_loads_neither_unet_nor_vae(tmp_path, monkeypatch, capsys, cache):
    import diffusers

    def refuse(*_, **__):
        raise AssertionError("a diffusion model was loaded for training")

    for name in ("StableDiffusionXLPipeline", "UNet2DConditionModel", "AutoencoderKL"):
        monkeypatch.setattr(getattr(diffusers, name), "from_pretrained", refuse)
    load, said = MLLM.from_pretrained, []

    def watched(*args, **more) -> MLLM:
        said.append(capsys.readouterr().out)
        return load(*args, **more)

    monkeypatch.setattr(MLLM, "from_pretrained", watched)
    kept = cache if cache == "none" else tmp_path / cache
    run = ["--pairs", small_twin_pairs(tmp_path), "--steps", 3, "--eval-prompts", 0, "--cache-dir", kept]
    assert call(monkeypatch, *run, "--output-dir", tmp_path / "run") == 0
    [plan] = said
    for words in ("plan: an aligner for tiny-sdxl, 3 steps of 64", "MLLM", "1.93 M parameters", "nothing that draws",
                  "a sample: 41.1 KB guidance", "checkpoint.pt 13.5 MB"):  # fmt: skip
        assert words in plan
    assert ("streamed" in plan) == (cache == "none")
    assert (tmp_path / "run" / "aligner.safetensors").exists()
    if cache != "none":
        assert call(monkeypatch, *run, "--output-dir", tmp_path / "second") == 0
        assert len(said) == 1, "a complete cache needs no MLLM"
        assert numbers(tmp_path / "run") == numbers(tmp_path / "second")


def test_sdxl_trains_from_a_stream_with_nothing_but_flags_that_point_at_the_released_files(
    release, tmp_path, monkeypatch, capsys
):
    from mllm_folders import write_original_llava
    from release_folder import locations

    from img_minimal.aligner import ImplicitAligner

    write_original_llava(tmp_path / "llava")
    tables = [rows(12), rows(12, 12)]
    tables[0][3]["jpg_0"] = b"<html>"
    tables[1][5] |= {"label_0": 0.5, "label_1": 0.5}
    where = {name: locations(release)[name] for name in ("image_encoder", "ip_adapter", "resampler")}
    where |= {"mllm": tmp_path / "llava", "pairs": write(tmp_path / "pairs", *tables), "output-dir": tmp_path / "run"}
    flags = [f"--{name.replace('_', '-')}={path}" for name, path in where.items()]
    assert call(monkeypatch, "--model=sdxl", "--steps=4", "--batch-size=4", "--save-every=2", *flags) == 0
    said = capsys.readouterr()
    assert "streamed" in said.out and "nothing that draws" in said.out
    assert "1 ties" in said.out and "1 with damaged images" in said.out and "skipped 1 rows" in said.err
    made = ImplicitAligner.from_file(tmp_path / "run" / "aligner.safetensors")
    assert (made.width, made.guidance_width, len(made.layers)) == (64, 48, 4)
    assert [row["step"] for row in numbers(tmp_path / "run")] == [1, 2, 3, 4]
    assert call(monkeypatch, "--model=sdxl", "--steps=6", "--batch-size=4", "--save-every=2", *flags, "--resume") == 0
    assert len(numbers(tmp_path / "run")) == 6


def test_the_plan_of_the_real_models_says_what_they_take(tmp_path):
    llama = {"model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
             "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32064}  # fmt: skip
    tower = {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
             "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}  # fmt: skip
    vit_h = {"model_type": "clip_vision_model", "hidden_size": 1280, "image_size": 224, "intermediate_size": 5120,
             "num_attention_heads": 16, "num_hidden_layers": 32, "patch_size": 14, "projection_dim": 1024}  # fmt: skip
    mllm = {"model_type": "llava", "text_config": llama, "vision_config": tower, "image_token_index": 32000}
    for name, settings in {"mllm": mllm, "encoder": vit_h}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    preset = dataclasses.replace(
        find_preset("sdxl"), mllm=str(tmp_path / "mllm"), image_encoder=str(tmp_path / "encoder"), dtype="bf16"
    )
    plan = aligner_plan(preset, "mllm", tmp_path, 70.0)
    for words in ("13.4 B parameters   26.7 GB", "632 M parameters", "195 M parameters    3.9 GB", "100,000 steps of 8",
                  "6.55 MB guidance (about 640 x 5120, bf16) + 262 KB tokens", "all pairs of data-is-better-together/",
                  "streamed", "none on disk", "checkpoint.pt 3.12 GB, aligner.safetensors 780 MB"):  # fmt: skip
        assert words in plan, plan
    kept = dataclasses.replace(preset, cache_dir=str(tmp_path), max_pairs=10_000)
    assert "at most 70 GB (10,269 pairs)" in aligner_plan(kept, "mllm", tmp_path, 70.0)


def test_a_disk_that_is_too_small_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch):
    import shutil

    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="1 KB are free there, the run writes"):
        aligner_plan(TWIN, "mllm", tmp_path, 70.0)


def test_the_papers_run_is_what_sdxl_means_by_default():
    preset = find_preset("sdxl")
    assert (preset.train_steps, preset.batch_size, preset.lr, preset.weight_decay) == (100_000, 8, 1e-4, 1e-4)
    assert (preset.preference_weight, preset.constant_share, preset.identity_share) == (1.0, 1.0, 0.0)
    assert script.Config().refresh_after == 10
    assert "open-image-preferences" in preset.pairs and preset.max_pairs == 0 and preset.cache_dir == "none"


def test_encoding_each_image_once_gives_the_numbers_of_encoding_every_one(monkeypatch):
    pairs, _ = read_pairs(TWIN.pairs, 24)

    encoder = load_encoder(TWIN, "mllm", 0)
    features = encoder(pairs)
    assert len(distinct([p.loser for p in pairs])[0]) < len(pairs), "the twin's pairs share images"
    alone = torch.cat([encoder.tokenizer.tokens([p.loser]) for p in pairs])
    assert (features.loser[: len(pairs)] - alone).abs().max() < 1e-5
    kept = identity_samples(pairs, TWIN.identity_share)
    assert 0 < len(kept) <= 24 * TWIN.identity_share + 1
    assert len(features) == 24 + len(kept) and features.is_identity.sum() == len(kept)
    assert torch.equal(features.loser[24:], features.winner[24:])
    assert all(any(p.winner is other.loser for other in pairs) for p in kept), "kept winners lose elsewhere"
    assert encoder.widths == (features.loser.shape[-1], features.guidance.shape[-1])
    other = compute_guidance(pairs, encoder.guide, kept, range(1, 1 + len(features)))["guidance"]
    assert other.shape != features.guidance.shape or not torch.equal(other, features.guidance), "other questions"
    assert compute_tokens(pairs, encoder.tokenizer, identity_samples(pairs, 0.0))["is_identity"].sum() == 0


def test_data_is_streamed_or_cached_as_the_preset_says(tmp_path, monkeypatch):
    source = small_twin_pairs(tmp_path, 12)
    preset = dataclasses.replace(PRESET, pairs=str(source), cache_dir="none", max_pairs=0)
    streamed = load_training_data(preset, "mllm", 0, 1.0)
    kept = load_training_data(dataclasses.replace(preset, cache_dir=str(tmp_path / "cache")), "mllm", 0, 1.0)
    assert isinstance(streamed, StreamedData) and isinstance(kept, CachedData)
    assert streamed.widths == kept.widths == (128, 160)
    [a], [b] = streamed.parts(Place()), kept.parts(Place())
    index = torch.arange(len(a.data))
    for x, y in zip(a.data[index].state_dict().values(), b.data[index].state_dict().values(), strict=True):
        assert torch.equal(x, y)
