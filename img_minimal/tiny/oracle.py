"""The exact judge of the tiny world: finds the shapes in a picture and compares them with the prompt.

It plays the people of Pick-a-Pic (labels preference pairs) and of GenEval (scores images). Sampling never sees it.
Colour decides which pixels belong together, the overlap with a form's silhouette decides what a blob is.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from img_minimal.tiny.edits import JUDGING_SLACK, instruction
from img_minimal.tiny.grammar import FORMS, Prompt
from img_minimal.tiny.world import BACKGROUND, BOXES, PALETTE, Scene, Shape, satisfied, signed_distance

SMALLEST_AREA = 40  # pixels; a cross of the smallest radius covers 110
CLEAR = 0.72  # overlap (intersection over union) with the silhouette below which a blob is no shape
LONGEST = 1.5  # of a blob's longer side to its shorter above which it is no shape; every form is as wide as high
BLOB = "blob"
MUDDY = 7  # the index after the palette: a colour that is none
SMALLEST_MUDDLE = 12  # pixels, after peeling


@dataclass(frozen=True)
class Verdict:
    """What the oracle says of one image: `strict` (all of it right), `soft` in [0, 1], what it found, what is wrong."""

    strict: bool
    soft: float
    found: Scene
    words: str


def judge(images: Tensor, prompts: list[Prompt]) -> list[Verdict]:
    """Scorer images (B, 3, 64, 64) in [0, 1] against their prompts."""
    return [_compare(scene, prompt) for scene, prompt in zip(detect(images), prompts, strict=True)]


def detect(images: Tensor) -> list[Scene]:
    """The shapes in each picture, in reading order; what is no clear shape has the form "blob"."""
    palette = torch.tensor([BACKGROUND, *PALETTE.values()]).view(-1, 3, 1, 1)
    distance = torch.stack([(images.float() - colour).square().sum(1) for colour in palette], dim=1)  # (B, 7, 64, 64)
    nearest, colour = distance.min(1)
    mixed = nearest > 0.06  # no colour of the palette, such as the blended edge of a shape
    colour[mixed] = 0
    # An edge is two pixels wide; mixed colour that survives peeling one pixel off each side is a blob of its own.
    core = 1 - F.max_pool2d(1 - mixed[:, None].float(), 3, stride=1, padding=1)[:, 0]
    colour[core.bool()] = MUDDY
    return [_shapes(picture) for picture in colour.numpy()]


def _label(colour: np.ndarray) -> np.ndarray:
    """Number the 8-connected areas of one colour from 1; 0 stays 0. (H, W) -> (H, W)."""
    ground = np.pad(colour, ((0, 0), (0, 1)))  # a column of ground, so that no run of pixels goes around the edge
    flat, width = ground.ravel(), ground.shape[1]
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    runs = flat[edges] > 0
    starts, ends = edges[runs], edges[np.flatnonzero(runs) + 1]  # the last run is ground
    # touch[i, j]: run i lies in the row below run j, meets it at least with a corner, and has its colour.
    touch = (starts[:, None] <= ends + width) & (ends[:, None] >= starts + width)
    touch &= flat[starts][:, None] == flat[starts]
    touch |= touch.T | np.eye(len(starts), dtype=bool)
    number = np.arange(len(starts))
    while True:
        lowest = np.where(touch, number, len(number)).min(1, initial=len(number))
        lowest = lowest[lowest]  # what the lowest neighbour knows already
        if (lowest == number).all():
            break
        number = lowest
    labels = np.zeros_like(flat)
    labels[flat > 0] = np.repeat(number + 1, ends - starts)
    return labels.reshape(ground.shape)[:, :-1]


def _shapes(colour: np.ndarray) -> Scene:
    labels, shapes = _label(colour), []
    for label in np.unique(labels[labels > 0]):
        rows, columns = np.nonzero(labels == label)
        index = colour[rows[0], columns[0]]
        if len(rows) < (SMALLEST_MUDDLE if index == MUDDY else SMALLEST_AREA):
            continue
        top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
        blob = labels[top:bottom, left:right] == label
        scores = {form: _overlap(blob, _silhouette(form, *blob.shape)) for form in FORMS}
        form = max(scores, key=scores.get)
        box = BOXES[form]
        r = max((bottom - top) / (box[3] - box[1]), (right - left) / (box[2] - box[0]))
        y = (top + bottom) / 2 - r * (box[1] + box[3]) / 2  # a triangle's centre is not its box's
        name = "muddy" if index == MUDDY else list(PALETTE)[index - 1]
        even = max(blob.shape) <= LONGEST * min(blob.shape)
        clear = scores[form] >= CLEAR and even and index != MUDDY
        shapes.append(Shape(name, form if clear else BLOB, float(left + right) / 2, float(y), float(r)))
    return tuple(sorted(shapes, key=lambda s: (s.y - s.r, s.x)))


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


@lru_cache(maxsize=4096)
def _silhouette(form: str, height: int, width: int) -> np.ndarray:
    """The form, cropped to its own box and stretched to height x width."""
    grid = torch.linspace(-26, 26, 209)
    rows, columns = torch.meshgrid(grid, grid, indexing="ij")
    inside = (signed_distance(form, columns, rows, 20.0) < 0).numpy()
    ys, xs = np.where(inside)
    inside = inside[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    y = ((np.arange(height) + 0.5) * inside.shape[0] / height).astype(int)
    x = ((np.arange(width) + 0.5) * inside.shape[1] / width).astype(int)
    return inside[y][:, x]


def _compare(found: Scene, prompt: Prompt) -> Verdict:
    left, matched = list(found), []
    for kind in prompt.kinds:
        shape = next((s for s in left if s.kind == kind), None)
        if shape:
            left.remove(shape)
        matched.append(shape)
    right = sum(shape is not None for shape in matched)
    soft = right / (len(matched) + 0.5 * len(left))
    complete = right == len(matched) and not left
    if prompt.relation:
        holds = right == len(matched) and satisfied(prompt, tuple(matched), JUDGING_SLACK)
        complete, soft = complete and holds, 0.7 * soft + 0.3 * holds
    return Verdict(complete, soft, found, instruction(found, prompt))
