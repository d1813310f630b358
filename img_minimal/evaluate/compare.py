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
from dataclasses import asdict

import torch
from torch import Tensor
from tqdm import tqdm

from img_minimal.evaluate.image_folder import ARMS, Batch, ImageFolder, content
from img_minimal.evaluate.options import CompareOptions
from img_minimal.evaluate.prompt_files import read_prompts
from img_minimal.evaluate.scorers import SCORERS, Scorer, ScorerFiles
from img_minimal.evaluate.scores import Scores
from img_minimal.load import load_img
from img_minimal.pipeline import IMG
from img_minimal.presets import Preset
from img_minimal.runtime.atomic import write_whole
from img_minimal.runtime.cli import check, warn, writable_folder
from img_minimal.runtime.plots import pairs_grid
from img_minimal.tiny.grammar import parse

# Fields of a preset that change its images. A file at such a place is known by its content.
DRAWN_BY = (
    "name", "backbone", "base", "unet", "image_encoder", "ip_adapter", "resampler", "mllm", "aligner",
    "sampling_steps", "guidance_scale", "true_cfg_scale", "height", "width", "scale", "scale_end", "passes", "dtype",
    "draw_batch", "mllm_batch", "encode_batch", "questions", "negative_prompt",
)  # fmt: skip
GROUP = 64  # prompts whose guidance features are held at once, 0.4 GB with LLaVA-13B


def draw_missing(images: ImageFolder, preset: Preset) -> None:
    """Draw what the folder lacks, in the order base model, MLLM, base model; nothing is loaded if it lacks nothing."""
    first = [(batch, arm) for batch in images.batches for arm in ("base", "new_seed") if images.lacks(batch, arm)]
    second = [batch for batch in images.batches if images.lacks(batch, "no_guidance", "img")]
    if not first and not second:
        return
    img = load_img(preset)
    cut = sum(bool(img.backbone.truncated_part(prompt.text)[0]) for prompt in images.prompts)
    if cut:
        warn(f"{cut} of {len(images.prompts)} prompts are longer than the text encoders read; their ends are not drawn")
    for batch, arm in tqdm(first, desc="draw", disable=not first):
        images.save(batch, arm, img.backbone.draw([p.text for p in batch], images.seeds(batch, arm)))
    # Of the PNG, so that a resumed run sees the same image.
    own = [img.backbone.tokens(images.load(batch, "base")) for batch in tqdm(second, desc="tokens", disable=not second)]
    aligned = align_all(img, images, second, own)
    for k, batch in enumerate(tqdm(second, desc="draw again", disable=not second)):
        for arm, tokens in (("no_guidance", own[k]), ("img", aligned[k])):
            if images.lacks(batch, arm):
                images.save(batch, arm, img.backbone.draw([p.text for p in batch], images.seeds(batch), tokens))


def align_all(img: IMG, images: ImageFolder, batches: list[Batch], own: list[Tensor]) -> list[Tensor]:
    """Aligned tokens of each batch's base images; `own` are the images' own. Both (B, N, D).

    In groups, because guidance features are fifty times as large as tokens, and because with offloading MLLM and
    aligner take turns on the GPU.
    """
    size = max(1, GROUP // img.mllm_batch)  # batches
    aligned = []
    with tqdm(total=len(batches), desc="look", disable=not batches) as bar:
        for start in range(0, len(batches), size):
            looked = []
            for batch in batches[start : start + size]:
                pictures = images.load(batch, "base")
                looked.append(img.guidance(pictures, [p.text for p in batch], images.seeds(batch)))
                bar.update()
            for tokens, (features, mask) in zip(own[start : start + size], looked):
                aligned.append(img.correct(tokens, features, mask))
    return aligned


def release() -> None:
    """Give back the memory of models that are no longer referred to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def print_table(title: str, results: dict) -> None:
    """One judge's means and paired comparisons, and a warning if it could not read all of the prompts."""

    def row(label: str, start: str, d: dict, w: dict) -> None:
        """One line of the table."""
        difference = f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
        rate = f"{w['value']:.3f} [{w['low']:.3f}, {w['high']:.3f}] of {w['decided']}" if w["decided"] else "all tied"
        print(f"{label:36} {start:27} {difference:26} {rate}")

    print(f"\n{title:36} {'mean [95 %]':27} {'IMG minus it':26} IMG's win rate without ties")
    for arm, values in results["arms"].items():
        mean = f"{values['mean']:.3f} [{values['interval']['low']:.3f}, {values['interval']['high']:.3f}]"
        if arm == "img":
            print(f"{ARMS[arm]:36} {mean}")
        else:
            row(ARMS[arm], mean, results["difference"][f"img_minus_{arm}"], results["win_rate"][f"img_vs_{arm}"])
    for category, part in results["by_category"].items():
        label = f"  base model, {category}"[:36]
        row(label, f"n {part['n']}", part["difference"]["img_minus_base"], part["win_rate"]["img_vs_base"])
    if results["truncated"]:
        print(
            f"warning: {results['truncated']} of {results['n']} prompts are longer than {title} can read; it judged "
            f"their beginning (up to {results['longest_cut']} tokens were cut)"
        )


def before_and_after(images: ImageFolder, scores: list[Scores], path: str, count: int = 6) -> None:
    """A picture of the first prompts, base and IMG, with their scores."""
    pairs = []
    for prompt in images.prompts[:count]:
        cells = []
        for arm, image in zip(("base", "img"), images.load([prompt], "base", "img")):
            said = [f"{one.title} {one.rows[prompt.index]['scores'][arm]:.2f}" for one in scores]
            cells.append((image, "\n".join([f'"{prompt.text}"' if arm == "base" else "IMG, same seed", *said])))
        pairs.append(cells)
    pairs_grid(pairs, path, f"the first {len(pairs)} of {len(images.prompts)} prompts, base and IMG")


def compare(
    options: CompareOptions,
    preset: Preset,
    *,
    count: int | None,
    seed: int,
    json_path: str | None = None,
    picture: str | None = None,
) -> dict:
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
    check(bool(names), f"--judges is empty, expected some of: {', '.join(SCORERS)}")
    judges = [ScorerFiles.find(n, getattr(options, f"{n}_model", None), options.judge_processor) for n in names]
    images = ImageFolder(writable_folder(options.output), prompts, seed, preset.mllm_batch)
    drawn_by = {name: content(getattr(preset, name)) for name in DRAWN_BY}
    images.claim(drawn_by | {"seed": seed, "prompts": [asdict(prompt) for prompt in prompts]})
    scores = [Scores(images, files) for files in judges]
    if any(images.lacks(batch, *ARMS) for batch in images.batches):
        for one in scores:
            if one.missing:
                Scorer.open(one.files)  # so that a missing file is found in seconds, not after hours of drawing
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
