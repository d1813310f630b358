"""Rounds: before each later one the pairs are renewed by the current aligner, as in SPIN and iterative DPO.

    draw     x0 of training prompts with the base, once; x1 with IMG and the current aligner, from the same seeds
    judge    the oracle on the twins; on real models PickScore and HPSv2, which have to agree
    train    from the current aligner, f_ref = f, on original pairs and those of the last two rounds, Eqs. 18 and 19
    gate     the round counts if held-back prompts are drawn no worse, and no more right images are broken

Each round is a folder `rounds/N` that can be left at any moment: images, pairs.parquet, and a run folder of its own.
"""

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from img_minimal.aligner import ImplicitAligner
from img_minimal.data.batches import Batches
from img_minimal.data.cache import FeatureCache
from img_minimal.data.pairs import held_back, pair_stream
from img_minimal.data.rounds import SCHEMA, Mixture, count, pair_rows, step_size
from img_minimal.data.sources import CachedData, StreamedData
from img_minimal.data.stream import LONGEST_TEXT, text_of
from img_minimal.evaluate.pair_judges import find_judge
from img_minimal.load import load_backbone, load_encoder, load_guide
from img_minimal.pipeline import IMG
from img_minimal.presets import Preset
from img_minimal.runtime.atomic import replacing, write_whole
from img_minimal.runtime.checkpoint import load_checkpoint
from img_minimal.runtime.errors import UserError
from img_minimal.runtime.images import from_pil, png, to_pil
from img_minimal.runtime.json_files import read_json
from img_minimal.runtime.plots import round_curves
from img_minimal.tiny.grammar import benchmark
from img_minimal.training import Trainer

FIRST_SEED = 2_000_000_000  # of the base's images; no pair and no evaluation has such seeds
GATE_PROMPTS = 200


def training_prompts(preset: Preset, number: int, seed: int, validation: bool = False) -> list[str]:
    """Prompts that are trained on, or held back from it, `number` of the first that the pairs have, in random order.

    Raises UserError if there are none.
    """
    stream, found = pair_stream(preset.pairs, limit=preset.max_pairs, seed=seed), {}
    column = stream.table.layout[0]
    for file in stream.files:
        for row in stream.table.rows(file):
            prompt = text_of(row[column])
            fits = prompt.strip() and len(prompt) <= LONGEST_TEXT
            if fits and held_back(prompt) == validation:
                found[prompt] = None
            if len(found) == 4 * number:
                break
    if not found:
        raise UserError(f"{preset.pairs}: has no {'held-back' if validation else 'training'} prompt to draw")
    prompts = list(found)
    random.Random(seed).shuffle(prompts)
    return prompts[:number]


