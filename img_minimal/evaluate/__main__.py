"""Does IMG help? Every arm on the same prompts and seeds, judged by the tiny world's oracle.

    python -m img_minimal.evaluate                       256 prompts of the test split
    python -m img_minimal.evaluate --prompts 640 --json results.json
    python -m img_minimal.evaluate --budget              ways to draw less, see budget.py
    python -m img_minimal.evaluate --prompt-file x.txt   your prompts, judged by the oracle or, for
                                                         real models, by CLIP models
    python -m img_minimal.evaluate --guidance text --aligner outputs/text/aligner.safetensors

Arms: the base model; the same compute spent on a new seed; the better of two seeds as picked by the
MLLM, or by the oracle (which cheats); a second pass with the tokens of a correct picture (no
aligner can do better); and the second pass with the image's own tokens (no guidance), or aligned
with text, stock MLLM, or the finetuned MLLM (IMG).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from img_minimal.cli import (
    PICTURES,
    check,
    option,
    parse,
    quiet_libraries,
    run,
    writable_file,
    writable_folder,
)
from img_minimal.presets import PRESETS, Models, Preset, Sampling, find_preset


@dataclass
class Config:
    """Flags of this command; all others override one number of the preset."""

    model: str = option("tiny-sdxl", "model to evaluate", choices=list(PRESETS))
    prompts: int | None = option(
        None, "number of prompts (default: 256, or all of --prompt-file)", least=5, most=100_000
    )
    seed: int = option(0, "seed that selects the prompts and numbers the images")
    split: str = option(
        "test",
        "test to report results, validation to choose settings",
        choices=["test", "validation"],
    )
    only_img: bool = option(False, "leave out the arms of text and stock MLLM")
    budget: bool = option(False, "compare IMG's ways to draw less, by the steps that they take")
    json: str | None = option(None, "also write the results to this file")
    picture: str | None = option(
        None, "also save a picture of the first prompts the base gets wrong"
    )
    guidance: str = option("mllm", "what guides the aligner", choices=["mllm", "stock", "text"])
    # With --prompt-file, see compare.py.
    prompt_file: str | None = option(
        None, "prompts to draw and judge: .txt, .csv, .tsv, .json, .jsonl"
    )
    judges: str | None = option(
        None, "judges for --prompt-file (default: oracle of a twin, else pickscore,hpsv2,clipscore)"
    )
    output: str = option("outputs/evaluate", "images and results of --prompt-file")
    pickscore_model: str | None = option(
        None, "PickScore, hub id or folder (default: as published)"
    )
    hpsv2_model: str | None = option(
        None, "HPSv2 in CLIPModel's layout (default: a conversion on the hub)"
    )
    clipscore_model: str | None = option(None, "CLIP for CLIPScore (default: ViT-L/14)")
    judge_processor: str | None = option(
        None, "tokenizer and image processor of the judges; default: each judge's own"
    )


if __name__ == "__main__":
    # Answers --help before torch is imported, which takes seconds.
    parse(Config, __doc__, Models, Sampling)

import torch

from img_minimal.devices import Precision, best_device
from img_minimal.evaluate import compare
from img_minimal.evaluate.arms import Arms, before_and_after, print_results
from img_minimal.evaluate.budget import Budget, print_row
from img_minimal.evaluate.intervals import said
from img_minimal.evaluate.judges import find_judges
from img_minimal.evaluate.prompts import read_prompts
from img_minimal.files import check_provenance, identity, write_whole
from img_minimal.pipeline import IMG
from img_minimal.tiny import grammar


def main() -> int:
    """Read the command line, evaluate, and write the results."""
    config, changes = parse(Config, __doc__, Models, Sampling)
    preset = find_preset(config.model).guided_by(config.guidance).changed(**changes)
    sampling, world = preset.sampling, preset.world and not config.prompt_file
    whole = sampling.draft_steps is None and not sampling.only_wrong
    alone = world and not config.picture and config.guidance != "text"
    advice = "--budget needs a twin's own prompts and an MLLM, and has no --picture"
    check(alone or not config.budget, advice)
    advice = "leave out --draft-steps and --only-wrong; --prompt-file and --budget decide them"
    check(whole or (world and not config.budget), advice)
    writable_file(config.json, "--json")
    writable_file(config.picture, "--picture", PICTURES)
    quiet_libraries()
    settings = asdict(config) | asdict(sampling) | {"torch": torch.__version__}
    # Named files replace those that belong to the guidance.
    files = {name: changes[name] for name in ("mllm", "aligner") if name in changes}
    evaluate = evaluate_world if world else evaluate_file
    save(evaluate(config, preset, settings, **files), config.json)
    return 0


def save(results: dict, path: str | Path | None) -> None:
    """Write results, if there is a path to write to."""
    if path:
        write_whole(path, json.dumps(results, indent=1))


def evaluate_world(config: Config, preset: Preset, settings: dict, **files: str) -> dict:
    """Draw and judge all arms on prompts of the tiny world, and print the results."""
    count, split, device = config.prompts or 256, config.split, best_device()
    compute = Precision.named(preset.models.dtype, device).described(device)
    asked = f"{count} prompts of the {split} split, seed {config.seed}"
    print(f"{preset.name}: {asked}; {compute}", flush=True)
    img = IMG(preset=preset, guidance=config.guidance, **files)
    prompts = grammar.benchmark(count, split, config.seed)
    settings |= {"prompts": count, "split": split, "compute": compute}
    if config.budget:
        results = {"ways": {}, "settings": settings}
        for name, row in Budget(img, prompts, config.seed).rows():
            results["ways"][name] = row
            print_row(name, row)
            save(results, config.json)
        return results
    arms = Arms(img, prompts, config.seed)
    arms.controls()
    if not config.only_img:
        arms.ablations()
    images = arms.aligned("img", img)
    results = arms.results() | {"settings": settings}
    print_results("strict", results)
    print("The paper's order, each arm minus the one before it, strict:")
    for name, difference in results["order"].items():
        print(said(difference, "+.3f"), name.replace("_", " "))
    if config.guidance != "text":
        results["mllm"] = arms.words()
        print("\nThe MLLM's words about the base's images:")
        for name, shares in results["mllm"].items():
            print(name.replace("_", " "), *(f"{kind} {s:.0%}" for kind, s in shares.items()))
    if config.picture:
        before_and_after(arms, preset.name, images, config.picture)
    return results


def evaluate_file(config: Config, preset: Preset, settings: dict, **files: str) -> dict:
    """Draw the prompts of a file, judge the images, and print and save the results.

    Raises UserError, before anything is drawn, if prompts or judges are missing or damaged or if
    the folder holds a run with other settings.
    """
    advice = "has no oracle and no prompts of its own; give it a --prompt-file"
    check(config.prompt_file, f"{preset.name} {advice}")
    prompts = read_prompts(config.prompt_file, config.prompts, config.seed)
    if preset.world == "tiny":
        for prompt in prompts:
            grammar.parse(prompt.text)  # its models know the words of its grammar and no others
    judges = find_judges(config.judges, preset.world, **asdict(config))
    path = writable_folder(config.output)
    drawn_by = {"model": preset.name, "seed": config.seed, "guidance": config.guidance}
    drawn_by["prompts"] = [asdict(prompt) for prompt in prompts]
    for name, value in (asdict(preset.models) | asdict(preset.sampling)).items():
        if name != "offload":  # it changes no image
            drawn_by[name] = identity(value)
    advice = "repeat that run's options, or choose another --output"
    used = any(path.glob("p*-s*-*.png"))  # without images it belongs to nobody
    check_provenance(path / "settings.json", drawn_by, advice, used)
    folder = compare.ImageFolder(path, prompts, config.seed)
    if not folder.complete:
        for judge in judges:
            judge.open()  # finds a missing file in seconds, not after hours
        compare.release()
        folder.draw_missing(IMG(preset=preset, guidance=config.guidance, **files))

    settings |= {"prompts": len(prompts), "judges": {judge.name: judge.model for judge in judges}}
    results = {"judges": {}, "settings": settings}
    for judge in judges:
        compare.release()
        result = results["judges"][judge.name] = compare.judge_images(folder, judge)
        print_results(judge.title, result)
    print(f"{len(prompts)} prompts; images and results.json in {path}")
    save(results, path / "results.json")
    if config.picture:
        compare.before_and_after(folder, results["judges"], config.picture)
    return results


if __name__ == "__main__":
    run(main)
