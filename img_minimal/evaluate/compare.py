"""Does IMG help on prompts of one's own? The arms of the evaluation over a prompt file, judged by CLIP models.

    python -m img_minimal.evaluate --model sdxl --prompt-file PartiPrompts.tsv
    python -m img_minimal.evaluate --model sdxl --prompt-file evaluation_metadata.jsonl --judges pickscore,hpsv2

Every prompt is drawn four times: by the base model, by the base model from a new seed (the same compute), and in a
second pass from the first seed with the image's own tokens (no guidance) or with aligned ones (IMG). Images are kept
as PNG, and the PNG is what is judged. A run that was stopped goes on where it was and ends in the same numbers.

One big model is needed at a time: the base model for all first passes, the MLLM for all images, the base model again;
then all of them are let go, and the judges come one after another.
"""

import gc
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from img_minimal.cli import UserError, check, warn, writable_folder
from img_minimal.devices import best_device
from img_minimal.evaluate.intervals import mean_interval, said, win_rate
from img_minimal.evaluate.judges import JUDGES, ClipJudge, JudgeFiles
from img_minimal.evaluate.prompts import FilePrompt, read_prompts
from img_minimal.files import content, made_with, png, read_json, to_pil, write_whole
from img_minimal.load import load_img
from img_minimal.plots import pairs_grid
from img_minimal.presets import Preset
from img_minimal.tiny.grammar import parse

ARMS = {
    "base": "base model",
    "new_seed": "same compute, new seed",
    "no_guidance": "second pass, the image's own tokens",
    "img": "IMG",
}
NEW_SEED = 1_000_000  # added to a seed for the control that spends IMG's compute on another try
FIRST_SEED = 100_000  # times the run's seed plus one: images of two runs share none
GROUP = 64  # prompts whose guidance features are held at once, 0.4 GB with LLaVA-13B
# Fields of a preset that change no image. All others are noted, files by their content, so that no folder mixes runs.
NOT_DRAWING = """stock_mllm stock_aligner text_aligner pairs max_pairs world offload train_steps batch_size lr
    constant_share round_steps round_prompts weight_decay preference_weight norm identity_share depth heads head_dim
    optimizer save_every cache_dir chunk_pairs triplets finetuning""".split()
Batch = list[FilePrompt]


class ImageFolder:
    """Which images there should be of some prompts, which ones there are, and where: by prompt, seed and arm."""

    def __init__(self, folder: Path, prompts: Batch, seed: int, batch_size: int):
        self.folder, self.prompts, self.seed = folder, prompts, seed
        # Always the same batches: in another batch, sums are rounded otherwise, and a resumed run would differ.
        self.batches = [prompts[k : k + batch_size] for k in range(0, len(prompts), batch_size)]

    def seeds(self, batch: Batch, arm: str = "base") -> list[int]:
        """Of the images of an arm: the same in every arm but the one that is about seeds."""
        offset = FIRST_SEED * (self.seed + 1) + (NEW_SEED if arm == "new_seed" else 0)
        return [offset + prompt.index for prompt in batch]

    def path(self, prompt: FilePrompt, arm: str) -> Path:
        """Where that image is, or will be."""
        return self.folder / f"p{prompt.index:05d}-s{self.seeds([prompt], arm)[0]}-{arm}.png"

    def lacks(self, batch: Batch, *arms: str) -> bool:
        """Whether any image of the batch is still to be drawn."""
        return not all(self.path(prompt, arm).exists() for prompt in batch for arm in arms)

    def save(self, batch: Batch, arm: str, images: Tensor) -> None:
        """Keep images (B, 3, H, W) in [0, 1], each written whole or not at all."""
        for prompt, image in zip(batch, to_pil(images), strict=True):
            write_whole(self.path(prompt, arm), png(image))

    def load(self, batch: Batch, *arms: str) -> list[Image.Image]:
        """Images of a batch: prompt after prompt, arm after arm. Raises UserError if one is damaged."""
        images = []
        for path in (self.path(prompt, arm) for prompt in batch for arm in arms):
            try:
                images.append(Image.open(path).convert("RGB"))
            except (OSError, SyntaxError):  # Pillow has both for a damaged PNG
                raise UserError(f"{path}: damaged image; delete it and run again to have it drawn again") from None
        return images


