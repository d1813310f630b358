"""The picture of tutorial 08."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from img_minimal.plots import BLUE, GREEN, GREY, ORANGE, PINK

COLOURS = {"guidance": BLUE, "loss": ORANGE, "lambda": GREEN, "refresh": PINK, "passes": GREY}


def draw(summary: dict[str, dict], rows: dict, base: str) -> Figure:
    """Ours on the left, the paper's numbers on the right, a colour for each group; dotted: the row `base`."""
    figure, (ours, paper) = plt.subplots(1, 2, figsize=(10, 7.6), width_ratios=(3, 1.6), layout="constrained")
    groups = list(COLOURS)
    places = np.array([k + 0.7 * groups.index(rows[title].group) for k, title in enumerate(summary)])
    for place, (title, row) in zip(places, summary.items()):
        value, colour = row["share"]["value"], COLOURS[rows[title].group]
        error = [[value - row["share"]["low"]], [row["share"]["high"] - value]]
        ours.barh(place, value, 0.7, color=colour, alpha=0.6)
        ours.errorbar(value, place, xerr=error, color="black", capsize=3, lw=1)
        if len(set(row["seeds"])) > 1:
            ours.plot(row["seeds"], [place] * len(row["seeds"]), "o", color=colour, markeredgecolor="black", ms=5)
        if rows[title].paper:
            paper.barh(place, rows[title].paper, 0.7, color=colour, alpha=0.6)
            paper.text(rows[title].paper + 0.01, place, f"{rows[title].paper:.2f}", va="center", fontsize=9)
    if base in summary:
        ours.axvline(summary[base]["share"]["value"], color="black", ls=":", lw=1)
        paper.axvline(rows[base].paper, color="black", ls=":", lw=1)
    ours.set_yticks(places, list(summary))
    ours.set(xlim=(0, None), xlabel="share right in everything (bar: mean, 95 % interval; dots: training seeds)")
    ours.set_title("the twin (dotted: base model)", fontsize=11)
    paper.set(yticks=[], xlim=(22, 22.9), ylim=ours.get_ylim(), xlabel="PickScore (axis starts at 22)")
    paper.set_title("the paper, SDXL", fontsize=11)
    for axis in (ours, paper):
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    return figure
