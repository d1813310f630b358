"""Rounds: pairs that an aligner makes for itself, the mixture that it learns from, the gate that it has to pass."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_training import part, some_features

import train as script
from img_minimal.aligner import ImplicitAligner
from img_minimal.data.features import Batches, Features, Shards
from img_minimal.data.pairs import START, held_back, pair_stream
from img_minimal.rounds import Mixture, count, pair_rows, step_size
from img_minimal.evaluate.judges import ClipJudges, Oracle
from img_minimal.presets import find_preset
from img_minimal.rounds import RoundLog, Rounds, training_prompts
from img_minimal.run import RunFolder
from img_minimal.files import to_pil
from img_minimal.tiny.grammar import parse
from img_minimal.tiny.world import Shape, render

TWIN = find_preset("tiny-sdxl")


def picture(grey: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (grey, grey, grey))


def test_pairs_of_a_round_are_pick_a_pics_rows_with_who_drew_what_and_read_back_as_they_should(tmp_path):
    prompts, outcomes = ["a", "b", "c", "d"], ["img", "base", "both", "none"]
    rows = pair_rows(prompts, [picture(k) for k in range(4)], [picture(10 + k) for k in range(4)], outcomes, "img, 1")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    [chunk] = pair_stream(tmp_path / "pairs.parquet").chunks()
    grey = [(p.prompt, p.winner.getpixel((0, 0))[0], p.loser.getpixel((0, 0))[0]) for p in chunk.items]
    assert grey == [("a", 10, 0), ("b", 1, 11), ("c", 2, 2)]
    assert chunk.items[2].winner is chunk.items[2].loser
    assert [(row["model_0"], row["model_1"]) for row in rows] == [
        ("base", "img, 1"),
        ("base", "img, 1"),
        ("base", "base"),
    ]
    found = count(outcomes, ["two", "one", "one", "one"])
    assert found["pairs"] == 3 and found["wins_by_category"] == {"two": 1} and found["drawn"] == 4


def scene_of(colour: str, form: str) -> tuple[Shape]:
    return (Shape(colour, form, 32.0, 32.0, 10.0),)


def test_the_oracle_prefers_what_is_nearer_to_the_prompt_and_drops_what_is_wrong_alike():
    prompt = "a red circle"
    right, wrong = (to_pil(render([scene])) for scene in (scene_of("red", "circle"), scene_of("blue", "square")))
    half = to_pil(render([scene_of("red", "square")]))
    outcome = lambda base, img: Oracle().compare([prompt], base, img)[0]  # noqa: E731
    assert (outcome(wrong, right), outcome(right, wrong)) == ("img", "base")
    assert (outcome(right, right), outcome(wrong, wrong)) == ("both", "none")
    assert outcome(wrong, half) in ("img", "none") and outcome(half, right) == "img"
    measured = Oracle().measure([prompt] * 4, right * 2 + wrong * 2, right + wrong + right + wrong)
    assert measured == {"score": 0.5, "damage": 0.25}


def test_real_judges_have_to_agree_beyond_their_margins(monkeypatch):
    scores = {("pickscore", "base"): [20.0] * 4, ("pickscore", "img"): [21, 19, 21, 20.1],
              ("hpsv2", "base"): [28.0] * 4, ("hpsv2", "img"): [29, 27, 27, 29]}  # fmt: skip
    judge = ClipJudges()
    monkeypatch.setattr(judge, "_scores", lambda name, prompts, images: torch.tensor(scores[name, images]))
    assert judge.compare(["p"] * 4, "base", "img") == ["img", "base", "none", "none"]


class Original:
    """Data as a cache has it: one part."""

    def __init__(self, data: Features):
        self.data = Shards([data])

    def parts(self, place):
        yield part(self.data)


@pytest.mark.parametrize("replay, expected", [(0.5, 0.5), (0.8, 0.8), (0.0, 0.0)])
def test_at_least_the_replayed_share_of_a_mixture_is_original(replay, expected):
    old, new = some_features(60), [Shards([some_features(50, seed=k)]) for k in (2, 3)]
    mixture = Mixture(Original(old), new, replay, seed=1)
    [mixed], [again] = list(mixture.parts(START)), list(mixture.parts(START))
    assert torch.equal(mixed.samples, again.samples)
    own = mixed.samples < 60
    assert own.float().mean() >= expected - 0.01 and len(mixed.samples.unique()) == len(mixed.samples)
    if not replay:
        assert not own.any() and len(mixed.samples) == 100
    assert not old.validation[mixed.samples[own]].any()
    batch = next(iter(Batches(mixture.parts, 8, 0)))
    assert len(batch) == 8


def test_the_size_of_a_step_is_the_mean_distance_of_pairs_of_two_images():
    data = some_features(30)
    same = replace(data, winner=data.loser, is_identity=torch.zeros(30, dtype=torch.bool))
    assert step_size(same) == 0
    moved = replace(same, winner=data.loser + 1)
    assert step_size(moved) == pytest.approx((4 * 64) ** 0.5, rel=1e-4)


def test_only_prompts_that_are_trained_on_are_drawn_and_held_back_ones_guard_the_gate():
    trained, spared = (training_prompts(TWIN, 40, seed=0, validation=v) for v in (False, True))
    assert len(set(trained)) == 40 and not any(map(held_back, trained)) and all(map(held_back, spared))
    assert all(parse(p).split == "train" for p in trained)
    assert training_prompts(TWIN, 40, seed=0) == trained != training_prompts(TWIN, 40, seed=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short training with two later rounds, whose gate is told what to measure: better, then worse."""
    folder = tmp_path_factory.mktemp("rounds")
    measured = iter([{"score": 0.5, "damage": 0.02}, {"score": 0.6, "damage": 0.02}, {"score": 0.7, "damage": 0.03}])
    config = script.Config(
        rounds=3, round_prompts=24, round_steps=4, steps=6, max_pairs=60, batch_size=8, save_every=2, eval_prompts=0,
        dtype="fp32", output_dir=str(folder / "run"), cache_dir=str(folder / "cache"),
    )  # fmt: skip
    preset = script.chosen_preset(config)
    run_folder = RunFolder.open(config.output_dir, {}, False, False)
    patch = pytest.MonkeyPatch()
    patch.setattr(Rounds, "measure", lambda *_: next(measured))
    assert script.train_aligner(config, preset, run_folder)
    patch.undo()
    return folder / "run"


