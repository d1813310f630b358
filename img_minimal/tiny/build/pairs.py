"""Pick-a-Pic for the tiny world: the base twin's own images, labelled by the oracle.

One image of a pair is what the base drew for a prompt. Its rival is the same scene edited: minimally corrected if the
image is wrong, damaged in one respect if it is right. Two unrelated images of one prompt differ in everything, and a
regression from one to the other learns an average; a pair that shares its layout differs in what is wrong. The oracle
labels both; equal labels are ties and are dropped.
"""

import io
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from img_minimal.images import to_pil
from img_minimal.pipeline import Painter
from img_minimal.presets import Preset
from img_minimal.tiny.build.triplets import damage
from img_minimal.tiny.edits import NOTHING, correct, instruction
from img_minimal.tiny.grammar import Prompt, sample_prompt
from img_minimal.tiny.oracle import Verdict, judge
from img_minimal.tiny.world import Scene, render

CHUNK = 400  # images between two files, so that a stopped build goes on
FIRST_SEED = 50_000_000  # far from those of the evaluation


def to_jpeg(image: Image.Image) -> bytes:
    """Encoded without colour subsampling, which would smear shapes of ten pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, subsampling=0, optimize=True)
    return buffer.getvalue()


def rival(verdict: Verdict, prompt: Prompt, rng: random.Random) -> Scene:
    """The scene of a drawn image, corrected or damaged; whichever makes it the other half of a pair."""
    if not verdict.strict:
        return correct(verdict.found, prompt)[1]
    for _ in range(20):
        scene = damage(verdict.found, rng)
        if instruction(scene, prompt) != NOTHING:
            break
    return scene


def chunk_of_pairs(painter: Painter, chunk: int) -> tuple[list[dict], int]:
    """Rows in Pick-a-Pic's columns from CHUNK images of the base, and how many of these were right."""
    rng = random.Random(70_000 + chunk)
    prompts = [sample_prompt(rng) for _ in range(CHUNK)]
    seeds = [FIRST_SEED + chunk * CHUNK + k for k in range(CHUNK)]
    images: Tensor = painter.draw([str(p) for p in prompts], seeds)
    verdicts = judge(images, prompts)
    rivals = render([rival(v, p, rng) for v, p in zip(verdicts, prompts)])
    labels = [(v.strict, r.strict) for v, r in zip(verdicts, judge(rivals, prompts))]
    rows = []
    for k, (drawn, edited) in enumerate(zip(to_pil(images), to_pil(rivals))):
        if labels[k][0] == labels[k][1]:
            continue
        sides = [(to_jpeg(drawn), labels[k][0], "tiny-sdxl"), (to_jpeg(edited), labels[k][1], "edited scene")]
        rng.shuffle(sides)
        (jpg_0, label_0, model_0), (jpg_1, label_1, model_1) = sides
        row = {"caption": str(prompts[k]), "jpg_0": jpg_0, "jpg_1": jpg_1, "label_0": float(label_0)}
        row |= {"label_1": float(label_1), "ranking_id": chunk * CHUNK + k, "model_0": model_0, "model_1": model_1}
        rows.append(row)
    return rows, sum(v.strict for v in verdicts)


def build(workdir: Path, target: Path, preset: Preset, chunks: int = 30, shard: int = 0, shards: int = 1) -> None:
    """Draw 12,000 images and write `target/pairs.parquet`.

    Several processes can share the work, each with its own `shard` of `shards`; the last call joins the chunks.
    """
    folder = workdir / "pairs"
    folder.mkdir(exist_ok=True)
    painter = Painter.from_preset(preset)
    for chunk in tqdm(range(shard, chunks, shards), desc="pairs"):
        path = folder / f"{chunk:03d}.parquet"
        if path.exists():
            continue
        rows, right = chunk_of_pairs(painter, chunk)
        tqdm.write(f"chunk {chunk}: {right} of {CHUNK} right, {len(rows)} pairs")
        pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    parts = [folder / f"{chunk:03d}.parquet" for chunk in range(chunks)]
    if all(p.exists() for p in parts):
        table = pa.concat_tables([pq.read_table(p) for p in parts])
        pq.write_table(table, target / "pairs.parquet", compression="zstd", compression_level=19)
        print(f"{table.num_rows} pairs, {(target / 'pairs.parquet').stat().st_size / 1e6:.1f} MB")
