"""Rows of an ablation: what each changes of one training recipe, trained, drawn and judged on the same prompts.

Tutorial 08 says what is varied, and shows it. Every aligner and every result is kept in a folder, so that a table which
was stopped goes on, and rows that differ in sampling only share an aligner.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from img_minimal.aligner import ImplicitAligner, align
from img_minimal.data.batches import Batches
from img_minimal.data.sources import CachedData
from img_minimal.evaluate.arms import Arms
from img_minimal.evaluate.intervals import mean_interval
from img_minimal.load import load_guide, load_img, load_training_data
from img_minimal.mllm import guidance_features
from img_minimal.presets import Preset
from img_minimal.runtime.atomic import write_whole
from img_minimal.tiny.grammar import benchmark
from img_minimal.training import Trainer


@dataclass(frozen=True)
class Row:
    """One row of the table: what it changes, and the paper's PickScore on SDXL where it has one.

    `guidance`: "mllm", "stock" or "text"; "none" draws again with the image's own tokens, "base" does not draw again.
    """

    group: str
    weight: float = 1.0
    guidance: str = "mllm"
    dpo: bool = True
    spin: bool = True
    refresh_after: int = 10
    passes: int = 1
    paper: float | None = None

    @property
    def aligner(self) -> str:
        """Rows that differ in sampling only share an aligner."""
        parts = "".join(name for name in ("dpo", "spin") if getattr(self, name) and self.weight)
        return f"{self.guidance}-{self.weight}-{parts or 'base'}-{self.refresh_after}"

    def key(self, seed: int) -> str:
        """A result's name: rows that are the same by another title share it; what is not trained has one seed."""
        untrained = self.guidance in ("none", "base")
        return self.guidance if untrained else f"{self.aligner}-passes{self.passes}-seed{seed}"


class Laboratory:
    """Trains and judges rows, each from several seeds; `settings`: seed and number of prompts, seeds, steps, pairs."""

    def __init__(self, preset: Preset, settings: dict, folder: Path):
        self.settings, self.folder = settings, folder
        self.preset = replace(preset, max_pairs=settings["max_pairs"], train_steps=settings["steps"])
        self.data: tuple[str, CachedData] | None = None
        self.looks: dict[str, tuple[Tensor, Tensor]] = {}

    def results(self, rows: dict[str, Row]) -> dict:
        """Of every row and seed a string of 0 and 1, one for each prompt; those of an earlier call included."""
        file = self.folder / "results.json"
        results = json.loads(file.read_text()) if file.exists() else {"settings": self.settings, "right": {}}
        work = {row.key(seed): (row, seed) for seed in range(self.settings["seeds"]) for row in rows.values()}
        for name, (row, seed) in tqdm(sorted(work.items(), key=lambda item: item[1][0].guidance), desc="rows"):
            if name not in results["right"]:
                results["right"][name] = "".join(map(str, self.right(row, seed)))
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(file, json.dumps(results, indent=1) + "\n")
        return results

    @cached_property
    def arms(self) -> Arms:
        """The base's images of all prompts."""
        prompts = benchmark(self.settings["prompts"], "test", self.settings["seed"])
        return Arms(load_img(self.preset), prompts, self.settings["seed"])

    def features(self, guidance: str) -> CachedData:
        """Frozen features of the training pairs, those of one guidance at a time."""
        if self.data is None or self.data[0] != guidance:
            self.data = guidance, load_training_data(self.preset, guidance, self.settings["seed"], cache_gb=70.0)
        return self.data[1]

    def aligner(self, row: Row, seed: int) -> ImplicitAligner:
        """Trained now, or in an earlier call."""
        from train import train  # the command's own loop

        folder = self.folder / f"{row.aligner}-seed{seed}"
        if not (folder / "aligner.safetensors").exists():
            folder.mkdir(parents=True, exist_ok=True)
            preset, data = replace(self.preset, preference_weight=row.weight), self.features(row.guidance)
            trainer = Trainer.new(preset, data.widths, row.refresh_after, seed)
            batches = Batches(data.parts, preset.batch_size, seed)
            train(trainer, batches, data.unseen, preset, folder, steps=preset.train_steps, dpo=row.dpo,
                  spin=row.spin, save_every=preset.train_steps)  # fmt: skip
            trainer.aligner.save(folder / "aligner.safetensors")
        return ImplicitAligner.from_file(folder / "aligner.safetensors").eval()

    def guidance(self, kind: str) -> tuple[Tensor, Tensor]:
        """h and mask of the base's images, by this kind of guidance."""
        if kind not in self.looks:
            arms = self.arms
            guide = arms.img.guide if kind == "mllm" else load_guide(self.preset, kind, arms.img.backbone)
            self.looks[kind] = guidance_features(guide, arms.pictures, arms.captions, arms.seeds)
        return self.looks[kind]

    def right(self, row: Row, seed: int) -> list[int]:
        """Of every prompt whether this row's image is right (1) or not (0)."""
        if row.guidance != "base":
            tokens = self.arms.own
            if row.guidance != "none":
                tokens = align(self.aligner(row, seed), tokens, *self.guidance(row.guidance), row.passes)
            self.arms.second_pass("row", tokens)
        return [int(v.strict) for v in self.arms.verdicts["base" if row.guidance == "base" else "row"]]


def table(results: dict, rows: dict[str, Row], reference: str) -> dict[str, dict]:
    """For every row: the share right with its interval, of each seed, and the paired difference to `reference`."""
    settings, summary = results["settings"], {}
    captions = [str(p) for p in benchmark(settings["prompts"], "test", settings["seed"])]

    def right(row: Row) -> np.ndarray:
        return np.array([[int(x) for x in results["right"][row.key(s)]] for s in range(settings["seeds"])])

    other, clusters = right(rows[reference]), captions * settings["seeds"]
    for title, row in rows.items():
        ours = right(row)
        summary[title] = {
            "share": mean_interval(ours.ravel(), clusters),
            "seeds": ours.mean(1),
            "difference": mean_interval((ours - other).ravel(), clusters),
        }
    return summary
