"""Pick-a-Pic for the tiny world: the base twin's own images, labelled by the oracle.

One image of a pair is what the base drew for a prompt. Its rival is the same scene edited: minimally corrected if the
image is wrong, damaged in one respect if it is right. Two unrelated images of one prompt differ in everything, and a
regression from one to the other learns an average; a pair that shares its layout differs in what is wrong. The oracle
labels both; equal labels are ties and are dropped.

An image also loses under prompts that it was not drawn for. Up to eight such prompts for each image, most of them one
to three edits away from what it shows, make many pairs without drawing: with 12,000 pairs an aligner of this size
over-fits. All of them stay in the work folder, for the aligners that ship; the repository ships a part.
"""

import io
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from img_minimal.files.weights import write_safetensors
from img_minimal.load import load_backbone
from img_minimal.presets import Preset
from img_minimal.runtime.images import to_pil
from img_minimal.tiny.build.tables import save_table
from img_minimal.tiny.build.triplets import damage, to_webp
from img_minimal.tiny.edits import NOTHING, correct, instruction
from img_minimal.tiny.grammar import HELD_OUT, RELATIONS, Group, Prompt, sample_prompt
from img_minimal.tiny.oracle import Verdict, compare, is_clear, judge
from img_minimal.tiny.world import Scene, Shape, render, satisfied

BASE = "tiny-sdxl"  # in the columns model_0 and model_1
CHUNKS, CHUNK = 60, 400  # files of images, so that a stopped build goes on, and images in each
FIRST_SEED = 50_000_000  # far from those of the evaluation
SHIPPED_IMAGES, SHIPPED_PAIRS = 12_000, 3  # the first images, and pairs of each: 15 MB


def to_jpeg(image: Image.Image) -> bytes:
    """Encoded without colour subsampling, which would smear shapes of ten pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, subsampling=0, optimize=True)
    return buffer.getvalue()


def damaged(scene: Scene, prompt: Prompt, rng: random.Random) -> Scene:
    """The scene with a mistake that makes it wrong for the prompt."""
    for _ in range(20):
        other = damage(scene, rng)
        if instruction(other, prompt) != NOTHING:
            break
    return other


def describe(scene: Scene, rng: random.Random) -> Prompt | None:
    """A training prompt that the scene is right for, if the grammar has one."""
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


def pair_row(prompt: Prompt, drawn: bytes, edited: bytes, drawn_wins: bool, number: int) -> dict:
    """A row in Pick-a-Pic's columns; `ranking_id` numbers the drawn image, and says on which side it stands."""
    sides = [(drawn, drawn_wins, BASE), (edited, not drawn_wins, "edited scene")]
    if number % 2:
        sides.reverse()
    (jpg_0, label_0, model_0), (jpg_1, label_1, model_1) = sides
    row = {"caption": str(prompt), "jpg_0": jpg_0, "jpg_1": jpg_1, "label_0": float(label_0)}
    return row | {"label_1": float(label_1), "ranking_id": number, "model_0": model_0, "model_1": model_1}


def can_be_named(shape: Shape) -> bool:
    """May a training prompt name it?"""
    return is_clear(shape) and shape.kind not in HELD_OUT


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


def pairs_of_image(drawn: bytes, verdict: Verdict, prompt: Prompt, number: int, more: int = 8) -> list[dict]:
    """The pairs of one drawn image.

    One under its own prompt, one that it wins under a prompt that says what it shows, and those that it loses under
    `more` other prompts.
    """
    rng, found = random.Random(number), verdict.found
    won = [prompt] if verdict.strict else []
    shown = describe(found, rng) if all(map(can_be_named, found)) else None
    if shown and str(shown) != str(prompt) and instruction(found, shown) == NOTHING:
        won.append(shown)
    lost = [] if verdict.strict else [prompt]
    lost += prompts_for(found, prompt, more, rng)
    candidates = [(p, damaged(found, p, rng), True) for p in won] + [(p, correct(found, p)[1], False) for p in lost]
    candidates = [(p, scene, wins) for p, scene, wins in candidates if compare(scene, p).strict != wins]
    edited = render([scene for _, scene, _ in candidates])
    return [pair_row(p, drawn, to_webp(picture), wins, number) for (p, _, wins), picture in zip(candidates, edited)]


def prompts_of(chunk: int) -> list[Prompt]:
    """What a chunk of images is drawn for."""
    rng = random.Random(70_000 + chunk)
    return [sample_prompt(rng) for _ in range(CHUNK)]


def draw(workdir: Path, preset: Preset, chunks: range = range(CHUNKS)) -> None:
    """Draw 24,000 images into `workdir/drawings`; processes can share the chunks."""
    backbone = load_backbone(preset)
    for chunk in tqdm(chunks, desc="drawings"):
        path = workdir / "drawings" / f"{chunk:03d}.safetensors"
        if not path.exists():
            seeds = [FIRST_SEED + chunk * CHUNK + k for k in range(CHUNK)]
            images = backbone.draw([str(p) for p in prompts_of(chunk)], seeds)
            write_safetensors(path, {"images": (images * 255).round().byte()})


def judged(workdir: Path, chunk: int) -> tuple[Tensor, list[Prompt], list[Verdict]]:
    """Images (CHUNK, 3, 64, 64) in [0, 1] that were drawn, what for, and what the oracle says of them."""
    images = load_file(workdir / "drawings" / f"{chunk:03d}.safetensors")["images"].float() / 255
    prompts = prompts_of(chunk)
    return images, prompts, judge(images, prompts)


def build(workdir: Path, target: Path) -> None:
    """Write all pairs of the drawings to `workdir/pairs.parquet` and a part of them to `target/pairs.parquet`."""
    rows, right = [], 0
    for chunk in tqdm(range(CHUNKS), desc="pairs"):
        images, prompts, verdicts = judged(workdir, chunk)
        right += sum(v.strict for v in verdicts)
        for k, (image, verdict, prompt) in enumerate(zip(to_pil(images), verdicts, prompts)):
            rows += pairs_of_image(to_jpeg(image), verdict, prompt, chunk * CHUNK + k)
    print(f"{right} of {CHUNKS * CHUNK} right, {len(rows)} pairs")
    for place, chosen in ((workdir, rows), (target, shipped(rows))):
        save_table(pa.Table.from_pylist(chosen), place / "pairs.parquet", "pairs")


def shipped(rows: list[dict]) -> list[dict]:
    """The part that the repository can carry."""
    seen: Counter[int] = Counter()
    chosen = []
    for row in rows:
        seen[row["ranking_id"]] += 1
        if row["ranking_id"] < SHIPPED_IMAGES and seen[row["ranking_id"]] <= SHIPPED_PAIRS:
            chosen.append(row)
    return chosen
