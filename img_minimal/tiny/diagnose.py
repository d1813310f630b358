"""Find out why the tiny base model fails, and whether its judge can be trusted.

    python -m img_minimal.tiny.diagnose                    all measurements, a minute
    python -m img_minimal.tiny.diagnose --sheet drawn.png  60 images of the base with verdicts

The oracle judges right scenes, before and after the VAE, and images that were also read by eye.
CLIP compares a right picture with its caption and with a *foil*, a caption that is wrong in one
respect: the UNet cannot use a distinction that the text embedding does not make. The MLLMs compare
a right picture of a relation with the reversed one.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from img_minimal.backbone import open_backbone
from img_minimal.cli import PICTURES, option, parse, quiet_libraries, run, writable_file
from img_minimal.files import decode, from_pil, to_pil
from img_minimal.mllm import MLLM
from img_minimal.plots import sheet
from img_minimal.presets import TWINS, find_preset
from img_minimal.tiny import grammar
from img_minimal.tiny.grammar import COLOURS, Prompt, benchmark, sample_prompt
from img_minimal.tiny.oracle import Verdict, compare, judge
from img_minimal.tiny.world import CELLS, Scene, Shape, exchange, place, render

FOILS = {"colour": "two", "count": "counting", "binding": "two", "position": "position"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MODELS = find_preset("tiny-sdxl").models


@dataclass
class Config:
    """Flags of this command."""

    sheet: str | None = option(None, "only draw 60 images of the base, judged, into this file")


# The oracle


@dataclass(frozen=True)
class Reading:
    """An image (3, 64, 64) in [0, 1] of the base, its prompt, and the verdict on what a person saw.

    The person had the palette in view. The oracle's thresholds were chosen on images that are not
    `fresh`.
    """

    image: Tensor
    prompt: Prompt
    by_eye: Verdict
    fresh: bool


def readings() -> list[Reading]:
    """Read the 360 images that ship with the twins.

    A reading is e.g. "red circle 1, unclear cross 5": cells are numbered like a telephone's keys.
    """
    pictures = []
    for row in pq.read_table(TWINS / "readings.parquet").to_pylist():
        scene = []
        for words in row["reading"].split(", "):
            colour, form, cell = words.rsplit(" ", 2)
            scene.append(Shape(colour, form, *CELLS[int(cell) - 1], r=8.0))
        prompt, image = grammar.parse(row["prompt"]), decode(row["image"]["bytes"])
        verdict = compare(tuple(scene), prompt)
        pictures.append(Reading(from_pil([image])[0], prompt, verdict, row["fresh"]))
    return pictures


def agreement(pictures: Sequence[Reading]) -> dict[str, float]:
    """Compute the shares of images that oracle and person judge alike.

    `strict`: right or wrong; `unclear`: nameable or not; `words`: the same edits; `meant`: the same
    edits, or wrong with a shape that neither could name, which may be worded in several ways.
    """
    images = torch.stack([picture.image for picture in pictures])
    verdicts = judge(images, [picture.prompt for picture in pictures])
    counts: Counter[str] = Counter()
    for picture, oracle in zip(pictures, verdicts):
        eye = picture.by_eye
        both_unclear = eye.unclear and oracle.unclear
        counts["strict"] += eye.strict == oracle.strict
        counts["unclear"] += eye.unclear == oracle.unclear
        counts["words"] += eye.words == oracle.words
        counts["meant"] += eye.words == oracle.words or both_unclear
    return {name: number / len(pictures) for name, number in counts.items()}


@torch.no_grad()
def oracle_accuracy(count: int = 1000, seed: int = 0) -> dict[str, float]:
    """Compute the share of right scenes that the oracle judges right.

    That is as rendered and after the VAE's round trip, the latter also split by held-out pairs: the
    VAE has never seen a blue triangle, which limits everything that is drawn through it.
    """
    prompts = benchmark(count, seed=seed)
    images = render(scenes_for(prompts, random.Random(seed)))
    vae = AutoencoderKL.from_pretrained(f"{MODELS.base}/vae", dtype=torch.float32)
    rebuilt = []
    for batch in images.split(50):
        latents = vae.encode(batch * 2 - 1).latent_dist.mode()
        rebuilt.append(vae.decode(latents).sample / 2 + 0.5)
    before = strict(images, prompts)
    after = strict(torch.cat(rebuilt), prompts)
    held_out = torch.tensor([prompt.held_out for prompt in prompts])
    return {
        "as rendered": before.mean().item(),
        "after the VAE": after.mean().item(),
        "after the VAE, seen pairs": after[~held_out].mean().item(),
        "after the VAE, held-out pairs": after[held_out].mean().item(),
    }


def scenes_for(prompts: list[Prompt], rng: random.Random) -> list[Scene]:
    """Lay out a right scene for each prompt."""
    return [place(prompt, rng) for prompt in prompts]


def strict(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """Judge images (B, 3, 64, 64): (B,), 1.0 where everything is right and 0.0 elsewhere."""
    verdicts = judge(images, prompts)
    return torch.tensor([float(verdict.strict) for verdict in verdicts])


# CLIP


def foil(prompt: Prompt, kind: str, rng: random.Random) -> Prompt:
    """Make a caption that is wrong in one of FOILS: colour, count, binding or position."""
    if kind == "position":
        return replace(prompt, relation=OPPOSITE[prompt.relation])
    first, *others = prompt.groups
    if kind == "colour":
        used = [group.colour for group in prompt.groups]
        unused = [colour for colour in COLOURS if colour not in used]
        first = replace(first, colour=rng.choice(unused))
    elif kind == "count":
        first = replace(first, count=3 if first.count == 4 else first.count + 1)
    else:
        (second,) = others
        others = [replace(second, colour=first.colour)]
        first = replace(first, colour=second.colour)
    return replace(prompt, groups=(first, *others))


@torch.no_grad()
def clip_against_foils(count: int = 500, seed: int = 0) -> dict[str, float]:
    """Compute the share of unseen images whose caption scores above its foil; 0.5 is chance."""
    folder = f"{MODELS.base}/text_encoder_2"
    text = CLIPTextModelWithProjection.from_pretrained(folder, dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(f"{MODELS.base}/tokenizer_2")
    vision = open_vision(MODELS.image_encoder)
    rng = random.Random(seed)

    def similarity(images: Tensor, captions: list[Prompt]) -> Tensor:
        words = list(map(str, captions))
        tokens = tokenizer(words, padding="max_length", return_tensors="pt").input_ids
        return F.cosine_similarity(images, text(tokens).text_embeds)

    shares = {}
    for kind, category in FOILS.items():
        prompts: list[Prompt] = []
        while len(prompts) < count:
            prompt = sample_prompt(rng, category, "test")
            if kind != "binding" or _is_exchangeable(prompt):
                prompts.append(prompt)
        pixels = render(scenes_for(prompts, rng))
        images = vision(pixels * 2 - 1).image_embeds
        foils = [foil(prompt, kind, rng) for prompt in prompts]
        preferred = similarity(images, prompts) > similarity(images, foils)
        shares[kind] = preferred.float().mean().item()
    return shares


def _is_exchangeable(prompt: Prompt) -> bool:
    """Return True if exchanging the colours of two groups makes another prompt."""
    first, second = prompt.groups
    return first.colour != second.colour and first.form != second.form


def open_vision(folder: str) -> CLIPVisionModelWithProjection:
    """Load a vision encoder in fp32."""
    return CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32)


# The MLLM


@torch.no_grad()
def relation_preference(mllm: MLLM, count: int = 300, seed: int = 0) -> float:
    """Measure how often an MLLM prefers a right image to the same with its two shapes exchanged.

    The prompts are about relations; 0.5 is chance.
    """
    rng = random.Random(seed)
    prompts = [sample_prompt(rng, "position") for _ in range(count)]
    captions = list(map(str, prompts))
    scenes = scenes_for(prompts, rng)
    scores = []
    for some in (scenes, [exchange(*scene) for scene in scenes]):
        satisfaction = mllm.satisfaction(to_pil(render(some)), captions, range(count))
        scores.append(torch.tensor(satisfaction))
    right, wrong = scores
    return (right > wrong).float().mean().item()


# The command


def draw_sheet(path: str, count: int = 60) -> None:
    """Draw validation prompts with the base, none of them chosen, with the oracle's verdicts."""
    prompts = benchmark(count, "validation")
    captions = list(map(str, prompts))
    backbone = open_backbone(find_preset("tiny-sdxl"))
    images = backbone.draw(captions, [*range(count)], progress="draw")
    verdicts = judge(images, prompts)
    rows, right, unclear = [], 0, 0
    for k, (picture, verdict) in enumerate(zip(to_pil(images), verdicts)):
        if k % 10 == 0:
            rows.append([])
        words = "right" if verdict.strict else verdict.words
        rows[-1].append((picture, f'"{captions[k]}"\n{words}'))
        right += verdict.strict
        unclear += verdict.unclear
    title = f"{right} of {count} right; {unclear} hold a shape that nobody could name"
    sheet(rows, path, title)


