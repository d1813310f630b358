"""Training tables of the tiny world, made of 24,000 images that the base draws.

Pick-a-Pic: preference pairs. One image of a pair is what the base drew for a prompt; its rival is
the same scene edited: minimally corrected if the image is wrong, damaged in one respect if it is
right. Two unrelated images of a prompt differ in everything, and an aligner would learn an average;
these differ in what is wrong. The oracle labels both. An image also loses under up to eight prompts
it was not drawn for, most of them one to three edits away from what it shows: with 12,000 pairs, an
aligner of this size overfits.

InstructPix2Pix: an image, the prompt of the edited scene, and the edit in words. Drawn images come
under their own prompt, under what they show, and under a prompt some edits away. Rendered scenes
miss their prompts as a base model does. In some more of them only the relation may be wrong: an
MLLM that seldom has to look for one guesses. Where nothing is wrong, the instruction is "nothing".
"""

import io
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from img_minimal.backbone import open_backbone
from img_minimal.detector import MAX_HELD_OUT
from img_minimal.files import replacing, to_pil
from img_minimal.hub.weights import write_weights
from img_minimal.tiny.build.fit import preset_in
from img_minimal.tiny.edits import NOTHING, correct, instruction
from img_minimal.tiny.grammar import (
    COLOURS,
    FORMS,
    HELD_OUT,
    RELATIONS,
    Group,
    Prompt,
    sample_prompt,
)
from img_minimal.tiny.oracle import Verdict, compare, is_clear, judge, reading_order
from img_minimal.tiny.world import (
    CELLS,
    LARGEST,
    SMALLEST,
    Scene,
    Shape,
    exchange,
    jittered,
    overlap,
    place,
    render,
    satisfied,
)

BASE = "tiny-sdxl"  # in the columns model_0 and model_1
CHUNKS, CHUNK = 60, 400  # files of drawn images, and images in each
FIRST_SEED = 50_000_000  # of drawings, far from those of the evaluation
OTHER_PROMPTS = 8  # under which a drawn image loses
SHIPPED_IMAGES, SHIPPED_PAIRS = 12_000, 3  # the first images, and pairs of each: 15 MB
RENDERED, RELATED = 32_000, 24_000  # rendered triplets, and those about a relation
SHIPPED_TRIPLETS = 24_000  # drawn and rendered ones that the repository carries
MISTAKES = ("colour", "form", "less", "more", "exchange", "exchange", "move")


# Drawings


def prompts_of(chunk: int) -> list[Prompt]:
    """Sample the prompts of a chunk of drawings."""
    rng = random.Random(70_000 + chunk)
    return [sample_prompt(rng) for _ in range(CHUNK)]


def build_drawings(workdir: Path, target: Path, chunks: int = CHUNKS) -> None:
    """Draw all prompts with the base in `target`; a stopped build goes on at the next chunk."""
    backbone = open_backbone(preset_in(target))
    for chunk in tqdm(range(chunks), desc="drawings"):
        path = drawings_path(workdir, chunk)
        if not path.exists():
            first = FIRST_SEED + chunk * CHUNK
            captions = list(map(str, prompts_of(chunk)))
            images = backbone.draw(captions, [*range(first, first + CHUNK)])
            write_weights(path, {"images": (images * 255).round().byte()})


def drawings_path(workdir: Path, chunk: int) -> Path:
    """Locate a chunk's images."""
    return workdir / "drawings" / f"{chunk:03d}.safetensors"


def judged(workdir: Path, chunk: int) -> tuple[Tensor, list[Prompt], list[Verdict]]:
    """Read a chunk's images (CHUNK, 3, 64, 64) in [0, 1], their prompts, and judge them."""
    images = load_file(drawings_path(workdir, chunk))["images"].float() / 255
    prompts = prompts_of(chunk)
    return images, prompts, judge(images, prompts)


# Scenes with a mistake, and prompts that a scene is right or wrong for


def damage(scene: Scene, rng: random.Random) -> Scene:
    """Make one random mistake, without a held-out pair."""
    while True:
        shapes = _attempt(list(scene), rng.choice(MISTAKES), rng)
        held_out = any(shape.kind in HELD_OUT for shape in shapes)
        if shapes != list(scene) and not held_out:
            return tuple(shapes)


