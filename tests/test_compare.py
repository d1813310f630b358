"""The evaluation over a prompt file, on the shipped twin: resumable, never mixing two runs, judged over prompts."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_judges import make_clip

import img_minimal.evaluate.compare as comparison
from img_minimal.aligner import ImplicitAligner
from img_minimal.sdxl import SDXLBackbone
from img_minimal.evaluate.__main__ import Config as CompareOptions
from img_minimal.evaluate.compare import ARMS, compare
from img_minimal.evaluate.judges import ClipJudge, JudgeFiles
from img_minimal.load import load_img
from img_minimal.mllm import MLLM
from img_minimal.presets import find_preset, with_overrides
from img_minimal.devices import Placement
from img_minimal.cli import UserError

ROOT = Path(__file__).parent.parent
PRESET = with_overrides(find_preset("tiny-sdxl"), sampling_steps=2, mllm_batch=2)
ROWS = [
    {"tag": "single_object", "prompt": "a red circle"},
    {"tag": "two_object", "prompt": "a purple cross and a blue square"},
    {"tag": "two_object", "prompt": "a red cross and an orange circle"},
    {"tag": "counting", "prompt": "three green squares"},
    {"tag": "complex", "prompt": "a blue circle, a red square and a purple cross"},
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def options(prompt_file: Path, clip: Path, output: Path, **more: object) -> CompareOptions:
    settings = dict(judges="clipscore,pickscore", clipscore_model=str(clip), pickscore_model=str(clip)) | more
    return CompareOptions(prompt_file=str(prompt_file), output=str(output), **settings)


def run(wanted: CompareOptions, preset=PRESET, seed: int = 0, **more: object) -> dict:
    return compare(wanted, preset, **dict(count=None, seed=seed) | more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, prompt_file, clip) -> tuple[Path, dict]:
    """A run that nothing stopped: its folder and its results."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    return folder, run(options(prompt_file, clip, folder))


def pixels(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def forbid(monkeypatch, owner: object, name: str) -> None:
    def called(*args, **kwargs):
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(owner, name, called)


def test_every_arm_of_every_prompt_is_kept_under_its_prompt_seed_and_name(whole):
    folder, _ = whole
    names = {f"p{k:05d}-s{100_000 + k + (arm == 'new_seed') * 1_000_000}-{arm}.png" for k in range(5) for arm in ARMS}
    assert set(pixels(folder)) == names
    assert all(Image.open(path).size == (64, 64) for path in folder.glob("*.png"))
    assert not list(folder.glob(".*")), "nothing half-written is left"


def test_the_images_are_those_that_img_itself_draws_from_the_same_seeds(whole):
    folder, _ = whole
    base, ours = load_img(PRESET).stages([row["prompt"] for row in ROWS[:2]], [100_000, 100_001])
    for arm, images in (("base", base), ("img", ours)):
        for k in range(2):
            kept = np.asarray(Image.open(folder / f"p{k:05d}-s{100_000 + k}-{arm}.png"))
            assert np.array_equal(kept, (images[k] * 255).round().byte().permute(1, 2, 0).numpy())
    assert not (base * 255).round().equal((ours * 255).round()), "or the two arms would show nothing"


def test_the_scores_are_the_judges_own_of_the_kept_images(whole, clip):
    folder, results = whole
    judge = ClipJudge.open(JudgeFiles.find("clipscore", str(clip)))
    for arm in ARMS:
        paths = sorted(folder.glob(f"*-{arm}.png"))
        scores = judge.score([Image.open(path) for path in paths], [row["prompt"] for row in ROWS])
        assert results["judges"]["clipscore"]["arms"][arm]["mean"] == pytest.approx(scores.mean(), abs=1e-4)


def test_results_have_the_form_of_the_oracles_and_a_part_for_each_category(whole):
    folder, results = whole
    assert set(results["judges"]) == {"clipscore", "pickscore"}
    for one in results["judges"].values():
        assert list(one["arms"]) == list(ARMS) and all(arm["n"] == 5 for arm in one["arms"].values())
        assert set(one["win_rate"]) == {"img_vs_base", "img_vs_new_seed", "img_vs_no_guidance"}
        assert set(one["win_rate"]["img_vs_base"]) == {"value", "low", "high", "decided"}
        difference = one["difference"]["img_minus_base"]
        assert difference["value"] == pytest.approx(one["arms"]["img"]["mean"] - one["arms"]["base"]["mean"])
        assert difference["low"] <= difference["value"] <= difference["high"]
        assert {c: part["n"] for c, part in one["by_category"].items()} == {
            "complex": 1, "counting": 1, "single_object": 1, "two_object": 2,
        }  # fmt: skip
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))


def test_a_finished_run_is_read_and_neither_drawn_nor_judged_again(whole, prompt_file, clip, monkeypatch):
    folder, results = whole
    forbid(monkeypatch, comparison, "load_img")
    forbid(monkeypatch, ClipJudge, "open")
    assert run(options(prompt_file, clip, folder)) == results


