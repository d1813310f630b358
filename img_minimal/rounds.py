"""Rounds: before each later one the current aligner makes new pairs, as in SPIN and iterative DPO.

    draw    x0 of training prompts with the base, x1 with IMG and the current aligner, same seeds
    judge   the oracle on the twins; PickScore and HPSv2, which have to agree, on real models
    train   from the current aligner, f_ref = f, on original pairs and those of the last two rounds
    gate    keep the new aligner if held-back prompts score no worse and no more images break

Both are drawn whole, whatever `draft_steps` is: x0 is a candidate, and not only looked at.

    x1 is better      loser x0, winner x1     what worked, once more
    x0 is better      loser x1, winner x0     the next aligner learns not to break images
    both are right    x0 is its own target    and to leave alone what is right
    both wrong alike  dropped

Each round is a folder rounds/N that can be interrupted at any moment: images, pairs.parquet, and a
run of its own.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from img_minimal.aligner import ImplicitAligner
from img_minimal.cli import UserError
from img_minimal.data.features import (
    Batches,
    CachedData,
    FeatureCache,
    Features,
    Part,
    Shards,
    StreamedData,
)
from img_minimal.data.load import load_encoder
from img_minimal.data.pairs import StreamPosition, held_back, pair_stream, prompts_of
from img_minimal.evaluate.judges import find_judge
from img_minimal.files import (
    cached_images,
    from_pil,
    png,
    read_json,
    replacing,
    to_pil,
    write_whole,
)
from img_minimal.pipeline import IMG
from img_minimal.plots import ROUNDS, curves, read_rows
from img_minimal.presets import Data, Preset
from img_minimal.run import Ranks, Run

FIRST_SEED = 2_000_000_000  # of drawn images; no pair and no evaluation has such seeds
GATE_PROMPTS = 200
PAIR_SCHEMA = pa.schema(
    {
        **{"caption": pa.string(), "ranking_id": pa.int64()},
        **{"jpg_0": pa.binary(), "jpg_1": pa.binary()},
        **{"label_0": pa.float64(), "label_1": pa.float64()},
        **{"model_0": pa.string(), "model_1": pa.string()},
    }
)


@dataclass
class Mixture:
    """Original data, cached or streamed, mixed with the pairs of the latest rounds.

    `replay`: minimum share of original samples per epoch; 0 trains on the new pairs only.
    """

    original: CachedData | StreamedData
    rounds: list[Shards]
    replay: float
    seed: int

    def __post_init__(self) -> None:
        self.widths, self.unseen = self.original.widths, self.original.unseen

    def batches(self, batch_size: int, seed: int, ranks: Ranks) -> Batches:
        """Return endless batches of the mixture, for one process."""
        return Batches(self.parts, batch_size, seed, shared=True)

    def parts(self, start: StreamPosition) -> Iterator[Part]:
        """Yield the parts of the original data, each with as many new samples as it can take."""
        new = Shards([features for shards in self.rounds for features in shards.parts])
        for part in self.original.parts(start):
            old = part.data.parts if isinstance(part.data, Shards) else [part.data]
            joined, first = Shards([*old, *new.parts]), sum(len(features) for features in old)
            room = len(new)
            if self.replay:
                room = round(len(part.samples) * (1 - self.replay) / self.replay)
            generator = torch.Generator().manual_seed(self.seed + part.position.chunk)
            order = torch.randperm(len(new), generator=generator)
            samples = first + order[:room].sort().values
            if self.replay:
                samples = torch.cat([part.samples, samples])
            yield Part(joined, samples, part.position)


def train_rounds(
    preset: Preset,
    run: Run,
    data: CachedData | StreamedData,
    first: ImplicitAligner,
    train: Callable[..., ImplicitAligner],
    *,
    rounds: int,
    guidance: str = "mllm",
    seed: int = 0,
    replay: float = 0.5,
    gate: bool = True,
) -> ImplicitAligner:
    """Run rounds 1, 2, ... from round 0's aligner; returns the last accepted one.

    `train` is that of train.py, without run, mixture, settings, start and seed. If it is stopped,
    `run.stopped` is set.
    """
    maker = PairMaker(preset, guidance, seed, run.path / "rounds")
    table = maker.folder / "metrics.jsonl"
    rows = finished_rounds(table)
    if not rows:
        first.save(maker.folder / "0" / "aligner.safetensors")
        row = {"round": 0, "kept": True} | maker.measure(first) | last_row(run.metrics)
        write_row(table, rows, row)
    accepted = [row for row in rows if row["kept"]][-1]
    aligner = first
    if accepted["round"] > 0:
        path = maker.folder / str(accepted["round"]) / "aligner.safetensors"
        aligner = ImplicitAligner.from_file(path).to(next(first.parameters()).device)

    for number in range(len(rows), rounds):
        counts = maker.make_pairs(number, aligner)
        mixture = Mixture(data, maker.features(number), replay, seed + number)
        counts["step_original"] = step_size(data.unseen)
        counts["step_new"] = step_size(mixture.rounds[0])

        inner = run.inside(maker.folder / str(number))
        settings = replace(preset.training, steps=preset.training.round_steps)
        trained = train(inner, mixture, settings, start=aligner, seed=seed + number)
        run.stopped = inner.stopped
        if run.stopped:
            return aligner

        measured = maker.measure(trained)
        better = measured["score"] >= accepted["score"]
        safer = measured["damage"] <= accepted["damage"]
        kept = not gate or (better and safer)
        trained.save(inner.path / "aligner.safetensors")
        row = {"round": number, "kept": kept} | counts | measured | last_row(inner.metrics)
        write_row(table, rows, row)
        if kept:
            aligner, accepted = trained, row
        else:
            print(f"round {number} scores worse on held-back prompts, or breaks more: not kept")
    curves({"": rows}, ROUNDS, run.path / "rounds.png", x="round")
    return aligner


class PairMaker:
    """Draws, judges and encodes the pairs of all rounds; models are loaded once, when needed."""

    def __init__(self, preset: Preset, guidance: str, seed: int, folder: Path):
        self.preset, self.guidance, self.seed, self.folder = preset, guidance, seed, folder
        self.judge = find_judge(preset.world)
        self.prompts = training_prompts(preset.data, preset.training.round_prompts, seed)
        self._img: IMG | None = None

    def img(self, aligner: ImplicitAligner) -> IMG:
        """Return the method with this aligner."""
        if self._img is None:
            self._img = IMG(preset=self.preset, aligner=aligner, guidance=self.guidance)
        self._img.aligner = aligner.eval()
        return self._img

    def make_pairs(self, number: int, aligner: ImplicitAligner) -> dict:
        """Draw, judge and write rounds/N/pairs.parquet unless it exists; returns their counts.

        Images are kept on disk, not in memory: 4,000 pairs of SDXL's take 24 GB. Raises UserError
        if no pair has a better image.
        """
        folder = self.folder / str(number)
        note = folder / "pairs.json"
        if note.exists():
            return read_json(note, dict, f"delete {folder} and --resume")
        seeds = self._seeds(len(self.prompts))
        size = self.preset.sampling.draw_batch
        batches = [slice(k, k + size) for k in range(0, len(seeds), size)]
        for batch in tqdm(batches, desc=f"round {number}, drawing", leave=False):
            self._drawn(folder / "images", aligner, self.prompts[batch], seeds[batch])
        outcomes, written = [], 0
        with (
            replacing(folder / "pairs.parquet") as partial,
            pq.ParquetWriter(partial, PAIR_SCHEMA) as writer,
        ):
            for batch in tqdm(batches, desc=f"round {number}, judging", leave=False):
                prompts = self.prompts[batch]
                x0, x1 = self._drawn(folder / "images", aligner, prompts, seeds[batch])
                judged = self.judge.compare(prompts, x0, x1)
                drawn_by = f"img, round {number}"
                rows = pair_rows(prompts, x0, x1, judged, drawn_by, len(outcomes))
                writer.write_table(pa.Table.from_pylist(rows, PAIR_SCHEMA))
                outcomes += judged
                written += len(rows)
        if not written:
            tried = f"none of {len(outcomes)} pairs has a better image"
            raise UserError(f"round {number}: {tried}; end with fewer --rounds")
        counts = count_outcomes(outcomes)
        write_whole(note, json.dumps(counts))
        return counts

    def features(self, number: int) -> list[Shards]:
        """Compute or read the features of this round's pairs and of the round before."""
        data = replace(self.preset.data, identity_share=0.0)
        preset = replace(self.preset, data=data)
        encoder = cache(lambda: load_encoder(preset, self.guidance, self.seed))
        rounds = []
        for k in [number, number - 1] if number > 1 else [1]:
            folder = self.folder / str(k)
            features = FeatureCache(folder / "features", {"the round": str(k)}, float("inf"))
            stream = pair_stream(folder / "pairs.parquet")
            rounds.append(CachedData(stream, encoder, features).data)
        return rounds

    def measure(self, aligner: ImplicitAligner) -> dict[str, float]:
        """Compute the gate's `score` and `damage` of an aligner, always on the same prompts."""
        if self.preset.world == "tiny":
            from img_minimal.tiny.grammar import benchmark

            drawn = benchmark(GATE_PROMPTS, "validation", seed=1000 + self.seed)
            prompts = [str(prompt) for prompt in drawn]
        else:
            prompts = training_prompts(self.preset.data, GATE_PROMPTS, self.seed, validation=True)
        seeds = [5_000 + seed for seed in self._seeds(len(prompts))]
        x0, x1 = self._drawn(None, aligner, prompts, seeds)
        return self.judge.measure(prompts, x0, x1)

    def _seeds(self, count: int) -> list[int]:
        return [FIRST_SEED + 10_000 * self.seed + k for k in range(count)]

    def _drawn(
        self, images: Path | None, aligner: ImplicitAligner, prompts: list[str], seeds: list[int]
    ) -> tuple[list[Image], list[Image]]:
        """Draw x0 and x1 of a batch, or read them; the gate (no folder) keeps x0 alone.

        Batches are always the same: in another one, sums would be rounded otherwise.
        """
        advice = "delete its folder and --resume"
        base = self.folder / ("gate" if images is None else "base")

        def draw_base() -> Tensor:
            return self.img(aligner).backbone.draw(prompts, seeds)

        def draw_again() -> Tensor:
            img = self.img(aligner)
            return img.backbone.draw(prompts, seeds, img.align(from_pil(x0), prompts, seeds))

        x0 = cached_images([base / f"{seed}.png" for seed in seeds], draw_base, advice)
        if images is None:
            return x0, to_pil(draw_again())
        return x0, cached_images([images / f"{seed}.png" for seed in seeds], draw_again, advice)


