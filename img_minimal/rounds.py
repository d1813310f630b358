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

Each round can be interrupted at any moment: its images are files in pairs/, its pairs a table of
them in Pick-a-Pic's columns, pairs/N.jsonl, and its training is a run of its own in the folder N.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from img_minimal.aligner import ImplicitAligner
from img_minimal.cli import check
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
from img_minimal.evaluate.judges import OUTCOMES, RoundJudge
from img_minimal.files import cached_images, write_whole
from img_minimal.pipeline import IMG
from img_minimal.plots import ROUNDS, curves, read_rows
from img_minimal.presets import Data, Preset
from img_minimal.run import Ranks, Run

FIRST_SEED = 2_000_000_000  # of drawn images; no pair and no evaluation has such seeds
GATE_PROMPTS = 200


@dataclass
class Mixture:
    """Original data, cached or streamed, mixed with the pairs of the latest rounds.

    `replay`: minimum share of original samples per epoch; 0 trains on the new pairs only.
    """

    original: CachedData | StreamedData
    new: list[Features]
    replay: float
    seed: int

    def __post_init__(self) -> None:
        self.unseen = self.original.unseen

    def batches(self, batch_size: int, seed: int, ranks: Ranks) -> Batches:
        """Return endless batches of the mixture, for one process."""
        return Batches(self.parts, batch_size, seed, shared=True)

    def parts(self, start: StreamPosition) -> Iterator[Part]:
        """Yield the parts of the original data, each with as many new samples as it can take."""
        count = sum(map(len, self.new))
        for part in self.original.parts(start):
            old = getattr(part.data, "parts", [part.data])  # of a cache, or a chunk
            samples, room = part.samples, count
            if self.replay:
                room = round(len(samples) * (1 - self.replay) / self.replay)
            else:
                samples = samples[:0]
            generator = torch.Generator().manual_seed(self.seed + part.position.chunk)
            chosen = torch.randperm(count, generator=generator)[:room].sort().values
            samples = torch.cat([samples, len(part.data) + chosen])
            yield Part(Shards([*old, *self.new]), samples, part.position)


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
    maker = PairMaker(preset, first, guidance, seed, run.path / "rounds")
    rows, aligner = read_rows(maker.table), first
    accepted = [row for row in rows if row["kept"]]
    if accepted:
        aligner = ImplicitAligner.from_file(maker.aligner_path(accepted[-1]["round"]))
        aligner = aligner.to(next(first.parameters()).device)

    for number in range(len(rows), rounds):
        trained, counts, inner = first, {}, run
        if number:
            counts = maker.make_pairs(number, aligner)
            latest = [maker.features(k) for k in range(number, max(0, number - 2), -1)]
            mixture = Mixture(data, sum([made.parts for made in latest], []), replay, seed + number)
            counts["step_original"] = step_size(data.unseen)
            counts["step_new"] = step_size(latest[0])

            inner = run.inside(maker.folder / str(number))
            settings = replace(preset.training, steps=preset.training.round_steps)
            trained = train(inner, mixture, settings, start=aligner, seed=seed + number)
            run.stopped = inner.stopped
            if run.stopped:
                return aligner

        trained.save(maker.aligner_path(number))
        row = {"round": number, "kept": True} | counts | maker.measure(number, trained)
        if gate and accepted:
            last = accepted[-1]
            row["kept"] = row["score"] >= last["score"] and row["damage"] <= last["damage"]
        maker.write_row(rows, row | last_row(inner.metrics))
        if row["kept"]:
            aligner = trained
            accepted.append(row)
        else:
            print(f"round {number} scores worse on held-back prompts, or breaks more: not kept")
    curves({"": rows}, ROUNDS, run.path / "rounds.png", x="round")
    return aligner


