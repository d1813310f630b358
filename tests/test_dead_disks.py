"""Killed commands go on to the same bytes; a full disk is one line and loses nothing."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from campaign import Command, content, finish, survive
from test_judges import make_clip

from img_minimal.presets import TWINS
from img_minimal.run import load_checkpoint

pytestmark = pytest.mark.slow
PROMPTS = ["a red circle", "a purple cross and a blue square", "three green squares", "a red cross"]
RESULTS = {
    "train": ("aligner.safetensors", "metrics.jsonl"),
    "cache": ("aligner.safetensors", "metrics.jsonl", "features/*/*.safetensors"),
    "rounds": ("aligner.safetensors", "rounds/metrics.jsonl", "rounds/pairs/1.jsonl"),
    "mllm": ("mllm/*.safetensors", "metrics.jsonl"),
    "evaluate": ("*.png", "results.json"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, count in (("pairs.parquet", 160), ("triplets.parquet", 64)):
        pq.write_table(pq.read_table(TWINS / name).slice(0, count), folder / name)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    make_clip(folder)
    return folder


def start(kind: str, files: Path, folder: Path, largest: int | None = None) -> Command:
    """Start, or go on with, a command that works for some seconds in a folder."""
    name = kind if kind in ("evaluate", "sample") else "train"
    words = ["--dtype", "fp32"]
    if kind == "evaluate":
        words += ["--prompt-file", files / "prompts.txt", "--output", folder, "--steps", 2]
        words += ["--judges", "clipscore", "--clipscore-model", files]
    elif kind == "sample":
        words += ["--output", folder, "--steps", 2, "--num-images", 2]
    else:
        words += ["--output-dir", folder, "--save-every", 3, "--batch-size", 8]
        if (folder / "checkpoint.pt").exists():
            words.append("--resume")
    if kind == "mllm":
        words += ["--stage", "mllm", "--triplets", files / "triplets.parquet", "--steps", 9]
    elif name == "train":
        cache = "none" if kind == "train" else folder / "features"
        words += ["--pairs", files / "pairs.parquet", "--steps", 12, "--cache-dir", cache]
        words += ["--eval-prompts", 5, "--preference-weight", 1]
    if kind == "rounds":
        words += ["--rounds", 2, "--round-prompts", 24, "--round-steps", 6]
    return Command(name, *words, largest=largest)


def results(kind: str, folder: Path) -> dict[str, object]:
    found: dict[str, object] = content(folder, *RESULTS[kind])
    if kind == "evaluate":  # it names its folder
        found["results.json"] = json.loads(found["results.json"])["judges"]
    return found


@pytest.mark.parametrize(
    ("kind", "kills", "longest"),
    [("train", 7, 9), ("cache", 5, 7), ("rounds", 6, 12), ("mllm", 7, 4), ("evaluate", 7, 2.5)],
)
def test_a_command_killed_at_random_moments_ends_with_the_bytes_of_one_that_was_not(
    files, tmp_path, kind, kills, longest
):
    finish(start(kind, files, tmp_path / "whole"))
    hits = survive(lambda: start(kind, files, tmp_path / "killed"), kills, longest, seed=3)
    assert hits >= kills // 2, "the commands were done before they were killed"
    whole, killed = results(kind, tmp_path / "whole"), results(kind, tmp_path / "killed")
    assert whole.keys() == killed.keys() and len(whole) >= 2
    assert [name for name in whole if whole[name] != killed[name]] == []
    assert not list((tmp_path / "killed").glob(".*.partial"))


@pytest.mark.parametrize("kind", ["train", "cache", "mllm", "evaluate", "sample"])
@pytest.mark.parametrize("largest", [0, 500, 20_000, 400_000, 4_000_000])
def test_a_disk_that_is_full_at_any_write_is_one_line_and_loses_no_checkpoint(
    files, tmp_path, kind, largest
):
    code, output = start(kind, files, tmp_path / "run", largest).end()
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if code == 0:  # nothing that it writes is as large
        assert not errors
        return
    assert code == 2 and len(errors) == 1 and "Traceback" not in output, output
    assert output.strip().endswith(errors[0]), "the error comes last"
    if (tmp_path / "run" / "checkpoint.pt").exists():
        load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    finish(start(kind, files, tmp_path / "run"))  # with room again, it goes on
