"""Two processes train as one: the same weights, the same decisions, nothing seen twice, and nobody waits for ever."""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from campaign import CONTEXT, Command, content, torchrun
from pair_files import pairs_of, rows, write
from test_training import PRESET, part, some_features, unseen

import train as script
from img_minimal.data.features import Batches
from img_minimal.data.pairs import pair_stream
from img_minimal.flags import share_of
from img_minimal.presets import TINY, with_overrides
from img_minimal.cli import UserError
from img_minimal.run import ALONE, Ranks
from img_minimal.run import Trainer, own_place


def train_rank(ranks: Ranks, folder: Path, optimizer: str, world: int) -> None:
    """60 steps; each rank saves its own weights."""
    folder.mkdir(exist_ok=True)
    preset = with_overrides(PRESET, optimizer=optimizer, lr=2e-3, train_steps=60, dtype="fp32")
    trainer, data = Trainer.new(preset, (64, 32), refresh_after=3, seed=0), some_features()
    batches = Batches(lambda _: iter([part(data)]), 8, 0, (ranks.rank, world))
    script.train(trainer, batches, unseen(data), preset, folder, steps=60, save_every=30, ranks=ranks)
    torch.save((trainer.aligner.state_dict(), trainer.refresh.refreshes), folder / f"rank{ranks.rank}.pt")


