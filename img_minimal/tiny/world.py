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
PIXELS = torch.arange(SIZE) + 0.5  # centres of pixels along an axis
# The named axis, the other one, and the sign of the way from the first shape to the second.
DIRECTIONS = {
    "left of": ("x", "y", 1),
    "right of": ("x", "y", -1),
    "above": ("y", "x", 1),
    "below": ("y", "x", -1),
}


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

    def at(self, x: float, y: float) -> "Shape":
        """Return the same shape at another position."""
        return replace(self, x=x, y=y)

    def squared_distance(self, x: float, y: float) -> float:
        """Compute the squared distance of the centre to a point."""
        return (self.x - x) ** 2 + (self.y - y) ** 2


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
    name, other, sign = DIRECTIONS[relation]
    end = max(sign * getattr(shape, name) for shape in first)
    start = min(sign * getattr(shape, name) for shape in second)
    gap = start - end
    along = abs(_mean(second, name) - _mean(first, name))
    across = abs(_mean(second, other) - _mean(first, other))
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
    return a.squared_distance(b.x, b.y) < (a.r + b.r + 1) ** 2


def exchange(a: Shape, b: Shape) -> Scene:
    """Let two shapes change places."""
    return a.at(b.x, b.y), b.at(a.x, a.y)


def jittered(cell: tuple[float, float], rng: random.Random) -> tuple[float, float]:
    """Shift a cell's centre by up to JITTER in each direction."""
    x = cell[0] + rng.uniform(-JITTER, JITTER)
    y = cell[1] + rng.uniform(-JITTER, JITTER)
    return x, y


def place(prompt: Prompt, rng: random.Random) -> Scene:
    """Lay out a random scene that is right for the prompt, in the order of the prompt."""
    kinds = prompt.kinds
    while True:
        shapes = []
        for kind, cell in zip(kinds, rng.sample(CELLS, len(kinds))):
            x, y = jittered(cell, rng)
            radius = rng.uniform(SMALLEST, LARGEST)
            shapes.append(Shape(*kind, x, y, radius))
        crowded = any(overlap(*pair) for pair in combinations(shapes, 2))
        if satisfied(prompt, shapes) and not crowded:
            return tuple(shapes)


def signed_distance(form: str, x: Tensor, y: Tensor, r: float) -> Tensor:
    """Compute the distance in pixels to the edge of a form of radius r at the origin.

    It is negative inside; y points down. Raises ValueError for an unknown form.
    """
    width, height = x.abs(), y.abs()
    if form == "circle":
        return (x * x + y * y).sqrt() - r
    if form == "square":
        return torch.maximum(width, height) - 0.88 * r
    if form == "triangle":
        base = y - 0.75 * r
        sides = (2 * width - y - 1.1 * r) / 5**0.5
        return torch.maximum(base, sides)
    if form == "cross":
        upright = torch.maximum(width - 0.36 * r, height - r)
        level = torch.maximum(width - r, height - 0.36 * r)
        return torch.minimum(upright, level)
    raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")


def render(scenes: Sequence[Scene]) -> Tensor:
    """Draw scenes with anti-aliased edges: (B, 3, 64, 64) in [0, 1]."""
    ground = torch.tensor(BACKGROUND).view(3, 1, 1)
    images = ground.repeat(len(scenes), 1, SIZE, SIZE)
    for image, scene in zip(images, scenes):
        for shape in scene:
            _paint(image, shape)
    return images


def _paint(image: Tensor, shape: Shape) -> None:
    """Paint a shape over an image (3, 64, 64)."""
    # A window around the shape takes a quarter of the time of the whole image.
    columns = window(shape.x, shape.r + 1)
    rows = window(shape.y, shape.r + 1)
    x = PIXELS[columns] - shape.x
    y = PIXELS[rows, None] - shape.y
    distance = signed_distance(shape.form, x, y, shape.r)
    cover = (0.5 - distance).clamp(0, 1)
    colour = torch.tensor(PALETTE[shape.colour]).view(3, 1, 1)
    painted = image[:, rows, columns]
    painted *= 1 - cover
    painted += colour * cover


def window(centre: float, reach: float) -> slice:
    """Return the pixels along an axis that are within a distance of a position."""
    first = int(centre - reach)
    last = int(centre + reach) + 1
    return slice(max(0, first), last + 1)
