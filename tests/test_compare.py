"""Evaluation on a prompt file: resumable, never mixing two runs, with intervals over prompts."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import refused
from test_judges import make_clip

from img_minimal.evaluate import __main__ as command
from img_minimal.evaluate import compare
from img_minimal.evaluate.compare import ARMS
from img_minimal.evaluate.intervals import mean_interval, win_rate
from img_minimal.evaluate.judges import Judge, find_judges
from img_minimal.files import to_pil
from img_minimal.pipeline import IMG
from img_minimal.presets import find_preset
from img_minimal.sdxl import SDXL
from img_minimal.tiny.grammar import parse
from img_minimal.tiny.oracle import judge_pictures

PRESET = find_preset("tiny-sdxl").changed(steps=2, draw_batch=2, mllm_batch=2)
compare.BATCH = 2
ROWS = [
    {"tag": "single_object", "prompt": "a red circle"},
    {"tag": "two_object", "prompt": "a purple cross and a blue square"},
    {"tag": "two_object", "prompt": "a red cross and an orange circle"},
    {"tag": "counting", "prompt": "three green squares"},
    {"tag": "complex", "prompt": "a blue circle, a red square and a purple cross"},
]
TEXTS = [row["prompt"] for row in ROWS]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> command.Config:
    """Return a command line that judges ROWS with two judges."""
    folder = tmp_path_factory.mktemp("files")
    prompt_file = folder / "evaluation_metadata.jsonl"
    prompt_file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    clip = str(make_clip(folder / "clip"))
    return command.Config(
        prompt_file=str(prompt_file),
        judges="clipscore,pickscore",
        clipscore_model=clip,
        pickscore_model=clip,
        output=str(folder / "whole"),
    )


def evaluate(config: command.Config, preset=PRESET, **changes: object) -> dict:
    return command.evaluate_file(replace(config, **changes), preset, {})


@pytest.fixture(scope="module")
def whole(config) -> tuple[Path, dict]:
    """Return the folder and the results of a run that nothing stopped."""
    return Path(config.output), evaluate(config)


def pixels(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def forbid(monkeypatch, owner: object, name: str) -> None:
    monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail(f"{name} was called"))


def test_images_are_those_that_img_draws_and_are_named_by_prompt_seed_and_arm(whole):
    folder, _ = whole
    assert len(pixels(folder)) == 5 * len(ARMS) and not list(folder.glob(".*"))
    assert (folder / "p00004-s1100004-new_seed.png").exists()
    stages = IMG(preset=PRESET).stages(TEXTS[:2], [100_000, 100_001])
    for arm, images in zip(("base", "img"), stages):
        for k, image in enumerate(to_pil(images)):
            saved = Image.open(folder / f"p{k:05d}-s{100_000 + k}-{arm}.png")
            assert np.array_equal(saved, image)


def test_results_hold_the_judges_scores_of_the_images_and_a_part_for_each_category(whole, config):
    folder, results = whole
    [judge] = find_judges("clipscore", None, clipscore_model=config.clipscore_model)
    judge = judge.open()
    result, means = results["judges"]["clipscore"], {}
    for arm in ARMS:
        images = [Image.open(path) for path in sorted(folder.glob(f"*-{arm}.png"))]
        means[arm] = judge.score(images, TEXTS).mean()
        assert result["arms"][arm]["clipscore"] == pytest.approx(means[arm], abs=1e-4)
    gain = result["difference"]["img_minus_base"]["value"]
    assert gain == pytest.approx(means["img"] - means["base"], abs=1e-4)
    last = judge.score([Image.open(folder / "p00004-s100004-img.png")], TEXTS[-1:])
    by_category = result["arms"]["img"]["by_category"]
    assert by_category.keys() == {"complex", "counting", "single_object", "two_object"}
    assert by_category["complex"] == pytest.approx(last[0], abs=1e-4)


def test_a_finished_run_is_read_and_a_judge_may_be_added_without_drawing(
    whole, config, monkeypatch
):
    forbid(monkeypatch, command, "IMG")
    hpsv2 = evaluate(config, judges="hpsv2", hpsv2_model=config.clipscore_model)["judges"]["hpsv2"]
    pickscore = whole[1]["judges"]["pickscore"]["arms"]["img"]["pickscore"]
    assert hpsv2["arms"]["img"]["hpsv2"] == pytest.approx(100 / np.exp(3.1) * pickscore, rel=1e-4)
    assert evaluate(config) == whole[1]


@pytest.mark.parametrize("drawn", [1, 5, 9])
def test_a_run_killed_while_drawing_draws_only_the_rest_and_ends_in_the_same_numbers(
    whole, config, tmp_path, monkeypatch, drawn
):
    original, calls = SDXL.draw, []

    def draw(self, prompts, seeds, tokens=None, **options):
        if len(calls) == drawn:
            raise KeyboardInterrupt
        calls.append((tuple(seeds), None if tokens is None else tokens.sum().item()))
        return original(self, prompts, seeds, tokens, **options)

    monkeypatch.setattr(SDXL, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, output=str(tmp_path))
    drawn = -1
    results = evaluate(config, output=str(tmp_path))
    assert len(calls) == 3 * len(ARMS) == len(set(calls)), "twelve batches, each once"
    assert pixels(tmp_path) == pixels(whole[0])
    assert results["judges"] == whole[1]["judges"]


def test_the_oracle_judges_a_twins_images_by_default_and_real_ones_never(whole, config, tmp_path):
    images = [Image.open(path) for path in sorted(whole[0].glob("*-img.png"))]
    verdicts = judge_pictures(images, list(map(parse, TEXTS)))
    judges = evaluate(config, judges=None)["judges"]
    for mark in ("strict", "soft"):
        expected = np.mean([getattr(verdict, mark) for verdict in verdicts])
        assert judges[mark]["arms"]["img"][mark] == pytest.approx(expected)
    with refused("unknown judge 'oracle'", "pickscore, hpsv2, clipscore"):
        find_judges("oracle", find_preset("sdxl").world)


@pytest.mark.parametrize("name", ["seed", "scale", "prompts", "aligner"])
def test_a_folder_of_a_run_with_another_setting_is_refused_with_the_reason(
    whole, config, tmp_path, monkeypatch, name
):
    forbid(monkeypatch, command, "IMG")
    before = pixels(whole[0])
    prompt_file, aligner = tmp_path / "others.txt", tmp_path / "aligner.safetensors"
    prompt_file.write_text("a red circle\n" * 5)
    aligner.write_bytes(Path(PRESET.sampling.aligner).read_bytes() + b"retrained")
    changes = {
        "seed": {"seed": 1},
        "scale": {"preset": PRESET.changed(scale=3)},
        "prompts": {"prompt_file": str(prompt_file)},
        "aligner": {"preset": PRESET.changed(aligner=str(aligner))},
    }
    with refused(f"another {name} ", "--output"):
        evaluate(config, **changes[name])
    assert pixels(whole[0]) == before


def test_a_damaged_image_is_named_and_drawn_again_to_the_same_bits(whole, config, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    image = folder / "p00002-s100002-img.png"
    image.write_bytes(image.read_bytes()[:300])
    with refused("p00002-s100002-img.png: damaged image; delete it"):
        evaluate(config, output=str(folder))
    image.unlink()
    assert evaluate(config, output=str(folder)) == whole[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pickscore_model": "/nowhere"}, ["/nowhere: no such file", "check --pickscore-model"]),
        ({"judges": "clipscore,taste"}, ["unknown judge 'taste'", "pickscore, hpsv2, clipscore"]),
        ({"judges": " , "}, ["--judges is empty, expected some of: pickscore"]),
        ({"prompt_file": None}, ["tiny-sdxl has no", "--prompt-file"]),
        ({"output": "/proc/nowhere"}, ["/proc/nowhere: cannot be written"]),
        ({"prompt_file": __file__.replace(".py", ".txt")}, ["cannot be read"]),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_drawn(
    config, tmp_path, monkeypatch, changes, words
):
    forbid(monkeypatch, command, "IMG")
    with refused(*words):
        evaluate(config, **({"output": str(tmp_path)} | changes))


def test_the_twin_refuses_prompts_that_are_not_of_its_world(config, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\na photo of a bench\n")
    with refused("a photo of a bench", "colours: red", "circle"):
        evaluate(config, prompt_file=str(tmp_path / "p.txt"))


def test_big_models_are_freed_before_a_judge_comes(config, tmp_path, monkeypatch):
    opened, open_judge = [], Judge.open

    def open_img(**options):
        img = IMG(**options)
        for part in (img.backbone.pipe.unet, img.guide.model, img.aligner):
            opened.append(weakref.ref(part))
        return img

    def open_after(*arguments):
        assert all(part() is None for part in opened), "a big model is still in memory"
        return open_judge(*arguments)

    monkeypatch.setattr(command, "IMG", open_img)
    monkeypatch.setattr(Judge, "open", open_after)
    evaluate(config, output=str(tmp_path))
    assert len(opened) == 3


def test_offloading_leaves_the_images_as_they_are_and_may_change_on_resume(whole, config, tmp_path):
    offloaded = PRESET.changed(offload=True)
    evaluate(config, offloaded, output=str(tmp_path))
    assert pixels(tmp_path) == pixels(whole[0])
    assert evaluate(config, offloaded) == whole[1]


def test_the_command_prints_tables_and_warnings_and_writes_what_it_is_asked_for(
    call, config, tmp_path
):
    line = ["evaluate", "--prompt-file", config.prompt_file, "--judges", "clipscore"]
    line += ["--json", tmp_path / "r.json", "--picture", tmp_path / "p.png", "--prompts", 5]
    line += ["--clipscore-model", config.clipscore_model, "--output", tmp_path / "run"]
    result = call(*line)
    assert result.returncode == 0, result.stderr
    assert "two_object" in result.stdout
    assert "1 of 5 prompts are longer than CLIPScore can read" in result.stderr
    written = (tmp_path / "r.json").read_text()
    assert written == (tmp_path / "run" / "results.json").read_text()
    assert json.loads(written)["judges"]["clipscore"]["truncated"] == 1
    assert Image.open(tmp_path / "p.png").width > 500


# Intervals


def test_intervals_are_over_prompts_and_images_of_one_prompt_count_once():
    differences = np.tile(np.random.default_rng(0).normal(0.2, 1, 40), 4)
    widths = []
    for count, prompts in ((40, 40), (160, 40), (160, 160)):
        texts = [str(k % prompts) for k in range(count)]
        interval = mean_interval(differences[:count], texts)
        widths.append(interval["high"] - interval["low"])
    assert widths[1] == pytest.approx(widths[0]) and widths[2] < 0.6 * widths[0]


@pytest.mark.parametrize(
    ("img", "value", "decided"), [([2, 2, 0, 1, 1], 2 / 3, 3), ([1, 1, 1, 1, 1], None, 0)]
)
def test_ties_are_left_out_of_the_win_rate_and_nothing_decided_is_null(img, value, decided):
    rate = win_rate(np.array(img), np.ones(5), list("abcde"))
    assert rate["decided"] == decided
    assert rate["value"] == (value and pytest.approx(value))
    json.dumps(rate, allow_nan=False)