def _attempt(shapes: list[Shape], mistake: str, rng: random.Random) -> list[Shape]:
    """Change the list of shapes by one of MISTAKES, if it has enough shapes and room for it."""
    k = rng.randrange(len(shapes))
    if mistake == "colour":
        shapes[k] = replace(shapes[k], colour=rng.choice(COLOURS))
    elif mistake == "form":
        shapes[k] = replace(shapes[k], form=rng.choice(FORMS))
    elif mistake == "less" and len(shapes) > 1:
        del shapes[k]
    elif mistake == "more" and len(shapes) < 4:
        like = rng.choice(shapes)
        colour = like.colour if rng.random() < 0.5 else rng.choice(COLOURS)
        form = like.form if rng.random() < 0.5 else rng.choice(FORMS)
        centre = free_cell(shapes, rng)
        shapes.append(Shape(colour, form, *centre, rng.uniform(SMALLEST, LARGEST)))
    elif mistake == "exchange" and len(shapes) > 1:
        i, j = rng.sample(range(len(shapes)), 2)
        a, b = shapes[i], shapes[j]
        if rng.random() < 0.5:
            shapes[i], shapes[j] = replace(a, colour=b.colour), replace(b, colour=a.colour)
        else:
            shapes[i], shapes[j] = exchange(a, b)
    elif mistake == "move":
        shapes[k] = shapes[k].at(*free_cell(shapes, rng))
    return shapes


def free_cell(shapes: list[Shape], rng: random.Random) -> tuple[float, float]:
    """Draw a jittered cell that is free, or any cell if the scene is too untidy to have one."""
    for _ in range(200):
        centre = jittered(rng.choice(CELLS), rng)
        new = Shape("", "", *centre, LARGEST)
        if not any(overlap(new, shape) for shape in shapes):
            break
    return centre


def damaged(scene: Scene, prompt: Prompt, rng: random.Random) -> Scene:
    """Make a mistake that makes the scene wrong for the prompt."""
    for _ in range(20):
        other = damage(scene, rng)
        if instruction(other, prompt) != NOTHING:
            break
    return other


def describe(scene: Scene, rng: random.Random) -> Prompt | None:
    """Draw a training prompt that says what the scene holds, if the grammar has one."""
    if not 1 <= len(scene) <= 4:
        return None
    kinds = list(Counter(shape.kind for shape in scene).items())
    rng.shuffle(kinds)
    kinds.sort(key=lambda item: -item[1])
    groups = tuple(Group(number, *kind) for kind, number in kinds)
    several = groups[0].count > 1
    if len(groups) > 3 or (len(groups) > 1 and groups[1].count > 1):
        return None
    plain = [] if several and len(groups) > 1 else [Prompt(groups)]
    order = [group.kind for group in groups]
    ordered = sorted(scene, key=lambda shape: order.index(shape.kind))
    related = []
    if len(groups) == 2:
        related = [Prompt(groups, relation) for relation in RELATIONS]
    fitting = [prompt for prompt in related if satisfied(prompt, ordered)] or plain
    training = [prompt for prompt in fitting + plain if prompt.split == "train"]
    return rng.choice(training or [None])


def can_be_named(shape: Shape) -> bool:
    """Return True if a training prompt may name the shape."""
    return is_clear(shape) and shape.kind not in HELD_OUT


def shown_by(scene: Scene, rng: random.Random) -> Prompt | None:
    """Draw a training prompt that an image with these shapes is right for, if there is one."""
    prompt = describe(scene, rng) if all(map(can_be_named, scene)) else None
    return prompt if prompt and instruction(scene, prompt) == NOTHING else None


