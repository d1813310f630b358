"""Scores of the images in a folder, kept beside them, and what follows from them.

A judge's scores can be left and come back to as the images can; what comes out is the same number for number.
"""

import json
from dataclasses import asdict

import numpy as np
from tqdm import tqdm

from img_minimal.evaluate.image_folder import ARMS, Batch, ImageFolder, content
from img_minimal.evaluate.intervals import mean_interval, win_rate
from img_minimal.evaluate.scorers import SCORERS, Scorer, ScorerFiles
from img_minimal.runtime.atomic import write_whole
from img_minimal.runtime.cli import check
from img_minimal.runtime.devices import best_device
from img_minimal.runtime.errors import UserError


class Scores:
    """scores-<judge>.jsonl: a line that says which files judged, then a line per prompt with the score of each arm."""

    def __init__(self, images: ImageFolder, files: ScorerFiles):
        """Read what there is. Raises UserError if the lines are damaged, or by another model of the judge."""
        self.images, self.files, self.path = images, files, images.folder / f"scores-{files.name}.jsonl"
        self.title, self.rows = SCORERS[files.name].title, {}
        mark = {part: content(location) for part, location in asdict(files).items()}
        text = self.path.read_text() if self.path.exists() else ""
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # cut by a kill; its batch is judged again
        lines = lines if len(lines) > 1 else [json.dumps(mark) + "\n"]
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                same = number > 1 or row == mark
                if number > 1:
                    scores = {arm: float(row["scores"][arm]) for arm in ARMS}
                    self.rows[int(row["prompt"])] = {"cut": int(row["cut"]), "scores": scores}
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise UserError(f"{self.path}, line {number}: damaged; delete the file, the images are kept") from None
            check(same, f"{self.path} was made with other files of the judge; give the same ones, or choose another "
                        "--output, or delete it to judge the images anew")  # fmt: skip
        write_whole(self.path, "".join(lines))

    @property
    def missing(self) -> list[Batch]:
        """Batches that are not judged yet."""
        return [batch for batch in self.images.batches if any(prompt.index not in self.rows for prompt in batch)]

    def fill(self) -> None:
        """Scorer what is not judged yet, and write every batch down at once."""
        if not self.missing:
            return
        judge = Scorer.open(self.files, best_device())
        with self.path.open("a") as file:
            for batch in tqdm(self.missing, desc=self.title):
                texts = [prompt.text for prompt in batch]
                values = judge.score(self.images.load(batch, *ARMS), [text for text in texts for _ in ARMS])
                for prompt, cut, row in zip(batch, judge.cut(texts), values.reshape(-1, len(ARMS)).tolist()):
                    self.rows[prompt.index] = {"cut": cut, "scores": dict(zip(ARMS, row))}
                file.writelines(json.dumps({"prompt": p.index} | self.rows[p.index]) + "\n" for p in batch)
                file.flush()

    def results(self) -> dict:
        """Means of the arms, and IMG against each other arm on the same prompts; intervals bootstrap prompts."""
        prompts = self.images.prompts
        rows, texts = [self.rows[p.index] for p in prompts], [p.text for p in prompts]
        scores = {arm: np.array([row["scores"][arm] for row in rows]) for arm in ARMS}
        others = [arm for arm in ARMS if arm != "img"]

        def against(arms: list[str], mask: np.ndarray) -> dict:
            """IMG against these arms, on the prompts in the mask."""
            ours, here = scores["img"][mask], [text for text, inside in zip(texts, mask) if inside]
            return {
                "n": len(here),
                "win_rate": {f"img_vs_{arm}": without_nan(win_rate(ours, scores[arm][mask], here)) for arm in arms},
                "difference": {f"img_minus_{arm}": mean_interval(ours - scores[arm][mask], here) for arm in arms},
            }

        categories = {c: np.array([p.category == c for p in prompts]) for c in sorted({p.category for p in prompts})}
        return {
            "arms": {
                arm: {"mean": scores[arm].mean().item(), "n": len(rows), "interval": mean_interval(scores[arm], texts)}
                for arm in ARMS
            },
            **against(others, np.ones(len(rows), dtype=bool)),
            "by_category": {c: against(["base"], mask) for c, mask in categories.items() if c},
            "truncated": sum(row["cut"] > 0 for row in rows),
            "longest_cut": max(row["cut"] for row in rows),
        }


def without_nan(rate: dict) -> dict:
    """A win rate whose numbers are None where nothing was decided: JSON has no NaN."""
    return rate if rate["decided"] else rate | dict.fromkeys(("value", "low", "high"))
