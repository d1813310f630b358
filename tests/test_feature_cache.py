"""What an aligner is trained on: chunks of a stream, or features that are kept in a cache of bounded size."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from pair_files import number, numbers, read_pairs, rows, write
from PIL import Image

import train as script
from img_minimal.data.features import Batches, CachedData, FeatureCache, Features, StreamedData, cache_key
from img_minimal.data.pairs import Pair, Place, pair_stream
from img_minimal.presets import find_preset
from img_minimal.cli import UserError
from img_minimal.run import Trainer

TWIN = find_preset("tiny-sdxl")
PRESET = dataclasses.replace(TWIN, train_steps=6, batch_size=4, depth=1, heads=1, identity_share=0.25)


class FakeEncoder:
    """Features that tell which image, which prompt and which chunk they are of."""

    widths = (6, 5)

    def __init__(self):
        self.seen: list[str] = []

    def __call__(self, pairs: list[Pair], chunk: int = 0) -> Features:
        self.seen += [p.prompt for p in pairs]

        def tokens(images: list[Image.Image]) -> torch.Tensor:
            return torch.stack([torch.full((3, 6), number(i) / 255) for i in images])

        length = 4 + chunk % 2  # chunks pad to their own longest
        guidance = torch.stack([torch.full((length, 5), float(p.prompt.split()[1]) / 100) for p in pairs])
        return Features(
            guidance.bfloat16(), torch.ones(len(pairs), length, dtype=torch.bool), tokens([p.loser for p in pairs]),
            tokens([p.winner for p in pairs]), torch.tensor([p.validation for p in pairs]),
            torch.zeros(len(pairs), dtype=torch.bool),
        )  # fmt: skip


def cached(folder: Path, source: Path, size: int = 0, limit: float = 1e9, encoder=None, **made) -> CachedData:
    kept = FeatureCache(folder / "features", {"the MLLM": "a", "seed": "0"} | made, limit)
    return CachedData(pair_stream(source, size), lambda: encoder or FakeEncoder(), kept)


def trained(data: CachedData | StreamedData, folder: Path, steps: int = 6, resume: bool = False) -> Trainer:
    folder.mkdir(exist_ok=True)
    trainer, batches = Trainer.new(PRESET, data.widths, 2, 0), Batches(data.parts, PRESET.batch_size, 0)
    if resume:
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        trainer.load_state_dict(saved)
        batches.resume(saved["data"])
    script.train(trainer, batches, data.unseen, PRESET, folder, steps=steps)
    return trainer


def test_training_from_a_stream_gives_the_numbers_of_training_from_a_cache_on_the_same_pairs(tmp_path):
    source = write(tmp_path / "pairs", rows(20), rows(20, 20))
    trained(cached(tmp_path / "cache", source), tmp_path / "a", steps=20)
    trained(StreamedData(pair_stream(source), FakeEncoder()), tmp_path / "b", steps=20)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert len(numbers(tmp_path / "a")) == 20  # more than two epochs


def test_a_streamed_run_that_stopped_goes_on_to_the_same_weights_bit_for_bit(tmp_path):
    source = write(tmp_path / "pairs", *(rows(15, 15 * k) for k in range(3)))

    def stream() -> StreamedData:
        return StreamedData(pair_stream(source, size=12, seed=2), FakeEncoder())

    whole = trained(stream(), tmp_path / "a", steps=15)
    for stop in (1, 4, 8, 15):  # within the first chunk, at later ones, in the second epoch
        trained(stream(), tmp_path / f"b{stop}", steps=stop)
        again = trained(stream(), tmp_path / f"b{stop}", steps=15, resume=True)
        assert all(torch.equal(p, q) for p, q in zip(whole.aligner.parameters(), again.aligner.parameters()))
        assert numbers(tmp_path / "a")[stop:] == [r for r in numbers(tmp_path / f"b{stop}") if r["step"] > stop]


def test_only_the_first_chunk_of_a_stream_spends_the_mllm_on_validation_prompts(tmp_path):
    source, encoder = write(tmp_path, rows(60)), FakeEncoder()
    data = StreamedData(pair_stream(source, size=30), encoder)
    seen = list(data.parts(Place()))
    held = {p.prompt for p in read_pairs(source)[0] if p.validation}
    first = {f"prompt {k}" for k in range(30)}
    assert held - first and held & first, "or this test shows nothing"
    assert set(encoder.seen) == first | {f"prompt {k}" for k in range(30, 60)} - held
    assert len(encoder.seen) == len(set(encoder.seen)), "the first chunk was encoded once"
    assert len(data.unseen) == len(held & first) and sum(len(p.samples) for p in seen) == 60 - len(held)


def test_a_source_without_a_single_preference_is_one_clear_line(tmp_path):
    table = [row | {"label_0": 0.5, "label_1": 0.5} for row in rows(5)]
    source = write(tmp_path / "pairs", table)
    with pytest.raises(UserError, match="no pair with a preference"):
        StreamedData(pair_stream(source), FakeEncoder())
    with pytest.raises(UserError, match="no features"):
        cached(tmp_path / "cache", source)


# What is cached


def test_a_cache_is_filled_once_and_its_shards_are_one_sequence(tmp_path):
    source, encoder = write(tmp_path / "pairs", rows(22)), FakeEncoder()
    one = cached(tmp_path / "one", source).data
    several = cached(tmp_path / "several", source, size=5, encoder=encoder).data
    assert len(list((tmp_path / "several" / "features").glob("*.safetensors"))) == 5
    index = torch.tensor([21, 0, 7, 7, 4, 5])
    a, b = one[index], several[index]
    assert torch.equal(a.loser, b.loser) and torch.equal(a.winner, b.winner)
    assert b.guidance.shape[1] == 5 and torch.equal(a.guidance, b.guidance[:, :4])
    assert b.mask.sum(1).tolist() == [4, 4, 5, 5, 4, 5], "shorter shards are padded, and masked"
    count = len(encoder.seen)
    cached(tmp_path / "several", source, size=5, encoder=encoder)
    assert len(encoder.seen) == count == 22


def test_a_complete_cache_needs_no_model(tmp_path):
    source = write(tmp_path / "pairs", rows(8))
    cached(tmp_path / "cache", source)
    kept = FeatureCache(tmp_path / "cache" / "features", {"the MLLM": "a", "seed": "0"}, 1e9)

    def load() -> None:
        raise AssertionError("loaded a model")

    assert len(CachedData(pair_stream(source), load, kept).data) == 8


def test_a_cache_whose_making_was_stopped_goes_on_with_the_next_chunk(tmp_path):
    source = write(tmp_path / "pairs", rows(20))

    class Stopped(FakeEncoder):
        def __call__(self, pairs: list[Pair], chunk: int = 0) -> Features:
            if chunk == 2:
                raise KeyboardInterrupt
            return super().__call__(pairs, chunk)

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "cache", source, size=5, encoder=Stopped())
    encoder = FakeEncoder()
    data = cached(tmp_path / "cache", source, size=5, encoder=encoder).data
    assert encoder.seen == [f"prompt {k}" for k in range(10, 20)] and len(data) == 20
    assert torch.equal(
        data[torch.arange(20)].loser, cached(tmp_path / "whole", source, size=5).data[torch.arange(20)].loser
    )


def test_a_cache_is_bounded_together_with_all_others_of_its_folder(tmp_path):
    source = write(tmp_path / "pairs", rows(40))
    whole = cached(tmp_path / "whole", source, size=5)
    shard = next((tmp_path / "whole").rglob("*.safetensors")).stat().st_size
    assert len(whole.data) == 40
    encoder, limit = FakeEncoder(), 3 * shard + 4096
    data = cached(tmp_path / "cache", source, size=5, limit=limit, encoder=encoder).data
    used = sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*.safetensors"))
    assert len(data) == 15 and used <= limit
    cached(tmp_path / "cache", source, size=5, limit=limit, encoder=(again := FakeEncoder()))
    assert again.seen == [], "a full cache is not tried again"
    other = FeatureCache(tmp_path / "cache" / "other", {}, limit)
    with pytest.raises(UserError, match=r"raise --cache-gb, lower --max-pairs.*--cache-dir none") as caught:
        CachedData(pair_stream(source, 5), FakeEncoder, other)
    assert "\n" not in str(caught.value)
    assert len(cached(tmp_path / "cache", source, size=5, limit=1e9).data) == 40, "with more room it is completed"


@pytest.mark.parametrize("shards", ["damaged", "foreign"])
def test_a_damaged_shard_is_named(tmp_path, shards):
    source = write(tmp_path / "pairs", rows(6))
    cached(tmp_path / "cache", source)
    [file] = (tmp_path / "cache").rglob("*.safetensors")
    if shards == "damaged":
        file.write_bytes(file.read_bytes()[:200])
    else:
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="00000.safetensors: damaged.*delete it"):
        cached(tmp_path / "cache", source)


def test_a_full_disk_is_one_clear_line_and_keeps_what_was_cached(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from img_minimal.hub import weights

    source, save, written = write(tmp_path / "pairs", rows(20)), weights.save_file, []

    def full(*arguments, **more) -> None:
        if len(written) == 2:
            raise SafetensorError("Error while serializing: No space left on device")
        written.append(save(*arguments, **more))

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(UserError, match="00002.safetensors: cannot be written.*No space left.*full") as caught:
        cached(tmp_path / "cache", source, size=5)
    assert "\n" not in str(caught.value)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2


def test_a_stale_cache_is_refused_and_the_reason_is_what_differs(tmp_path):
    source = write(tmp_path / "pairs", rows(6))
    cached(tmp_path / "cache", source)
    with pytest.raises(UserError, match="made with the MLLM a, this run has b; delete.*another --cache-dir") as caught:
        cached(tmp_path / "cache", source, **{"the MLLM": "b"})
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="made with image size None, this run has 64"):
        cached(tmp_path / "cache", source, **{"image size": "64"})
    (tmp_path / "cache" / "features" / "cache.json").write_text("{")
    with pytest.raises(UserError, match="cache.json: unreadable"):
        cached(tmp_path / "cache", source)


@pytest.mark.parametrize("where", ["features", "mask", "the place of what follows"])
def test_a_flipped_bit_in_a_cached_shard_is_found_and_the_file_named(tmp_path, where):
    source = write(tmp_path / "pairs", rows(6))
    cached(tmp_path / "cache", source)
    [file] = (tmp_path / "cache" / "features").glob("*.safetensors")
    whole = bytearray(file.read_bytes())
    header = int.from_bytes(whole[:8], "little") + 8
    place = {"features": header + 40, "mask": len(whole) - 1, "the place of what follows": whole.index(b"chunk") + 9}
    whole[place[where]] ^= 1
    file.write_bytes(whole)
    with pytest.raises(UserError, match=f"{file.name}: damaged.*delete it and run again"):
        cached(tmp_path / "cache", source)


def test_everything_that_features_depend_on_makes_a_cache_stale(tmp_path, monkeypatch):
    source = write(tmp_path / "pairs", rows(3))
    preset = dataclasses.replace(TWIN, pairs=str(source))
    before = cache_key(preset, "mllm", 0)

    def changed(preset=preset, guidance="mllm", seed=0) -> set[str]:
        now = cache_key(preset, guidance, seed)
        return {key for key in now if before.get(key) != now[key]}

    assert changed() == set()
    assert changed(seed=1) == {"seed"}
    assert changed(guidance="stock") == {"the MLLM"}
    assert changed(dataclasses.replace(preset, dtype="bf16")) == {"dtype"}
    assert changed(dataclasses.replace(preset, identity_share=0.5)) == {"a share of identity samples"}
    write(source, rows(4))
    assert changed() == {"the pairs"}
    write(source, rows(3))
    asked = dataclasses.replace(preset, questions="released")
    assert changed(asked) == {"the questions, one drawn for each sample"}
    settings = json.loads((Path(TWIN.image_encoder) / "config.json").read_text())
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(settings | {"image_size": 128}))
    assert "image size" in changed(dataclasses.replace(preset, image_encoder=str(tmp_path / "encoder")))