def prompts_for(scene: Scene, own: Prompt, count: int, rng: random.Random) -> list[Prompt]:
    """Draw up to `count` training prompts, other than its own, that an image is wrong for.

    Most are one to three edits away from what it shows.
    """
    clear = tuple(filter(can_be_named, scene))[:4]
    prompts: dict[str, Prompt] = {}
    for _ in range(8 * count):
        if len(prompts) == count:
            break
        if not clear or rng.random() < 0.25:
            other = sample_prompt(rng, own.category)
        else:
            edited = clear
            for _ in range(rng.choices((1, 2, 3), (7, 5, 3))[0]):
                edited = damage(edited, rng)
            other = describe(edited, rng)
        if other and str(other) != str(own) and instruction(scene, other) != NOTHING:
            prompts[str(other)] = other
    return list(prompts.values())


# Preference pairs


def build_pairs(workdir: Path, target: Path, chunks: int = CHUNKS) -> None:
    """Write all pairs of the drawings to `workdir`, and a part of them to `target`."""
    rows, right = [], 0
    for chunk in tqdm(range(chunks), desc="pairs"):
        images, prompts, verdicts = judged(workdir, chunk)
        right += sum(verdict.strict for verdict in verdicts)
        drawn = zip(to_pil(images), verdicts, prompts)
        for number, (image, verdict, prompt) in enumerate(drawn, chunk * CHUNK):
            rows += pairs_of_image(to_jpeg(image), verdict, prompt, number)
    print(f"{right} of {chunks * CHUNK} right, {len(rows)} pairs")
    save_table(pa.Table.from_pylist(rows), workdir / "pairs.parquet", "pairs")
    save_table(pa.Table.from_pylist(shipped(rows)), target / "pairs.parquet", "pairs")


def pairs_of_image(drawn: bytes, verdict: Verdict, prompt: Prompt, number: int) -> list[dict]:
    """Make the pairs of one drawn image.

    It wins or loses under its own prompt, wins under a prompt that says what it shows, and loses
    under OTHER_PROMPTS.
    """
    rng, scene = random.Random(number), verdict.found
    won, lost = ([prompt], []) if verdict.strict else ([], [prompt])
    shown = shown_by(scene, rng)
    if shown and str(shown) != str(prompt):
        won.append(shown)
    lost += prompts_for(scene, prompt, OTHER_PROMPTS, rng)
    rivals = [(other, damaged(scene, other, rng), True) for other in won]
    for other in lost:
        _, corrected = correct(scene, other)
        rivals.append((other, corrected, False))
    rows = []
    for other, edited, drawn_wins in rivals:
        if compare(edited, other).strict != drawn_wins:  # else it is a tie
            rival = to_webp(render([edited])[0])
            rows.append(pair_row(other, drawn, rival, drawn_wins, number))
    return rows


def pair_row(prompt: Prompt, drawn: bytes, edited: bytes, drawn_wins: bool, number: int) -> dict:
    """Build a row in Pick-a-Pic's columns; drawn images of odd numbers come second."""
    sides = [(drawn, drawn_wins, BASE), (edited, not drawn_wins, "edited scene")]
    if number % 2:
        sides.reverse()
    row = {"caption": str(prompt)}
    (row["jpg_0"], first_wins, model_0), (row["jpg_1"], second_wins, model_1) = sides
    row |= {"label_0": float(first_wins), "label_1": float(second_wins)}
    return row | {"ranking_id": number, "model_0": model_0, "model_1": model_1}


def shipped(rows: list[dict]) -> list[dict]:
    """Choose the pairs that the repository can carry."""
    seen: Counter[int] = Counter()
    chosen = []
    for row in rows:
        number = row["ranking_id"]
        seen[number] += 1
        if number < SHIPPED_IMAGES and seen[number] <= SHIPPED_PAIRS:
            chosen.append(row)
    return chosen


# Edit triplets

EditTriplet = tuple[bytes, Prompt, str]  # image, prompt, instruction


def sample_triplet(rng: random.Random) -> tuple[Scene, Prompt, str]:
    """Draw a scene, a prompt that it mostly is wrong for, and the instruction to correct it."""
    prompt = sample_prompt(rng)
    scene = place(prompt, rng)
    for _ in range(rng.choice((0, 1, 1, 2))):
        scene = damage(scene, rng)
    scene = tuple(rng.sample(scene, len(scene)))  # the order must not give the answer away
    return scene, prompt, instruction(tuple(sorted(scene, key=reading_order)), prompt)


