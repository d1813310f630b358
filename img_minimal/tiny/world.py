"""Pictures of the tiny world: 64 x 64 pixels, one to four flat shapes on a light ground.

A `Shape` has a colour, a form, a centre and a radius in pixels; a scene is a tuple of shapes. They
are laid out on a jittered 3 x 3 grid, so that shapes never overlap, and "left of" or "above" is
never a matter of taste.

    >>> scene = place(parse("a red circle above a blue square"), random.Random(0))
    >>> render([scene]).shape
    torch.Size([1, 3, 64, 64])
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from img_minimal.tiny.grammar import FORMS, Kind, Prompt

SIZE = 64  # pixels, both sides
AXIS = (11.5, 32.0, 52.5)  # pixels, centres of the grid's rows and columns
CELLS = tuple((x, y) for y in AXIS for x in AXIS)  # in reading order
JITTER, SMALLEST, LARGEST = 1.5, 7.5, 9.0  # pixels, of a centre and of radii
PALETTE = {
    "red": (0.90, 0.12, 0.15),
    "green": (0.10, 0.62, 0.22),
    "blue": (0.13, 0.30, 0.88),
    "yellow": (0.98, 0.82, 0.10),
    "purple": (0.55, 0.15, 0.70),
    "orange": (0.98, 0.52, 0.05),
}
BACKGROUND = (0.94, 0.94, 0.92)
DIRECTIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}


@dataclass(frozen=True)
class Shape:
    """One flat shape; centre and radius in pixels, `clear` in [0, 1] as the oracle finds it."""

    colour: str
    form: str
    x: float
    y: float
    r: float
    clear: float = 1.0

    @property
    def kind(self) -> Kind:
        """(colour, form), which the grammar names."""
        return self.colour, self.form

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y)."""
        return self.x, self.y


Scene = tuple[Shape, ...]


def related(
    relation: str, first: Sequence[Shape], second: Sequence[Shape], judging: bool = False
) -> bool:
    """Return True if every shape of `first` is e.g. left of every shape of `second`.

    Scenes are laid out beyond doubt: all gaps are over 6 pixels and, between the two centres of
    mass, the named axis is the longer one by 3. Images are judged as GenEval does: all gaps are
    over 5 pixels, and the line between the centres is within 60 degrees of the named axis, so that
    a shape on a diagonal is above *and* left.
    """
    axis, sign = DIRECTIONS[relation]
    end = max(sign * shape.centre[axis] for shape in first)
    gap = min(sign * shape.centre[axis] for shape in second) - end
    distances = []
    for name in ("x", "y"):
        distances.append(abs(_mean(second, name) - _mean(first, name)))
    along, across = distances[axis], distances[1 - axis]
    if judging:
        return gap > 5 and 3**0.5 * along > across
    return gap > 6 and along - across > 3


def _mean(shapes: Sequence[Shape], name: str) -> float:
    return sum(getattr(shape, name) for shape in shapes) / len(shapes)


def satisfied(prompt: Prompt, scene: Sequence[Shape], judging: bool = False) -> bool:
    """Return True if the relation of the prompt holds; `scene` has the order of the prompt."""
    if prompt.relation is None:
        return True
    count = prompt.groups[0].count
    return related(prompt.relation, scene[:count], scene[count:], judging)


def overlap(a: Shape, b: Shape) -> bool:
    """Return True if two shapes touch, or nearly do."""
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2 < (a.r + b.r + 1) ** 2


def exchange(a: Shape, b: Shape) -> Scene:
    """Let two shapes change places."""
    return replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)


def jittered(cell: tuple[float, float], rng: random.Random) -> tuple[float, float]:
    """Shift a cell's centre by up to JITTER in each direction."""
    x, y = cell
    return x + rng.uniform(-JITTER, JITTER), y + rng.uniform(-JITTER, JITTER)


def place(prompt: Prompt, rng: random.Random) -> Scene:
    """Lay out a random scene that is right for the prompt, in the order of the prompt."""
    kinds = prompt.kinds
    while True:
        shapes = []
        for kind, cell in zip(kinds, rng.sample(CELLS, len(kinds))):
            centre = jittered(cell, rng)
            shapes.append(Shape(*kind, *centre, rng.uniform(SMALLEST, LARGEST)))
        crowded = any(overlap(a, b) for a, b in combinations(shapes, 2))
        if satisfied(prompt, shapes) and not crowded:
            return tuple(shapes)


def signed_distance(form: str, x: Tensor, y: Tensor, r: float) -> Tensor:
    """Compute the distance in pixels to the edge of a form of radius r at the origin.

    It is negative inside; y points down. Raises ValueError for an unknown form.
    """
    if form == "circle":
        return (x * x + y * y).sqrt() - r
    if form == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * r
    if form == "triangle":
        return torch.maximum(y - 0.75 * r, (2 * x.abs() - y - 1.1 * r) / 5**0.5)
    if form == "cross":
        upright = torch.maximum(x.abs() - 0.36 * r, y.abs() - r)
        return torch.minimum(upright, torch.maximum(x.abs() - r, y.abs() - 0.36 * r))
    raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")


def render(scenes: Sequence[Scene]) -> Tensor:
    """Draw scenes with anti-aliased edges: (B, 3, 64, 64) in [0, 1]."""
    pixels = torch.arange(SIZE) + 0.5
    rows, columns = torch.meshgrid(pixels, pixels, indexing="ij")
    images = torch.tensor(BACKGROUND).view(1, 3, 1, 1).repeat(len(scenes), 1, SIZE, SIZE)
    for image, scene in zip(images, scenes):
        for shape in scene:
            # Drawing a window around the shape is four times faster than the whole picture.
            top, left = max(0, int(shape.y - shape.r) - 1), max(0, int(shape.x - shape.r) - 1)
            bottom, right = int(shape.y + shape.r) + 3, int(shape.x + shape.r) + 3
            window = slice(top, bottom), slice(left, right)
            x, y = columns[window] - shape.x, rows[window] - shape.y
            cover = (0.5 - signed_distance(shape.form, x, y, shape.r)).clamp(0, 1)
            colour = torch.tensor(PALETTE[shape.colour]).view(3, 1, 1)
            image[:, *window] = image[:, *window] * (1 - cover) + colour * cover
    return images
