"""InstructPix2Pix for the tiny world: an image, the prompt of the edited scene, and the edit in words.

Images are rendered scenes that miss the prompt in the ways a base model does: a colour or form exchanged, taken or
missing, one shape too many, the relation reversed. Where nothing is wrong the instruction is "nothing". Adding images
that the base drew itself made a detector of drawn images, but its features a worse guide: see the README.
"""

import io
import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from img_minimal.tiny.build.tables import save_table
from img_minimal.tiny.edits import instruction
from img_minimal.tiny.grammar import COLOURS, FORMS, HELD_OUT, Prompt, sample_prompt
from img_minimal.tiny.world import CELLS, JITTER, LARGEST, SMALLEST, Scene, Shape, overlap, place, render


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


def sample_triplet(rng: random.Random, split: str = "train") -> tuple[Scene, Prompt, str]:
    """A scene, a prompt it was (mostly) not drawn for, and the instruction that leads from one to the other."""
    prompt = sample_prompt(rng, split=split)
    scene = place(prompt, rng)
    for _ in range(rng.choice((0, 1, 1, 2))):
        scene = damage(scene, rng)
    scene = tuple(rng.sample(scene, len(scene)))  # the order of the list must not give the answer away
    return scene, prompt, instruction(tuple(sorted(scene, key=lambda s: (s.y - s.r, s.x))), prompt)


def to_webp(pixels: Tensor) -> bytes:
    """(3, 64, 64) in [0, 1] -> a lossless WebP of 64 colours, about 240 bytes."""
    array = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).quantize(64).convert("RGB").save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def build(target: Path, count: int = 32_000) -> None:
    """Write `target/triplets.parquet` with the columns of InstructPix2Pix that the method reads."""
    rng = random.Random(61)
    triplets = [sample_triplet(rng) for _ in tqdm(range(count), desc="triplets")]
    images = [{"bytes": to_webp(render([scene])[0]), "path": None} for scene, _, _ in triplets]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"original_image": pa.array(images, kind), "edit_prompt": [words for *_, words in triplets]}
    table = pa.table(columns | {"edited_prompt": [str(prompt) for _, prompt, _ in triplets]})
    save_table(table, target / "triplets.parquet", "triplets")