@pytest.mark.parametrize("drawn", [1, 5, 9])
def test_a_run_killed_while_drawing_draws_only_the_rest_and_ends_in_the_same_numbers(
    whole, prompt_file, clip, tmp_path, monkeypatch, drawn
):
    original, calls = SDXLBackbone.draw, []

    def draw(self, prompts, seeds, tokens=None, *args, **kwargs):
        if len(calls) == drawn:
            raise KeyboardInterrupt
        calls.append((tuple(seeds), None if tokens is None else tokens.sum().item()))
        return original(self, prompts, seeds, tokens, *args, **kwargs)

    monkeypatch.setattr(SDXLBackbone, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        run(options(prompt_file, clip, tmp_path))
    before, drawn = calls[:], -1
    results = run(options(prompt_file, clip, tmp_path))
    assert len(before) + len(calls[len(before) :]) == 3 * len(ARMS) == len(set(calls)), "twelve batches, each once"
    assert pixels(tmp_path) == pixels(whole[0])
    assert results["judges"] == whole[1]["judges"]


def test_a_run_killed_while_judging_judges_only_the_rest_and_ends_in_the_same_numbers(
    whole, prompt_file, clip, tmp_path, monkeypatch
):
    for name, data in pixels(whole[0]).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "settings.json").write_bytes((whole[0] / "settings.json").read_bytes())
    kept = json.loads((whole[0] / "scores-clipscore.json").read_text())
    kept["prompts"] = {k: row for k, row in kept["prompts"].items() if int(k) < 2}
    (tmp_path / "scores-clipscore.json").write_text(json.dumps(kept))
    original, judged = ClipJudge.score, []
    monkeypatch.setattr(ClipJudge, "score", lambda self, i, texts: judged.append(texts) or original(self, i, texts))
    results = run(options(prompt_file, clip, tmp_path, judges="clipscore"))
    assert [len(texts) for texts in judged] == [8, 4], "the batch that is done is not judged again"
    assert results["judges"]["clipscore"] == whole[1]["judges"]["clipscore"]


def test_a_judge_may_be_added_later_without_drawing_again(whole, prompt_file, clip, monkeypatch):
    forbid(monkeypatch, comparison, "load_img")
    wanted = options(prompt_file, clip, whole[0], judges="hpsv2", hpsv2_model=str(clip))
    mean = run(wanted)["judges"]["hpsv2"]["arms"]["img"]["mean"]
    assert mean == pytest.approx(100 / np.exp(3.1) * whole[1]["judges"]["pickscore"]["arms"]["img"]["mean"], rel=1e-4)


def other_prompts(folder: Path) -> Path:
    path = folder / "others.txt"
    path.write_text("a red circle\n" * 5)
    return path


@pytest.mark.parametrize("name", ["seed", "scale", "sampling_steps", "mllm_batch", "prompts", "aligner"])
def test_a_folder_of_a_run_with_another_setting_is_refused_with_the_reason(
    whole, prompt_file, clip, tmp_path, monkeypatch, name
):
    folder, _ = whole
    forbid(monkeypatch, comparison, "load_img")
    kept, wanted, more = pixels(folder), options(prompt_file, clip, folder), {}
    if name == "seed":
        more = {"seed": 1}
    elif name in ("scale", "sampling_steps", "mllm_batch"):
        more = {"preset": replace(PRESET, **{name: 3})}
    elif name == "prompts":
        wanted = replace(wanted, prompt_file=str(other_prompts(tmp_path)))
    else:
        (tmp_path / "aligner.safetensors").write_bytes(Path(PRESET.aligner).read_bytes() + b"retrained")
        more = {"preset": replace(PRESET, aligner=str(tmp_path / "aligner.safetensors"))}
    with pytest.raises(UserError, match=f"another {name} .*--output") as error:
        run(wanted, **more)
    assert "\n" not in str(error.value) and pixels(folder) == kept