def training_prompts(data: Data, number: int, seed: int, validation: bool = False) -> list[str]:
    """Choose prompts of the pairs that are trained on, or held back, in random order.

    They are drawn from the first `4 * number` that are found. Raises UserError if there are none.
    """
    stream = pair_stream(data.pairs, limit=data.max_pairs, seed=seed)
    found: dict[str, None] = {}
    for prompt in prompts_of(stream):
        if held_back(prompt) == validation:
            found[prompt] = None
        if len(found) == 4 * number:
            break
    kind = "held-back" if validation else "training"
    if not found:
        raise UserError(f"{data.pairs}: has no {kind} prompt to draw")
    prompts = list(found)
    random.Random(seed).shuffle(prompts)
    return prompts[:number]


def pair_rows(
    prompts: Sequence[str],
    base: Sequence[Image],
    img: Sequence[Image],
    outcomes: Sequence[str],
    model: str,
    first: int = 0,
) -> list[dict]:
    """Build rows in Pick-a-Pic's columns, numbered from `first`; `model` drew the `img` images."""
    rows = []
    judged = zip(prompts, base, img, outcomes, strict=True)
    for number, (prompt, x0, x1, outcome) in enumerate(judged, first):
        if outcome == "none":
            continue
        second, drawn_by = (x0, "base") if outcome == "both" else (x1, model)
        label = float(outcome != "img")
        rows.append(
            {
                **{"caption": prompt, "ranking_id": number},
                **{"jpg_0": png(x0), "jpg_1": png(second)},
                **{"label_0": label, "label_1": 1 - label},
                **{"model_0": "base", "model_1": drawn_by},
            }
        )
    return rows


