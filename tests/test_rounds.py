"""Rounds: an aligner makes pairs, learns from a mixture of them, and has to pass a gate."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_sets import Data, some_features
from pair_files import rows, write
from PIL import Image

import train as script
from img_minimal.aligner import ImplicitAligner
from img_minimal.data import tables
from img_minimal.data.features import Part, Shards
from img_minimal.data.pairs import START, StreamPosition, held_back, pair_stream
from img_minimal.evaluate.judges import OUTCOMES, RoundJudge
from img_minimal.files import to_pil
from img_minimal.plots import read_rows
from img_minimal.presets import find_preset
from img_minimal.rounds import (
    Mixture,
    PairMaker,
    pair_rows,
    step_size,
    training_prompts,
    write_lines,
)
from img_minimal.run import Ranks
from img_minimal.tiny.grammar import parse
from img_minimal.tiny.world import Shape, render

TWIN = find_preset("tiny-sdxl")


def greys(first: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (first + k,) * 3) for k in range(4)]


def test_pairs_of_a_round_are_pick_a_pics_rows_that_name_files_of_images(tmp_path):
    for folder, first in (("base", 0), ("1", 10)):
        (tmp_path / folder).mkdir()
        for k, image in enumerate(greys(first)):
            image.save(tmp_path / folder / f"{k}.png")
    rows = pair_rows(["a", "b", "c", "d"], 0, [*OUTCOMES, "none"], 1)
    write_lines(tmp_path / "1.jsonl", rows)
    [chunk] = pair_stream(tmp_path / "1.jsonl").chunks()
    found = []
    for pair in chunk.items:
        values = [image.getpixel((0, 0))[0] for image in (pair.winner, pair.loser)]
        found.append((pair.prompt, *values))
    assert found == [("a", 10, 0), ("b", 1, 11), ("c", 2, 2)]


def test_the_oracle_prefers_the_image_nearer_to_the_prompt_and_drops_what_is_wrong_alike():
    def picture(colour: str, form: str) -> list[Image.Image]:
        return to_pil(render([(Shape(colour, form, 32.0, 32.0, 10.0),)]))

    right, half, wrong = (
        picture("red", "circle"),
        picture("red", "square"),
        picture("blue", "cross"),
    )
    cases = [(wrong, right), (right, wrong), (half, right), (right, right), (wrong, wrong)]
    judge = RoundJudge("tiny")
    outcomes = [judge.compare(["a red circle"], *images)[0] for images in cases]
    assert outcomes == ["img_better", "base_better", "img_better", "both_right", "none"]
    base, img = right * 2 + wrong * 2, right + wrong + right + wrong
    measured = judge.measure(["a red circle"] * 4, base, img)
    assert measured == {"score": 0.5, "damage": 0.25}


def test_real_judges_have_to_agree_beyond_their_margins(monkeypatch):
    scores = {
        ("pickscore", "base"): [20.0] * 4,
        ("pickscore", "img"): [21, 19, 21, 20.1],
        ("hpsv2", "base"): [28.0] * 4,
        ("hpsv2", "img"): [29, 27, 27, 29],
    }
    judge = RoundJudge(None)
    monkeypatch.setattr(judge, "scores", lambda name, _, images: np.array(scores[name, images]))
    assert judge.compare(["p"] * 4, "base", "img") == ["img_better", "base_better", "none", "none"]


class Original(Data):
    """Data as a cache has it: one part."""

    def parts(self, position: StreamPosition) -> Iterator[Part]:
        for part in super().parts(position):
            yield replace(part, data=Shards([part.data]))


@pytest.mark.parametrize("replay", [0.5, 0.8, 0.0])
def test_at_least_the_replayed_share_of_a_mixture_is_original(replay):
    old, new = some_features(60), [some_features(50, seed=k) for k in (2, 3)]
    mixture = Mixture(Original(old), new, replay, seed=1)
    [mixed], [again] = mixture.parts(START), mixture.parts(START)
    assert torch.equal(mixed.samples, again.samples)
    assert len(mixed.samples.unique()) == len(mixed.samples)
    original = mixed.samples[mixed.samples < 60]
    assert len(original) / len(mixed.samples) >= replay - 0.01
    assert not old.validation[original].any()
    assert replay or len(mixed.samples) == 100 and not len(original)
    assert len(next(iter(mixture.batches(8, 0, Ranks())))) == 8


def test_the_size_of_a_step_is_the_mean_distance_of_pairs_of_two_images():
    data = some_features(30)
    same = replace(data, winner=data.loser, is_identity=torch.zeros(30, dtype=torch.bool))
    assert step_size(same) == 0
    assert step_size(replace(same, winner=data.loser + 1)) == pytest.approx(16, rel=1e-4)


def test_only_prompts_that_are_trained_on_are_drawn_and_held_back_ones_guard_the_gate():
    trained = training_prompts(TWIN.data, 40, seed=0)
    assert trained != training_prompts(TWIN.data, 40, seed=1) and len(set(trained)) == 40
    assert not any(map(held_back, trained)) and {parse(p).split for p in trained} == {"train"}
    spared = training_prompts(TWIN.data, 40, seed=0, validation=True)
    assert all(map(held_back, spared))


@pytest.mark.parametrize("validation, expected", [(False, 30), (True, 250)])
def test_prompts_of_a_table_are_read_until_there_are_enough(
    tmp_path, monkeypatch, validation, expected
):
    data = replace(TWIN.data, pairs=str(write(tmp_path, *(rows(100, 100 * k) for k in range(5)))))
    read, count = tables.READERS[".parquet"], Counter()

    def counted(*arguments: object) -> Iterator[dict]:
        for row in read(*arguments):
            count["rows"] += 1
            yield row

    monkeypatch.setitem(tables.READERS, ".parquet", counted)
    assert len(training_prompts(data, 5, seed=0, validation=validation)) == 5
    assert count["rows"] < expected, "a random choice of 4 times as many"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Train two later rounds whose gate is told what to measure: better, then worse."""
    folder = tmp_path_factory.mktemp("rounds")
    measured = [(0.5, 0.02), (0.6, 0.02), (0.7, 0.03)]
    changes = {"steps": 6, "batch_size": 8, "save_every": 2, "round_prompts": 12, "round_steps": 4}
    changes |= {"max_pairs": 60, "dtype": "fp32", "cache_dir": str(folder / "cache")}
    config = script.Config(rounds=3, eval_prompts=0, output_dir=str(folder / "run"))
    with pytest.MonkeyPatch.context() as patch:
        given = iter(dict(zip(("score", "damage"), values)) for values in measured)
        patch.setattr(PairMaker, "measure", lambda *_: next(given))
        assert not script.start(config, script.chosen_preset(config, changes)).stopped
    return folder / "run"


def test_a_round_that_breaks_more_is_rejected_and_the_aligner_before_it_stays(trained):
    rows = read_rows(trained / "rounds" / "metrics.jsonl")
    assert [(row["round"], row["kept"]) for row in rows] == [(0, True), (1, True), (2, False)]
    final, first, second = (
        ImplicitAligner.from_file(trained / name / "aligner.safetensors").proj_out.weight
        for name in (".", "rounds/1", "rounds/2")
    )
    assert torch.equal(final, first) and not torch.equal(final, second)
    assert (trained / "rounds.png").exists()


def test_a_round_says_what_it_drew_and_how_far_its_pairs_go(trained):
    for row in read_rows(trained / "rounds" / "metrics.jsonl")[1:]:
        counts = row["img_better"] + row["base_better"] + row["both_right"]
        assert row["drawn"] == 12 and row["pairs"] == counts
        assert row["step_original"] > 0 and "validation_error" in row and "correction" in row
    drawn = list((trained / "rounds" / "pairs" / "base").glob("*.png"))
    assert len(drawn) == 12, "the base draws once for all rounds"