def drawn_triplets(workdir: Path, chunk: int) -> Iterator[EditTriplet]:
    """Make triplets of a chunk of drawings, except for drawings of a held-out pair."""
    rng = random.Random(62_000 + chunk)
    for image, prompt, verdict in zip(*judged(workdir, chunk)):
        scene = verdict.found
        if any(shape.kind in HELD_OUT for shape in scene):
            continue
        shown = shown_by(scene, rng)
        prompts = [prompt, shown] if shown else [prompt]
        prompts += prompts_for(scene, prompt, 1, rng)
        distinct = {str(other): other for other in prompts}
        jpeg = to_jpeg(to_pil(image[None])[0])
        # A wrong drawing under its own prompt comes twice: it is what the MLLM will be shown.
        again = [] if verdict.strict else [prompt]
        for other in [*distinct.values(), *again]:
            words = instruction(scene, other)
            if not any(map(str.isdigit, words)):  # "remove 5 red circles" is too much to count
                yield jpeg, other, words


def rendered_triplets(count: int) -> Iterator[EditTriplet]:
    """Make triplets of rendered scenes."""
    rng = random.Random(61)
    for _ in tqdm(range(count), desc="rendered triplets"):
        scene, prompt, words = sample_triplet(rng)
        yield to_webp(render([scene])[0]), prompt, words


def relation_triplets(count: int) -> Iterator[EditTriplet]:
    """Make triplets of right shapes; in every other one, the relation may be wrong."""
    rng = random.Random(64)
    for k in tqdm(range(count), desc="relation triplets"):
        prompt = sample_prompt(rng, rng.choice(("position", "complex")))
        while not prompt.relation:
            prompt = sample_prompt(rng, "complex")
        other = replace(prompt, relation=rng.choice(RELATIONS)) if k % 2 else prompt
        scene = place(other, rng)
        yield to_webp(render([scene])[0]), prompt, instruction(scene, prompt)


def build_triplets(
    workdir: Path,
    target: Path,
    rendered: int = RENDERED,
    related: int = RELATED,
    chunks: int = CHUNKS,
) -> None:
    """Write all triplets to `workdir/triplets.parquet`, and a part of them to `target`."""
    triplets = list(rendered_triplets(rendered))
    for chunk in tqdm(range(chunks), desc="drawn triplets"):
        triplets += drawn_triplets(workdir, chunk)
    random.Random(63).shuffle(triplets)
    everything = [*relation_triplets(related), *triplets]
    save_table(triplet_table(everything), workdir / "triplets.parquet", "triplets")
    if len(triplets) > SHIPPED_TRIPLETS:
        # Finetuning on either table holds out the same ones, at the end.
        triplets = triplets[: SHIPPED_TRIPLETS - MAX_HELD_OUT] + triplets[-MAX_HELD_OUT:]
    save_table(triplet_table(triplets), target / "triplets.parquet", "triplets")


def triplet_table(triplets: list[EditTriplet]) -> pa.Table:
    """Build a table in InstructPix2Pix's columns."""
    images, prompts, instructions = zip(*triplets)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = [{"bytes": image, "path": None} for image in images]
    return pa.table(
        {
            "original_image": pa.array(cells, kind),
            "edit_prompt": instructions,
            "edited_prompt": list(map(str, prompts)),
        }
    )


# Files


def save_table(table: pa.Table, path: Path, kind: str) -> None:
    """Write a parquet file, as small as possible, and print its size."""
    with replacing(path) as partial:
        pq.write_table(table, partial, compression="zstd", compression_level=19)
    print(f"{len(table)} {kind} in {path}, {path.stat().st_size / 1e6:.1f} MB")


def to_webp(pixels: Tensor) -> bytes:
    """Encode (3, 64, 64) in [0, 1] as a lossless WebP of 64 colours, about 240 bytes."""
    buffer = io.BytesIO()
    image = to_pil(pixels[None])[0].quantize(64).convert("RGB")
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def to_jpeg(image: Image.Image) -> bytes:
    """Encode without colour subsampling, which would smear shapes of ten pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, subsampling=0, optimize=True)
    return buffer.getvalue()
