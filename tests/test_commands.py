"""The commands a user types: good input works, bad input is one line and exit code 2, and costs nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from PIL import Image

from img_minimal.aligner import ImplicitAligner
from img_minimal.pipeline import IMG
from img_minimal.presets import find_preset
from img_minimal.cli import printable
from img_minimal.plots import labelled_grid

ROOT = Path(__file__).parent.parent
TWIN = find_preset("tiny-sdxl")


def assert_one_clear_line(result: SimpleNamespace, *words: str) -> None:
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert "error: " in last
    for word in words:
        assert word in last


def test_sample_saves_both_images_and_the_picture_and_says_what_was_seen(call, tmp_path):
    one = ("--prompt", "a red circle above a blue square", "--seed", 1, "--num-images", 1)
    result = call("sample.py", *one, "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "initial: MLLM: " in result.stdout and "oracle: " in result.stdout
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"seed1-0-initial.png", "seed1-1-round1.png", "side-by-side.png", "results.json"}
    last = Image.open(tmp_path / "seed1-1-round1.png")
    assert last.size == (64, 64)
    assert (last.text["prompt"], last.text["seed"], last.text["stage"]) == (one[1], "1", "round 1")
    [row] = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [image["file"] for image in row["images"]] == ["seed1-0-initial.png", "seed1-1-round1.png"]
    assert all(image["MLLM"] and image["oracle"] for image in row["images"])
    steps = re.search(r"in [\d.]+ s: draw \d+%, look \d+%, align \d+%, draw again \d+%, put in words", result.stdout)
    assert steps and "GB of" in result.stdout


def test_sample_begins_with_a_picture_that_one_has(call, tmp_path):
    Image.new("RGB", (100, 80), "white").save(tmp_path / "mine.png")
    out = tmp_path / "out"
    done = call("sample.py", "--image", tmp_path / "mine.png", "--num-images", 2, "--steps", 2, "--output", out)
    assert done.returncode == 0, done.stderr
    assert Image.open(out / "seed0-0-given.png").size == (100, 80)
    first, second = (Image.open(out / f"seed{seed}-1-round1.png").tobytes() for seed in (0, 1))
    assert first != second


def test_sample_draws_the_prompts_of_a_file_and_a_sweep(call, tmp_path):
    (tmp_path / "two.txt").write_text("a red circle\na blue square\n")
    more = ("--num-images", 1, "--steps", 2, "--no-explain", "--guidance-scale", 3)
    more += ("--negative-prompt", "a green cross")
    for words in ("scale=0,1.5", "passes=1,2"):
        done = call("sample.py", "--prompt-file", tmp_path / "two.txt", *more, "--sweep", words, "--output", tmp_path)
        assert done.returncode == 0, done.stderr
    assert {"prompt0-seed0-1-round1.png", "prompt1-seed0-1-round1.png", "sweep.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert (settings["negative_prompt"], settings["guidance_scale"]) == ("a green cross", 3.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], ["empty"]),
        (["--prompt", "a red zebra"], ["zebra", "--model sdxl"]),
        (["--seed", "-1"], ["--seed", "0 or more"]),
        (["--seed", "x"], ["--seed"]),
        (["--passes", "0"], ["--passes"]),
        (["--scale", "-0.5"], ["--scale"]),
        (["--scale-end", "-0.5"], ["--scale-end"]),
        (["--model", "nope"], ["nope", "tiny-sdxl"]),
        (["--output", "/proc/nowhere"], ["/proc/nowhere", "choose another folder"]),
        (["--colour", "red"], ["--colour"]),
        (["--image", "nowhere.png"], ["nowhere.png", "No such file"]),
        (["--image", __file__], ["test_commands.py", "no picture", "PNG"]),
        (["--sweep", "colour=1"], ["--sweep", "scale"]),
        (["--sweep", "scale=a"], ["--sweep", "scale=0,0.2"]),
        (["--mllm-device", "cuda:77"], ["--mllm-device", "cpu"]),
        (["--guidance-scale", "-1"], ["--guidance-scale"]),
    ],
)
def test_sample_refuses_bad_input_in_one_line(call, arguments, words):
    assert_one_clear_line(call("sample.py", *arguments), *words)


def test_a_missing_a_truncated_and_a_foreign_aligner_are_each_one_line(call, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(TWIN.aligner).read_bytes()[:5000])
    cases = {tmp_path / "none.safetensors": "no such file", cut: "cut short", Path(TWIN.ip_adapter): "not an aligner"}
    for path, word in cases.items():
        assert_one_clear_line(call("sample.py", "--aligner", path, "--output", tmp_path), word)


def test_an_aligner_of_another_guidance_width_is_refused_in_one_line(call, tmp_path):
    ImplicitAligner(128, 96, depth=1, heads=2).save(tmp_path / "other.safetensors")
    result = call("sample.py", "--aligner", tmp_path / "other.safetensors", "--output", tmp_path)
    assert_one_clear_line(result, "trained for an MLLM of width 96")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--batch-size", "0"],
        ["--seed", "-3"],
        ["--resume"],
        ["--output-dir", "/proc/no"],
        ["--norm", "l1"],
    ],
)
def test_train_refuses_bad_input_in_one_line(call, arguments, tmp_path):
    folder = [] if "--output-dir" in arguments else ["--output-dir", tmp_path / "run"]
    assert_one_clear_line(call("train.py", *folder, *arguments))


@pytest.mark.parametrize("flag", ["seed", "num-images", "steps", "passes", "height", "rounds", "scale"])
@pytest.mark.parametrize("value", ["9" * 5, "9" * 12, "9" * 400, "-99999999999", "1e400", "nan"])
def test_numbers_that_nothing_can_be_done_with_are_one_line_soon(call, flag, value, tmp_path):
    if flag == "seed" and value == "9" * 5:
        return  # that is one
    done = call("sample.py", f"--{flag}={value}", "--output", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error:" in done.stderr


def test_dollars_and_halves_of_characters_are_drawn_as_they_stand(tmp_path):
    picture = Image.new("RGB", (8, 8))
    for k, text in enumerate(("costs $5 and $6", r"$\\frac{1}$", "$$", "a_b^{", "\ud83d half", "tab\there")):
        labelled_grid([[(picture, text)]], tmp_path / f"{k}.png", printable(text), text)
        assert (tmp_path / f"{k}.png").stat().st_size > 1000


def test_the_first_image_is_kept_where_the_mllm_prefers_it_and_it_is_said(call, tmp_path, monkeypatch):
    monkeypatch.setattr(IMG, "better", lambda self, first, *_: [k == 0 for k in range(len(first))])
    done = call("sample.py", "--keep-better", "--num-images", 2, "--steps", 2, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("seed 0, round 1: ") for line in lines)
    assert any(line.startswith("seed 1, round 1, first image kept: ") for line in lines)
    first, last = (Image.open(tmp_path / f"seed1-{name}.png").tobytes() for name in ("0-initial", "1-round1"))
    assert first == last


def test_evaluate_refuses_bad_input_in_one_line(call):
    assert_one_clear_line(call("evaluate", "--prompts", 0), "--prompts")
    assert_one_clear_line(call("evaluate", "--json", "/proc/x.json"), "/proc/x.json")
    assert_one_clear_line(call("evaluate", "--json", "/tmp"), "/tmp: is a folder")
    assert_one_clear_line(call("evaluate", "--picture", "/tmp/x.doc"), "as .doc", ".png")
    assert_one_clear_line(call("sample.py", "--width", 99), "--width is 99", "multiples of 8")


def test_evaluate_writes_every_arm_with_its_size_and_interval(call, tmp_path):
    result = call("evaluate", "--prompts", 10, "--split", "validation", "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    arms = results["arms"]
    expected = {"base", "new_seed", "best_of_two_mllm", "best_of_two_oracle", "perfect_tokens", "no_guidance", "img",
                "img_kept", "img_asked"}  # fmt: skip
    assert set(arms) - {"text", "stock_mllm"} == expected
    for arm in ("text", "stock"):
        assert (f"--guidance {arm}" in result.stdout) == (f"{arm}".replace("stock", "stock_mllm") not in arms)
    assert all(arm["n"] == 10 and 0 <= arm["strict"] <= arm["soft"] <= 1 for arm in arms.values())
    assert arms["best_of_two_oracle"]["strict"] >= max(arms["base"]["strict"], arms["new_seed"]["strict"])
    assert set(results["win_rate"]["img_vs_base"]) == {"value", "low", "high", "decided"}


def test_train_stopped_by_sigterm_says_how_to_resume_and_resumes(call, tmp_path):
    cache = tmp_path / "cache"
    run = ["train.py", "--output-dir", tmp_path / "run", "--cache-dir", cache, "--pairs", small_pairs(tmp_path)]
    run += ["--steps", "80", "--eval-prompts", "5", "--save-every", "20"]
    process = subprocess.Popen(  # a process of its own, because a signal ends it
        [sys.executable, *map(str, run)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "--resume" in said, said
    result = call(*run, "--resume")
    assert result.returncode == 0, result.stderr
    assert "strict alignment on 5 validation prompts: base" in result.stdout
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 81))
    made = {p.name for p in (tmp_path / "run").iterdir()}
    assert made >= {"config.json", "metrics.jsonl", "curves.png", "samples.png", "checkpoint.pt", "aligner.safetensors"}
    # The features were computed once; a cache of another making is refused, not used.
    [kept] = cache.glob("*-mllm-*/*.safetensors")
    shutil.copy(Path(small_pairs(tmp_path, rows=40)), kept)
    assert_one_clear_line(call(*run, "--overwrite"), kept.name)
    # Nothing of a run is lost by accident: not to a second start, not to a resumption with other settings.
    assert_one_clear_line(call(*run), "--resume", "--overwrite")
    assert_one_clear_line(call(*run, "--resume", "--lr", "0.5"), "lr", "0.5")


def small_pairs(folder: Path, rows: int = 60) -> Path:
    path = folder / f"pairs-{rows}.parquet"
    if not path.exists():
        pq.write_table(pq.read_table(TWIN.pairs).slice(0, rows), path)
    return path
