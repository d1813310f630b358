"""The picture of tutorial 05."""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from img_minimal.plots import BLUE, GREEN, GREY, ORANGE, PINK, plain

Field = Callable[..., tuple[Tensor, Tensor]]  # points, reference, objective -> -grad L, and what is the preference's


def draw(
    fields: list[tuple[str, Tensor, Tensor, dict]], field: Field, grid: int, pair: tuple[Tensor, Tensor],
    refreshed: Any, never: Any, way: Tensor, winds: dict[str, Tensor], lambdas: tuple, resting: dict[str, Tensor],
) -> Figure:  # fmt: skip
    """Fields above (title, f_ref, where f ends, objective); strength of the wind and where it leads below."""
    with plt.rc_context({"text.parse_math": True, "font.size": 12}):  # labels are formulas, and no prompt is drawn
        figure = plt.figure(figsize=(15, 8.6), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1))
        axes, below = upper.subplots(1, 4, sharey=True), lower.subplots(1, 3)
        for axis, (title, reference, end, objective) in zip(axes, fields):
            draw_field(axis, field, reference, title, grid, end, pair, objective)
        axes[3].plot(*refreshed.path.T, color="black", linewidth=2)
        axes[3].plot(*torch.stack([r for _, r in refreshed.references]).T, "o", color=PINK, markersize=5, zorder=4)
        axes[0].set_ylabel("second element of f")
        draw_descents(below[0], refreshed, never)
        draw_winds(below[1], way, winds)
        draw_ends(below[2], lambdas, resting)
        handles = [
            Line2D([], [], color=BLUE, label="-∇L: where f goes"),
            Line2D([], [], color="#FDAE6B", linewidth=8, label="wind: strength of the preference terms"),
            Line2D([], [], color="black", linestyle="--", label="x = 0: f as good as $f_{ref}$"),
            Line2D([], [], color="black", marker="*", linestyle="", markersize=13, label="where f comes to rest"),
        ]
        upper.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=12, frameon=False)
        for axis in below:
            axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_field(
    axis: plt.Axes, field: Field, reference: Tensor, title: str, grid: int, end: Tensor, pair: tuple, objective: dict
) -> None:
    """Streamlines of -grad L; colour is the length of what the preference terms add; dashed is x = 0."""
    x, y = (torch.linspace(*ends, grid, dtype=torch.float64) for ends in ((-0.75, 2.05), (-1.05, 1.25)))
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 1, 2)
    total, blown = (part.view(grid, grid, 2) for part in field(points, reference, **objective))
    wind = blown.norm(dim=-1)
    axis.contourf(x, y, wind, levels=torch.linspace(0, 5, 26).numpy(), cmap="Oranges", vmin=0, vmax=7, extend="max")
    if wind.max() > 0:
        half = field(reference, reference, **objective)[1].norm().item()  # x = 0 there, and all along its line
        axis.contour(x, y, wind, levels=[half], colors="black", linestyles="--", linewidths=1.2)
    u, v = total.unbind(-1)
    speed = (u**2 + v**2).sqrt()
    axis.streamplot(
        x.numpy(), y.numpy(), u.numpy(), v.numpy(), color=BLUE, density=0.75, arrowsize=1.1,
        linewidth=(0.5 + 0.35 * speed.clamp(max=6)).numpy(),
    )  # fmt: skip
    winner, loser = pair
    marks = [(winner, GREEN, "$c_w$", (-4, -24))]
    if wind.max() > 0:  # L_base knows c_w alone
        marks += [(loser, GREY, "$c_l$", (0, 9)), (reference, PINK, "$f_{ref}$", (7, 9))]
    for point, colour, name, offset in marks:
        axis.plot(*point[0, 0], "o", color=colour, markersize=11, markeredgecolor="white", zorder=5)
        axis.annotate(
            name, point[0, 0], offset, textcoords="offset points", fontsize=14, ha="center", zorder=6,
            bbox=dict(facecolor="white", alpha=0.8, edgecolor="none", pad=0.6),
        )  # fmt: skip
    axis.plot(*end, "*", color="black", markersize=15, markeredgecolor="white", zorder=7)
    axis.set(title=title, xlabel="first element of f", aspect="equal", xlim=(-0.75, 2.05), ylim=(-1.05, 1.25))


def draw_descents(axis: plt.Axes, refreshed: Any, never: Any) -> None:
    """Strength of the wind over the steps of two descents."""
    axis.plot(never.strength, color=GREY, linewidth=2, label=f"never refreshed (last {never.strength[-1]:.2f})")
    label = f"{len(refreshed.references) - 1} refreshes (last {refreshed.strength[-1]:.2f})"
    axis.plot(refreshed.strength, color=BLUE, linewidth=2, label=label)
    for step, _ in refreshed.references[1:]:
        axis.axvline(step, color=PINK, linewidth=0.8, zorder=0)
    axis.axhline(0.5, color="black", linewidth=1, linestyle="--")
    axis.set(xlabel="step of gradient descent (pink: $f_{ref} ← f$)", ylabel="σ(-x), strength of the wind")
    axis.set(ylim=(0, 0.62), xlim=(0, len(never.strength)))
    axis.set_title("A refresh brings the wind back")
    axis.legend(fontsize=11, loc="lower right")


def draw_winds(axis: plt.Axes, way: Tensor, winds: dict[str, Tensor]) -> None:
    """sigmoid(-x) on the way from f_ref = c_l to c_w, for sums over more and more elements and for the mean."""
    for (name, strength), colour in zip(winds.items(), (GREEN, BLUE, PINK, ORANGE)):
        axis.semilogx(way[1:], strength[1:], color=colour, linewidth=2, label=name)
    axis.set(xlabel="share of the way from $f_{ref}$ to $c_w$ (logarithmic)", ylabel="σ(-x)", ylim=(0, 0.72))
    axis.xaxis.set_major_formatter(plain)
    axis.set_title("Sum or mean: when does the wind die?")
    axis.legend(fontsize=9, loc="upper center", ncols=2)


def draw_ends(axis: plt.Axes, lambdas: tuple, resting: dict[str, Tensor]) -> None:
    """For each lambda and norm, how far beyond c_w, along c_w - c_l, f ends."""
    styles = ((ORANGE, "o-"), (ORANGE, "o:"), (PINK, "s-"), (BLUE, "s-"))
    for (name, beyond), (colour, style) in zip(resting.items(), styles):
        axis.plot(range(len(lambdas)), beyond, style, color=colour, label=name)
    axis.axhline(1, color=GREY, linewidth=1, linestyle="--")
    axis.annotate("as wrong as $c_l$ was", (0, 1), (0, -15), textcoords="offset points", color=GREY, fontsize=11)
    axis.set_xticks(range(len(lambdas)), map(str, lambdas))
    axis.set(xlabel=r"$\lambda$", ylabel=r"end of f beyond $c_w$, in $|c_w - c_l|$", ylim=(-0.08, 1.75))
    axis.set_title("What a large λ breaks")
    axis.legend(fontsize=11, loc="upper left")
