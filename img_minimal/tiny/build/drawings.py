"""What the base twin draws for 24,000 training prompts: pairs and triplets are made of the same pictures."""

import random
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from img_minimal.hub.weights import write_safetensors
from img_minimal.load import load_backbone
from img_minimal.presets import Preset
from img_minimal.tiny.grammar import Prompt, sample_prompt
from img_minimal.tiny.oracle import Verdict, judge

CHUNKS, CHUNK = 60, 400  # files of images, so that a stopped build goes on, and images in each
FIRST_SEED = 50_000_000  # far from those of the evaluation


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