def main() -> None:
    """Print all measurements, or draw the sheet."""
    config, _ = parse(Config, __doc__)
    quiet_libraries()
    if config.sheet:
        writable_file(config.sheet, "--sheet", PICTURES)
        draw_sheet(config.sheet)
        return
    for name, share in oracle_accuracy().items():
        print(f"correct scenes the oracle calls right, {name:30} {share:.3f} (n 1000)")
    pictures = readings()
    fresh = [picture for picture in pictures if picture.fresh]
    for title, some in (("all", pictures), ("fresh", fresh)):
        shares = listed(agreement(some))
        print(
            f"drawn pictures that the oracle and a person call alike, {title}: {shares} "
            f"(n {len(some)})"
        )
    for kind, share in clip_against_foils().items():
        name = f"CLIP prefers the caption to one with a wrong {kind:24}"
        print(f"{name} {share:.3f} (n 500, chance 0.5)")
    for name, folder in (("stock", MODELS.stock_mllm), ("finetuned", MODELS.mllm)):
        share = relation_preference(MLLM.from_pretrained(folder))
        print(f"the {name} MLLM prefers the right picture of a relation  {share:.3f} (n 300)")


def listed(shares: dict[str, float]) -> str:
    """Write numbers in one line: "colour 1.000, form 0.997"."""
    return ", ".join(f"{name} {share:.3f}" for name, share in shares.items())


if __name__ == "__main__":
    run(main)
