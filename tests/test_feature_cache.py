"""Features of a stream: kept in a cache of bounded size, or computed chunk by chunk."""

import json
import os
from itertools import islice
from pathlib import Path

import pytest
import torch
from pair_files import jpeg, number, read_pairs, rows, tie, write
from refusals import refused

from img_minimal.data.features import CachedData, FeatureCache, Features, StreamedData
from img_minimal.data.load import open_cache
from img_minimal.data.pairs import START, Pair, pair_stream
from img_minimal.presets import Preset, find_preset
from img_minimal.run import Ranks

TWIN = find_preset("tiny-sdxl")
MADE_WITH = {"the MLLM": "a", "seed": "0"}


class FakeEncoder:
    """Features that show their image, prompt and chunk; `prompts` are those encoded so far."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def __call__(self, pairs: list[Pair], chunk: int = 0) -> Features:
        self.prompts += [p.prompt for p in pairs]
        length = 4 + chunk % 2
        prompts = [int(p.prompt.split()[1]) for p in pairs]
        return Features(
            guidance=filled(prompts, length, 5).flatten(0, 1).bfloat16(),
            lengths=torch.full((len(pairs),), length),
            longest=torch.full((len(pairs),), length),
            loser=filled([number(p.loser) for p in pairs], 3, 6),
            winner=filled([number(p.winner) for p in pairs], 3, 6),
            validation=torch.tensor([p.validation for p in pairs]),
            is_identity=torch.zeros(len(pairs), dtype=torch.bool),
        )


def filled(values: list[int], *shape: int) -> torch.Tensor:
    return torch.tensor(values).float().view(-1, 1, 1).expand(-1, *shape)


def cached(
    folder: Path, source: Path, size: int = 0, limit: float = 1e9, encoder=None, **changes: str
) -> CachedData:
    cache = FeatureCache(folder, MADE_WITH | changes, limit)
    return CachedData(pair_stream(source, size), lambda: encoder or FakeEncoder(), cache)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*.safetensors")}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs", rows(11), rows(11, 11))


def test_batches_of_a_stream_continue_at_any_step(source):
    def batches():
        data = StreamedData(pair_stream(source, size=8, seed=2), FakeEncoder())
        return data.batches(3, 0, Ranks())

    whole = batches()
    states, expected = [], []
    for batch in islice(whole, 15):  # more than two epochs
        states.append(whole.state_dict())
        expected.append(batch.loser)
    for step in (1, 3, 8, 12):
        resumed = batches()
        resumed.load_state_dict(states[step])
        for batch, loser in zip(resumed, expected[step + 1 :]):
            assert torch.equal(batch.loser, loser)


def test_only_the_first_chunk_of_a_stream_is_encoded_with_its_validation_pairs(tmp_path):
    source, encoder = write(tmp_path, rows(60)), FakeEncoder()
    data = StreamedData(pair_stream(source, size=30), encoder)
    trained = sum(len(part.samples) for part in data.parts(START))
    pairs = read_pairs(source)[0]
    held_out = [pair.validation for pair in pairs]
    first, later = sum(held_out[:30]), sum(held_out[30:])
    assert first and later, "or this test shows nothing"
    assert (len(data.unseen), trained) == (first, 60 - first - later)
    expected = [p.prompt for k, p in enumerate(pairs) if k < 30 or not held_out[k]]
    assert encoder.prompts == expected, "each pair is encoded once"


def test_a_source_without_a_single_preference_is_refused(tmp_path):
    table = rows(5)
    for row in table:
        tie(row)
    source = write(tmp_path / "pairs", table)
    with refused("no pair with a preference"):
        StreamedData(pair_stream(source), FakeEncoder())
    with refused("no features"):
        cached(tmp_path / "cache", source)


def test_shards_of_a_cache_are_one_sequence(tmp_path, source):
    one = cached(tmp_path / "one", source).data
    several = cached(tmp_path / "several", source, size=5).data
    assert len(several.parts) == 5
    index = torch.tensor([21, 0, 7, 7, 4, 5])
    a, b = one[index], several[index]
    assert torch.equal(a.loser, b.loser) and torch.equal(a.winner, b.winner)
    h, mask = b.padded()
    assert torch.equal(a.padded()[0], h[:, :4]) and h.shape[1] == 5
    assert mask.sum(1).tolist() == [4, 4, 5, 5, 4, 5], "shorter samples are padded, and masked"


def test_three_jobs_fill_the_cache_that_one_fills(tmp_path, source):
    for rank in (2, 0, 1, 0):
        cache = FeatureCache(tmp_path / "three" / "cache", MADE_WITH, 1e9)
        cache.collect(pair_stream(source, 5), FakeEncoder, (rank, 3))
    assert cache.complete
    cached(tmp_path / "one" / "cache", source, size=5)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_all_caches_of_a_folder_stay_within_one_limit(tmp_path, source):
    cached(tmp_path / "whole" / "cache", source, size=5)
    shard = len(contents(tmp_path / "whole")["00000.safetensors"])
    limit, folder = 3 * shard + 4096, tmp_path / "limited"
    for prompts in (20, 0):  # the chunk that does not fit is only tried once
        encoder = FakeEncoder()
        data = cached(folder / "a", source, size=5, limit=limit, encoder=encoder)
        assert len(encoder.prompts) == prompts
    assert len(data.data) == 15 and sum(map(len, contents(folder).values())) <= limit
    with refused("raise --cache-gb, lower --max-pairs", "--cache-dir none"):
        cached(folder / "b", source, size=5, limit=limit)
    assert len(cached(folder / "a", source, size=5).data) == 22, "with more room it is completed"


@pytest.mark.parametrize("damage", ["features", "mask", "position of the next chunk"])
def test_a_flipped_bit_in_a_shard_is_found_and_named(tmp_path, source, damage):
    cached(tmp_path / "cache", source)
    [file] = (tmp_path / "cache").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    position = data.index(b"chunk") + 9
    places = {"features": header + 40, "mask": len(data) - 1}
    data[places.get(damage, position)] ^= 1
    file.write_bytes(data)
    with refused(f"{file.name}: damaged", "delete it and run again"):
        cached(tmp_path / "cache", source)


def test_pictures_replaced_under_the_same_names_are_found_and_absent_ones_are_not_needed(tmp_path):
    folder, rows = tmp_path / "pairs", []
    (folder / "sub").mkdir(parents=True)
    for k in range(3):
        (folder / "sub" / f"{k}.png").write_bytes(jpeg(k))
        rows.append({"prompt": f"prompt {k}", "path1": f"sub/{k}.png", "path2": "sub/0.png"})
    (folder / "train.json").write_text(json.dumps(rows))
    before = cached(tmp_path / "cache", folder / "train.json", size=2).data[torch.arange(3)]
    (folder / "sub" / "1.png").unlink()
    cached(tmp_path / "cache", folder / "train.json", size=2)
    (folder / "sub" / "2.png").write_bytes(jpeg(9))
    with refused("00001.safetensors: made with another", "sub/2.png", "delete it and run again"):
        cached(tmp_path / "cache", folder / "train.json", size=2)
    (tmp_path / "cache" / "00001.safetensors").unlink()
    after = cached(tmp_path / "cache", folder / "train.json", size=2).data[torch.arange(3)]
    assert before.winner[2, 0, 0] == 2 and after.winner[2, 0, 0] == 9


def test_a_long_sample_makes_no_other_longer_and_its_batch_alone_is_padded_to_it():
    lengths = torch.tensor([3, 90, 4, 3])
    h = torch.arange(1.0, 101.0)[:, None].bfloat16()
    values = torch.zeros(4, 1, 2)
    flags = torch.zeros(4, dtype=torch.bool)
    features = Features(h, lengths, torch.full((4,), 90), values, values, flags, flags)
    assert features.guidance.numel() == 100, "90 times 4 if all were padded"
    for index, shape in (([2, 0], 8), ([1, 3], 90)):  # else at most twice its own longest
        batch = features[torch.tensor(index)]
        padded, mask = batch.padded()
        assert padded.shape == mask.shape + (1,) == (2, shape, 1)
        assert mask.sum(1).tolist() == lengths[index].tolist()
        assert torch.equal(padded[mask], batch.guidance) and not padded[~mask].any()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"the MLLM": "b"}, "made with the MLLM a, this run has b"),
        ({"dtype": "bf16"}, "made with dtype None, this run has bf16"),
        ({}, "cache.json: unreadable"),
    ],
)
def test_a_cache_built_with_other_settings_is_refused_by_what_differs(
    tmp_path, source, changes, words
):
    cached(tmp_path / "cache", source)
    if not changes:
        (tmp_path / "cache" / "cache.json").write_text("{")
    with refused(words, f"delete {tmp_path / 'cache'}", "choose another --cache-dir"):
        cached(tmp_path / "cache", source, **changes)


def test_a_cache_depends_on_everything_that_features_depend_on(tmp_path):
    source = write(tmp_path / "pairs", rows(3))
    preset = TWIN.changed(("data",), pairs=str(source), cache_dir=str(tmp_path / "caches"))
    cache = open_cache(preset, "mllm", 0, 1.0)
    before, first = cache.note["making"], cache.folder

    def changed(preset: Preset = preset, guidance: str = "mllm", seed: int = 0) -> set[str]:
        now = open_cache(preset, guidance, seed, 1.0).note["making"]
        return {name for name in now if before.get(name) != now[name]}

    for name, found in {
        "seed": changed(seed=1),
        "the MLLM": changed(guidance="stock"),
        "dtype": changed(preset.changed(dtype="bf16")),
        "the questions, one drawn for each sample": changed(preset.changed(questions="released")),
        "a share of identity samples": changed(preset.changed(("data",), identity_share=0.5)),
        "at most this many pairs": changed(preset.changed(("data",), max_pairs=2)),
        "this many pairs in a chunk": changed(preset.changed(("training",), chunk=7)),
    }.items():
        assert found == {name}

    settings = json.loads((Path(TWIN.models.image_encoder) / "config.json").read_text())
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(settings | {"image_size": 128}))
    encoder = preset.changed(image_encoder=str(tmp_path / "encoder"))
    assert changed(encoder) == {"the image encoder"}
    assert changed() == set() and open_cache(preset, "mllm", 0, 1.0).folder == first
    other = preset.changed(("data",), pairs=str(write(tmp_path / "other" / "pairs", rows(3, 9))))
    assert open_cache(other, "mllm", 0, 1.0).folder != first, "many tables have one name"
    [table] = source.glob("*.parquet")
    os.utime(table, ns=(0, 0))  # as if it was replaced by one of the same size
    assert changed() == {"the pairs"}
    write(source, rows(4))
    assert changed() == {"the pairs"}
