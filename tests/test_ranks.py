"""Several processes train as one: equal weights, equal decisions, and none waits for ever."""

import os
import signal
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from campaign import CONTEXT, Command, content, finish, rank_environments
from feature_sets import Data, some_features
from pair_files import pairs_of, rows, write
from refusals import refused

import train as script
from img_minimal import cli, run
from img_minimal.cli import UserError
from img_minimal.data.features import Batches, CachedData
from img_minimal.data.pairs import START, pair_stream
from img_minimal.devices import Precision
from img_minimal.plots import read_rows
from img_minimal.presets import TWINS, find_preset
from img_minimal.run import Ranks, Run, load_checkpoint


def train_rank(folder: Path, optimizer: str, environment: dict[str, str]) -> None:
    """Train 60 steps as one of the processes; each saves its own weights."""
    os.environ |= environment
    torch.set_num_threads(1)
    small = {"steps": 60, "batch_size": 8, "depth": 1, "heads": 1, "save_every": 30, "lr": 2e-3}
    small["preference_weight"] = 1.0
    settings = replace(find_preset("tiny-sdxl").training, **small, optimizer=optimizer)
    with Ranks() as ranks:
        run, precision = Run(folder, {}, ranks=ranks), Precision.named("fp32", torch.device("cpu"))
        data = Data(some_features())
        aligner = script.train(run, data, settings, precision, refresh_after=3)
        torch.save(aligner.state_dict(), folder / f"rank{ranks.rank}.pt")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_ranks_end_with_the_weights_of_one_process_and_equal_each_other_to_the_bit(
    tmp_path, optimizer
):
    processes = []
    for name, world in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        for environment in rank_environments(world):
            arguments = (tmp_path / name, optimizer, environment)
            processes.append(CONTEXT.Process(target=train_rank, args=arguments))
            processes[-1].start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    one, first, second = (
        torch.load(tmp_path / name) for name in ("one/rank0.pt", "two/rank0.pt", "two/rank1.pt")
    )
    assert one.keys() == first.keys()
    for key, weight in one.items():
        assert torch.equal(first[key], second[key]), key
        assert (weight - first[key]).abs().max() <= 1e-5, key
    alone, together = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in together] == list(range(1, 61)), "one rank writes each step once"
    for row, other in zip(alone, together, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-4)
    assert load_checkpoint(tmp_path / "two" / "checkpoint.pt")["refresh"]["refreshes"] >= 3


@pytest.mark.parametrize("files", [1, 2, 3, 5])
@pytest.mark.parametrize("limit", [0, 17])
def test_the_ranks_together_see_the_pairs_of_one_process_without_doubles(tmp_path, files, limit):
    source = write(tmp_path, *(rows(4 + k, 10 * k) for k in range(files)))
    one = [pair.prompt for pair in pairs_of(pair_stream(source, size=3, limit=limit, seed=5))]
    for world in (2, 3):
        seen: Counter[str] = Counter()
        for rank in range(world):
            share = pair_stream(source, size=3, limit=limit, seed=5, share=(rank, world))
            chunks = list(share.chunks())
            for chunk in chunks:
                seen.update(pair.prompt for pair in chunk.items)
            again = next(share.chunks(chunks[-1].position))
            assert [p.prompt for p in again.items] == [p.prompt for p in chunks[-1].items]
        assert max(seen.values()) == 1
        assert limit or sorted(seen) == sorted(one)


def test_a_stream_goes_back_to_the_rank_it_came_from_and_another_number_of_ranks_is_refused(
    tmp_path, monkeypatch
):
    positions = [{"epoch": rank, "position": vars(START), "batch": rank} for rank in (0, 1)]
    Run(tmp_path, {}).save({"data": positions, "step": 4, "logged": 0})
    batches = Data(some_features()).batches(8, 0, Ranks())

    def resume(rank: int, world: int, shared: bool) -> int:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        batches.shared = shared
        run = Run(tmp_path, {}, resume=True)
        run.restore({"data": batches}, last=9)
        return batches.epoch

    assert resume(1, 2, shared=False) == 1
    assert resume(3, 4, shared=True) == 0
    with refused("began with 2 processes", "this one has 4", "--nproc_per_node=2"):
        resume(1, 4, shared=False)
    with refused("--batch-size is 9, which 4 processes cannot share"):
        Ranks().split(9, "--batch-size")


NAMES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
HERE = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def environment(monkeypatch):
    """Return a function that replaces what torchrun sets, for processes that wait a second."""
    monkeypatch.setattr("img_minimal.run.MEETING", 1.0)

    def change(values: dict[str, str]) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is ''"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE is '0'"),
        (HERE | {"RANK": "2"}, "RANK is '2'"),
        (HERE | {"RANK": "-1"}, "RANK is '-1'"),
        (HERE, "rank 1 of 2 does not meet the others"),  # nobody is there
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR"),
        (HERE | {"MASTER_PORT": "abc"}, "abc"),
        (HERE | {"MASTER_PORT": "70000"}, "rank 1 of 2"),
        (HERE | {"MASTER_ADDR": "nowhere.invalid"}, "rank 1 of 2"),
        (rank_environments(2)[0], "rank 0 of 2"),  # the other one never comes
        (rank_environments(3)[0] | {"MASTER_PORT": "1x"}, "1x"),
    ],
)
def test_an_environment_that_does_not_fit_together_is_one_line_soon(environment, values, words):
    environment(values)
    began = time.monotonic()
    with refused(words, "torchrun"), Ranks():
        pass
    assert time.monotonic() - began < 30


