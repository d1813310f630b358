"""Does IMG help? Every arm on the same prompts and seeds, judged by the tiny world's oracle.

    python -m img_minimal.evaluate                       256 prompts of the test split
    python -m img_minimal.evaluate --prompts 640 --json results.json
    python -m img_minimal.evaluate --prompt-file x.txt   prompts of your own, judged by CLIP models: compare.py

Arms: the base model; the same compute spent on a new seed; the better of two seeds as picked by the MLLM, or by the
oracle (which cheats); a second pass with the tokens of a correct picture (no aligner can do better); and the second
pass with the image's own tokens (no guidance), or aligned with text, stock MLLM, or the finetuned MLLM (IMG).
"""

import json
from dataclasses import dataclass

from img_minimal.cli import PICTURES, check, option, parse, quiet_libraries, run, writable_file
from img_minimal.flags import SamplingFlags
from img_minimal.presets import PRESETS, find_preset


@dataclass
class Config(SamplingFlags):
    """The command line."""

    model: str = option("tiny-sdxl", "which model", choices=list(PRESETS))
    prompts: int | None = option(
        None, "how many prompts; default: 256 of the twin's, or all of the --prompt-file", most=100_000
    )
    seed: int = option(0, "draws the prompts and numbers the images")
    split: str = option("test", "test for reporting, validation for choosing", choices=["test", "validation"])
    only_img: bool = option(False, "leave out the arms of text and stock MLLM")
    json: str | None = option(None, "also write the results to this file")
    picture: str | None = option(None, "also draw before and after, of the first prompts that the base gets wrong")
    # with --prompt-file, see compare.py
    prompt_file: str | None = option(None, "judge images of these prompts with CLIP models: .txt, .jsonl, .tsv, .json")
    judges: str = option("pickscore,hpsv2,clipscore", "judges of a prompt file, separated by commas")
    output: str = option("outputs/evaluate", "folder that keeps the images and scores of a prompt file")
    pickscore_model: str | None = option(None, "hub id or folder; default: where it was published, see judges.py")
    hpsv2_model: str | None = option(None, "hub id or folder in CLIPModel's layout; default: where it was published")
    clipscore_model: str | None = option(None, "hub id or folder; default: where it was published")
    judge_processor: str | None = option(None, "tokenizer and image processor of the judges; default: each one's own")


if __name__ == "__main__":
    parse(Config, __doc__)  # answers --help before torch is imported, which takes seconds

import torch

from img_minimal.devices import Precision, best_device
from img_minimal.evaluate.arms import Arms, ablations, before_and_after, print_results
from img_minimal.evaluate.compare import compare
from img_minimal.files import write_whole
from img_minimal.load import load_img
from img_minimal.tiny.grammar import benchmark


def main() -> int:
    """All arms, the table, the JSON."""
    config = parse(Config, __doc__)
    preset = config.applied_to(find_preset(config.model))
    check(config.prompts is None or config.prompts >= 5, f"--prompts is {config.prompts}, expected 5 or more")
    check(config.seed >= 0, f"--seed is {config.seed}, expected 0 or more")
    writable_file(config.json, "--json")
    writable_file(config.picture, "--picture", PICTURES)
    quiet_libraries()
    if config.prompt_file or preset.world is None:
        compare(config, preset, count=config.prompts, seed=config.seed, json_path=config.json, picture=config.picture)
        return 0
    count = config.prompts or 256
    device = best_device()
    compute = Precision.named(preset.dtype, device).described(device)
    print(f"{preset.name}: {count} prompts of the {config.split} split, seed {config.seed}; {compute}", flush=True)
    img = load_img(preset)
    arms = Arms(img, benchmark(count, config.split, config.seed), config.seed)
    arms.controls()
    if not config.only_img:
        ablations(arms, preset)
    images = arms.aligned("img", img)
    arms.choices(images)
    results = arms.results() | {"mllm": arms.words()}
    results["settings"] = {
        "model": preset.name,
        "split": config.split,
        "seed": config.seed,
        "prompts": count,
        "scale": preset.scale,
        "scale_end": preset.scale_end,
        "passes": preset.passes,
        "compute": compute,
        "torch": torch.__version__,
    }
    print_results(results)
    if config.json:
        write_whole(config.json, json.dumps(results, indent=1))
    if config.picture:
        before_and_after(arms, preset.name, images, config.picture)
    return 0


if __name__ == "__main__":
    run(main)
