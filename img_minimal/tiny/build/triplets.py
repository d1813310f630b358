"""InstructPix2Pix for the tiny world: an image, the prompt of the edited scene, and the edit in words.

Two kinds of images. Drawn ones come from the base, each under its own prompt, under what it shows, and under one that
is some edits away: in the paper, too, the MLLM learns from what a diffusion model draws. Rendered scenes miss their
prompt in the ways a base model does: a colour or form exchanged, taken or missing, one shape too many, the relation
reversed. In some more of them all shapes are right and only the relation may not hold: where an MLLM seldom has to look
for one, it guesses. The oracle words the instruction, which is "nothing" where nothing is wrong.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from img_minimal.files import to_pil
from img_minimal.finetuning import finetune
from img_minimal.tiny.build.drawings import CHUNKS, judged
from img_minimal.tiny.build.mistakes import damage, prompts_for, shown_by
from img_minimal.tiny.build.tables import save_table, to_jpeg, to_webp
from img_minimal.tiny.edits import instruction
from img_minimal.tiny.grammar import HELD_OUT, RELATIONS, Prompt, sample_prompt
from img_minimal.tiny.world import Scene, place, render

RENDERED, RELATED = 32_000, 24_000  # scenes, and scenes about a relation
SHIPPED = 24_000  # triplets, drawn and rendered, that the repository carries


def sample_triplet(rng: random.Random, split: str = "train") -> tuple[Scene, Prompt, str]:
    """A scene, a prompt it was (mostly) not drawn for, and the instruction that leads from one to the other."""
    prompt = sample_prompt(rng, split=split)
    scene = place(prompt, rng)
    for _ in range(rng.choice((0, 1, 1, 2))):
        scene = damage(scene, rng)
    scene = tuple(rng.sample(scene, len(scene)))  # the order of the list must not give the answer away
    return scene, prompt, instruction(tuple(sorted(scene, key=lambda s: (s.y - s.r, s.x))), prompt)


def drawn_triplets(workdir: Path, chunk: int) -> Iterator[tuple[bytes, Prompt, str]]:
    """(image, prompt, instruction) of the base's drawings; what shows a held-out pair is left out."""
    rng = random.Random(62_000 + chunk)
    for image, prompt, verdict in zip(*judged(workdir, chunk)):
        if any(shape.kind in HELD_OUT for shape in verdict.found):
            continue
        prompts = {str(p): p for p in (prompt, shown_by(verdict.found, rng)) if p}
        prompts |= {str(p): p for p in prompts_for(verdict.found, prompt, 1, rng)}
        drawn = to_jpeg(to_pil(image[None])[0])
        own = [] if verdict.strict else [prompt]  # twice: a wrong drawing under its own prompt is what will be shown
        for other in [*prompts.values(), *own]:
            words = instruction(verdict.found, other)
            if not any(letter.isdigit() for letter in words):  # "remove 5 red circles": more than the MLLM can count
                yield drawn, other, words


def rendered_triplets(count: int) -> Iterator[tuple[bytes, Prompt, str]]:
    """The same of scenes that were never drawn by a model."""
    rng = random.Random(61)
    for _ in tqdm(range(count), desc="rendered triplets"):
        scene, prompt, words = sample_triplet(rng)
        yield to_webp(render([scene])[0]), prompt, words


def relation_triplets(count: int) -> Iterator[tuple[bytes, Prompt, str]]:
    """Scenes with the right shapes, every other one laid out for some relation and not for the prompt's."""
    rng = random.Random(64)
    for k in tqdm(range(count), desc="relation triplets"):
        prompt = sample_prompt(rng, rng.choice(("position", "complex")))
        while not prompt.relation:
            prompt = sample_prompt(rng, "complex")
        other = replace(prompt, relation=rng.choice(RELATIONS)) if k % 2 else prompt
        scene = place(other, rng)
        yield to_webp(render([scene])[0]), prompt, instruction(scene, prompt)


def build(workdir: Path, target: Path, rendered: int = RENDERED, related: int = RELATED, chunks: int = CHUNKS) -> None:
    """Write all triplets to `workdir/triplets.parquet` and a part to `target`, in InstructPix2Pix's columns."""
    triplets = list(rendered_triplets(rendered))
    for chunk in tqdm(range(chunks), desc="drawn triplets"):
        triplets += drawn_triplets(workdir, chunk)
    random.Random(63).shuffle(triplets)
    save_table(as_table([*relation_triplets(related), *triplets]), workdir / "triplets.parquet", "triplets")
    if len(triplets) > SHIPPED:  # its last ones are those that finetuning on either table holds out
        unseen = finetune.HELD_OUT
        triplets = triplets[: SHIPPED - unseen] + triplets[-unseen:]
    save_table(as_table(triplets), target / "triplets.parquet", "triplets")


def as_table(triplets: list[tuple[bytes, Prompt, str]]) -> pa.Table:
    """InstructPix2Pix's columns."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": image, "path": None} for image, *_ in triplets], kind)
    columns = {"original_image": images, "edit_prompt": [words for *_, words in triplets]}
    return pa.table(columns | {"edited_prompt": [str(prompt) for _, prompt, _ in triplets]})
