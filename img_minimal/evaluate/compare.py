"""Compare the arms on prompts of your own, from a file, judged by CLIP models or by the oracle.

    python -m img_minimal.evaluate --prompt-file prompts.txt                    a twin, the oracle
    python -m img_minimal.evaluate --model sdxl --prompt-file PartiPrompts.tsv
    python -m img_minimal.evaluate --model sdxl --prompt-file evaluation_metadata.jsonl \\
        --judges pickscore,hpsv2

Every prompt is drawn four times: by the base model, by the base model from a new seed (the same
compute), and in a second pass from the first seed with the image's own tokens (no guidance) or with
aligned ones (IMG). Images are kept as PNG, and the PNG is what is judged. A run that was stopped
draws only the rest, judges anew, which takes minutes and not hours, and ends in the same numbers.

First all images are drawn, a batch in all arms at a time, so that with offloading each model comes
to the GPU once a batch; then these models are freed, and the judges come one after another.
"""

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from img_minimal.cli import warn
from img_minimal.evaluate.arms import FIRST_SEED, NEW_SEED, save_pairs
from img_minimal.evaluate.intervals import compare_arms
from img_minimal.evaluate.judges import Judge
from img_minimal.evaluate.prompts import FilePrompt
from img_minimal.files import cached_images
from img_minimal.pipeline import IMG

ARMS = ("base", "new_seed", "no_guidance", "img")
# Prompts drawn and judged at once. The same in every run: in batches of another size, sums would be
# rounded otherwise, and a resumed run would differ.
BATCH = 16
Draw = Callable[[list[str], list[int]], Tensor]  # prompts, seeds -> images (B, 3, H, W)


class ImageFolder:
    """The images of prompts in all arms, each a file that prompt, seed and arm name."""

    def __init__(self, path: Path, prompts: list[FilePrompt], seed: int):
        self.path, self.prompts = path, prompts
        self.texts = [prompt.text for prompt in prompts]
        self.first_seed = FIRST_SEED * (seed + 1)
        self.batches = [slice(k, k + BATCH) for k in range(0, len(prompts), BATCH)]

    def images(self, arm: str, batch: slice, draw: Draw | None = None) -> list[Image]:
        """Read images, after drawing them if any is missing. Raises UserError.

        Seeds are the same in every arm but `new_seed`.
        """
        numbers = [prompt.index for prompt in self.prompts[batch]]
        first = self.first_seed + NEW_SEED * (arm == "new_seed")
        paths = [self.path / f"p{k:05d}-s{first + k}-{arm}.png" for k in numbers]
        seeds = [first + k for k in numbers]
        advice = "delete it and run again to have it drawn again"
        return cached_images(paths, lambda: draw(self.texts[batch], seeds), advice)

    @property
    def complete(self) -> bool:
        """True if every image is drawn."""
        return len(list(self.path.glob("p*-s*-*.png"))) == len(ARMS) * len(self.prompts)

    def draw_missing(self, img: IMG) -> None:
        """Draw what the folder lacks."""
        cut = sum(bool(img.backbone.truncated_part(text)[0]) for text in self.texts)
        if cut:
            reason = "are longer than the text encoders read; their ends are not drawn"
            warn(f"{cut} of {len(self.texts)} prompts {reason}")
        for batch in tqdm(self.batches, desc="draw"):
            self.draw_batch(img, batch)

    def draw_batch(self, img: IMG, batch: slice) -> None:
        """Draw a batch in all arms. What is aligned are the files, so that a resumed run agrees."""
        draw, tokens = img.backbone.draw, img.backbone.tokens
        base = self.images("base", batch, draw)
        self.images("new_seed", batch, draw)
        self.images("no_guidance", batch, lambda *asked: draw(*asked, tokens(base)))
        self.images("img", batch, lambda *asked: draw(*asked, img.align(base, *asked)))


def judge_images(folder: ImageFolder, judge: Judge) -> dict:
    """Score all images, average the arms, and compare IMG with each other arm.

    Intervals are over prompts. Warns of prompts that the judge cannot read to their end.
    """
    model, scores = judge.open(), {arm: [] for arm in ARMS}
    for batch in tqdm(folder.batches, desc=judge.title):
        for arm in ARMS:
            images = folder.images(arm, batch)
            scores[arm] += model.score(images, folder.texts[batch]).tolist()
    categories = np.array([prompt.category for prompt in folder.prompts])
    groups = {kind: categories == kind for kind in np.unique(categories) if kind}
    marks = {judge.name: {arm: np.array(values) for arm, values in scores.items()}}
    results = compare_arms(marks, {"win_rate": judge.name}, groups, folder.texts)
    cut = model.cut(folder.texts)
    results |= {"truncated": sum(map(bool, cut)), "longest_cut": max(cut), "scores": scores}
    if any(cut):
        longer = "of {} prompts are longer than {} can read; it judged their beginning"
        most = f"up to {max(cut)} tokens were cut"
        warn(f"{results['truncated']} {longer.format(len(cut), judge.title)} ({most})")
    return results


def before_and_after(folder: ImageFolder, judges: dict[str, dict], path: str) -> None:
    """Save the base's and IMG's images of the first six prompts, with their scores."""
    cells = []
    for k, text in enumerate(folder.texts[:6]):
        for arm in ("base", "img"):
            label = f'"{text}"'
            for judge, results in judges.items():
                label += f"\n{judge} {results['scores'][arm][k]:.2f}"
            cells += [(image, label) for image in folder.images(arm, slice(k, k + 1))]
    shown = f"the first {len(cells) // 2} of {len(folder.texts)} prompts"
    save_pairs(cells, path, f"{shown}, base and IMG")


def release() -> None:
    """Free the memory of models that are no longer referred to."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing on a CPU