def draw_missing(images: ImageFolder, preset: Preset) -> None:
    """Draw what the folder lacks, in the order base model, MLLM, base model."""
    img = load_img(preset)
    cut = sum(bool(img.backbone.truncated_part(prompt.text)[0]) for prompt in images.prompts)
    if cut:
        warn(f"{cut} of {len(images.prompts)} prompts are longer than the text encoders read; their ends are not drawn")
    for arm in ("base", "new_seed"):
        for batch in tqdm([batch for batch in images.batches if images.lacks(batch, arm)], desc=ARMS[arm]):
            images.save(batch, arm, img.backbone.draw([p.text for p in batch], images.seeds(batch, arm)))
    # Of the PNG, so that a resumed run sees the same image. In groups, because guidance features are fifty times as
    # large as tokens, and because with offloading MLLM and aligner take turns on the GPU.
    batches = [batch for batch in images.batches if images.lacks(batch, "no_guidance", "img")]
    own = [img.backbone.tokens(images.load(batch, "base")) for batch in tqdm(batches, desc="tokens")]
    aligned: list[Tensor] = []
    size = max(1, GROUP // img.mllm_batch)  # batches
    for start in tqdm(range(0, len(batches), size), desc="look"):
        group = batches[start : start + size]
        looked = [img.guidance(images.load(b, "base"), [p.text for p in b], images.seeds(b)) for b in group]
        aligned += [img.correct(tokens, *seen) for tokens, seen in zip(own[start:], looked)]
    for k, batch in enumerate(tqdm(batches, desc="draw again")):
        for arm, tokens in (("no_guidance", own[k]), ("img", aligned[k])):
            if images.lacks(batch, arm):
                images.save(batch, arm, img.backbone.draw([p.text for p in batch], images.seeds(batch), tokens))


class Scores:
    """scores-<judge>.json: which files judged, and for every prompt the score of each arm, kept batch by batch."""

    def __init__(self, images: ImageFolder, files: JudgeFiles):
        """Read what there is. Raises UserError if it is damaged, or by another model of the judge."""
        self.images, self.files, self.title = images, files, JUDGES[files.name].title
        self.path = images.folder / f"scores-{files.name}.json"
        mark = {part: content(location) for part, location in asdict(files).items()}
        instead = "give the judge's files of that time, choose another --output, or delete it to judge anew"
        self.kept = {"made_with": mark, "prompts": {}}
        if self.path.exists():
            self.kept = read_json(self.path, dict, instead, check=_check_scores)
            check(self.kept["made_with"] == mark, f"{self.path} was made with other files of the judge; {instead}")

    @property
    def missing(self) -> list[Batch]:
        """Batches that are not judged yet."""
        return [batch for batch in self.images.batches if any(str(p.index) not in self.kept["prompts"] for p in batch)]

    def fill(self) -> None:
        """Judge what is not judged yet."""
        if not self.missing:
            return
        judge = ClipJudge.open(self.files, best_device())
        for batch in tqdm(self.missing, desc=self.title):
            texts = [prompt.text for prompt in batch]
            values = judge.score(self.images.load(batch, *ARMS), [text for text in texts for _ in ARMS])
            for prompt, cut, row in zip(batch, judge.cut(texts), values.reshape(-1, len(ARMS)).tolist()):
                self.kept["prompts"][str(prompt.index)] = {"cut": cut, "scores": dict(zip(ARMS, row))}
            write_whole(self.path, json.dumps(self.kept))

    def results(self) -> dict:
        """Means of the arms, and IMG against each other arm on the same prompts; intervals bootstrap prompts."""
        prompts = self.images.prompts
        rows, texts = [self.kept["prompts"][str(p.index)] for p in prompts], np.array([p.text for p in prompts])
        scores = {arm: np.array([row["scores"][arm] for row in rows]) for arm in ARMS}

        def against(arms: list[str], here: np.ndarray) -> dict:
            """IMG against these arms, on the prompts that `here` says."""
            ours, clusters = scores["img"][here], list(texts[here])
            rates = {arm: win_rate(ours, scores[arm][here], clusters) for arm in arms}
            return {
                "n": len(clusters),
                "win_rate": {f"img_vs_{arm}": without_nan(rate) for arm, rate in rates.items()},
                "difference": {f"img_minus_{arm}": mean_interval(ours - scores[arm][here], clusters) for arm in arms},
            }

        kinds = np.array([p.category for p in prompts])
        return {
            "arms": {
                arm: {"mean": values.mean().item(), "n": len(rows), "interval": mean_interval(values, list(texts))}
                for arm, values in scores.items()
            },
            **against([arm for arm in ARMS if arm != "img"], np.ones(len(rows), dtype=bool)),
            "by_category": {kind: against(["base"], kinds == kind) for kind in sorted(set(kinds)) if kind},
            "truncated": sum(row["cut"] > 0 for row in rows),
            "longest_cut": max(row["cut"] for row in rows),
        }


def _check_scores(kept: dict) -> None:
    """Raises an error if a part is missing or no number."""
    for number, row in kept["prompts"].items():
        int(number), int(row["cut"]), [float(row["scores"][arm]) for arm in ARMS]
    kept["made_with"].keys()


def without_nan(rate: dict) -> dict:
    """A win rate whose numbers are None where nothing was decided: JSON has no NaN."""
    return rate if rate["decided"] else rate | dict.fromkeys(("value", "low", "high"))


def print_table(title: str, results: dict) -> None:
    """One judge's means and paired comparisons, and a warning if it could not read all of the prompts."""
    print(f"\n{title:36} {'mean [95 %]':27} {'IMG minus it':26} IMG's win rate without ties")
    rows = [(ARMS[arm], said(values["interval"]), results, arm) for arm, values in results["arms"].items()]
    rows += [(f"  base model, {c}"[:36], f"n {part['n']}", part, "base") for c, part in results["by_category"].items()]
    for label, start, part, arm in rows:
        line = f"{label:36} {start:27}"
        if arm != "img":
            rate = part["win_rate"][f"img_vs_{arm}"]
            wins = f"{said(rate)} of {rate['decided']}" if rate["decided"] else "all tied"
            line += f" {said(part['difference'][f'img_minus_{arm}'], '+.3f'):26} {wins}"
        print(line.rstrip())
    if results["truncated"]:
        print(
            f"warning: {results['truncated']} of {results['n']} prompts are longer than {title} can read; it judged "
            f"their beginning (up to {results['longest_cut']} tokens were cut)"
        )


def before_and_after(images: ImageFolder, scores: list[Scores], path: str, count: int = 6) -> None:
    """A picture of the first prompts, base and IMG, with their scores."""
    pairs = []
    for prompt in images.prompts[:count]:
        words = {"base": f'"{prompt.text}"', "img": "IMG, same seed"}
        for one in scores:
            for arm in words:
                score = one.kept["prompts"][str(prompt.index)]["scores"][arm]
                words[arm] += f"\n{one.title} {score:.2f}"
        pairs.append(list(zip(images.load([prompt], "base", "img"), words.values())))
    pairs_grid(pairs, path, f"the first {len(pairs)} of {len(images.prompts)} prompts, base and IMG")


def release() -> None:
    """Give back the memory of models that are no longer referred to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(
    options: Any, preset: Preset, *, count: int | None, seed: int, json_path: str | None = None,
    picture: str | None = None,
) -> dict:  # fmt: skip
    """Draw what is missing, judge what is not judged, print the tables, keep and return the results.

    Raises UserError, before anything is drawn, if prompts or judges are missing or damaged or if the folder holds a run
    with other settings.
    """
    check(bool(options.prompt_file), f"{preset.name} has no oracle and no prompts of its own; give it a --prompt-file")
    prompts = read_prompts(options.prompt_file, count, seed)
    if preset.world == "tiny":
        for prompt in prompts:
            parse(prompt.text)  # its models know the words of its grammar and no others
    names = dict.fromkeys(name.strip() for name in options.judges.split(",") if name.strip())
    check(bool(names), f"--judges is empty, expected some of: {', '.join(JUDGES)}")
    judges = [JudgeFiles.find(n, getattr(options, f"{n}_model", None), options.judge_processor) for n in names]
    images = ImageFolder(writable_folder(options.output), prompts, seed, preset.mllm_batch)
    drawn_by = {f.name: content(getattr(preset, f.name)) for f in fields(Preset) if f.name not in NOT_DRAWING}
    drawn_by |= {"seed": seed, "prompts": [asdict(prompt) for prompt in prompts]}
    used = any(images.folder.glob("p*-s*-*.png"))  # else there is nothing to mix with
    made_with(images.folder / "settings.json", drawn_by, "repeat that run's options, or choose another --output", used)
    scores = [Scores(images, files) for files in judges]
    if any(images.lacks(batch, *ARMS) for batch in images.batches):
        for one in scores:
            if one.missing:
                ClipJudge.open(one.files)  # so that a missing file is found in seconds, not after hours of drawing
        release()
        draw_missing(images, preset)
    for one in scores:
        release()
        one.fill()
    results = {"judges": {one.files.name: one.results() for one in scores}}
    results["settings"] = {"model": preset.name, "prompt_file": str(options.prompt_file), "prompts": len(prompts),
                           "seed": seed, "scale": preset.scale, "scale_end": preset.scale_end, "passes": preset.passes,
                           "judges": [asdict(files) for files in judges], "torch": torch.__version__}  # fmt: skip
    for one in scores:
        print_table(one.title, results["judges"][one.files.name])
    print(f"\n{len(prompts)} prompts; images, scores and results.json in {images.folder}")
    for path in filter(None, (images.folder / "results.json", json_path)):
        write_whole(path, json.dumps(results, indent=1))
    if picture:
        before_and_after(images, scores, picture)
    return results
