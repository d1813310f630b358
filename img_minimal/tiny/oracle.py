"""Exact judge of the tiny world: finds the shapes in a picture and compares them with the prompt.

It takes the part of Pick-a-Pic's people, who label preference pairs, and of GenEval, which scores
images. Sampling never sees it. It reads a picture as people do: figures stand out from the ground,
a connected figure is one shape, its inside gives its colour, and its coverage of pixels its form.
`python -m img_minimal.tiny.diagnose` compares it with readings by eye.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from PIL.Image import Image
from torch import Tensor

from img_minimal.files import from_pil
from img_minimal.tiny.edits import instruction, match
from img_minimal.tiny.grammar import FORMS, Prompt
from img_minimal.tiny.world import (
    BACKGROUND,
    PALETTE,
    SIZE,
    Scene,
    Shape,
    satisfied,
    signed_distance,
    window,
)

FIGURE = 0.3  # least distance from the ground in RGB; that of a third of a yellow pixel's coverage
SPECK = 24  # pixels; smaller figures are overlooked
SMALLEST_PART = 6.0  # pixels; a part of a figure with a smaller radius is no shape of its own
ALIKE = 0.8  # least overlap with a form (intersection over union of coverages)
MOSTLY = 0.8  # least share of a shape's inside that is nearest to one colour
BETWEEN = 0.6  # of the distance to the second colour; farther from the nearest, people see neither
FOREIGN = 0.35  # distance from the nearest colour at which a shape has none
UNCLEAR, BLOB = "unclear", "shape"  # colour and form of shapes that nobody could name
COLOURS = np.array(list(PALETTE.values()))
PIXELS = np.arange(SIZE) + 0.5  # centres along an axis


@dataclass(frozen=True)
class Verdict:
    """Judgement of one image.

    `strict`: everything is right. `soft`: the share that is right. `graded`: like `soft`, but each
    right shape counts by how clear it is, so that two images are hardly ever equal. `unclear`: the
    image holds a shape that nobody could name, which is never right. `found`: its shapes. `words`:
    the edits that it needs.
    """

    strict: bool
    soft: float
    graded: float
    unclear: bool
    found: Scene
    words: str


def judge(images: Tensor, prompts: list[Prompt]) -> list[Verdict]:
    """Judge images (B, 3, 64, 64) in [0, 1] by their prompts."""
    scenes = detect(images)
    return [compare(scene, prompt) for scene, prompt in zip(scenes, prompts, strict=True)]


def judge_pictures(pictures: list[Image], prompts: list[Prompt]) -> list[Verdict]:
    """Judge pictures of any size by their prompts."""
    resized = [picture.convert("RGB").resize((SIZE, SIZE)) for picture in pictures]
    return judge(from_pil(resized), prompts)


def compare(scene: Scene, prompt: Prompt) -> Verdict:
    """Judge an image in which these shapes were found."""
    matched, left = match(scene, prompt)
    right = [shape for shape in matched if shape]
    holds = len(right) == len(matched) and satisfied(prompt, right, judging=True)
    shares = []
    clear = sum(shape.clear for shape in right)
    for credit in (len(right), clear):
        share = credit / (len(matched) + 0.5 * len(left))
        if prompt.relation:
            share = 0.7 * share + 0.3 * holds
        shares.append(share)
    soft, graded = shares
    strict = holds and not left
    unclear = not all(map(is_clear, scene))
    return Verdict(strict, soft, graded, unclear, scene, instruction(scene, prompt))


def is_clear(shape: Shape) -> bool:
    """Return True if a person could name the shape."""
    return shape.colour != UNCLEAR and shape.form != BLOB


# From pixels to shapes


def detect(images: Tensor) -> list[Scene]:
    """Find the shapes in each image (B, 3, 64, 64), in reading order.

    An image and its PNG give the same shapes.
    """
    rounded = (images.float().clamp(0, 1) * 255).round()
    pictures = rounded.permute(0, 2, 3, 1).double().numpy() / 255
    contrast = np.linalg.norm(pictures - BACKGROUND, axis=-1)
    masks = torch.from_numpy(contrast > FIGURE)[:, None]
    scenes = []
    for picture, labels in zip(pictures, _label(masks)[:, 0].numpy()):
        shapes = []
        for label in np.unique(labels)[:0:-1]:  # from the top; the last one, 0, is the ground
            figure = labels == label
            if figure.sum() >= SPECK:
                shapes += _shapes_of(picture, figure)
        scenes.append(tuple(sorted(shapes, key=reading_order)))
    return scenes


def reading_order(shape: Shape) -> tuple[float, float]:
    """Sort shapes by their upper edges, then from left to right."""
    return shape.y - shape.r, shape.x


def _label(masks: Tensor) -> Tensor:
    """Number the 8-connected areas of masks (B, 1, H, W), from high at the top to low, ground 0."""
    count = masks.shape[1:].numel()
    mask = masks.flatten(1).float()
    labels = mask * torch.arange(count, 0, -1)  # every pixel its own label
    while True:
        spread = F.max_pool2d(labels.view(masks.shape), 3, 1, padding=1).flatten(1)
        # A label names the pixel that it comes from, which may know of a higher one by now.
        origin = (count - spread).clamp(max=count - 1).long()
        spread = spread.gather(1, origin) * mask
        if torch.equal(spread, labels):
            return labels.view(masks.shape)
        labels = spread


def _shapes_of(picture: ndarray, figure: ndarray) -> list[Shape]:
    """Read a figure (H, W) as one shape, or as up to four clear shapes that touch."""
    whole = _read_shape(picture, figure)
    if not is_clear(whole):
        for count in (2, 3, 4):
            parts = [_read_shape(picture, part) for part in _split(figure, count)]
            if all(is_clear(part) and part.r >= SMALLEST_PART for part in parts):
                return parts
    return [whole]


def _read_shape(picture: ndarray, figure: ndarray) -> Shape:
    """Describe one figure (H, W), whatever it is."""
    inside = smaller = figure
    for _ in range(2):
        smaller = _shrink(smaller)
        if smaller.sum() >= 8:
            inside = smaller
    colour = np.median(picture[inside], axis=0)
    name, clear = _name_colour(colour, picture[inside])
    # Pixels on an edge are part shape, part ground; edges reach one pixel beyond the clear figure.
    contrast = colour - BACKGROUND
    coverage = (picture - BACKGROUND) @ contrast / (contrast @ contrast)
    coverage = coverage.clip(0, 1) * _grow(figure)
    area = coverage.sum()
    x = PIXELS @ coverage.sum(0) / area
    y = PIXELS @ coverage.sum(1) / area

    overlaps = {form: _overlap(form, x, y, area, coverage) for form in FORMS}
    form = max(overlaps, key=overlaps.get)
    unit_area, low = _moments(form)
    radius = float((area / unit_area) ** 0.5)
    clear *= overlaps[form]
    if overlaps[form] < ALIKE:
        form, clear = BLOB, 0.0
    return Shape(name, form, float(x), float(y - low * radius), radius, clear)


def _name_colour(colour: ndarray, pixels: ndarray) -> tuple[str, float]:
    """Name a median colour (3,) of pixels (N, 3), and say how clear it is, in [0, 1]."""
    distances = np.linalg.norm(COLOURS - colour, axis=-1)
    order = np.argsort(distances)
    best = order[0]
    nearest, second = distances[order[:2]]
    votes = _distances(pixels, COLOURS).argmin(-1)
    uniform = (votes == best).mean() >= MOSTLY
    near = nearest < min(FOREIGN, BETWEEN * second)
    name = list(PALETTE)[best] if near and uniform else UNCLEAR
    return name, 1 - float(nearest / second)


def _overlap(form: str, x: float, y: float, area: float, coverage: ndarray) -> float:
    """Compare a coverage (H, W) with the form of the same area and centre of mass.

    Returns intersection over union.
    """
    unit_area, low = _moments(form)
    r = (area / unit_area) ** 0.5
    columns, rows = window(x, 1.5 * r), window(y, 1.5 * r)
    dx = torch.from_numpy(PIXELS[columns]) - x
    dy = torch.from_numpy(PIXELS[rows, None]) - y + low * r
    distance = signed_distance(form, dx, dy, r)
    ideal = (0.5 - distance).clamp(0, 1).numpy()
    both = np.minimum(ideal, coverage[rows, columns]).sum()
    return float(both / (ideal.sum() + area - both))


@lru_cache
def _moments(form: str) -> tuple[float, float]:
    """Compute a form's area at radius 1, and how far its centre of mass lies below its centre."""
    grid = torch.linspace(-1.2, 1.2, 961, dtype=torch.float64)
    rows, columns = torch.meshgrid(grid, grid, indexing="ij")
    inside = signed_distance(form, columns, rows, 1.0) < 0
    cell = (grid[1] - grid[0]) ** 2
    return float(inside.sum() * cell), float(rows[inside].mean())