def _rank(rank: int, port: int, folder: Path, optimizer: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with Ranks.joined() as ranks:
        train_rank(ranks, folder, optimizer, 2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_ranks_end_with_the_weights_of_one_process_and_equal_each_other_to_the_bit(tmp_path, optimizer):
    train_rank(ALONE, tmp_path / "one", optimizer, 1)
    port = 29_500 + os.getpid() % 2000
    both = [CONTEXT.Process(target=_rank, args=(rank, port, tmp_path / "two", optimizer)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    (one, refreshes), *two = (torch.load(tmp_path / p) for p in ("one/rank0.pt", "two/rank0.pt", "two/rank1.pt"))
    assert refreshes >= 3 and all(count == refreshes for _, count in two)
    for key, weight in one.items():
        assert torch.equal(two[0][0][key], two[1][0][key]), key
        assert (weight - two[0][0][key]).abs().max() <= 1e-5, key
    assert not any(key.startswith("module.") for key in two[0][0])
    logs = [[json.loads(row) for row in (tmp_path / k / "metrics.jsonl").open()] for k in ("one", "two")]
    assert [row["step"] for row in logs[1]] == list(range(1, 61)), "one rank writes, and every step once"
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys() and all(abs(a[name] - b[name]) < 1e-4 * max(1, abs(a[name])) for name in a)


@pytest.mark.parametrize("files", [1, 2, 3, 5])
@pytest.mark.parametrize("limit", [0, 17])
def test_what_the_ranks_see_together_is_what_one_process_sees_without_doubles(tmp_path, files, limit):
    source = write(tmp_path, *(rows(4 + k, 10 * k) for k in range(files)))
    one = [p.prompt for p in pairs_of(pair_stream(source, size=3, limit=limit, seed=5))]
    for world in (2, 3):
        shares = [pair_stream(source, size=3, limit=limit, seed=5, share=(rank, world)) for rank in range(world)]
        seen = Counter(p.prompt for share in shares for p in pairs_of(share))
        assert max(seen.values()) == 1
        if not limit:
            assert sorted(seen) == sorted(one)
        chunks = list(shares[1].chunks())
        again = list(shares[1].chunks(chunks[-1].place))
        assert [p.prompt for p in again[0].items] == [p.prompt for p in chunks[-1].items], "a place of its own"


def test_places_go_back_to_the_ranks_they_came_from_and_another_number_of_ranks_is_refused():
    places = [{"epoch": 0}, {"epoch": 1}]
    assert own_place(places, False, Ranks(1, 2)) == {"epoch": 1}
    assert own_place(places, True, Ranks(2, 4)) == {"epoch": 0}
    with pytest.raises(UserError, match="began with 2 processes.*--nproc_per_node=2"):
        own_place(places, False, ALONE)
    with pytest.raises(UserError, match="--batch-size is 8, which 3 processes cannot share"):
        Ranks(0, 3).share(8, "--batch-size")
    for wrong in ("3", "4/4", "a/b", "-1/2", "1/0", "1/2/3", ""):
        with pytest.raises(UserError, match="--shard is"):
            share_of(wrong)
    assert share_of("3/16") == (3, 16)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    table = pq.read_table(TINY / "pairs.parquet")
    for k in range(3):
        pq.write_table(table.slice(60 * k, 60), folder / f"train-{k}.parquet")
    return folder


def options(pairs: Path, folder: Path, cache: str, *more: object) -> list[object]:
    return ["--output-dir", folder, "--pairs", pairs, "--steps", 30, "--save-every", 5, "--batch-size", 8,
            "--eval-prompts", 0, "--dtype", "fp32", "--refresh-after", 3, "--cache-dir", cache, *more]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("kill", ["SIGKILL of one", "SIGTERM of all"])
def test_killed_ranks_end_soon_with_a_reason_and_resume_to_the_bits_of_a_run_that_was_not(
    pairs, tmp_path, streamed, kill
):
    def start(name: str) -> list[Command]:
        resume = ["--resume"] if (tmp_path / name / "checkpoint.pt").exists() else []
        return torchrun(
            2, "train", *options(pairs, tmp_path / name, "none" if streamed else tmp_path / "cache", *resume)
        )

    for command in start("whole"):
        code, said = command.end()
        assert code == 0, said
    ranks = start("killed")
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if kill == "SIGKILL of one":
        assert ranks[1].kill()
        code, said = ranks[0].end(60)
        assert code == 2 and "another process of this run ended" in said and "Traceback" not in said, said
    else:
        for rank in ranks:
            os.kill(rank.process.pid, signal.SIGTERM)
        for rank in ranks:
            code, said = rank.end(60)
            assert code in (0, 130) and "Traceback" not in said, said
    for command in start("killed"):
        code, said = command.end()
        assert code == 0, said
    files = ["aligner.safetensors"] + ["metrics.jsonl"] * ("KILL" in kill)  # who is asked to stop validates once more
    whole, killed = (content(tmp_path / name, *files) for name in ("whole", "killed"))
    assert whole == killed


@pytest.mark.slow
def test_a_mistake_that_one_rank_meets_ends_all_of_them_with_it(pairs, tmp_path):
    (tmp_path / "pairs").mkdir()
    for k, file in enumerate(sorted(pairs.iterdir())):
        data = bytearray(file.read_bytes())
        if k == 1:
            data[300:9000] = bytes(8700)  # only its reader sees it
        (tmp_path / "pairs" / file.name).write_bytes(data)
    for command in torchrun(2, "train", *options(tmp_path / "pairs", tmp_path / "run", "none")):
        code, said = command.end(90)
        assert code == 2 and "Traceback" not in said and "error: " in said, said


@pytest.mark.slow
def test_jobs_that_each_compute_a_part_of_a_cache_leave_the_cache_of_one(pairs, tmp_path, monkeypatch):
    from img_minimal import presets

    monkeypatch.setitem(presets.PRESETS, "tiny-sdxl", with_overrides(presets.PRESETS["tiny-sdxl"], chunk_pairs=40))
    for name, shards in (("one", ["0/1"]), ("three", ["2/3", "0/3", "1/3"])):
        for shard in shards:
            config = script.Config(pairs=str(pairs), cache_dir=str(tmp_path / name), dtype="fp32", shard=shard)
            preset = script.chosen_preset(config)
            said = script.compute_features(preset, "mllm", 0, 10.0, share_of(shard))
        assert said.endswith("all there are")
    one, three = (content(tmp_path / name, "*/*.safetensors") for name in ("one", "three"))
    assert one == three and len(one) >= 4
