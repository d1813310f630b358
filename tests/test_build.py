"""Every part of the twins' build runs, and what it teaches is true."""

import os
import random
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from img_minimal.hub.weights import read_weights
from img_minimal.presets import TWINS, find_preset
from img_minimal.tiny.build import encoders, fit, flux, image_tokens, llava, sdxl, tables
from img_minimal.tiny.grammar import parse
from img_minimal.tiny.world import Shape

BUILT = (
    *("sdxl/unet", "sdxl/vae", "sdxl/text_encoder_2", "image_encoder", "llava-detector"),
    *("ip_adapter", "unet-dpo", "flux/transformer", "flux/text_encoder_2"),
    *("flux_image_encoder", "flux_ip_adapter"),
)


@pytest.mark.slow
def test_every_part_of_the_twins_can_be_built_from_nothing(tmp_path):
    target, work = tmp_path / "twins", tmp_path / "work"
    target.mkdir()
    work.mkdir()
    encoders.build_vae(work, target, steps=2, count=1000)
    encoders.build_clip(work, target, steps=2, batch_size=8, count=64)
    sdxl.build_scenes(work, target, count=80)
    image_tokens.build_resampler(work, target, steps=2, batch_size=8)
    sdxl.build_unet(work, target, steps=2, batch_size=8, watched=5)
    pairs = pq.read_table(find_preset("tiny-sdxl").data.pairs).slice(0, 40)
    pq.write_table(pairs, target / "pairs.parquet")
    sdxl.build_dpo(work, target, steps=2, batch_size=4, watched=5)
    llava.build_stock(work, target, steps=2, count=100)
    tables.build_triplets(work, target, rendered=60, related=4, chunks=0)
    llava.build_detector(work, target, steps=2)
    image_tokens.build_flux_encoder(work, target, steps=2, batch_size=8, count=40)
    flux.build_flux(work, target, steps=2, batch_size=8, count=40, watched=5)
    for name in BUILT:
        shapes = []
        for root in (target, TWINS):
            file = next(p for p in sorted(root.rglob("*.safetensors")) if name in str(p))
            shapes.append({key: value.shape for key, value in read_weights(file).items()})
        assert shapes[0] == shapes[1], name


def questions_about(caption: str, scene: tuple[Shape, ...]) -> set[tuple[str, str]]:
    rng, prompt = random.Random(0), parse(caption)
    turns = set()
    for topic in llava.TOPICS:
        turns |= {llava.ask_about(rng, prompt, scene, topic) for _ in range(200)}
    return turns - {None}


def test_the_stock_mllm_is_told_the_truth_about_groups():
    red, blue = ("red", "circle"), ("blue", "square")
    scene = Shape(*red, 10, 12, 8), Shape(*red, 11, 52, 8), Shape(*blue, 50, 30, 8)
    turns = questions_about("two red circles left of a blue square", scene)
    everything = "a red circle bottom left, a red circle top left, a blue square right"
    assert turns >= {
        ("where is the blue square?", "right"),
        ("how many red circles are in the image?", "two"),
        ("where is everything?", everything),
    }
    # Nobody could say which one is meant.
    assert not any(question.startswith("where is the red circle") for question, _ in turns)


def test_the_stock_mllm_is_told_the_truth_about_relations():
    scene = Shape("red", "circle", 10, 12, 8), Shape("blue", "square", 50, 50, 8)
    assert questions_about("a red circle and a blue square", scene) >= {
        ("where is the red circle relative to the blue square?", "left of and above"),
        ("is the red circle above the blue square?", "yes"),
        ("is the red circle below the blue square?", "no"),
        ("is the blue square above the red circle?", "no"),
    }


def test_the_dpo_loss_is_minus_log_sigmoid_of_winners_gains_over_losers():
    torch.manual_seed(0)
    ours, reference, target = torch.randn(3, 6, 4, 8, 8, dtype=torch.float64)
    gain = ((reference - target) ** 2).mean((1, 2, 3)) - ((ours - target) ** 2).mean((1, 2, 3))
    expected = torch.log(1 + torch.exp(-3 * (gain[:3] - gain[3:]))).mean()
    assert torch.allclose(sdxl.dpo_loss(ours, reference, target, 3.0), expected)


def test_pairs_and_triplets_are_drawn_by_the_base_and_labelled_by_the_oracle(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK", 24)
    tables.build_drawings(tmp_path, TWINS, chunks=2)
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    tables.build_pairs(tmp_path, shipped, chunks=2)
    tables.build_triplets(tmp_path, shipped, rendered=20, related=10, chunks=2)

    pairs = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert len(pairs) > 48
    for row in pairs:
        assert {row["label_0"], row["label_1"]} == {0.0, 1.0}
        assert {row["model_0"], row["model_1"]} == {"tiny-sdxl", "edited scene"}
        assert parse(row["caption"]).split == "train"

    everything = pq.read_table(tmp_path / "triplets.parquet").to_pylist()
    triplets = pq.read_table(shipped / "triplets.parquet").to_pylist()
    assert everything[10:] == triplets
    assert {parse(row["edited_prompt"]).split for row in triplets} == {"train"}
    instructions = [row["edit_prompt"].split()[0] for row in everything]
    assert 0.2 < instructions.count("nothing") / len(instructions) < 0.6
    assert set(instructions[:10]) <= {"nothing", "move"}  # about relations


def test_a_stopped_part_resumes_to_the_same_weights(tmp_path):
    def train(folder: Path, stop_at: int | None = None) -> Tensor:
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(4, 4)})

        def loss_of_step(step: int) -> Tensor:
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            return model["a"](torch.randn(8, 4)).square().mean()

        def measure() -> dict[str, float]:
            return {"random": torch.rand(1).item()}

        fit.fit(folder, model, loss_of_step, 20, lr=0.1, measure=measure)
        return model["a"].weight.detach()

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stop_at=7)
    assert torch.equal(train(tmp_path / "stopped"), whole)
