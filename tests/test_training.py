"""An aligner learns from samples for training alone, and its training resumes to the bit."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from feature_sets import Data, interrupt, some_features
from refusals import assert_refused, refused

import train as script
from img_minimal.aligner import ImplicitAligner
from img_minimal.data.features import Batches, Part
from img_minimal.data.pairs import StreamPosition
from img_minimal.devices import Precision
from img_minimal.plots import read_rows
from img_minimal.presets import find_preset
from img_minimal.run import Run, load_checkpoint

SMALL = {
    "steps": 12,
    "batch_size": 8,
    "depth": 1,
    "heads": 1,
    "save_every": 100,
    "preference_weight": 1.0,
}
SETTINGS = dataclasses.replace(find_preset("tiny-sdxl").training, **SMALL)
FP32 = Precision.named("fp32", torch.device("cpu"))


def train(folder: Path, data: Data, stop: int = -1, **changed: object) -> ImplicitAligner:
    """Train in a folder, or go on there; a signal comes in step `stop`."""
    run = Run(folder, {}, resume=(folder / "checkpoint.pt").exists())
    interrupt(run, stop)
    settings = dataclasses.replace(SETTINGS, **changed)
    aligner = script.train(run, data, settings, FP32, refresh_after=2)
    run.lock.close()
    return aligner


@pytest.mark.parametrize("chunks", [1, 3])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, chunks):
    data = [some_features(60 // chunks, seed) for seed in range(chunks)]
    train(tmp_path / "whole", Data(*data))
    train(tmp_path / "parts", Data(*data), stop=4)
    assert load_checkpoint(tmp_path / "parts" / "checkpoint.pt")["step"] == 5
    torch.rand(100)  # another process would not have this one's random state either
    train(tmp_path / "parts", Data(*data))
    one, other = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert one["refresh"] == other["refresh"] and one["refresh"]["refreshes"] > 0
    for name in ("aligner", "reference"):
        for key, weight in one[name].items():
            assert torch.equal(weight, other[name][key]), key
    rows, resumed = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [row["loss"] for row in rows] == [row["loss"] for row in resumed] and len(rows) == 12


@pytest.mark.parametrize("norm", ["mean", "sum"])
def test_training_lowers_the_error_which_is_logged_as_a_mean_over_elements(tmp_path, norm):
    data = some_features()
    data.winner = data.loser + 1.0
    data.winner[data.validation] = torch.nan  # would stop the run if it were trained on
    train(tmp_path, Data(data), steps=100, lr=1e-2, norm=norm)
    errors = [row["error"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert errors[0] == pytest.approx(1.0) and len(errors) == 100
    assert sum(errors[-5:]) < 0.3 * sum(errors[:5])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", 0], "--steps is 0"),
        (["--lr", 0, "--stage", "mllm"], "--lr is 0"),
        (["--stage", "mllm", "--dtype", "fp16"], "choose bf16"),
        (["--pairs", "no.parquet"], "no.parquet: no such file or folder"),
        (["--mllm", "/no/such/mllm"], "/no/such/mllm"),
        (["--output-dir", "/proc/no"], "choose another place"),
        (["--resume"], "no checkpoint to resume from"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_any_work(tmp_path, call, flags, words):
    folder = tmp_path / "run"
    done = call("train.py", "--output-dir", folder, "--cache-dir", tmp_path / "cache", *flags)
    assert_refused(done, words)
    assert not (folder / "metrics.jsonl").exists()


def test_batches_go_through_chunks_in_order_and_through_every_sample_once_an_epoch():
    def parts(position: StreamPosition) -> Iterator[Part]:
        for k in range(position.chunk, 2):
            yield Part(torch.arange(16) + 100 * k, torch.arange(16), StreamPosition(chunk=k))

    source, orders = iter(Batches(parts, batch_size=8, seed=0)), []
    for chunk in (0, 1, 0, 1):
        samples = next(source).tolist() + next(source).tolist()
        orders.append([sample - 100 * chunk for sample in samples])
        assert sorted(orders[-1]) == list(range(16))
    assert len({tuple(order) for order in orders}) == 4


def test_data_without_a_sample_to_train_on_is_refused_instead_of_searched_forever(tmp_path):
    data = some_features()
    data.validation[:] = True
    with refused("nothing to train on"):
        train(tmp_path, Data(data))


def test_validation_measures_what_it_says_and_is_silent_without_samples():
    data = Data(some_features()).unseen
    untrained = ImplicitAligner(*data.widths, depth=1, heads=1)  # changes nothing
    errors = (data.winner - data.loser).square().flatten(1).mean(1)
    expected = errors[~data.is_identity].mean().item()
    assert script.validate(untrained, data) == {
        "validation_error": pytest.approx(expected),
        "identity_error": pytest.approx(expected),
        "nearer": 0,
        "identity_sample_error": pytest.approx(errors[data.is_identity].mean().item()),
    }
    assert script.validate(untrained, data[:0]) == {}
