"""The picture of tutorial 10."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from img_minimal.plots import BLUE, GREY, ORANGE, PINK


def draw(logs: dict[str, list[dict]], shares: dict[str, dict]) -> Figure:
    """By round: the gate's numbers, size of the steps, error on original pairs, wins by category; the end's result."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained")
    colours = dict(zip(logs, (BLUE, ORANGE, PINK)))
    panels = (("score", "held-back prompts right"), ("damage", "right before, wrong after"),
              ("validation_error", "error on held-back original pairs"))  # fmt: skip
    for axis, (name, title) in zip(axes.flat, panels):
        for way, rows in logs.items():
            x = [row["round"] for row in rows if name in row]
            axis.plot(x, [row[name] for row in rows if name in row], "o-", color=colours[way], label=way)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    steps, wins, end = axes.flat[3:]
    for axis in axes.flat[:4]:
        axis.xaxis.get_major_locator().set_params(integer=True)
    for way, rows in logs.items():
        later = [row for row in rows if row["round"]]
        steps.plot([r["round"] for r in later], [r["step_new"] for r in later], "o-", color=colours[way], label=way)
    steps.axhline(later[0]["step_original"], color=GREY, linestyle="--", label="original pairs")
    steps.set(title="|c_w - c_l|: how far a pair asks to go", ylim=(0, None))
    steps.legend(fontsize=8)
    first = next(iter(logs.values()))[1]["wins_by_category"]
    wins.bar(list(first), list(first.values()), color=BLUE)
    wins.set_title("round 1: IMG's wins by category", fontsize=10)
    for k, (name, share) in enumerate(shares.items()):
        error = [[share["value"] - share["low"]], [share["high"] - share["value"]]]
        end.bar(k, share["value"], color=colours.get(name, GREY))
        end.errorbar(k, share["value"], error, color="k")
    labels = [name.replace(", ", ",\n").replace(" and ", "\nand ") for name in shares]
    end.set_xticks(range(len(shares)), labels, fontsize=8)
    end.set(title="test prompts right, at the end", ylim=(0, 1))
    return figure
