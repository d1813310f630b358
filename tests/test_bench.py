"""The benchmarks run, on shapes that take no time. Their numbers are printed and never tested."""

import json
import sys
import time

import pytest

from img_minimal.bench import __main__ as bench
from img_minimal.bench import memory, true_size
from img_minimal.presets import PRESETS, TWINS, find_preset


def test_calls_are_made_in_turn_after_a_round_to_warm_up():
    calls, order = {}, []
    for name, seconds in (("a", 0.001), ("b", 0.02)):
        calls[name] = lambda name=name, seconds=seconds: order.append(name) or time.sleep(seconds)
    columns = bench.in_turn(calls, rounds=3)
    assert order == ["a", "b"] * 4 and columns["measured"] == ["a", "b"]
    first, second = zip(*(columns[name] for name in ("lowest", "ratio", "highest")))
    assert first == (1, 1, 1) and 1 < second[0] <= second[1] <= second[2]


@pytest.mark.parametrize(
    ("subject", "small"),
    [("aligner", {"guidance_width": 32}), ("features", {"pairs": 48}), ("sampling", {"count": 1})],
)
def test_every_subject_has_calls_that_run(subject, small, twin, monkeypatch):
    monkeypatch.setattr(bench, "PUBLIC_HEADS", {"sdxl": (0, (16, 64))})
    with twin.drawing(steps=1):
        columns = bench.in_turn(bench.MEASURES[subject](twin, **small), rounds=1)
    assert columns["GFLOP ratio"][0] == 1
    if subject == "sampling":
        operations = dict(zip(columns["measured"], columns["GFLOP ratio"]))
        assert operations["IMG"] > 2, "it draws twice"
        assert operations["IMG, one look at the draft"] < operations["IMG"] + 1


def test_without_a_subject_all_that_is_timed_is_measured(monkeypatch, capsys):
    measures = {"wait": lambda img: {"x": dict, "y": dict}, "sleep": lambda img: {"z": dict}}
    monkeypatch.setattr(bench, "MEASURES", measures)
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert bench.main() == 0
    rows = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    assert rows == ["measured", "---", "x", "y", "measured", "---", "z"]


def settings(folder: str) -> dict:
    """Read a config.json; what is built is in the run's dtype and not in the file's."""
    text = (TWINS / folder / "config.json").read_text()
    return json.loads(text.replace('"bfloat16"', '"float32"'))


def twin_sizes(model: str, encoder: str) -> dict[str, dict]:
    """Read a twin's settings; its texts and images become as long and large as the public ones."""
    sizes = {"image_encoder": settings(encoder) | {"image_size": 224, "patch_size": 56}}
    for part in memory.SIZES[model].keys() - sizes:
        more = {"max_position_embeddings": 77} if "text" in part else {}
        sizes[part] = settings(f"{model}/{part}") | more
    return sizes


@pytest.mark.parametrize(("model", "offload"), [("sdxl", "none"), ("flux", "models")])
def test_the_run_at_true_size_runs_with_the_twins_shapes(
    model, offload, monkeypatch, capsys, tmp_path
):
    encoder = {"sdxl": "image_encoder", "flux": "flux_image_encoder"}[model]
    sizes = {model: twin_sizes(model, encoder), "llava-7b": settings("llava-stock")}
    monkeypatch.setattr(memory, "SIZES", sizes)
    monkeypatch.setattr(bench, "PUBLIC_HEADS", {model: (0, (4, 64))})
    small = find_preset(model).changed(steps=2, height=64, width=64)
    monkeypatch.setitem(PRESETS, model, small)
    monkeypatch.setattr(bench.features, "__defaults__", (12,))
    monkeypatch.setattr(bench.sampling, "__defaults__", (1,))
    path = tmp_path / "sizes.json"
    words = ["--model", model, "--mllm", "llava-7b", "--offload", offload, "--dtype", "fp32"]
    monkeypatch.setattr(sys, "argv", ["true_size", *words, "--json", str(path)])
    assert true_size.main() == 0
    results = json.loads(path.read_text())
    assert list(results["rows"]) == list(bench.MEASURES)
    assert "| IMG |" in capsys.readouterr().out
    for columns in results["rows"].values():
        assert len(columns["measured"]) == len(columns["ms"])
