"""The tiny world: 64 x 64 pictures of one to four flat shapes on a light ground.

A `Shape` is a colour, a form, a centre and a radius in pixels; a scene is a tuple of shapes. Scenes are laid out on a
jittered 3 x 3 grid, so shapes never overlap and "left of" or "above" is never a matter of taste.

    >>> scene = place(parse("a red circle above a blue square"), random.Random(0))
    >>> render([scene]).shape
    torch.Size([1, 3, 64, 64])
"""

import random
from dataclasses import dataclass
from itertools import combinations

import torch

from img_minimal.tiny.grammar import FORMS, Prompt

SIZE = 64  # pixels, both sides
CELLS = tuple((x, y) for y in (11.5, 32.0, 52.5) for x in (11.5, 32.0, 52.5))  # reading order
JITTER, SMALLEST, LARGEST = 1.5, 7.5, 9.0  # pixels
PALETTE = {
    "red": (0.90, 0.12, 0.15),
    "green": (0.10, 0.62, 0.22),
    "blue": (0.13, 0.30, 0.88),
    "yellow": (0.98, 0.82, 0.10),
    "purple": (0.55, 0.15, 0.70),
    "orange": (0.98, 0.52, 0.05),
}
BACKGROUND = (0.94, 0.94, 0.92)


@dataclass(frozen=True)
class Shape:
    """One flat shape: what it is, its centre and its radius in pixels, and how clear the oracle finds it."""

    colour: str
    form: str
    x: float
    y: float
    r: float
    clear: float = 1.0

    @property
    def kind(self) -> tuple[str, str]:
        """What the grammar talks about: (colour, form)."""
        return self.colour, self.form


Scene = tuple[Shape, ...]


def related(relation: str, first: list[Shape], second: list[Shape], judging: bool = False) -> bool:
    """Is every shape of `first` e.g. left of every one of `second`?

    Scenes are laid out so that nobody could doubt it: each is by 6 pixels, and between the two centres of mass the
    named axis is the longer one by 3. A picture is judged as GenEval does: each is by 5 pixels, and the way between the
    centres is within 60 degrees of the named axis, so that what lies diagonally is above *and* left.
    """
    sign, axis = {"left of": (1, 0), "right of": (-1, 0), "above": (1, 1), "below": (-1, 1)}[relation]
    gap = min(sign * ((b.x, b.y)[axis] - (a.x, a.y)[axis]) for a in first for b in second)
    dx = sum(b.x for b in second) / len(second) - sum(a.x for a in first) / len(first)
    dy = sum(b.y for b in second) / len(second) - sum(a.y for a in first) / len(first)
    along, across = (abs(dx), abs(dy)) if axis == 0 else (abs(dy), abs(dx))
    return gap > 5 and 3**0.5 * along > across if judging else gap > 6 and along - across > 3


def satisfied(prompt: Prompt, scene: Scene, judging: bool = False) -> bool:
    """Does the relation of the prompt hold? `scene` lists the shapes in the order of the prompt."""
    if prompt.relation is None:
        return True
    n = prompt.groups[0].count
    return related(prompt.relation, list(scene[:n]), list(scene[n:]), judging)


def overlap(a: Shape, b: Shape) -> bool:
    """Do two shapes touch, or all but touch?"""
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2 < (a.r + b.r + 1) ** 2


def place(prompt: Prompt, rng: random.Random) -> Scene:
    """A random scene that is right for the prompt, shapes in the order of the prompt."""
    kinds = prompt.kinds
    while True:
        cells = rng.sample(CELLS, len(kinds))
        scene = tuple(
            Shape(
                *kind,
                x + rng.uniform(-JITTER, JITTER),
                y + rng.uniform(-JITTER, JITTER),
                rng.uniform(SMALLEST, LARGEST),
            )
            for kind, (x, y) in zip(kinds, cells)
        )
        if satisfied(prompt, scene) and not any(overlap(a, b) for a, b in combinations(scene, 2)):
            return scene


def signed_distance(form: str, x: torch.Tensor, y: torch.Tensor, r: float | torch.Tensor) -> torch.Tensor:
    """Distance in pixels to the edge of a form of radius r at the origin, negative inside; y points down."""
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


def render(scenes: list[Scene]) -> torch.Tensor:
    """Draw scenes with anti-aliased edges: (B, 3, 64, 64) in [0, 1]."""
    centres = torch.arange(SIZE) + 0.5
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    images = torch.tensor(BACKGROUND).view(1, 3, 1, 1).repeat(len(scenes), 1, SIZE, SIZE)
    for image, scene in zip(images, scenes):
        for shape in scene:
            # A window around the shape is enough, and four times faster than the whole picture.
            top, left = max(0, int(shape.y - shape.r) - 1), max(0, int(shape.x - shape.r) - 1)
            window = (slice(top, int(shape.y + shape.r) + 3), slice(left, int(shape.x + shape.r) + 3))
            edge = signed_distance(shape.form, columns[window] - shape.x, rows[window] - shape.y, shape.r)
            cover = (0.5 - edge).clamp(0, 1)
            colour = torch.tensor(PALETTE[shape.colour]).view(3, 1, 1)
            image[:, *window] = image[:, *window] * (1 - cover) + colour * cover
    return images
