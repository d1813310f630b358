"""What is made of a judge's scores: intervals over prompts, win rates without ties."""

import json
from pathlib import Path

import numpy as np
import pytest

from img_minimal.evaluate.compare import ARMS, ImageFolder, Scores
from img_minimal.evaluate.judges import JudgeFiles
from img_minimal.evaluate.prompts import FilePrompt


def fake_scores(folder: Path, texts: list[str], differences: list[float]) -> dict:
    """Results of a judge who gave 1 to every arm but IMG's."""
    prompts = [FilePrompt(k, text) for k, text in enumerate(texts)]
    scores = Scores(ImageFolder(folder, prompts, 0, 4), JudgeFiles("clipscore", "some/model", "some/processor"))
    for prompt, d in zip(prompts, differences):
        scores.kept["prompts"][str(prompt.index)] = {"cut": 0, "scores": {arm: 1 + d * (arm == "img") for arm in ARMS}}
    return scores.results()


def test_intervals_are_over_prompts_and_images_of_one_prompt_count_once(tmp_path):
    differences = np.random.default_rng(0).normal(0.2, 1, 40)
    once = fake_scores(tmp_path, [f"prompt {k}" for k in range(40)], differences)
    often = fake_scores(tmp_path, [f"prompt {k % 40}" for k in range(160)], np.tile(differences, 4))
    naive = fake_scores(tmp_path, [f"prompt {k}" for k in range(160)], np.tile(differences, 4))
    for kind, key in (("difference", "img_minus_base"), ("win_rate", "img_vs_new_seed")):
        a, b, c = (result[kind][key] for result in (once, often, naive))
        assert a["value"] == pytest.approx(b["value"])
        widths = [x["high"] - x["low"] for x in (a, b, c)]
        assert widths[1] == pytest.approx(widths[0]), "four images of a prompt are no four prompts"
        assert widths[2] < 0.6 * widths[0]


def test_ties_are_left_out_of_the_win_rate_and_stay_in_the_difference(tmp_path):
    result = fake_scores(tmp_path, list("abcde"), [1, 1, -1, 0, 0])
    assert result["win_rate"]["img_vs_base"]["value"] == pytest.approx(2 / 3)
    assert result["win_rate"]["img_vs_base"]["decided"] == 3
    assert result["difference"]["img_minus_base"]["value"] == pytest.approx(0.2)


def test_a_win_rate_of_nothing_but_ties_is_null_in_json(tmp_path):
    rate = fake_scores(tmp_path, list("abc"), [0, 0, 0])["win_rate"]["img_vs_base"]
    assert json.loads(json.dumps(rate, allow_nan=False)) == {"value": None, "low": None, "high": None, "decided": 0}