def count_outcomes(outcomes: Sequence[str]) -> dict[str, int]:
    """Count the pairs of each outcome."""
    counts = Counter(outcomes)
    return {
        "drawn": len(outcomes),
        "pairs": len(outcomes) - counts["none"],
        "img_better": counts["img"],
        "base_better": counts["base"],
        "both_right": counts["both"],
    }


def step_size(features: Features | Shards, most: int = 1000) -> float:
    """Compute the mean |c_w - c_l| of pairs: how far they ask the aligner to go."""
    some = features[torch.arange(min(len(features), most))]
    distance = (some.winner - some.loser).flatten(1).norm(dim=1)
    moved = distance[~some.is_identity & (distance > 0)]
    return moved.mean().item() if len(moved) else 0.0


def finished_rounds(table: Path) -> list[dict]:
    """Read the rows of whole rounds, up to the first that is missing or damaged."""
    rows: list[dict] = []
    for row in read_rows(table):
        if row.get("round") != len(rows) or not {"kept", "score", "damage"} <= row.keys():
            break
        rows.append(row)
    return rows


def write_row(path: Path, rows: list[dict], row: dict) -> None:
    """Append a row to the table of rounds, and print it."""
    rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(r) + "\n" for r in rows))
    cells = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in row.items()]
    print(", ".join(cells), flush=True)


def last_row(log: Path) -> dict[str, float]:
    """Read the size of the correction and the validation error that a run's log ends with."""
    last = (read_rows(log) or [{}])[-1]
    return {name: last[name] for name in ("correction", "validation_error") if name in last}
