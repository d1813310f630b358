"""Pick-a-Pic for the tiny world: the base twin's own images, labelled by the oracle.

One image of a pair is what the base drew for a prompt. Its rival is the same scene edited: minimally corrected if the
image is wrong, damaged in one respect if it is right. Two unrelated images of one prompt differ in everything, and a
regression from one to the other learns an average; a pair that shares its layout differs in what is wrong. The oracle
labels both; equal labels are ties and are dropped.

An image also loses under prompts that it was not drawn for. Up to eight such prompts for each image, most of them one
to three edits away from what it shows, make many pairs without drawing: with 12,000 pairs an aligner of this size
over-fits. All of them stay in the work folder, for the aligners that ship; the repository ships a part.
"""

import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from img_minimal.files import to_pil
from img_minimal.tiny.build.drawings import CHUNK, CHUNKS, judged
from img_minimal.tiny.build.mistakes import damaged, prompts_for, shown_by
from img_minimal.tiny.build.tables import save_table, to_jpeg, to_webp
from img_minimal.tiny.edits import correct
from img_minimal.tiny.grammar import Prompt
from img_minimal.tiny.oracle import Verdict, compare
from img_minimal.tiny.world import render

BASE = "tiny-sdxl"  # in the columns model_0 and model_1
SHIPPED_IMAGES, SHIPPED_PAIRS = 12_000, 3  # the first images, and pairs of each: 15 MB


def pair_row(prompt: Prompt, drawn: bytes, edited: bytes, drawn_wins: bool, number: int) -> dict:
    """A row in Pick-a-Pic's columns; `ranking_id` numbers the drawn image, and says on which side it stands."""
    sides = [(drawn, drawn_wins, BASE), (edited, not drawn_wins, "edited scene")]
    if number % 2:
        sides.reverse()
    (jpg_0, label_0, model_0), (jpg_1, label_1, model_1) = sides
    row = {"caption": str(prompt), "jpg_0": jpg_0, "jpg_1": jpg_1, "label_0": float(label_0)}
    return row | {"label_1": float(label_1), "ranking_id": number, "model_0": model_0, "model_1": model_1}


def pairs_of_image(drawn: bytes, verdict: Verdict, prompt: Prompt, number: int, more: int = 8) -> list[dict]:
    """The pairs of one drawn image.

    One under its own prompt, one that it wins under a prompt that says what it shows, and those that it loses under
    `more` other prompts.
    """
    rng, found = random.Random(number), verdict.found
    won = [prompt] if verdict.strict else []
    if (shown := shown_by(found, rng)) and str(shown) != str(prompt):
        won.append(shown)
    lost = [] if verdict.strict else [prompt]
    lost += prompts_for(found, prompt, more, rng)
    candidates = [(p, damaged(found, p, rng), True) for p in won] + [(p, correct(found, p)[1], False) for p in lost]
    candidates = [(p, scene, wins) for p, scene, wins in candidates if compare(scene, p).strict != wins]
    edited = render([scene for _, scene, _ in candidates])
    return [pair_row(p, drawn, to_webp(picture), wins, number) for (p, _, wins), picture in zip(candidates, edited)]


def build(workdir: Path, target: Path, chunks: int = CHUNKS) -> None:
    """Write all pairs of the drawings to `workdir/pairs.parquet` and a part of them to `target/pairs.parquet`."""
    rows, right = [], 0
    for chunk in tqdm(range(chunks), desc="pairs"):
        images, prompts, verdicts = judged(workdir, chunk)
        right += sum(v.strict for v in verdicts)
        for k, (image, verdict, prompt) in enumerate(zip(to_pil(images), verdicts, prompts)):
            rows += pairs_of_image(to_jpeg(image), verdict, prompt, chunk * CHUNK + k)
    print(f"{right} of {chunks * CHUNK} right, {len(rows)} pairs")
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