def meet(environment: dict[str, str], ends: object) -> None:
    """Meet the others for three seconds, and tell how it ended."""
    os.environ |= environment
    run.MEETING = 3.0
    try:
        with Ranks():
            ends.put("met")
    except UserError as error:
        ends.put(str(error))


def test_two_processes_of_one_number_end_all_of_them(tmp_path):
    first, second, _ = rank_environments(3)
    ends = CONTEXT.Queue()
    for environment in (first, second, second):
        CONTEXT.Process(target=meet, args=(environment, ends)).start()
    told = sorted(ends.get(timeout=60) for _ in range(3))
    assert [line[:9] for line in told] == ["rank 0 of", "rank 1 of", "rank 1 of"]
    assert "another process has RANK 1" in "".join(told)


def test_a_rank_alone_silences_nothing(environment, capsys):
    for values in (
        {"RANK": "3"},
        {"RANK": "x", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "", "RANK": "1"},
    ):
        environment(values)
        cli.silence_nonzero_ranks()
        cli.warn("heard")
        print("printed")
        with Ranks() as ranks:
            assert ranks.main and ranks.world == 1
        assert capsys.readouterr() == ("printed\n", "warning: heard\n")


@pytest.mark.parametrize(
    ("values", "words", "said"),
    [
        ({}, ["train.py", "--resume", "--pairs", "my pairs"], "python train.py --pairs 'my pairs'"),
        ({}, ["a b/train.py", "--overwrite", "--lr=1"], "python 'a b/train.py' --lr=1"),
        (
            HERE | {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
            ["train.py", "--pairs", "$HOME"],
            "torchrun --nproc_per_node=4 train.py --pairs '$HOME'",
        ),
        ({"LOCAL_WORLD_SIZE": "1"}, ["train.py"], "torchrun --nproc_per_node=1 train.py"),
    ],
)
def test_the_command_that_resumes_can_be_pasted_into_a_shell(
    environment, monkeypatch, values, words, said
):
    environment(values)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", words)
    assert Ranks().again() == f"{said} --resume"


def test_a_run_resumed_on_another_number_of_ranks_sees_the_same_global_batches():
    def batches_of(rank: int, world: int) -> Batches:
        ranks = Ranks()
        ranks.rank, ranks.world = ranks.share = rank, world
        return CachedData.batches(data, 8, 3, ranks)

    data = Data(some_features())
    whole = batches_of(0, 1)
    states, expected = [], []
    for batch in islice(whole, 20):  # more than two epochs
        states.append(whole.state_dict())
        expected.append(batch.loser)
    for world in (1, 2, 4):
        for step in (2, 5, 6):
            ranks = [batches_of(rank, world) for rank in range(world)]
            for batches in ranks:
                batches.load_state_dict(states[step])
            for losers, *shares in zip(expected[step + 1 :], *ranks):
                together = torch.stack([share.loser for share in shares], dim=1).flatten(0, 1)
                assert torch.equal(together, losers)
            assert batches.state_dict() == states[-1]


@pytest.mark.parametrize("shard", ["3", "4/4", "a/b", "-1/2", "1/0", "1/2/3", ""])
def test_a_shard_is_a_part_of_a_number_of_parts(shard):
    assert script.share_of("3/16") == (3, 16)
    with refused("--shard is", "as in 0/8"):
        script.share_of(shard)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    table = pq.read_table(TWINS / "pairs.parquet")
    for k in range(3):
        pq.write_table(table.slice(60 * k, 60), folder / f"train-{k}.parquet")
    return folder


def start(pairs: Path, folder: Path, cache: object = "none") -> list[Command]:
    """Start a training of two ranks, or go on with it."""
    words = ["--output-dir", folder, "--pairs", pairs, "--cache-dir", cache, "--dtype", "fp32"]
    words += ["--steps", 30, "--save-every", 5, "--batch-size", 8, "--eval-prompts", 0]
    words += ["--refresh-after", 3, "--preference-weight", 1]
    if (folder / "checkpoint.pt").exists():
        words.append("--resume")
    return [Command("train", *words, ranks=environment) for environment in rank_environments(2)]


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("kill", ["SIGKILL of one", "SIGTERM of all"])
def test_killed_ranks_end_soon_with_a_reason_and_resume_to_the_bits_of_a_run_that_was_not(
    pairs, tmp_path, streamed, kill
):
    cache = "none" if streamed else tmp_path / "cache"
    finish(*start(pairs, tmp_path / "whole", cache))
    ranks = start(pairs, tmp_path / "killed", cache)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if kill == "SIGKILL of one":
        assert ranks[1].kill()
        code, output = ranks[0].end(60)
        assert code == 2 and "another process of this run ended" in output, output
        assert "Traceback" not in output, output
    else:
        for rank in ranks:
            os.kill(rank.process.pid, signal.SIGTERM)
        for rank in ranks:
            code, output = rank.end(60)
            assert code in (0, 130) and "Traceback" not in output, output
    finish(*start(pairs, tmp_path / "killed", cache))
    # A run that is asked to stop validates once more.
    files = ["aligner.safetensors"] + ["metrics.jsonl"] * ("KILL" in kill)
    whole, killed = (content(tmp_path / name, *files) for name in ("whole", "killed"))
    assert whole == killed
