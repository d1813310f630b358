"""Scenes with a mistake, and prompts that a scene is right or wrong for: what pairs and triplets are made of."""

import random
from collections import Counter
from dataclasses import replace

from img_minimal.tiny.edits import NOTHING, instruction
from img_minimal.tiny.grammar import (
    COLOURS,
    FORMS,
    HELD_OUT,
    RELATIONS,
    Group,
    Prompt,
    sample_prompt,
)
from img_minimal.tiny.oracle import is_clear
from img_minimal.tiny.world import (
    CELLS,
    JITTER,
    LARGEST,
    SMALLEST,
    Scene,
    Shape,
    overlap,
    satisfied,
)


def damage(scene: Scene, rng: random.Random) -> Scene:
    """One random mistake; held-out pairs do not appear."""
    while True:
        shapes = list(scene)
        kind = rng.choice(("colour", "form", "less", "more", "exchange", "exchange", "move"))
        k = rng.randrange(len(shapes))
        if kind == "colour":
            shapes[k] = replace(shapes[k], colour=rng.choice(COLOURS))
        elif kind == "form":
            shapes[k] = replace(shapes[k], form=rng.choice(FORMS))
        elif kind == "less" and len(shapes) > 1:
            del shapes[k]
        elif kind == "more" and len(shapes) < 4:
            like = rng.choice(shapes)
            colour = like.colour if rng.random() < 0.5 else rng.choice(COLOURS)
            form = like.form if rng.random() < 0.5 else rng.choice(FORMS)
            shapes.append(Shape(colour, form, *free_cell(shapes, rng), rng.uniform(SMALLEST, LARGEST)))
        elif kind == "exchange" and len(shapes) > 1:
            a, b = rng.sample(range(len(shapes)), 2)
            if rng.random() < 0.5:
                shapes[a], shapes[b] = (
                    replace(shapes[a], colour=shapes[b].colour),
                    replace(shapes[b], colour=shapes[a].colour),
                )
            else:
                shapes[a], shapes[b] = (
                    replace(shapes[a], x=shapes[b].x, y=shapes[b].y),
                    replace(shapes[b], x=shapes[a].x, y=shapes[a].y),
                )
        elif kind == "move":
            x, y = free_cell(shapes, rng)
            shapes[k] = replace(shapes[k], x=x, y=y)
        if shapes != list(scene) and not any(s.kind in HELD_OUT for s in shapes):
            return tuple(shapes)


def free_cell(shapes: list[Shape], rng: random.Random) -> tuple[float, float]:
    """A jittered place where nothing stands; any place if the scene is too untidy to have one."""
    for _ in range(200):
        x, y = (c + rng.uniform(-JITTER, JITTER) for c in rng.choice(CELLS))
        if not any(overlap(Shape("", "", x, y, LARGEST), s) for s in shapes):
            break
    return x, y


def damaged(scene: Scene, prompt: Prompt, rng: random.Random) -> Scene:
    """The scene with a mistake that makes it wrong for the prompt."""
    for _ in range(20):
        other = damage(scene, rng)
        if instruction(other, prompt) != NOTHING:
            break
    return other


def can_be_named(shape: Shape) -> bool:
    """May a training prompt name it?"""
    return is_clear(shape) and shape.kind not in HELD_OUT


def shown_by(found: Scene, rng: random.Random) -> Prompt | None:
    """A training prompt that an image with these shapes is right for, if there is one."""
    prompt = describe(found, rng) if all(map(can_be_named, found)) else None
    return prompt if prompt and instruction(found, prompt) == NOTHING else None


def describe(scene: Scene, rng: random.Random) -> Prompt | None:
    """A training prompt that says what the scene holds, if the grammar has one."""
    if len(scene) > 4:
        return None
    counts = list(Counter(s.kind for s in scene).items())
    rng.shuffle(counts)
    counts.sort(key=lambda item: -item[1])
    groups = tuple(Group(n, *kind) for kind, n in counts)
    if not 1 <= len(groups) <= 3 or (len(groups) > 1 and groups[1].count > 1):
        return None
    plain = [Prompt(groups)] if len(groups) == 1 or groups[0].count == 1 else []
    ordered = tuple(sorted(scene, key=lambda s: [k for k, _ in counts].index(s.kind)))
    options = [Prompt(groups, relation) for relation in RELATIONS] if len(groups) == 2 else []
    fitting = [p for p in options if satisfied(p, ordered)] or plain
    return rng.choice([p for p in fitting + plain if p.split == "train"] or [None])


def prompts_for(found: Scene, own: Prompt, more: int, rng: random.Random) -> list[Prompt]:
    """Up to `more` training prompts that the image is wrong for: most are one to three edits away, some are any."""
    clear = tuple(filter(can_be_named, found))[:4]
    prompts: dict[str, Prompt] = {}
    for _ in range(8 * more):
        if len(prompts) == more:
            break
        if not clear or rng.random() < 0.25:
            other = sample_prompt(rng, own.category)
        else:
            scene = clear
            for _ in range(rng.choices((1, 2, 3), (7, 5, 3))[0]):
                scene = damage(scene, rng)
            other = describe(scene, rng)
        if other and str(other) != str(own) and instruction(found, other) != NOTHING:
            prompts[str(other)] = other
    return list(prompts.values())
