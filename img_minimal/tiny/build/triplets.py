"""InstructPix2Pix for the tiny world: an image, the prompt of the edited scene, and the edit in words.

Some images are rendered scenes that miss the prompt in the ways a base model does: a colour or form exchanged, taken or
missing, one shape too many, the relation reversed. The others were drawn by the base itself, under the prompts of the
preference pairs, and the oracle says what is wrong: a detector that has only seen clean pictures overlooks much in
drawn ones. Where nothing is wrong the instruction is "nothing".
"""

import io
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from img_minimal.data.pairs import held_back
from img_minimal.images import decode, from_pil
from img_minimal.tiny.build.tables import save_table
from img_minimal.tiny.edits import instruction
from img_minimal.tiny.grammar import COLOURS, FORMS, HELD_OUT, Prompt, parse, sample_prompt
from img_minimal.tiny.oracle import detect
from img_minimal.tiny.world import CELLS, JITTER, LARGEST, SMALLEST, Scene, Shape, overlap, place, render

SHIPPED = 16_000  # triplets
BASE = "tiny-sdxl"  # in the columns model_0 and model_1 of preference pairs


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


def to_png(pixels: Tensor) -> bytes:
    """(3, 64, 64) in [0, 1] -> a 64-colour PNG, a quarter of the size of a full one."""
    array = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).quantize(64).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def drawn_triplets(rows: list[dict], rng: random.Random) -> Iterator[tuple[bytes, str, str]]:
    """About two triplets (JPEG, prompt, words) of each image that the base drew, from its preference pairs."""
    for _, group in groupby(rows, key=lambda row: row["ranking_id"]):
        won, lost = [], []
        for row in group:
            side = int(row["model_1"] == BASE)
            image = row[f"jpg_{side}"]  # the same in all rows of a group
            (won if row[f"label_{side}"] else lost).append(row["caption"])
        captions = lost[:1] + [rng.choice(part) for part in (won, lost[1:]) if part and rng.random() < 0.5]
        [found] = detect(from_pil([decode(image)]))
        for caption in captions:
            if not held_back(caption):
                yield image, caption, instruction(found, parse(caption))


def build(workdir: Path, target: Path, count: int = 12_000, images: int = 16_000) -> None:
    """Triplets of `count` rendered scenes and of the first `images` that the base drew for `workdir/pairs.parquet`.

    All go to `workdir/triplets.parquet`, the first SHIPPED also to `target`.
    """
    rng, triplets = random.Random(61), []
    for _ in tqdm(range(count), desc="rendered triplets"):
        scene, prompt, words = sample_triplet(rng)
        triplets.append((to_png(render([scene])[0]), str(prompt), words))
    rows = [row for row in pq.read_table(workdir / "pairs.parquet").to_pylist() if row["ranking_id"] < images]
    triplets += tqdm(drawn_triplets(rows, rng), desc="drawn triplets")
    rng.shuffle(triplets)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pictures = pa.array([{"bytes": image, "path": None} for image, _, _ in triplets], kind)
    columns = {"original_image": pictures, "edit_prompt": [words for *_, words in triplets]}
    table = pa.table(columns | {"edited_prompt": [prompt for _, prompt, _ in triplets]})
    for folder, part in ((workdir, table), (target, table[:SHIPPED])):
        save_table(part, folder / "triplets.parquet", "triplets")