def test_scores_by_another_model_of_the_same_judge_are_not_mixed(whole, prompt_file, clip, tmp_path):
    other = make_clip(tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(UserError, match=r"scores-clipscore.json was made with other files.*--output"):
        run(options(prompt_file, other, whole[0], judges="clipscore"))


def test_a_damaged_score_line_and_a_damaged_image_are_named(whole, prompt_file, clip, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for path in whole[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    scores = folder / "scores-clipscore.json"
    scores.write_text(scores.read_text().replace('"cut"', '"cot"', 1))
    with pytest.raises(UserError, match=r"scores-clipscore.json: unreadable"):
        run(options(prompt_file, clip, folder))
    scores.unlink()
    image = folder / "p00002-s100002-img.png"
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(UserError, match="p00002-s100002-img.png: damaged image; delete it"):
        run(options(prompt_file, clip, folder))
    image.unlink()
    assert run(options(prompt_file, clip, folder)) == whole[1], "the one image was drawn again, to the same bits"


def test_a_missing_judge_is_found_before_anything_is_drawn(prompt_file, clip, tmp_path, monkeypatch):
    forbid(monkeypatch, comparison, "load_img")
    with pytest.raises(UserError, match="/nowhere: no such file or folder; check --pickscore-model"):
        run(options(prompt_file, clip, tmp_path, pickscore_model="/nowhere"))
    with pytest.raises(UserError, match="unknown judge 'taste'"):
        run(options(prompt_file, clip, tmp_path, judges="clipscore,taste"))
    forbid(monkeypatch, ClipJudge, "open")
    with pytest.raises(AssertionError):  # a folder without images belongs to nobody: other settings are welcome
        run(options(prompt_file, clip, tmp_path), seed=7)


def test_the_diffusion_model_and_the_mllm_are_let_go_before_a_judge_comes(prompt_file, clip, tmp_path, monkeypatch):
    made, load, open_judge = [], load_img, ClipJudge.open

    def watched(*args):
        img = load(*args)
        made.extend(weakref.ref(part) for part in (img.backbone.pipe.unet, img.guide.model, img.aligner))
        return img

    def open_after(*args):
        # The first two calls are the look at the files before anything is drawn.
        assert all(part() is None for part in made), "a big model is still in memory"
        return open_judge(*args)

    monkeypatch.setattr(comparison, "load_img", watched)
    monkeypatch.setattr(ClipJudge, "open", open_after)
    run(options(prompt_file, clip, tmp_path))
    assert len(made) == 3


@pytest.mark.parametrize(("group", "times"), [(64, 1), (2, 3)])
def test_with_offloading_each_part_is_on_the_device_when_it_is_used_and_the_images_stay_the_same(
    whole, prompt_file, clip, tmp_path, monkeypatch, group, times
):
    monkeypatch.setattr(comparison, "GROUP", group)
    moves, used, placements = [], set(), []
    move = Placement._move

    def spy(owner: type, name: str, part: str) -> None:
        original = getattr(owner, name)

        def method(self, *args, **kwargs):
            used.add((part, placements[-1].resident))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, method)

    def moved(self, name: str, away: bool) -> None:
        if self.resident:
            placements.append(self)
            moves.extend([] if away else [name])
        move(self, name, away)

    monkeypatch.setattr(Placement, "_move", moved)
    spy(MLLM, "guidance", "mllm")
    spy(ImplicitAligner, "forward", "aligner")
    results = run(options(prompt_file, clip, tmp_path), replace(PRESET, offload=True))
    assert used == {("mllm", "mllm"), ("aligner", "aligner")}
    assert moves.count("mllm") == times, "the biggest model is moved in once for a group of prompts"
    assert pixels(tmp_path) == pixels(whole[0]) and results["judges"] == whole[1]["judges"]


def test_a_run_may_be_resumed_with_offloading(whole, prompt_file, clip):
    assert run(options(prompt_file, clip, whole[0]), replace(PRESET, offload=True)) == whole[1]


def test_prompts_that_are_too_long_are_counted_and_said(whole, prompt_file, clip, capsys):
    results = run(options(prompt_file, clip, whole[0]))
    assert results["judges"]["clipscore"]["truncated"] == 1
    assert "1 of 5 prompts are longer than CLIPScore can read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"prompt_file": None}, "tiny-sdxl has no .* --prompt-file"),
        ({"judges": " , "}, "--judges is empty, expected some of: pickscore"),
        ({"output": "/proc/nowhere"}, "/proc/nowhere: cannot be written"),
    ],
)
def test_bad_options_are_one_line(prompt_file, clip, tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        run(replace(options(prompt_file, clip, tmp_path), **more))


def test_the_twin_refuses_prompts_that_are_not_of_its_world(clip, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a red circle\na photo of a bench\n")
    with pytest.raises(UserError, match="a photo of a bench"):
        run(options(path, clip, tmp_path / "run"))


def test_the_command_draws_judges_prints_and_writes_what_it_was_asked_for(call, prompt_file, clip, tmp_path):
    command = ["evaluate", "--model", "tiny-sdxl", "--prompt-file", prompt_file, "--judges", "clipscore"]
    command += ["--json", tmp_path / "r.json", "--picture", tmp_path / "p.png", "--prompts", 5]
    result = call(*command, "--clipscore-model", clip, "--output", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "CLIPScore" in result.stdout and "same compute, new seed" in result.stdout and "two_object" in result.stdout
    assert json.loads((tmp_path / "r.json").read_text())["judges"]["clipscore"]["n"] == 5
    assert Image.open(tmp_path / "p.png").width > 500
    result = call(*command, "--clipscore-model", tmp_path / "none", "--output", tmp_path / "other")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2
    assert last.startswith(f"error: {tmp_path}/none: no such file or folder; check --clipscore-model")
