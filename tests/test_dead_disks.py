"""Commands that are killed at any moment go on to the same bytes; a full disk is one line and loses nothing."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from campaign import Command, content, survive
from test_judges import make_clip

from img_minimal.presets import TINY
from img_minimal.run import load_checkpoint

pytestmark = pytest.mark.slow
PROMPTS = ["a red circle", "a purple cross and a blue square", "three green squares", "a red cross"]


def part(source: Path, target: Path, rows: int) -> Path:
    """The first rows of a table that the repository ships."""
    pq.write_table(pq.read_table(source).slice(0, rows), target)
    return target


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    part(TINY / "pairs.parquet", folder / "pairs.parquet", 160)
    part(TINY / "triplets.parquet", folder / "triplets.parquet", 64)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    make_clip(folder)
    return folder


def arguments(kind: str, files: Path, folder: Path) -> tuple[str, list]:
    """A command that works for some seconds and leaves what it does in a folder."""
    train = ["--output-dir", folder, "--save-every", 3, "--batch-size", 8, "--dtype", "fp32"]
    pairs = ["--pairs", files / "pairs.parquet", "--steps", 12, "--eval-prompts", 5]
    return {
        "train": ("train", [*train, *pairs, "--cache-dir", "none"]),
        "cache": ("train", [*train, *pairs, "--cache-dir", folder / "features"]),
        "rounds": ("train", [*train, *pairs, "--cache-dir", folder / "features", "--rounds", 2, "--round-prompts", 24,
                             "--round-steps", 6]),
        "mllm": ("train", [*train, "--stage", "mllm", "--triplets", files / "triplets.parquet", "--steps", 9]),
        "evaluate": ("evaluate", ["--prompt-file", files / "prompts.txt", "--judges", "clipscore", "--clipscore-model",
                                  files, "--output", folder, "--steps", 2, "--dtype", "fp32"]),
        "sample": ("sample", ["--output", folder, "--steps", 2, "--num-images", 2, "--dtype", "fp32"]),
    }[kind]  # fmt: skip


def start(kind: str, files: Path, folder: Path, largest: int | None = None) -> Command:
    name, words = arguments(kind, files, folder)
    resume = ["--resume"] if name == "train" and (folder / "checkpoint.pt").exists() else []
    return Command(name, *words, *resume, largest=largest)


RESULTS = {
    "train": ("aligner.safetensors", "metrics.jsonl"),
    "cache": ("aligner.safetensors", "metrics.jsonl", "features/*/*.safetensors"),
    "rounds": ("aligner.safetensors", "rounds/metrics.jsonl", "rounds/1/pairs.parquet", "rounds/1/aligner.safetensors"),
    "mllm": ("mllm/*.safetensors", "metrics.jsonl"),
    "evaluate": ("*.png", "scores-*.jsonl", "results.json"),
}


@pytest.mark.parametrize(
    "kind, kills, longest", [("train", 7, 9), ("cache", 5, 7), ("rounds", 6, 12), ("mllm", 7, 4), ("evaluate", 7, 2.5)]
)
def test_a_command_killed_at_random_moments_ends_with_the_bytes_of_one_that_was_not(
    files, tmp_path, kind, kills, longest
):
    code, said = start(kind, files, tmp_path / "whole").end()
    assert code == 0, said
    hits = survive(lambda: start(kind, files, tmp_path / "killed"), kills, longest, seed=3)
    assert hits >= kills // 2, "the commands were done before they were killed"
    whole, killed = (content(tmp_path / name, *RESULTS[kind]) for name in ("whole", "killed"))
    if kind == "evaluate":  # it names its folder
        whole, killed = ({k: v for k, v in x.items() if k != "results.json"} | {
            "results": json.loads(x["results.json"])["judges"]} for x in (whole, killed))  # fmt: skip
    assert whole.keys() == killed.keys() and len(whole) >= 2
    assert [name for name in whole if whole[name] != killed[name]] == []
    assert not list((tmp_path / "killed").glob(".*.partial"))


@pytest.mark.parametrize("kind", ["train", "cache", "mllm", "evaluate", "sample"])
@pytest.mark.parametrize("largest", [0, 500, 20_000, 400_000, 4_000_000])
def test_a_disk_that_is_full_at_any_write_is_one_line_and_what_was_saved_stays_whole(files, tmp_path, kind, largest):
    code, said = start(kind, files, tmp_path / "run", largest).end()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code == 0:  # nothing that it writes is as large
        assert not errors
        return
    assert code == 2 and len(errors) == 1 and "Traceback" not in said, said
    assert said.strip().endswith(errors[0]), "the error is the last that is said"
    if (tmp_path / "run" / "checkpoint.pt").exists():
        load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    code, said = start(kind, files, tmp_path / "run").end()  # with room again, it goes on
    assert code == 0, said