def test_a_round_that_breaks_more_does_not_count_and_the_aligner_before_it_stays(trained):
    rows = RoundLog(trained / "rounds" / "metrics.jsonl").rows
    assert [(row["round"], row["kept"]) for row in rows] == [(0, True), (1, True), (2, False)]
    final, first, second = (
        ImplicitAligner.from_file(trained / name / "aligner.safetensors").state_dict()
        for name in (".", "rounds/1", "rounds/2")
    )
    assert all(torch.equal(final[key], first[key]) for key in final)
    assert any(not torch.equal(final[key], second[key]) for key in final)
    assert (trained / "rounds.png").exists()


def test_the_rounds_of_an_overwritten_run_are_not_gone_on_with(tmp_path):
    (tmp_path / "rounds" / "1").mkdir(parents=True)
    (tmp_path / "rounds" / "metrics.jsonl").write_text('{"round": 0, "kept": true}\n')
    RunFolder.open(tmp_path, {}, False, True).begin(0)
    assert not (tmp_path / "rounds").exists()


def test_a_round_says_what_it_drew_and_how_far_its_pairs_go(trained):
    for row in RoundLog(trained / "rounds" / "metrics.jsonl").rows[1:]:
        assert row["drawn"] == 24 and row["pairs"] == row["img_better"] + row["base_better"] + row["both_right"]
        assert row["step_original"] > 0 and "validation_error" in row and "correction" in row
    table = pq.read_table(trained / "rounds" / "1" / "pairs.parquet").to_pylist()
    assert {row["model_1"] for row in table} <= {"base", "img, round 1"}
    assert len(list((trained / "rounds" / "base").glob("*.png"))) == 24, "the base draws once for all rounds"
    log = [json.loads(line) for line in (trained / "rounds" / "2" / "metrics.jsonl").open()]
    assert [row["step"] for row in log] == [1, 2, 3, 4]
