"""The training loop: resumable to the bit, and safe against bad numbers and signals."""

import copy
import dataclasses
import json

import pytest
import torch

import train as script
from img_minimal.checkpoint import load_checkpoint, save_checkpoint
from img_minimal.errors import UserError
from img_minimal.features import Features
from img_minimal.presets import find_preset
from img_minimal.training import Stop, Trainer, batch_indices

PRESET = dataclasses.replace(find_preset("tiny-sdxl"), train_steps=12, batch_size=8, depth=1, heads=1)


def some_features(count: int = 60) -> Features:
    generator = torch.Generator().manual_seed(1)
    loser = torch.randn(count, 4, 64, generator=generator)
    return Features(
        guidance=torch.randn(count, 7, 32, generator=generator).bfloat16(),
        mask=torch.arange(7)[None] < torch.randint(3, 8, (count, 1), generator=generator),
        loser=loser,
        winner=loser.flip(-1),
        validation=torch.arange(count) % 6 == 0,
        kept=torch.arange(count) >= count - 10,
    )


def fresh(data: Features, seed: int = 0) -> Trainer:
    return Trainer.new(PRESET, data, refresh_after=2, seed=seed)


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    data = some_features()
    whole = fresh(data)
    script.train(whole, data, PRESET, tmp_path, steps=12)

    first = fresh(data)
    script.train(first, data, PRESET, tmp_path, steps=5, save_every=5)
    torch.rand(100)  # the world goes on between the two processes
    second = fresh(data, seed=99)
    second.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pt"))
    assert second.step == 5
    script.train(second, data, PRESET, tmp_path, steps=12)

    assert whole.refresh.refreshes == second.refresh.refreshes > 0
    for one, other in ((whole.aligner, second.aligner), (whole.reference, second.reference)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    assert any((p != q).any() for p, q in zip(whole.aligner.parameters(), fresh(data).aligner.parameters()))


def test_training_lowers_the_error_on_what_it_trains_on(tmp_path):
    data = some_features()
    data.winner = data.loser + 1.0
    preset = dataclasses.replace(PRESET, train_steps=100, lr=1e-2)
    trainer = Trainer.new(preset, data, refresh_after=2, seed=0)
    script.train(trainer, data, preset, tmp_path, steps=100)
    errors = [json.loads(line)["error"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(errors) == 100
    assert sum(errors[-5:]) < 0.3 * sum(errors[:5])


def test_a_stop_signal_saves_a_checkpoint_and_ends_the_loop(tmp_path):
    data, stop = some_features(), Stop()
    trainer = fresh(data)
    stop.asked = True
    assert script.train(trainer, data, PRESET, tmp_path, steps=12, stop=stop) is False
    assert trainer.step == 1
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 1


def test_a_loss_that_is_not_finite_names_step_and_samples_and_keeps_the_last_checkpoint(tmp_path):
    data = some_features()
    trainer = fresh(data)
    script.train(trainer, data, PRESET, tmp_path, steps=3, save_every=3)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    broken = copy.deepcopy(data)
    broken.winner[:] = torch.nan
    with pytest.raises(UserError, match=r"step 3 is nan \(samples \["):
        script.train(trainer, broken, PRESET, tmp_path, steps=6)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["guidance", "loser", "winner"])
def test_a_nan_in_the_features_is_found_before_training_and_its_sample_named(name):
    data = some_features()
    getattr(data, name)[17, 0, 0] = torch.nan
    with pytest.raises(UserError, match=f"{name} features of sample 17"):
        data.check_finite()


def test_a_truncated_checkpoint_is_one_clear_line(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", {"step": 1, "weights": torch.zeros(1000)})
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut short") as caught:
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert "\n" not in str(caught.value)


def test_every_sample_is_seen_once_an_epoch_in_an_order_of_its_own():
    samples = torch.arange(100, 140)
    epochs = [torch.cat([batch_indices(8 * e + k, 5, samples, seed=0) for k in range(8)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == samples.tolist()
    assert epochs[0].tolist() != epochs[1].tolist()
    assert torch.equal(batch_indices(3, 5, samples, seed=0), epochs[0][15:20])


def test_the_reference_gets_no_gradient_and_validation_samples_are_not_trained_on(tmp_path):
    data = some_features()
    data.winner[data.validation] = torch.nan  # would stop the run if it were trained on
    trainer = fresh(data)
    script.train(trainer, data, PRESET, tmp_path, steps=12)
    assert all(p.grad is None for p in trainer.reference.parameters())
