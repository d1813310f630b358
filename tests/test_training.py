"""The training loop: resumable to the bit from a set or a stream, and safe against bad numbers and signals."""

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import train as script
from img_minimal.data.features import Batches, Features, Part, batch_indices
from img_minimal.data.pairs import Place
from img_minimal.presets import find_preset
from img_minimal.run import load_checkpoint
from img_minimal.cli import UserError
from img_minimal.run import Stop, Trainer, validate

PRESET = dataclasses.replace(find_preset("tiny-sdxl"), train_steps=12, batch_size=8, depth=1, heads=1)


def some_features(count: int = 60, seed: int = 1) -> Features:
    generator = torch.Generator().manual_seed(seed)
    loser = torch.randn(count, 4, 64, generator=generator)
    return Features(
        guidance=torch.randn(count, 7, 32, generator=generator).bfloat16(),
        mask=torch.arange(7)[None] < torch.randint(3, 8, (count, 1), generator=generator),
        loser=loser,
        winner=loser.flip(-1),
        validation=torch.arange(count) % 6 == 0,
        is_identity=torch.arange(count) >= count - 10,
    )


def part(data: Features, chunk: int = 0) -> Part:
    return Part(data, (~data.validation).nonzero().flatten(), Place(chunk=chunk))


def batches(*chunks: Features, seed: int = 0) -> Batches:
    def parts(place: Place) -> Iterator[Part]:
        yield from (part(data, k) for k, data in enumerate(chunks) if k >= place.chunk)

    return Batches(parts, PRESET.batch_size, seed)


def unseen(data: Features) -> Features:
    return data[data.validation]


def fresh(seed: int = 0) -> Trainer:
    return Trainer.new(PRESET, (64, 32), refresh_after=2, seed=seed)


def run(trainer: Trainer, data: Features, folder: Path, steps: int, source: Batches | None = None, **more) -> bool:
    return script.train(trainer, source or batches(data), unseen(data), PRESET, folder, steps=steps, **more)


