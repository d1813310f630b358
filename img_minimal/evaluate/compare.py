"""Compare the arms on prompts of your own, from a file, judged by CLIP models.

    python -m img_minimal.evaluate --model sdxl --prompt-file PartiPrompts.tsv
    python -m img_minimal.evaluate --model sdxl --prompt-file evaluation_metadata.jsonl \\
        --judges pickscore,hpsv2

Every prompt is drawn four times: by the base model, by the base model from a new seed (the same
compute), and in a second pass from the first seed with the image's own tokens (no guidance) or with
aligned ones (IMG). Images are kept as PNG, and the PNG is what is judged. A run that was stopped
goes on where it was and ends in the same numbers.

One big model is needed at a time: the base model for all first passes, the MLLM for all images, the
base model again; then all of them are freed, and the judges come one after another.
"""

import gc
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from img_minimal.cli import warn
from img_minimal.devices import best_device
from img_minimal.evaluate.arms import FIRST_SEED, NEW_SEED, TITLES, save_pairs
from img_minimal.evaluate.intervals import differences, mean_interval, said, said_wins, win_rates
from img_minimal.evaluate.judges import JUDGES, ClipJudge, JudgeFiles
from img_minimal.evaluate.prompts import FilePrompt
from img_minimal.files import cached_images, check_provenance, identity, read_json, write_whole
from img_minimal.pipeline import IMG

ARMS = ("base", "new_seed", "no_guidance", "img")
LOOK_BATCH = 64  # prompts whose guidance features are held at once, 0.4 GB with LLaVA-13B
JUDGE_BATCH = 16  # prompts judged at once, with an image of every arm
# Settings that change no image here. All others are recorded, so that no folder mixes two runs.
NOT_DRAWING = "stock_mllm stock_aligner text_aligner offload draft_steps only_wrong".split()
Prompts = list[FilePrompt]


class ImageFolder:
    """The images of prompts in all arms, each a file that prompt, seed and arm name."""

    def __init__(self, folder: Path, prompts: Prompts, seed: int):
        self.folder, self.prompts, self.first_seed = folder, prompts, FIRST_SEED * (seed + 1)

    def batches(self, size: int) -> list[Prompts]:
        """Cut the prompts into batches.

        They are the same in every run: in other ones, sums would be rounded otherwise, and a
        resumed run would differ.
        """
        return [self.prompts[k : k + size] for k in range(0, len(self.prompts), size)]

    def seeds(self, batch: Prompts, arm: str = "base") -> list[int]:
        """Return the seeds of images, the same in every arm but `new_seed`."""
        first = self.first_seed + NEW_SEED * (arm == "new_seed")
        return [first + prompt.index for prompt in batch]

    def paths(self, batch: Prompts, arm: str) -> list[Path]:
        """Return where images are, or will be."""
        paths = []
        for prompt, seed in zip(batch, self.seeds(batch, arm)):
            paths.append(self.folder / f"p{prompt.index:05d}-s{seed}-{arm}.png")
        return paths

    def lacks(self, batch: Prompts, arm: str) -> bool:
        """Return True if any image is still to be drawn."""
        return not all(map(Path.exists, self.paths(batch, arm)))

    def images(
        self, batch: Prompts, arm: str, img: IMG | None = None, tokens: Tensor | None = None
    ) -> list[Image]:
        """Read images, after drawing them with `img` if any is missing. Raises UserError."""

        def draw() -> Tensor:
            return img.backbone.draw(texts_of(batch), self.seeds(batch, arm), tokens)

        advice = "delete it and run again to have it drawn again"
        return cached_images(self.paths(batch, arm), draw, advice)


def texts_of(prompts: Prompts) -> list[str]:
    """Return the texts of prompts."""
    return [prompt.text for prompt in prompts]


def draw_missing(folder: ImageFolder, img: IMG) -> None:
    """Draw what the folder lacks, in the order base model, MLLM, base model."""
    prompts, cut = folder.prompts, 0
    for prompt in prompts:
        cut += bool(img.backbone.truncated_part(prompt.text)[0])
    if cut:
        reason = "are longer than the text encoders read; their ends are not drawn"
        warn(f"{cut} of {len(prompts)} prompts {reason}")
    batches = folder.batches(img.mllm_batch)  # divides LOOK_BATCH; `draw` splits it again
    for arm in ("base", "new_seed"):
        for batch in tqdm(batches, desc=TITLES[arm]):
            if folder.lacks(batch, arm):
                folder.images(batch, arm, img)

    # In groups, because guidance features are fifty times as large as tokens, and because with
    # offloading the MLLM and the aligner take turns on the GPU.
    own, aligned = {}, {}
    for group in tqdm(folder.batches(LOOK_BATCH), desc="look"):
        if folder.lacks(group, "no_guidance") or folder.lacks(group, "img"):
            # The files, not what was just drawn, so that a resumed run sees the same images.
            pictures = folder.images(group, "base")
            tokens = img.backbone.tokens(pictures)
            h, mask = img.guidance(pictures, texts_of(group), folder.seeds(group))
            own |= zip(group, tokens)
            aligned |= zip(group, img.correct(tokens, h, mask))
    for arm, tokens in (("no_guidance", own), ("img", aligned)):
        for batch in tqdm(batches, desc=TITLES[arm]):
            if folder.lacks(batch, arm):
                folder.images(batch, arm, img, torch.stack(list(map(tokens.get, batch))))


