"""Rows of an ablation: what each changes of one training recipe, trained, drawn and judged on the same prompts.

Tutorial 08 says what is varied, and shows it. Every aligner and every result is kept in a folder, so that a table which
was stopped goes on, and rows that differ in sampling only share an aligner.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from img_minimal.aligner import ImplicitAligner, align
from img_minimal.data.features import Batches, CachedData
from img_minimal.evaluate.arms import Arms
from img_minimal.files import content
from img_minimal.evaluate.intervals import mean_interval
from img_minimal.load import load_guide, load_img, load_training_data
from img_minimal.mllm import guidance_features
from img_minimal.presets import Preset
from img_minimal.files import write_whole
from img_minimal.cli import check
from img_minimal.files import read_json
from img_minimal.tiny.grammar import benchmark
from img_minimal.run import Trainer

MEASURED = ("gradient_norm", "margin", "correction", "refreshes", "validation_error")


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

    @property
    def trained(self) -> bool:
        """Is there an aligner?"""
        return self.guidance not in ("none", "base")

    def run(self, seed: int) -> str:
        """The name of its training from a seed."""
        return f"{self.aligner}-seed{seed}"

    def key(self, seed: int) -> str:
        """A result's name: rows that are the same by another title share it; what is not trained has one seed."""
        return f"{self.aligner}-passes{self.passes}-seed{seed}" if self.trained else self.guidance


class Laboratory:
    """Trains and judges rows, each from several seeds; `settings`: seed and number of prompts, seeds, steps, pairs."""

    def __init__(self, preset: Preset, settings: dict, folder: Path):
        self.settings, self.folder = settings, folder
        self.preset = replace(preset, max_pairs=settings["max_pairs"], train_steps=settings["steps"])
        self.data: tuple[str, CachedData] | None = None
        self.looks: dict[str, tuple[Tensor, Tensor]] = {}

    def results(self, rows: dict[str, Row]) -> dict:
        """Of every row and seed a string of 0 and 1, one for each prompt, and how the training ended.

        Those of an earlier call are included. Raises UserError if that had other models or pairs.
        """
        self.claim()
        file = self.folder / "results.json"
        results = {"settings": self.settings, "right": {}, "training": {}}
        results |= json.loads(file.read_text()) if file.exists() else {}
        work = {row.key(seed): (row, seed) for seed in range(self.settings["seeds"]) for row in rows.values()}
        for name, (row, seed) in tqdm(sorted(work.items(), key=lambda item: item[1][0].guidance), desc="rows"):
            if name not in results["right"]:
                results["right"][name] = "".join(map(str, self.right(row, seed)))
                if row.trained:
                    results["training"][row.run(seed)] = self.training(row.run(seed))
                write_whole(file, json.dumps(results, indent=1) + "\n")
        return results

    def claim(self) -> None:
        """Make the folder that of these models and pairs. Raises UserError if its rows were made with others."""
        unused = ("aligner", "stock_aligner", "text_aligner", "triplets", "finetuning", "cache_dir", "save_every")
        made = {name: content(value) for name, value in asdict(self.preset).items() if name not in unused}
        note, instead = self.folder / "made_with.json", "choose another --output"
        kept = read_json(note, dict, instead) if note.exists() else made
        others = ", ".join(differing(kept, made))
        check(not others, f"{self.folder} holds rows made with another {others}; {instead}")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps(made, indent=1) + "\n")

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

        folder = self.folder / row.run(seed)
        if not (folder / "aligner.safetensors").exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").unlink(missing_ok=True)  # of a call that was stopped
            preset, data = replace(self.preset, preference_weight=row.weight), self.features(row.guidance)
            trainer = Trainer.new(preset, data.widths, row.refresh_after, seed)
            batches = Batches(data.parts, preset.batch_size, seed)
            train(trainer, batches, data.unseen, preset, folder, steps=preset.train_steps, dpo=row.dpo,
                  spin=row.spin, save_every=preset.train_steps)  # fmt: skip
            trainer.aligner.save(folder / "aligner.safetensors")
        return ImplicitAligner.from_file(folder / "aligner.safetensors").eval()

    def training(self, run: str) -> dict[str, float]:
        """Of the last thousand steps: means of what is measured in each, and the last of what is not."""
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines[-1000:]]
        each = {name: np.mean([step[name] for step in steps]) for name in MEASURED[:3] if name in steps[-1]}
        each |= {name: steps[-1][name] for name in MEASURED[3:] if name in steps[-1]}
        return {name: round(float(value), 5) for name, value in each.items()}

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


def read_results(path: str | Path) -> dict:
    """What `Laboratory.results` wrote once. Raises UserError for another file."""

    def look(file: dict) -> None:
        """Raises KeyError or AttributeError if a part is missing."""
        names = ("seed", "prompts", "seeds", "steps", "pairs", "max_pairs", "preference_weight")
        file["right"].keys(), file["training"].keys(), [file["settings"][name] for name in names]

    return read_json(path, dict, "expected a results.json of this tutorial's --fresh", check=look)


def trainings(results: dict, rows: dict[str, Row]) -> dict[str, list[str]]:
    """For every row, how its trainings ended: each of MEASURED as a range over the seeds, in words."""
    found = {}
    for title, row in rows.items():
        runs = [results["training"].get(row.run(seed), {}) for seed in range(results["settings"]["seeds"])]
        values = [sorted(run[name] for run in runs if name in run) for name in MEASURED]
        found[title] = [" to ".join(dict.fromkeys(f"{v:.4g}" for v in (*each[:1], *each[-1:]))) for each in values]
    return found


def table(results: dict, rows: dict[str, Row], reference: str) -> dict[str, dict]:
    """For every row: the share right with its interval, of each seed, and the paired difference to `reference`.

    Rows that the results lack are left out. Raises UserError if `reference` is one of them.
    """
    settings, summary, there = results["settings"], {}, results["right"].keys()
    rows = {title: row for title, row in rows.items() if {row.key(s) for s in range(settings["seeds"])} <= there}
    check(reference in rows, f"the results lack the row {reference!r}, which others are compared with")
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