class PairMaker:
    """Draws, judges and encodes the pairs of all rounds; models are loaded once, when needed."""

    def __init__(
        self, preset: Preset, first: ImplicitAligner, guidance: str, seed: int, folder: Path
    ):
        self.preset, self.folder = preset, folder
        self.seed, self.first_seed = seed, FIRST_SEED + 10_000 * seed
        self.table = folder / "metrics.jsonl"
        self.judge = RoundJudge(preset.world)
        self.prompts = training_prompts(preset.data, preset.training.round_prompts, seed)
        plain = preset.changed(("data",), identity_share=0.0)
        self.encoder = cache(partial(load_encoder, plain, guidance, seed))
        self.img = cache(partial(IMG, preset=preset, aligner=first, guidance=guidance))

    def aligner_path(self, number: int) -> Path:
        """Return the file of a round's aligner."""
        return self.folder / str(number) / "aligner.safetensors"

    def make_pairs(self, number: int, aligner: ImplicitAligner) -> dict[str, int]:
        """Draw, judge and write a round's pairs, unless they exist; returns their counts.

        Raises UserError if no pair has a better image.
        """
        path, size = self.folder / "pairs" / f"{number}.jsonl", self.preset.sampling.draw_batch
        if not path.exists():
            rows = []
            # Batches are always the same: in another one, sums would be rounded otherwise.
            for k in tqdm(range(0, len(self.prompts), size), desc=f"round {number}, drawing"):
                prompts = self.prompts[k : k + size]
                images = self.drawn("pairs", number, aligner, prompts, k)
                rows += pair_rows(prompts, k, self.judge.compare(prompts, *images), number)
            tried = f"none of {len(self.prompts)} pairs has a better image"
            check(rows, f"round {number}: {tried}; end with fewer --rounds")
            write_lines(path, rows)
        counts = Counter(json.loads(row)["outcome"] for row in path.read_text().splitlines())
        counts = dict.fromkeys(OUTCOMES, 0) | counts
        return {"drawn": len(self.prompts), "pairs": sum(counts.values())} | counts

    def features(self, number: int) -> Shards:
        """Compute or read the features of a round's pairs."""
        folder = self.folder / str(number) / "features"
        features = FeatureCache(folder, {"the round": str(number)}, float("inf"))
        stream = pair_stream(self.folder / "pairs" / f"{number}.jsonl")
        return CachedData(stream, self.encoder, features).data

    def measure(self, number: int, aligner: ImplicitAligner) -> dict[str, float]:
        """Compute the gate's `score` and `damage` of an aligner, always on the same prompts."""
        if self.preset.world == "tiny":
            from img_minimal.tiny.grammar import benchmark

            prompts = list(map(str, benchmark(GATE_PROMPTS, "validation", 1000 + self.seed)))
        else:
            prompts = training_prompts(self.preset.data, GATE_PROMPTS, self.seed, validation=True)
        images = self.drawn("gate", number, aligner, prompts, 5_000)
        return self.judge.measure(prompts, *images)

    def drawn(
        self, kind: str, number: int, aligner: ImplicitAligner, prompts: list[str], first: int
    ) -> tuple[list[Image], list[Image]]:
        """Draw x0 and x1 of prompts, from seeds numbered from `first` on, or read them."""
        numbers = range(first, first + len(prompts))
        seeds = [self.first_seed + k for k in numbers]

        def draw(x0: list[Image] | None = None) -> Tensor:
            img, tokens = self.img(), None
            if x0:
                img.aligner = aligner.eval()
                tokens = img.align(x0, prompts, seeds)
            return img.backbone.draw(prompts, seeds, tokens)

        def images(name: object, draw: Callable[[], Tensor]) -> list[Image]:
            paths = [self.folder / kind / f"{name}/{k}.png" for k in numbers]
            return cached_images(paths, draw, "delete its folder and --resume")

        x0 = images("base", draw)
        return x0, images(number, partial(draw, x0))

    def write_row(self, rows: list[dict], row: dict) -> None:
        """Append a row to the table of rounds, and print it."""
        rows.append(row)
        write_lines(self.table, rows)
        cells = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in row.items()]
        print(", ".join(cells), flush=True)


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
    check(found, f"{data.pairs}: has no {kind} prompt to draw")
    prompts = list(found)
    random.Random(seed).shuffle(prompts)
    return prompts[:number]


def pair_rows(prompts: list[str], first: int, outcomes: list[str], round_number: int) -> list[dict]:
    """Build rows in Pick-a-Pic's columns, of images by their numbers from `first` on."""
    rows = []
    for number, (prompt, outcome) in enumerate(zip(prompts, outcomes), first):
        second = "base" if outcome == "both_right" else round_number
        row = {
            "caption": prompt,
            "outcome": outcome,
            "jpg_0": f"base/{number}.png",
            "jpg_1": f"{second}/{number}.png",
            "label_0": outcome != "img_better",
            "label_1": outcome == "img_better",
        }
        if outcome != "none":
            rows.append(row)
    return rows


def step_size(features: Features | Shards) -> float:
    """Compute the mean |c_w - c_l| of pairs: how far they ask the aligner to go."""
    some = features[torch.arange(min(len(features), 1000))]
    distance = (some.winner - some.loser).flatten(1).norm(dim=1)
    moved = distance[~some.is_identity & (distance > 0)]
    return moved.mean().nan_to_num().item()  # 0 if there are none


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write rows as .jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def last_row(log: Path) -> dict[str, float]:
    """Read the size of the correction and the validation error that a run's log ends with."""
    [last] = read_rows(log)[-1:] or [{}]
    return {name: last[name] for name in ("correction", "validation_error") if name in last}