def _split(figure: ndarray, count: int) -> list[ndarray]:
    """Cut a figure into `count` masks (H, W) around their centres of mass (k-means)."""
    points = np.argwhere(figure)
    centres = points[:1]
    while len(centres) < count:  # start each cluster at the point farthest from the others
        farthest = _distances(points, centres).min(1).argmax()
        centres = np.vstack([centres, points[farthest]])
    for _ in range(10):
        cluster = _distances(points, centres).argmin(1)
        centres = np.stack([points[cluster == k].mean(0) for k in range(count)])
    rows, columns = points.T
    parts = np.zeros((count, *figure.shape), dtype=bool)
    parts[cluster, rows, columns] = True
    return list(parts)


def _distances(points: ndarray, centres: ndarray) -> ndarray:
    """Compute the distances (N, K) of N points to K centres."""
    return np.linalg.norm(points[:, None] - centres, axis=-1)


def _shrink(mask: ndarray) -> ndarray:
    """Remove the pixels that have one of their four neighbours outside."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    for top, left in ((0, 1), (1, 0), (1, 2), (2, 1)):
        mask = mask & padded[top : top + height, left : left + width]
    return mask


def _grow(mask: ndarray) -> ndarray:
    """Add the pixels that have one of their four neighbours inside."""
    return ~_shrink(~np.pad(mask, 1))[1:-1, 1:-1]
