"""The commands a user types: good input works, bad input is one line and exit code 2, soon."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from campaign import Command
from pair_files import rows, write
from PIL import Image
from refusals import assert_refused
from release_folder import flags, locations

from img_minimal.aligner import ImplicitAligner
from img_minimal.pipeline import IMG
from img_minimal.plots import read_rows
from img_minimal.presets import find_preset

ROOT = Path(__file__).parent.parent
PROMPT = "a red circle above a blue square"


def pictures(folder: Path, *names: str) -> list[bytes]:
    return [Image.open(folder / name).tobytes() for name in names]


def test_sample_saves_both_images_of_img_with_what_was_seen_and_how_long_it_took(
    call, twin, tmp_path
):
    words = ("--prompt", PROMPT, "--seed", 1, "--num-images", 1)
    done = call("sample.py", *words, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "initial: MLLM: " in done.stdout and "oracle: " in done.stdout
    steps = r"in [\d.]+ s: draw \d+%, look \d+%, align \d+%, draw again \d+%, put in words .* GB of"
    assert re.search(steps, done.stdout)
    files = ["seed1-0-initial.png", "seed1-1-round1.png"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*files, "side-by-side.png", "results.json"}
    out = twin(PROMPT, seed=1)
    assert pictures(tmp_path, *files) == [out.initial[0].tobytes(), out.images[0].tobytes()]
    notes = Image.open(tmp_path / files[1]).text
    assert (notes["prompt"], notes["seed"], notes["stage"]) == (PROMPT, "1", "round 1")
    [row] = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [image["file"] for image in row["images"]] == files
    assert all(image["MLLM"] and image["oracle"] for image in row["images"])


def test_sample_begins_with_a_picture_that_one_has(call, tmp_path):
    Image.new("RGB", (100, 80), "white").save(tmp_path / "mine.png")
    words = ("--image", tmp_path / "mine.png", "--num-images", 2, "--steps", 2)
    done = call("sample.py", *words, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out" / "seed0-0-given.png").size == (100, 80)
    first, second = pictures(tmp_path / "out", "seed0-1-round1.png", "seed1-1-round1.png")
    assert first != second


@pytest.mark.parametrize("sweep", ["scale=0,1.5", "passes=1,2"])
def test_sample_draws_the_prompts_of_a_file_and_a_sweep(call, tmp_path, sweep):
    (tmp_path / "two.txt").write_text("a red circle\na blue square\n")
    words = ["--prompt-file", tmp_path / "two.txt", "--num-images", 1, "--steps", 2, "--no-explain"]
    words += ["--guidance-scale", 3, "--negative-prompt", "a green cross", "--sweep", sweep]
    done = call("sample.py", *words, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"prompt0-seed0-1-round1.png", "prompt1-seed0-1-round1.png", "sweep.png"}
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert (settings["negative_prompt"], settings["guidance_scale"]) == ("a green cross", 3.0)
    words = ("--one-look", "--prompt-file", tmp_path / "two.txt")
    assert_refused(call("sample.py", *words, "--output", tmp_path), "seeds of one prompt")


def test_the_first_image_is_kept_where_the_mllm_prefers_it(call, tmp_path, monkeypatch):
    monkeypatch.setattr(IMG, "better", lambda self, first, *_: [k == 0 for k in range(len(first))])
    words = ("--keep-better", "--num-images", 2, "--steps", 2)
    done = call("sample.py", *words, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    kept = [line for line in done.stdout.splitlines() if "kept: the first image" in line]
    assert [line.split(": ")[0] for line in kept] == ["seed 1, round 1"]
    first, last = pictures(tmp_path, "seed1-0-initial.png", "seed1-1-round1.png")
    assert first == last


def test_one_look_at_one_draft_is_saved_once_with_all_images_of_the_prompt(call, tmp_path):
    words = ("--one-look", "--draft-steps", 2, "--num-images", 3, "--steps", 3)
    done = call("sample.py", *words, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    stages = [[image["stage"] for image in result["images"]] for result in results]
    assert stages == [["draft", "round 1"], ["round 1"], ["round 1"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "a red zebra"], "zebra"),
        (["--seed", "-1"], "--seed is -1, expected 0 to"),
        (["--steps", "0"], "--steps is 0, expected 1 to 10,000"),
        (["--draft-steps", "0"], "--draft-steps is 0, expected 1"),
        (["--steps", "5", "--draft-steps", "6"], "--draft-steps is 6, above the 5 of --steps"),
        (["--model", "nope"], "tiny-sdxl"),
        (["--output", "/proc/nowhere"], "/proc/nowhere: cannot be written"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--image", __file__], "test_commands.py"),
        (["--sweep", "colour=1"], "--sweep is 'colour=1', expected a name of scale"),
        (["--sweep", "scale=a"], "as in scale=0,0.2"),
        (["--sweep", "steps=2,0"], "--steps is 0, expected 1 to 10,000"),
        (["--sweep", "passes=1,1000000000"], "--passes is 1000000000, expected 1 to 100"),
        (["--sweep", "scale=nan"], "--scale is nan"),
        (["--sweep", "guidance_scale=-1"], "--guidance-scale is -1.0, expected 0 to 1,000"),
        (["--mllm-device", "cuda:77"], "--mllm-device is 'cuda:77', expected one of: cpu"),
        (["--width", "99"], "--width is 99, this model draws multiples of 8"),
        (["--aligner", "nowhere.pth"], "check --aligner"),
    ],
)
def test_sample_refuses_bad_input(call, tmp_path, arguments, words):
    assert_refused(call("sample.py", "--output", tmp_path, *arguments), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", 0], "--prompts is 0"),
        (["--prompts", 10**9], "--prompts is 1000000000, expected 5 to 100,000"),
        (["--json", "/proc/x.json"], "/proc/x.json"),
        (["--json", "/tmp"], "/tmp: cannot be written (a folder"),
        (["--picture", "/tmp/x.doc"], "cannot be drawn as .doc; --picture takes .png"),
        (["--draft-steps", 11], "--draft-steps is 11, above the 10 of --steps"),
        (["--model", "sdxl", "--only-wrong"], "leave out --draft-steps and --only-wrong"),
        (["--budget", "--draft-steps", 3], "leave out --draft-steps and --only-wrong"),
        (["--budget", "--prompt-file", __file__], "--budget needs a twin's own prompts"),
    ],
)
def test_evaluate_refuses_bad_input(call, arguments, words):
    assert_refused(call("evaluate", *arguments), words)


def test_evaluate_writes_every_arm_with_its_size_and_interval_also_with_drafts(call, tmp_path):
    words = ("--prompts", 5, "--split", "validation", "--json", tmp_path / "r.json")
    done = call("evaluate", *words, "--draft-steps", 5, "--only-wrong")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    arms, settings = results["arms"], results["settings"]
    assert (settings["draft_steps"], settings["only_wrong"]) == (5, True)
    always = "base new_seed best_of_two_mllm best_of_two_oracle perfect_tokens no_guidance".split()
    assert arms.keys() - {"text", "stock_mllm"} == {*always, "img"}
    for arm, guidance in (("text", "text"), ("stock_mllm", "stock")):
        assert (f"--guidance {guidance}" in done.stdout) == (arm not in arms)
    for arm in arms.values():
        assert arm["n"] == 5 and 0 <= arm["strict"] <= arm["soft"] <= 1
    best = max(arms["base"]["strict"], arms["new_seed"]["strict"])
    assert arms["best_of_two_oracle"]["strict"] >= best
    assert results["win_rate"]["img_vs_base"].keys() == {"value", "low", "high", "decided"}


def test_an_aligner_is_evaluated_and_drawn_with_the_guidance_it_was_trained_with(call, tmp_path):
    aligner = ImplicitAligner.from_file(find_preset("tiny-sdxl").sampling.text_aligner)
    aligner.guide = "text"
    aligner.save(tmp_path / "a.safetensors")
    commands = {"evaluate": ["--prompts", 5, "--only-img"], "sample.py": ["--num-images", 1]}
    for name, words in commands.items():
        words += ["--aligner", tmp_path / "a.safetensors", "--steps", 2, "--output", tmp_path]
        assert_refused(call(name, *words), "trained with text", "choose --guidance text")
        done = call(name, *words, "--guidance", "text")
        assert done.returncode == 0, done.stderr


def test_train_stopped_by_sigterm_says_how_to_resume_and_resumes(call, tmp_path):
    folder = tmp_path / "run"
    words = ["--output-dir", folder, "--cache-dir", tmp_path / "cache", "--max-pairs", 60]
    words += ["--batch-size", 8, "--steps", 60, "--save-every", 20, "--eval-prompts", 5]
    metrics, command = folder / "metrics.jsonl", Command("train", *words)
    deadline = time.monotonic() + 120
    while not read_rows(metrics) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(command.process.pid, signal.SIGTERM)
    code, output = command.end()
    assert code == 130 and "--resume" in output, output

    done = call("train.py", *words, "--resume")
    assert done.returncode == 0, done.stderr
    assert "strict alignment on 5 validation prompts" in done.stdout
    assert "b*, the best multiple of the aligner's steps" in done.stdout
    assert [row["step"] for row in read_rows(metrics)] == list(range(1, 61))
    made = {path.name for path in folder.iterdir()}
    pictures = {"curves.png", "samples.png"}
    assert (
        made >= {"config.json", "metrics.jsonl", "checkpoint.pt", "aligner.safetensors"} | pictures
    )
    # Nothing of a run is lost by accident.
    assert_refused(call("train.py", *words), "--overwrite")
    assert_refused(call("train.py", *words, "--resume", "--lr", 0.5), "lr 0.5")


COMMANDS = ["sample.py", "train.py", "-m img_minimal.plots", "-m img_minimal.evaluate"]
COMMANDS += ["-m img_minimal.bench", "-m img_minimal.tiny.build"]
COMMANDS += [f"tutorials/{path.name}" for path in sorted((ROOT / "tutorials").glob("[0-9]*.py"))]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_there_before_torch_is(command):
    words = [sys.executable, "-X", "importtime", *command.split(), "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr[-500:]
    assert not re.search(r"\| +(torch|diffusers|transformers|matplotlib)$", done.stderr, re.M)


def test_training_real_models_imports_nothing_of_the_tiny_world(release, tmp_path):
    files = locations(release)
    del files["base"], files["aligner"]
    words = flags(files) + [
        f"--pairs={write(tmp_path / 'pairs', rows(12))}",
        "--steps=1",
        "--batch-size=2",
    ]
    words += [f"--output-dir={tmp_path / 'run'}", "--model=sdxl"]
    code = """
import sys, train
assert train.main() == 0
print([name for name in sys.modules if name.startswith("img_minimal.tiny")])"""
    words = [sys.executable, "-c", code, *words]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr[-2000:]


def test_the_examples_of_the_readme_run():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert examples
    for example in examples:
        names: dict = {}
        exec(example, names)
        out = names["out"]
        assert out.initial[0].size == out.images[0].size == (64, 64) and out.said[0]
