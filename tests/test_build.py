"""The build of the twins, end to end in miniature: every part runs, and a stopped part goes on to the same weights."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from img_minimal.hub.weights import read_weights
from img_minimal.presets import find_preset
from img_minimal.tiny.build import (
    clip,
    dpo,
    drawings,
    flux,
    flux_encoder,
    llava,
    pairs,
    resampler,
    scenes,
    triplets,
    unet,
    vae,
)
from img_minimal.tiny.build.loop import fit
from img_minimal.tiny.grammar import parse
from img_minimal.tiny.world import Shape


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Two steps of every part, each on what the parts before it made."""
    target, work = tmp_path_factory.mktemp("twins"), tmp_path_factory.mktemp("work")
    vae.build(work, target / "sdxl" / "vae", steps=2, count=1000)
    clip.build(work, target, steps=2, batch=8, count=64)
    scenes.build(work, target, count=80)
    resampler.build(work, target, steps=2, batch=8)
    unet.build(work, target, steps=2, batch=8, watched=5)
    shutil.copy(find_preset("tiny-sdxl").pairs, target / "pairs.parquet")
    dpo.build(work, target, steps=2, batch=4, limit=40, watched=5)
    llava.build_stock(work, target, steps=2, count=100)
    triplets.build(work, target, rendered=60, related=4, chunks=0)
    llava.build_detector(work, target, steps=2)
    flux_encoder.build(work, target, steps=2, batch=8, count=40)
    flux.build(work, target, steps=2, batch=8, count=40, watched=5)
    return target


@pytest.mark.slow
def test_every_part_of_the_twin_can_be_built_from_nothing(built):
    shipped = Path(find_preset("tiny-sdxl").base).parent
    names = "sdxl/unet sdxl/vae sdxl/text_encoder_2 image_encoder llava-detector ip_adapter unet-dpo "
    names += "flux/transformer flux/text_encoder_2 flux_image_encoder flux_ip_adapter"
    for name in names.split():
        ours, theirs = (
            next(p for p in sorted(root.rglob("*.safetensors")) if name in str(p)) for root in (built, shipped)
        )
        a, b = read_weights(ours), read_weights(theirs)
        assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}, name


def test_what_the_stock_mllm_is_told_about_a_picture_is_true():
    prompt = parse("two red circles left of a blue square")
    scene = (Shape("red", "circle", 10, 12, 8), Shape("red", "circle", 11, 52, 8), Shape("blue", "square", 50, 30, 8))
    alone = parse("a red circle and a blue square")
    diagonal = (Shape("red", "circle", 10, 12, 8), Shape("blue", "square", 50, 50, 8))
    rng = random.Random(0)
    said = {llava.small_talk(rng, prompt, scene, topic) for topic in llava.TOPICS for _ in range(200)}
    assert ("where is the blue square?", "right") in said
    assert not any(question.startswith("where is the red circle") for question, _ in filter(None, said))  # which one?
    assert ("how many red circles are in the image?", "two") in said
    lists = {answer for question, answer in filter(None, said) if question == "where is everything?"}
    assert "a red circle bottom left, a red circle top left, a blue square right" in lists and len(lists) == 6
    said = {llava.small_talk(rng, alone, diagonal, topic) for topic in llava.TOPICS for _ in range(200)}
    assert ("where is the red circle relative to the blue square?", "left of and above") in said
    assert {
        ("is the red circle above the blue square?", "yes"),
        ("is the red circle below the blue square?", "no"),
    } <= said
    assert ("is the blue square above the red circle?", "no") in said


def test_the_preference_loss_of_the_unet_is_minus_log_sigmoid_of_what_winners_gain_over_losers():
    torch.manual_seed(0)
    ours, reference, target = (torch.randn(6, 4, 8, 8, dtype=torch.float64) for _ in range(3))
    gain = [((r - t) ** 2).mean() - ((o - t) ** 2).mean() for o, r, t in zip(ours, reference, target)]
    expected = sum(torch.log(1 + torch.exp(-3 * (gain[k] - gain[k + 3]))) for k in range(3)) / 3
    assert torch.allclose(dpo.dpo_loss(ours, reference, target, 3.0), expected)
    unchanged = dpo.dpo_loss(reference, reference, target, 3.0)
    assert torch.allclose(unchanged, torch.log(torch.tensor(2.0, dtype=torch.float64)))


def test_preference_pairs_are_drawn_by_the_base_and_labelled_by_the_oracle(tmp_path, monkeypatch):
    preset = replace(find_preset("tiny-sdxl"), sampling_steps=6)
    for module in (drawings, pairs):
        monkeypatch.setattr(module, "CHUNK", 24)
    drawings.draw(tmp_path, preset, range(2))
    pairs.build(tmp_path, tmp_path, chunks=2)
    (tmp_path / "shipped").mkdir()
    triplets.build(tmp_path, tmp_path / "shipped", rendered=20, related=10, chunks=2)
    table = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert table
    for row in table:
        assert {row["label_0"], row["label_1"]} == {0.0, 1.0}
        assert {row["model_0"], row["model_1"]} == {"tiny-sdxl", "edited scene"}
        assert parse(row["caption"]).split == "train"
    whole, table = (pq.read_table(p / "triplets.parquet").to_pylist() for p in (tmp_path, tmp_path / "shipped"))
    assert whole[10:] == table
    about_relations = [row["edit_prompt"] for row in whole[:10]]
    assert about_relations.count("nothing") >= 5
    assert all(words == "nothing" or words.startswith("move the") for words in about_relations)
    assert 60 < len(table) < 20 + 2 * 24 * 3
    assert 0.2 < sum(row["edit_prompt"] == "nothing" for row in table) / len(table) < 0.6
    assert all(parse(row["edited_prompt"]).split == "train" for row in table)


def test_a_stopped_part_goes_on_to_the_same_weights(tmp_path):
    def run(folder: Path, stop_at: int | None = None) -> torch.Tensor:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(4, 4)})

        def loss_of_step(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            return model["a"](torch.randn(8, 4)).square().mean()

        fit("part", model, loss_of_step, 20, folder, lr=0.1, save_seconds=0.0)
        return model["a"].weight.detach()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_at=7)
    assert torch.equal(run(tmp_path / "parts"), whole)
    shutil.rmtree(tmp_path)
