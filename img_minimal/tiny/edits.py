"""The smallest correction that makes a scene right for a prompt: as a new scene, and in words.

The words teach the MLLM to see misalignment (InstructPix2Pix's edit instructions), tell a reader what the oracle found
wrong, and the corrected scene is the other half of a preference pair. The correction is a function of scene and
prompt, without rng: a shape that must be added goes to the free cell nearest the middle, so that what an aligner has
to learn is an answer and not an average of answers.
"""

from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations

from img_minimal.tiny.grammar import Group, Prompt
from img_minimal.tiny.world import CELLS, LARGEST, SMALLEST, Scene, Shape, overlap, satisfied

NOTHING = "nothing"
ADDED_RADIUS = (SMALLEST + LARGEST) / 2


def correct(found: Scene, prompt: Prompt) -> tuple[list[str], Scene]:
    """Edits in words (empty when the scene is right) and the corrected scene, shapes in the order of the prompt."""
    changes = _changes(found, prompt)
    kept, edits = _match(list(found), prompt, changes)
    added = [k for k, shape in enumerate(kept) if shape is None]
    edits += _counted("add", [prompt.kinds[k] for k in added])
    scene, moved = _arrange(kept, prompt)
    left = list((Counter(s.kind for s in found) - Counter(s.kind for s in kept if s)).elements())
    changed_from = Counter(kind for kind, _ in changes)
    edits += _counted("remove", list((Counter(left) - changed_from).elements()))
    if moved:
        first, second = prompt.groups
        edits.append(f"move {_the(first)} {prompt.relation} {_the(second)}")
    return edits, scene


def instruction(found: Scene, prompt: Prompt) -> str:
    """The edits as one line, or "nothing"."""
    return ", ".join(correct(found, prompt)[0]) or NOTHING


def _the(group: Group) -> str:
    return f"the {group}".replace("the an ", "the ").replace("the a ", "the ")


def _counted(verb: str, kinds: list[tuple[str, str]]) -> list[str]:
    groups = [Group(n, *kind) for kind, n in Counter(kinds).items()]
    return [f"{verb} {_the(group) if verb == 'remove' and group.count == 1 else group}" for group in groups]


def _changes(found: Scene, prompt: Prompt) -> list[tuple[tuple[str, str], int]]:
    """Which left-over kinds turn into which missing places of the prompt: (kind, place), most alike first."""
    missing = list(range(len(prompt.kinds)))
    left = [shape.kind for shape in found]
    for k, kind in enumerate(prompt.kinds):
        if kind in left:
            left.remove(kind)
            missing.remove(k)
    changes = []
    for alike in (1, 0):  # one attribute in common, then none
        for k in list(missing):
            target = prompt.kinds[k]
            match = next((kind for kind in left if (kind[0] == target[0]) + (kind[1] == target[1]) >= alike), None)
            if match:
                changes.append((match, k))
                left.remove(match)
                missing.remove(k)
    return changes


def _match(
    found: list[Shape], prompt: Prompt, changes: list[tuple[tuple[str, str], int]]
) -> tuple[list[Shape | None], list[str]]:
    """Give every place of the prompt a shape of the scene, recoloured or reshaped if need be, or None."""
    kept: list[Shape | None] = []
    for kind in prompt.kinds:
        shape = next((s for s in found if s.kind == kind), None)
        if shape:
            found.remove(shape)
        kept.append(shape)
    edits = []
    for kind, k in changes:
        shape = next(s for s in found if s.kind == kind)
        found.remove(shape)
        colour, form = prompt.kinds[k]
        kept[k] = replace(shape, colour=colour, form=form)
        edits.append(f"change the {' '.join(kind)} to {Group(1, colour, form)}")
    return kept, edits


def _arrange(kept: list[Shape | None], prompt: Prompt) -> tuple[Scene, bool]:
    """Find places for what is added and, if the relation asks for it, for as few others as possible."""
    shapes = [
        replace(s, r=min(max(s.r, SMALLEST), LARGEST)) if s else Shape(*kind, 32.0, 32.0, ADDED_RADIUS)
        for s, kind in zip(kept, prompt.kinds)
    ]
    added = [k for k, s in enumerate(kept) if s is None]
    present = [k for k, s in enumerate(kept) if s is not None]
    if not added and satisfied(prompt, tuple(shapes), judging=True):
        return tuple(shapes), False
    if not added and len(shapes) == 2:
        a, b = shapes
        exchanged = (replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y))
        if satisfied(prompt, exchanged):
            return exchanged, True
    for extra in range(len(present) + 1):
        best = None
        for moved in combinations(present, extra):
            free = [*added, *moved]
            for cells in permutations(CELLS, len(free)):
                # Added shapes start in the middle, so their cost is the distance from it.
                cost = sum((x - shapes[k].x) ** 2 + (y - shapes[k].y) ** 2 for k, (x, y) in zip(free, cells))
                if best and cost >= best[0]:
                    continue
                scene = list(shapes)
                for k, (x, y) in zip(free, cells):
                    scene[k] = replace(scene[k], x=x, y=y)
                clash = any(overlap(scene[k], s) for k in free for j, s in enumerate(scene) if j != k)
                if not clash and satisfied(prompt, tuple(scene)):
                    best = (cost, tuple(scene))
        if best:
            return best[1], extra > 0
    raise ValueError(f"no correction of {kept} fits {prompt}")
