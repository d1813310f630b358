"""The budget curve counts what was drawn, draws nothing twice, and compares with whole IMG."""

import pytest

from img_minimal.evaluate import budget
from img_minimal.pipeline import IMG
from img_minimal.tiny.grammar import benchmark


@pytest.fixture(scope="module")
def rows(twin) -> dict[str, dict]:
    """Draw two prompts in every way, in four steps; the MLLM finds every second image wrong."""

    def finds_wrong(self: IMG, guidance: object, mask: object) -> list[bool]:
        return [k % 2 == 0 for k in range(len(guidance))]

    with pytest.MonkeyPatch.context() as patch, twin.drawing(steps=4):
        patch.setattr(budget, "DRAFTS", (1, 0.5))
        patch.setattr(budget, "ONE_LOOK", (0.5,))
        patch.setattr(IMG, "finds_wrong", finds_wrong)
        ways = budget.Budget(twin, benchmark(2), seed=0)
        rows = dict(ways.rows())
    # Eight of the base, of whole IMG and of one look; two of IMG, of drafts, and after drafts.
    distinct = 4 * (8 + 8 + 8 + 2 + 2) + 2 * 2
    assert ways.evaluations <= 2 * distinct, "no image is drawn twice"
    assert "draw_each" not in vars(twin), "the method is itself again"
    return rows


COSTS = {
    "base model": 1,
    "best of 2 seeds, by the MLLM": 2,
    "best of 4 seeds, by the MLLM": 4,
    "IMG, a look at 4 of 4 steps": 2,
    "IMG, a look at 2 of 4 steps": 1.5,
    "IMG, a look at 2 of 4 steps, for four images": 1 + 0.5 / 4,
    "IMG, the better image": 2,
    # Of a right image, a whole one stays, and a draft is drawn whole.
    "IMG, a look at 4 of 4 steps, only what is wrong": 1.5,
    "IMG, a look at 2 of 4 steps, only what is wrong": 1.5,
    "IMG, only what is wrong, the better image": 1.5,
}


@pytest.mark.parametrize(("way", "drawings"), COSTS.items())
def test_the_drawings_of_a_way_are_counted(rows, way, drawings):
    assert rows[way]["drawings"] == pytest.approx(drawings)


def test_a_way_is_compared_with_whole_img_and_with_the_base_from_the_same_seeds(rows):
    whole = rows["IMG, a look at 4 of 4 steps"]
    assert whole["difference"]["value"] == whole["fixed"] == whole["broken"] == 0
    assert rows["base model"]["win_rate"]["decided"] == 0
    assert rows["base model"]["share"]["value"] <= 1


def test_four_images_are_compared_with_each_other(rows):
    assert rows[budget.BASE]["distance"]["value"] == 1
    look = rows["IMG, a look at 2 of 4 steps, for four images"]
    assert 0 < look["distance"]["value"] < rows[budget.WHOLE]["distance"]["value"]
    assert look["all_right"] + look["all_wrong"] <= 1
    line = budget.line("a way", look)
    assert line.startswith("a way") and "1.12" in line
