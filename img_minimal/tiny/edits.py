"""Correct a scene for a prompt by as few edits as possible: as a new scene, and in words.

The words are InstructPix2Pix's edit instructions: they teach the MLLM to see misalignment, and tell
a reader what the oracle found wrong. The corrected scene is the other half of a preference pair.

A correction depends on nothing but scene and prompt: an added shape goes to the free cell nearest
the middle, so that an aligner has one answer to learn and not an average of several.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, permutations

from img_minimal.tiny.grammar import Group, Kind, Prompt
from img_minimal.tiny.world import (
    CELLS,
    LARGEST,
    SMALLEST,
    Scene,
    Shape,
    exchange,
    overlap,
    satisfied,
)

NOTHING = "nothing"
ADDED_RADIUS = (SMALLEST + LARGEST) / 2


def correct(scene: Scene, prompt: Prompt) -> tuple[list[str], Scene]:
    """Return the edits in words, and the corrected scene in the order of the prompt.

    There are no edits if the scene is right.
    """
    shapes, left = match(scene, prompt)
    edits = _change(shapes, left, prompt)
    missing = [kind for kind, shape in zip(prompt.kinds, shapes) if shape is None]
    edits += _count("add", Counter(missing))
    corrected, moved = _arrange(shapes, prompt)
    # The intersection keeps the order in which kinds appear in the scene.
    edits += _count("remove", _kinds(scene) & _kinds(left))
    if moved:
        first, second = map(_definite, prompt.groups)
        edits.append(f"move {first} {prompt.relation} {second}")
    return edits, corrected


def instruction(scene: Scene, prompt: Prompt) -> str:
    """Return the edits as one line, or "nothing"."""
    edits, _ = correct(scene, prompt)
    return ", ".join(edits) or NOTHING


def match(scene: Scene, prompt: Prompt) -> tuple[list[Shape | None], list[Shape]]:
    """Find the shapes that the prompt names.

    Returns a shape or None for each of `prompt.kinds`, and the shapes left over.
    """
    left = list(scene)
    shapes = [_take(left, kind, alike=2) for kind in prompt.kinds]
    return shapes, left


def _take(shapes: list[Shape], kind: Kind, alike: int) -> Shape | None:
    """Remove and return the first shape that has at least `alike` attributes of a kind."""
    colour, form = kind
    for shape in shapes:
        same = (shape.colour == colour) + (shape.form == form)
        if same >= alike:
            shapes.remove(shape)
            return shape
    return None


def _change(shapes: list[Shape | None], left: list[Shape], prompt: Prompt) -> list[str]:
    """Fill gaps in `shapes` by recolouring or reshaping what is left; returns the edits in words.

    Shapes that have one attribute right come first.
    """
    edits = []
    for alike in (1, 0):
        for k, kind in enumerate(prompt.kinds):
            if shapes[k]:
                continue
            old = _take(left, kind, alike)
            if old:
                new = Group(1, *kind)
                shapes[k] = replace(old, colour=new.colour, form=new.form)
                edits.append(f"change the {old.colour} {old.form} to {new}")
    return edits


def _arrange(shapes: list[Shape | None], prompt: Prompt) -> tuple[Scene, bool]:
    """Add missing shapes and, if the relation needs it, move as few of the others as possible.

    Returns the scene, and True if a shape was moved.
    """
    added = [k for k, shape in enumerate(shapes) if shape is None]
    present = [k for k, shape in enumerate(shapes) if shape is not None]
    scene = []
    for shape, kind in zip(shapes, prompt.kinds):
        # An added shape starts in the middle, so its cost is the distance from there.
        shape = shape or Shape(*kind, 32.0, 32.0, ADDED_RADIUS)
        radius = min(max(shape.r, SMALLEST), LARGEST)
        scene.append(replace(shape, r=radius))
    if not added:
        if satisfied(prompt, scene, judging=True):
            return tuple(scene), False
        if len(scene) == 2:
            exchanged = exchange(*scene)
            if satisfied(prompt, exchanged):
                return exchanged, True
    for count in range(len(present) + 1):
        free = [[*added, *moved] for moved in combinations(present, count)]
        nearest = _nearest_layout(scene, free, prompt)
        if nearest:
            return nearest, count > 0
    raise ValueError(f"no correction of {shapes} fits {prompt}")


def _nearest_layout(scene: list[Shape], choices: list[list[int]], prompt: Prompt) -> Scene | None:
    """Move shapes to cells, at the least sum of squared distances, such that the prompt is right.

    `choices` are the sets of shapes that may move; returns None if no layout is right.
    """
    nearest, least = None, float("inf")
    for free in choices:
        for cells in permutations(CELLS, len(free)):
            cost = sum(scene[k].squared_distance(*cell) for k, cell in zip(free, cells))
            if cost >= least:
                continue
            layout = list(scene)
            for k, cell in zip(free, cells):
                layout[k] = layout[k].at(*cell)
            if satisfied(prompt, layout) and not _clashes(layout, free):
                nearest, least = tuple(layout), cost
    return nearest


def _clashes(scene: list[Shape], moved: list[int]) -> bool:
    """Return True if a moved shape overlaps another one."""
    for k in moved:
        for j, other in enumerate(scene):
            if j != k and overlap(scene[k], other):
                return True
    return False


def _kinds(shapes: Sequence[Shape]) -> Counter[Kind]:
    return Counter(shape.kind for shape in shapes)


def _count(verb: str, kinds: Counter[Kind]) -> list[str]:
    """Word an edit for each kind: "add two red circles", "remove the blue square"."""
    edits = []
    for kind, number in kinds.items():
        group = Group(number, *kind)
        known = verb == "remove" and number == 1
        words = _definite(group) if known else str(group)
        edits.append(f"{verb} {words}")
    return edits


def _definite(group: Group) -> str:
    """Name a group that is known: "the red circle", "the two red circles"."""
    if group.count > 1:
        return f"the {group}"
    return f"the {group.colour} {group.form}"