@dataclass
class Rounds:
    """What all rounds of a run share. Models are loaded when they are needed, and once."""

    preset: Preset
    guidance: str
    seed: int
    folder: Path
    replay: float = 0.5  # least share of original samples
    gate: bool = True

    def __post_init__(self) -> None:
        self.judge = find_judge(self.preset)
        self.prompts = training_prompts(self.preset, self.preset.round_prompts, self.seed)
        self._img: IMG | None = None

    def img(self, aligner: ImplicitAligner) -> IMG:
        """The method with this aligner."""
        if self._img is None:
            backbone = load_backbone(self.preset)
            guide = load_guide(self.preset, self.guidance, backbone)
            self._img = IMG(backbone, guide, aligner, self.preset.passes, self.preset.mllm_batch)
        self._img.aligner = aligner.eval()
        return self._img

    def pairs(self, number: int, aligner: ImplicitAligner) -> tuple[Path, dict]:
        """Draw, judge and write the pairs of a round, unless they are there. Returns their file and what they are.

        Images wait on the disk and not in memory, a batch of both at a time: 4,000 pairs of SDXL's take 24 GB.
        """
        folder = self.folder / str(number)
        table, note = folder / "pairs.parquet", folder / "pairs.json"
        if note.exists():
            return table, read_json(note, dict, f"delete {folder} and --resume")
        seeds = [FIRST_SEED + 10_000 * self.seed + k for k in range(len(self.prompts))]
        parts = [slice(k, k + self.preset.draw_batch) for k in range(0, len(seeds), self.preset.draw_batch)]
        for part in tqdm(parts, desc=f"round {number}, drawing", leave=False):
            self._both(number, aligner, self.prompts[part], seeds[part])
        outcomes, rows = [], 0
        with replacing(table) as partial, pq.ParquetWriter(partial, SCHEMA) as writer:
            for part in tqdm(parts, desc=f"round {number}, judging", leave=False):
                prompts, (x0, x1) = self.prompts[part], self._both(number, aligner, self.prompts[part], seeds[part])
                found = self.judge.compare(prompts, x0, x1)
                made = pair_rows(prompts, x0, x1, found, f"img, round {number}", len(outcomes))
                writer.write_table(pa.Table.from_pylist(made, SCHEMA))
                outcomes, rows = outcomes + found, rows + len(made)
        if not rows:
            raise UserError(
                f"round {number}: none of {len(outcomes)} pairs has a better image; end with fewer --rounds"
            )
        counted = count(outcomes, [self.judge.category(p) for p in self.prompts])
        write_whole(note, json.dumps(counted))
        return table, counted

    def _both(
        self, number: int, aligner: ImplicitAligner, prompts: list[str], seeds: list[int]
    ) -> tuple[list[Image.Image], list[Image.Image]]:
        """x0 and x1 of a batch. Those on the disk are kept: always in the same batches, so to the same bits."""
        x0 = _kept(self.folder / "base", seeds, lambda: self.img(aligner).backbone.draw(prompts, seeds))
        images = self.folder / str(number) / "images"
        return x0, _kept(images, seeds, lambda: self._again(aligner, x0, prompts, seeds))

    def _again(self, aligner: ImplicitAligner, x0: list[Image.Image], prompts: list[str], seeds: list[int]) -> Tensor:
        img = self.img(aligner)
        return img.backbone.draw(prompts, seeds, img.align(from_pil(x0), prompts, seeds))

    def features(self, number: int, table: Path) -> CachedData:
        """Features of a round's pairs, kept beside them."""
        preset = replace(self.preset, pairs=str(table), identity_share=0.0)
        cache = FeatureCache(self.folder / str(number), "features", {"the round": str(number)}, float("inf"))
        return CachedData(pair_stream(table), lambda: load_encoder(preset, self.guidance, self.seed), cache)

    def mixed(self, original: CachedData | StreamedData, number: int, aligner: ImplicitAligner) -> tuple[Mixture, dict]:
        """What round `number` trains on: original pairs, and those of this round and the one before."""
        table, found = self.pairs(number, aligner)
        latest = [self.features(number, table)]
        if number > 1:
            latest.append(self.features(number - 1, self.folder / str(number - 1) / "pairs.parquet"))
        found |= {"step_original": step_size(original.unseen), "step_new": step_size(latest[0].data)}
        return Mixture(original, [data.data for data in latest], self.replay, self.seed + number), found

    def begin(
        self, number: int, aligner: ImplicitAligner, original: CachedData | StreamedData, refresh_after: int
    ) -> tuple[Trainer, Batches, dict]:
        """A round's training from the current aligner, which is its own first opponent, or where that was left.

        Also what is known of its pairs.
        """
        mixture, found = self.mixed(original, number, aligner)
        preset, seed = replace(self.preset, train_steps=self.preset.round_steps), self.seed + number
        trainer = Trainer.new(preset, original.widths, refresh_after, seed)
        for f in (trainer.aligner, trainer.reference):
            f.load_state_dict(aligner.state_dict())
        batches, checkpoint = (
            Batches(mixture.parts, preset.batch_size, seed),
            self.folder / str(number) / "checkpoint.pt",
        )
        if checkpoint.exists():
            saved = load_checkpoint(checkpoint)
            trainer.load_state_dict(saved)
            batches.resume(saved["data"])
        return trainer, batches, found

    def measure(self, aligner: ImplicitAligner) -> dict[str, float]:
        """The gate's numbers of an aligner: score and damage on held-back prompts, always the same."""
        if self.preset.world == "tiny":
            prompts = [str(p) for p in benchmark(GATE_PROMPTS, "validation", seed=1000 + self.seed)]
        else:
            prompts = training_prompts(self.preset, GATE_PROMPTS, self.seed, validation=True)
        seeds = [FIRST_SEED + 10_000 * self.seed + 5_000 + k for k in range(len(prompts))]
        base = _kept(
            self.folder / "gate", seeds, lambda: self.img(aligner).backbone.draw(prompts, seeds, progress="gate")
        )
        img = self.img(aligner)
        again = to_pil(img.backbone.draw(prompts, seeds, img.align(from_pil(base), prompts, seeds), progress="gate"))
        return self.judge.measure(prompts, base, again)

    def passes(self, before: dict[str, float], after: dict[str, float]) -> bool:
        """Does the round count?"""
        return not self.gate or (after["score"] >= before["score"] and after["damage"] <= before["damage"])


class RoundLog:
    """rounds/metrics.jsonl: a row for each round that is done, round 0 first."""

    COLUMNS = ("round", "kept", "score", "damage", "drawn", "pairs", "img_better", "base_better", "both_right",
               "step_original", "step_new", "correction", "validation_error")  # fmt: skip

    def __init__(self, path: Path):
        """Read what there is; a line that a kill cut off is its round's, which is then done again."""
        self.path, self.rows = path, []
        for line in path.read_text().splitlines() if path.exists() else []:
            with suppress(ValueError):
                self.rows.append(json.loads(line))

    @property
    def standing(self) -> dict:
        """The row of the aligner that stands."""
        return next(row for row in reversed(self.rows) if row["kept"])

    def latest(self, first: ImplicitAligner, folder: Path) -> ImplicitAligner:
        """The aligner that stands; `first` is round 0's."""
        number = self.standing["round"]
        if number == 0:
            return first
        aligner = ImplicitAligner.from_file(folder / str(number) / "aligner.safetensors")
        return aligner.to(next(first.parameters()).device)

    def add(self, row: dict) -> None:
        """Write a row down, and print it."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, "".join(json.dumps(one) + "\n" for one in self.rows))
        if row["round"] == 0:
            print("  ".join(f"{name:>10}" for name in self.COLUMNS))
        cells = [row.get(name, "") for name in self.COLUMNS]
        print("  ".join(f"{cell:>10.4f}" if isinstance(cell, float) else f"{cell!s:>10}" for cell in cells), flush=True)

    def draw(self, path: Path) -> None:
        """The table as a picture."""
        round_curves(self.rows, path)


def last_row(folder: Path) -> dict[str, float]:
    """What a run's log ends with: size of the correction, and error on held-back original pairs; nothing without."""
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    row = json.loads(lines[-1]) if lines else {}
    return {name: row[name] for name in ("correction", "validation_error") if name in row}


def _kept(folder: Path, seeds: Sequence[int], draw: Callable[[], Tensor]) -> list[Image.Image]:
    """Images by their seeds, drawn together if any is missing. Raises UserError if one is damaged."""
    paths = [folder / f"{seed}.png" for seed in seeds]
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        for path, image in zip(paths, to_pil(draw())):
            write_whole(path, png(image))
    try:
        return [Image.open(path).convert("RGB") for path in paths]
    except (OSError, SyntaxError):
        raise UserError(f"{folder}: holds a damaged image; delete the folder and --resume") from None
