"""The budget curve counts what was drawn, and compares every way with whole IMG."""

import pytest
import torch

from img_minimal.evaluate import budget
from img_minimal.pipeline import IMG
from img_minimal.tiny.grammar import benchmark


@pytest.fixture(scope="module")
def rows(twin) -> dict[str, dict]:
    """Draw two prompts in every way, in four steps; the MLLM finds every second image wrong."""

    def finds_wrong(self: IMG, guidance: object, mask: object) -> list[bool]:
        return [k % 2 == 0 for k in range(len(guidance))]

    with pytest.MonkeyPatch.context() as patch, twin.drawing(steps=4):
        patch.setattr(IMG, "finds_wrong", finds_wrong)
        ways = ((0.5, False, False), (0.5, True, False), (0.5, True, True), (1, True, True))
        patch.setattr(budget, "WAYS", ways)
        return dict(budget.Budget(twin, benchmark(2), seed=0).rows())


COSTS = {
    budget.BASE: 1,
    budget.WHOLE: 2,
    "base model": 1,
    "best of 2 seeds, by the MLLM": 2,
    "best of 4 seeds, by the MLLM": 4,
    "IMG": 2,
    "IMG, the better image": 2,
    # Of right images, a whole one stays, and a draft is drawn whole.
    "IMG, only what is wrong": 1.5,
    "IMG, only what is wrong, the better image": 1.5,
    "IMG, drafts of 2 steps": 1.5,
    "IMG, drafts of 2 steps, only what is wrong": 1.5,
    "IMG, drafts of 2 steps, only what is wrong, one look for four": 1 + 0.5 / 4,
    "IMG, only what is wrong, one look for four": 1 + 1 / 4,
}


def test_the_drawings_of_every_way_are_counted(rows):
    assert {way: row["drawings"] for way, row in rows.items()} == pytest.approx(COSTS)


def test_a_way_is_compared_with_whole_img_and_with_the_base_from_the_same_seeds(rows):
    whole = rows["IMG"]
    assert whole["difference"]["value"] == whole["fixed"] == whole["broken"] == 0
    assert rows["base model"]["win_rate"]["decided"] == 0
    assert rows["base model"]["share"]["value"] <= 1


def test_four_images_are_compared_with_each_other(rows, capsys):
    assert rows[budget.BASE]["distance"]["value"] == 1
    look = rows["IMG, drafts of 2 steps, only what is wrong, one look for four"]
    assert 0 < look["distance"]["value"] < rows[budget.WHOLE]["distance"]["value"]
    assert look["all_right"] + look["all_wrong"] <= 1
    budget.print_row("a way", look)
    assert capsys.readouterr().out.startswith("a way; 1.12 drawings; strict")


def test_a_network_that_is_called_by_names_is_counted_too(twin):
    ways = budget.Budget(twin, benchmark(1), seed=0)
    ways._count(None, (), {"hidden_states": torch.zeros(3, 1)})
    assert ways.evaluations == 3