class Scores:
    """The scores of one judge, saved batch by batch in scores-<judge>.json."""

    def __init__(self, folder: ImageFolder, source: JudgeFiles):
        """Read the scores there are. Raises UserError if they are damaged, or of other files."""
        self.folder, self.source, self.title = folder, source, JUDGES[source.name].title
        self.path = folder.folder / f"scores-{source.name}.json"
        advice = f"choose another --output, or delete {self.path.name} to judge anew"
        # A judge may be added later, so each has a record of its own.
        judged_by = {}
        for part, location in asdict(source).items():
            judged_by[f"{source.name} {part}"] = identity(location)
        note = self.path.with_name(f"judge-{source.name}.json")
        check_provenance(note, judged_by, advice, self.path.exists())
        self.rows: dict[str, dict[str, float]] = {}  # by the prompt's number
        if self.path.exists():
            self.rows = read_json(self.path, dict, advice, inspect=_inspect_rows)

    def missing(self) -> list[Prompts]:
        """Return the batches that are not judged yet."""
        missing = []
        for batch in self.folder.batches(JUDGE_BATCH):
            if not all(str(prompt.index) in self.rows for prompt in batch):
                missing.append(batch)
        return missing

    def fill(self) -> None:
        """Judge what is not judged yet."""
        missing = self.missing()
        if not missing:
            return
        judge = ClipJudge.open(self.source, best_device())
        for batch in tqdm(missing, desc=self.title):
            texts, images = texts_of(batch), []
            for arm in ARMS:
                images += self.folder.images(batch, arm)
            scores = judge.score(images, texts * len(ARMS)).reshape(len(ARMS), -1)
            for prompt, cut, row in zip(batch, judge.cut(texts), scores.T.tolist()):
                self.rows[str(prompt.index)] = dict(zip(ARMS, row), cut=cut)
            write_whole(self.path, json.dumps(self.rows))

    def results(self) -> dict:
        """Average the arms, and compare IMG with each other arm; intervals are over prompts."""
        prompts, scores = self.folder.prompts, {}
        for name in (*ARMS, "cut"):
            scores[name] = np.array([self.rows[str(prompt.index)][name] for prompt in prompts])
        cut, texts = scores.pop("cut"), np.array(texts_of(prompts))
        categories = np.array([prompt.category for prompt in prompts])
        arms, by_category = {}, {}
        for arm in ARMS:
            interval = mean_interval(scores[arm], texts)
            arms[arm] = {"mean": interval["value"], "n": len(prompts), "interval": interval}
        for kind in filter(None, sorted(set(categories))):
            chosen = categories == kind
            pair = {arm: scores[arm][chosen] for arm in ("base", "img")}
            by_category[kind] = against_img(pair, texts[chosen])
        counts = {"truncated": sum(cut > 0).item(), "longest_cut": max(cut).item()}
        return {"arms": arms, "by_category": by_category, **against_img(scores, texts), **counts}


def _inspect_rows(rows: dict) -> None:
    for row in rows.values():
        for name in (*ARMS, "cut"):
            float(row[name])


def against_img(scores: dict[str, np.ndarray], texts: np.ndarray) -> dict:
    """Compare IMG with every other arm on the same prompts."""
    pairs = [("img", arm) for arm in scores if arm != "img"]
    return {
        "n": len(texts),
        "win_rate": win_rates(scores, texts, pairs),
        "difference": differences(scores, texts, pairs),
    }


def print_table(title: str, results: dict) -> None:
    """Print one judge's means and comparisons, and warn if it could not read all prompts."""
    print(f"\n{title:36} {'mean [95 %]':27} {'IMG minus it':26} IMG's win rate without ties")
    for arm, values in results["arms"].items():
        line = f"{TITLES[arm]:36} {said(values['interval']):27}"
        print(line if arm == "img" else f"{line} {said_comparison(results, arm)}")
    for kind, part in results["by_category"].items():
        line = f"{f'  base model, {kind}'[:36]:36} n {part['n']:<25}"
        print(line, said_comparison(part, "base"))
    if results["truncated"]:
        print(
            "warning: {truncated} of {n} prompts are longer than {title} can read; it judged their "
            "beginning (up to {longest_cut} tokens were cut)".format(title=title, **results)
        )


def said_comparison(results: dict, arm: str) -> str:
    """Format IMG's difference from an arm and its win rate."""
    difference = said(results["difference"][f"img_minus_{arm}"], "+.3f")
    return f"{difference:26} {said_wins(results['win_rate'][f'img_vs_{arm}'])}"


def before_and_after(folder: ImageFolder, scores: list[Scores], path: str) -> None:
    """Save the base's and IMG's images of the first six prompts, with their scores."""
    cells = []
    for prompt in folder.prompts[:6]:
        for arm, label in (("base", f'"{prompt.text}"'), ("img", "IMG, same seed")):
            for one in scores:
                label += f"\n{one.title} {one.rows[str(prompt.index)][arm]:.2f}"
            cells.append((folder.images([prompt], arm)[0], label))
    shown = f"the first {len(cells) // 2} of {len(folder.prompts)} prompts"
    save_pairs(cells, path, f"{shown}, base and IMG")


def release() -> None:
    """Free the memory of models that are no longer referred to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