def assert_equal_weights(one: Trainer, other: Trainer) -> None:
    for a, b in ((one.aligner, other.aligner), (one.reference, other.reference)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("chunks", [1, 3])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, chunks):
    data = [some_features(60 // chunks, seed) for seed in range(chunks)]
    whole = fresh()
    run(whole, data[0], tmp_path, 12, batches(*data))

    first = fresh()
    run(first, data[0], tmp_path, 5, batches(*data), save_every=5)
    torch.rand(100)  # the world goes on between the two processes
    second, saved, source = fresh(seed=99), load_checkpoint(tmp_path / "checkpoint.pt"), batches(*data)
    second.load_state_dict(saved)
    source.resume(saved["data"])
    assert second.step == 5
    run(second, data[0], tmp_path, 12, source)

    assert whole.refresh.refreshes == second.refresh.refreshes > 0
    assert_equal_weights(whole, second)
    assert any((p != q).any() for p, q in zip(whole.aligner.parameters(), fresh().aligner.parameters()))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "-1"], "--lr is -1"),
        (["--lr", "0", "--stage", "mllm"], "--lr is 0"),
        (["--preference-weight", "-1"], "--preference-weight"),
        (["--max-pairs", "-1"], "--max-pairs"),
        (["--cache-gb", "0"], "--cache-dir none"),
        (["--stage", "mllm", "--dtype", "fp16"], "choose bf16"),
        (["--pairs", "no.parquet"], "no.parquet: no such file or folder"),
        (["--mllm", "/no/such/mllm"], "/no/such/mllm"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_any_work(tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(sys, "argv", ["train.py", "--output-dir", str(tmp_path), "--cache-dir", str(tmp_path), *flags])
    with pytest.raises(UserError) as caught:
        script.main()
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_training_lowers_the_error_on_what_it_trains_on(tmp_path):
    data = some_features()
    data.winner = data.loser + 1.0
    preset = dataclasses.replace(PRESET, train_steps=100, lr=1e-2)
    trainer = Trainer.new(preset, (64, 32), refresh_after=2, seed=0)
    script.train(trainer, batches(data), unseen(data), preset, tmp_path, steps=100)
    errors = [json.loads(line)["error"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(errors) == 100
    assert sum(errors[-5:]) < 0.3 * sum(errors[:5])


def test_a_stop_signal_saves_a_checkpoint_and_ends_the_loop(tmp_path):
    stop, trainer = Stop(), fresh()
    stop.asked = True
    assert run(trainer, some_features(), tmp_path, 12, stop=stop) is False
    assert trainer.step == 1
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 1


def test_a_loss_that_is_not_finite_names_step_and_samples_and_keeps_the_last_checkpoint(tmp_path):
    data, trainer = some_features(), fresh()
    run(trainer, data, tmp_path, 3, save_every=3)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    broken = copy.deepcopy(data)
    broken.winner[:] = torch.nan
    with pytest.raises(UserError, match=r"step 3 is nan \(samples \["):
        run(trainer, broken, tmp_path, 6)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["guidance", "loser", "winner"])
def test_a_nan_in_the_features_is_found_before_training_and_its_sample_named(name):
    data = some_features()
    getattr(data, name)[17, 0, 0] = torch.nan
    with pytest.raises(UserError, match=f"{name} features of sample 17"):
        data.check_finite()


def test_every_sample_is_seen_once_an_epoch_in_an_order_of_its_own():
    samples = torch.arange(100, 140)
    epochs = [torch.cat([batch_indices(8 * e + k, 5, samples, seed=0) for k in range(8)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == samples.tolist()
    assert epochs[0].tolist() != epochs[1].tolist()
    assert torch.equal(batch_indices(3, 5, samples, seed=0), epochs[0][15:20])


def test_batches_go_through_the_chunks_in_order_and_through_each_chunk_in_an_order_of_its_own():
    def parts(place: Place) -> Iterator[Part]:
        yield from (Part(torch.arange(16) + 100 * k, torch.arange(16), Place(chunk=k)) for k in range(place.chunk, 2))

    source = iter(Batches(parts, batch_size=8, seed=0))
    seen = [next(source).tolist() for _ in range(8)]
    assert [batch[0] // 100 for batch in seen] == [0, 0, 1, 1, 0, 0, 1, 1]
    orders = [[i % 100 for i in seen[k] + seen[k + 1]] for k in range(0, 8, 2)]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_data_without_a_sample_to_train_on_is_refused_instead_of_searched_forever():
    data = some_features()
    data.validation[:] = True
    with pytest.raises(UserError, match="nothing to train on"):
        next(iter(batches(data)))


def test_the_reference_gets_no_gradient_and_validation_samples_are_not_trained_on(tmp_path):
    data = some_features()
    data.winner[data.validation] = torch.nan  # would stop the run if it were trained on
    trainer = fresh()
    run(trainer, data, tmp_path, 12)
    assert all(p.grad is None for p in trainer.reference.parameters())


def test_validation_measures_what_it_says_and_is_silent_without_samples():
    data, trainer = some_features(), fresh()  # an untrained aligner changes nothing
    found = validate(trainer, unseen(data))
    wrong = unseen(data)[~unseen(data).is_identity]
    expected = (wrong.winner - wrong.loser).square().mean().item()
    assert found["validation_error"] == pytest.approx(expected) == pytest.approx(found["identity_error"])
    assert found["nearer"] == 0 and found["identity_sample_error"] == pytest.approx(
        (unseen(data).winner - unseen(data).loser)[unseen(data).is_identity].square().mean().item()
    )
    assert validate(trainer, data[torch.zeros(0, dtype=torch.long)]) == {}


TRUE_SIZE = """
import resource, sys, torch
import train as script
from dataclasses import replace
from pathlib import Path
from train import Batches, Features, Trainer, train
from img_minimal.presets import find_preset
from img_minimal.data.features import Part
script.save_checkpoint = lambda path, state: None  # gigabytes that nobody reads
preset = replace(find_preset(sys.argv[2]), batch_size=2, dtype="fp32")
count, width = map(int, sys.argv[3:])
h, tokens = torch.randn(2, 64, 5120).bfloat16(), torch.randn(2, count, width)
no = torch.zeros(2, dtype=torch.bool)
data = Features(h, ~torch.zeros(2, 64, dtype=torch.bool), tokens, tokens.flip(1), no, no)
trainer = Trainer.new(preset, (width, 5120), refresh_after=1, seed=0)
batches = Batches(lambda place: iter([Part(data, torch.arange(2))]), 2, 0)
before = trainer.aligner.zero_linear.weight.clone()
train(trainer, batches, data[no], preset, Path(sys.argv[1]), steps=3, save_every=1000)
assert (trainer.aligner.zero_linear.weight != before).any()
print(sum(p.numel() for p in trainer.aligner.parameters()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "shape", "millions", "gib"), [("sdxl", (16, 2048), 195.1, 6), ("flux", (4, 4096), 675.4, 16)]
)
def test_an_aligner_of_true_size_trains_three_steps_on_this_machine(tmp_path, capsys, model, shape, millions, gib):
    """In a process of its own, so that the peak is its own; a parameter takes 20 bytes."""
    command = [sys.executable, "-c", TRUE_SIZE, str(tmp_path), model, *map(str, shape)]
    result = subprocess.run(command, cwd=Path(script.__file__).parent, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    parameters, peak = map(int, result.stdout.split()[-2:])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    with capsys.disabled():
        print(f"\n{model}: {parameters / 1e6:.1f} M parameters, 3 steps, peak memory {peak / 2**20:.2f} GiB")
    assert round(parameters / 1e6, 1) == millions
    assert peak < gib * 2**20
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[2]["error"] < rows[0]["error"]
