"""The exact judge of the tiny world: finds the shapes in a picture and compares them with the prompt.

It plays the people of Pick-a-Pic (labels preference pairs) and of GenEval (scores images). Sampling never sees it.
It reads a picture as people do: figures stand out from the ground, what hangs together is one shape, its colour is that
of its inside, and its form that of its mask at half coverage. `python -m img_minimal.tiny.diagnose` compares it with a
reading by eye.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from img_minimal.files import from_pil
from img_minimal.tiny.edits import instruction
from img_minimal.tiny.grammar import FORMS, Prompt
from img_minimal.tiny.world import (
    BACKGROUND,
    PALETTE,
    SIZE,
    Scene,
    Shape,
    satisfied,
    signed_distance,
)

FIGURE = 0.3  # distance from the ground in RGB; a third of a yellow pixel's coverage
SPECK = 24  # pixels; smaller figures are overlooked
SMALLEST_PART = 6.0  # pixels; the radius below which a part of a figure is no shape of its own
ALIKE = 0.8  # overlap with the ideal form (intersection over union of coverages) below which it is none
MOSTLY = 0.8  # share of a shape's inside that must have one name
BETWEEN = 0.6  # of the distances to the nearest and the second colour, above which a person would not name it
FOREIGN = 0.35  # distance from every colour above which it has none
UNCLEAR, BLOB = "unclear", "shape"  # the colour and the form that nobody could name: "the unclear triangle"
COLOURS = np.array(list(PALETTE.values()))


@dataclass(frozen=True)
class Verdict:
    """What the oracle says of one image.

    `strict`: all of it is right. `soft` in [0, 1]: how much of it. `graded`: `soft` with every right shape counted by
    how clear it is, so that two images are hardly ever equal. `unclear`: it holds a shape that nobody could name, which
    is never right. Then what was found, and what is wrong in words.
    """

    strict: bool
    soft: float
    graded: float
    unclear: bool
    found: Scene
    words: str


def judge(images: Tensor, prompts: list[Prompt]) -> list[Verdict]:
    """Scorer images (B, 3, 64, 64) in [0, 1] against their prompts."""
    return [compare(scene, prompt) for scene, prompt in zip(detect(images), prompts, strict=True)]


def judge_pictures(pictures: list[Image.Image], prompts: list[Prompt]) -> list[Verdict]:
    """The same of pictures of any size."""
    return judge(from_pil([picture.convert("RGB").resize((SIZE, SIZE)) for picture in pictures]), prompts)


def detect(images: Tensor) -> list[Scene]:
    """The shapes in each picture, in reading order; an image and its PNG give the same."""
    pictures = (images.float().clamp(0, 1) * 255).round().permute(0, 2, 3, 1).double().numpy() / 255
    return [_shapes(picture) for picture in pictures]


def is_clear(shape: Shape) -> bool:
    """Could a person name it?"""
    return shape.colour != UNCLEAR and shape.form != BLOB


def _shapes(picture: np.ndarray) -> Scene:
    labels = _label(np.linalg.norm(picture - BACKGROUND, axis=-1) > FIGURE)
    figures = [labels == label for label in range(1, labels.max() + 1)]
    found = [shape for figure in figures if figure.sum() >= SPECK for shape in _shapes_of(picture, figure)]
    return tuple(sorted(found, key=lambda s: (s.y - s.r, s.x)))


def _shapes_of(picture: np.ndarray, figure: np.ndarray) -> list[Shape]:
    """One shape, or up to four clear ones that touch."""
    whole = _name(picture, figure)
    if not is_clear(whole):
        for count in (2, 3, 4):
            parts = [_name(picture, part) for part in _split(figure, count)]
            if all(is_clear(part) and part.r >= SMALLEST_PART for part in parts):
                return parts
    return [whole]


def _name(picture: np.ndarray, figure: np.ndarray) -> Shape:
    """Colour, form, centre and size of one figure (H, W), whatever it is."""
    inside = next((m for m in (_shrink(_shrink(figure)), _shrink(figure)) if m.sum() >= 8), figure)
    colour = np.median(picture[inside], axis=0)
    distances = np.linalg.norm(COLOURS - colour, axis=-1)
    nearest, second = np.argsort(distances)[:2]
    names = np.linalg.norm(picture[inside][:, None] - COLOURS, axis=-1).argmin(-1)
    named = distances[nearest] < min(FOREIGN, BETWEEN * distances[second]) and (names == nearest).mean() >= MOSTLY
    # A pixel on the edge is part shape, part ground; a figure's edge reaches one pixel beyond its clear part.
    towards = colour - BACKGROUND
    coverage = ((picture - BACKGROUND) @ towards / (towards @ towards)).clip(0, 1) * _grow(figure)
    area = coverage.sum()
    y, x = ((np.arange(n) + 0.5) @ c / area for n, c in ((SIZE, coverage.sum(1)), (SIZE, coverage.sum(0))))
    overlaps = {form: _overlap(form, x, y, area, coverage) for form in FORMS}
    form = max(overlaps, key=overlaps.get)
    unit, low = _moments(form)
    r = float((area / unit) ** 0.5)
    name = list(PALETTE)[nearest] if named else UNCLEAR
    form, clear = (form, overlaps[form]) if overlaps[form] >= ALIKE else (BLOB, 0.0)
    clear *= 1 - float(distances[nearest] / distances[second])
    return Shape(name, form, float(x), float(y - low * r), r, clear)


def _overlap(form: str, x: float, y: float, area: float, coverage: np.ndarray) -> float:
    """Intersection over union of a coverage (H, W) with the form of the same area and centre of mass."""
    unit, low = _moments(form)
    r = (area / unit) ** 0.5
    window = np.s_[max(0, int(y - 1.5 * r)) : int(y + 1.5 * r) + 2, max(0, int(x - 1.5 * r)) : int(x + 1.5 * r) + 2]
    rows, columns = (torch.from_numpy(grid[window]) for grid in GRID)
    ideal = (0.5 - signed_distance(form, columns - x, rows - y + low * r, r)).clamp(0, 1).numpy()
    both = np.minimum(ideal, coverage[window]).sum()
    return float(both / (ideal.sum() + area - both))


GRID = np.mgrid[0:SIZE, 0:SIZE] + 0.5


@lru_cache
def _moments(form: str) -> tuple[float, float]:
    """Area of the form of radius 1, and how far its centre of mass lies below its centre."""
    grid = torch.linspace(-1.2, 1.2, 961, dtype=torch.float64)
    rows, columns = torch.meshgrid(grid, grid, indexing="ij")
    inside = signed_distance(form, columns, rows, 1.0) < 0
    return float(inside.sum() * (grid[1] - grid[0]) ** 2), float(rows[inside].mean())


def _split(figure: np.ndarray, count: int) -> list[np.ndarray]:
    """Cut a figure in `count` parts around their centres of mass (k-means)."""
    points = np.argwhere(figure)
    centres = points[:1]
    while len(centres) < count:  # the farthest from those that there are
        centres = np.vstack([centres, points[_distances(points, centres).min(1).argmax()]])
    for _ in range(10):
        part = _distances(points, centres).argmin(1)
        centres = np.stack([points[part == k].mean(0) for k in range(count)])
    parts = np.zeros((count, *figure.shape), dtype=bool)
    parts[part, points[:, 0], points[:, 1]] = True
    return list(parts)


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None] - centres, axis=-1)


def _shrink(mask: np.ndarray) -> np.ndarray:
    """Without the pixels that have a neighbour outside."""
    m = np.pad(mask, 1)
    return m[1:-1, 1:-1] & m[:-2, 1:-1] & m[2:, 1:-1] & m[1:-1, :-2] & m[1:-1, 2:]


def _grow(mask: np.ndarray) -> np.ndarray:
    """With the pixels that have a neighbour inside."""
    return ~_shrink(~np.pad(mask, 1))[1:-1, 1:-1]


def _label(mask: np.ndarray) -> np.ndarray:
    """Number the 8-connected areas of a mask (H, W) from 1; 0 stays 0."""
    ground = np.pad(mask, ((0, 0), (0, 1)))  # a column of ground, so that no run of pixels goes around the edge
    flat, width = ground.ravel().astype(int), ground.shape[1]
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    starts, ends = edges[::2], edges[1::2]
    # touch[i, j]: run i lies in the row below run j and meets it at least with a corner.
    touch = (starts[:, None] <= ends + width) & (ends[:, None] >= starts + width)
    touch |= touch.T | np.eye(len(starts), dtype=bool)
    number = np.arange(len(starts))
    while True:
        lowest = np.where(touch, number, len(number)).min(1, initial=len(number))
        lowest = lowest[lowest]  # what the lowest neighbour knows already
        if (lowest == number).all():
            break
        number = lowest
    flat[flat > 0] = np.repeat(np.unique(number, return_inverse=True)[1] + 1, ends - starts)
    return flat.reshape(ground.shape)[:, :-1]


def compare(found: Scene, prompt: Prompt) -> Verdict:
    """What the oracle says of a picture in which it has found these shapes."""
    left, matched = list(found), []
    for kind in prompt.kinds:
        shape = next((s for s in left if s.kind == kind), None)
        if shape:
            left.remove(shape)
        matched.append(shape)
    right = [shape for shape in matched if shape]
    holds = len(right) == len(matched) and satisfied(prompt, tuple(right), judging=True)

    def score(worth: float) -> float:
        """Of the shapes that are asked for, beside those that are not; a relation is a third of what is asked."""
        share = worth / (len(matched) + 0.5 * len(left))
        return 0.7 * share + 0.3 * holds if prompt.relation else share

    soft, graded = score(len(right)), score(sum(shape.clear for shape in right))
    unclear = not all(map(is_clear, found))
    return Verdict(holds and not left, soft, graded, unclear, found, instruction(found, prompt))
