"""Does IMG help? Every arm on the same prompts and seeds, judged by the tiny world's oracle.

    python -m img_minimal.evaluate                       256 prompts of the test split
    python -m img_minimal.evaluate --prompts 640 --json results.json
    python -m img_minimal.evaluate --budget              ways to draw less, see budget.py
    python -m img_minimal.evaluate --prompt-file x.txt   your prompts, judged by CLIP models

Arms: the base model; the same compute spent on a new seed; the better of two seeds as picked by the
MLLM, or by the oracle (which cheats); a second pass with the tokens of a correct picture (no
aligner can do better); and the second pass with the image's own tokens (no guidance), or aligned
with text, stock MLLM, or the finetuned MLLM (IMG).
"""

import json
from dataclasses import asdict, dataclass

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
    # With --prompt-file, see compare.py.
    prompt_file: str | None = option(
        None, "prompts whose images CLIP models judge: .txt, .jsonl, .tsv, .json"
    )
    judges: str = option("pickscore,hpsv2,clipscore", "CLIP judges for --prompt-file")
    output: str = option("outputs/evaluate", "images and scores of --prompt-file")
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
from img_minimal.evaluate import budget, compare
from img_minimal.evaluate.arms import Arms, ablations, before_and_after, print_results
from img_minimal.evaluate.judges import JUDGES, ClipJudge, JudgeFiles
from img_minimal.evaluate.prompts import read_prompts
from img_minimal.files import check_provenance, identity, write_whole
from img_minimal.pipeline import IMG
from img_minimal.tiny import grammar


def main() -> int:
    """Read the command line, evaluate, and write the results."""
    config, changes = parse(Config, __doc__, Models, Sampling)
    preset = find_preset(config.model).changed(**changes)
    sampling, world = preset.sampling, preset.world and not config.prompt_file
    whole = sampling.draft_steps is None and not sampling.only_wrong
    alone = world and not config.picture
    check(alone or not config.budget, "--budget needs a twin's own prompts, and has no --picture")
    advice = "leave out --draft-steps and --only-wrong; --prompt-file and --budget decide them"
    check(whole or (world and not config.budget), advice)
    writable_file(config.json, "--json")
    writable_file(config.picture, "--picture", PICTURES)
    quiet_libraries()
    settings = {
        "model": preset.name,
        "seed": config.seed,
        "torch": torch.__version__,
    }
    for name in ("scale", "scale_end", "passes", "draft_steps", "only_wrong"):
        settings[name] = getattr(sampling, name)
    evaluate = evaluate_world if world else evaluate_file
    results = evaluate(config, preset, settings)
    if config.json:
        write_whole(config.json, json.dumps(results, indent=1))
    return 0


def evaluate_world(config: Config, preset: Preset, settings: dict) -> dict:
    """Draw and judge all arms on prompts of the tiny world, and print the results."""
    count, split, device = config.prompts or 256, config.split, best_device()
    compute = Precision.named(preset.models.dtype, device).described(device)
    asked = f"{count} prompts of the {split} split, seed {config.seed}"
    print(f"{preset.name}: {asked}; {compute}", flush=True)
    img = IMG(preset=preset)
    prompts = grammar.benchmark(count, split, config.seed)
    settings |= {"prompts": count, "split": split, "compute": compute}
    if config.budget:
        return evaluate_budget(config, budget.Budget(img, prompts, config.seed), settings)
    arms = Arms(img, prompts, config.seed)
    arms.controls()
    if not config.only_img:
        ablations(arms)
    images = arms.aligned("img", img)
    results = arms.results() | {"mllm": arms.words()}
    results["settings"] = settings
    print_results(results)
    if config.picture:
        before_and_after(arms, preset.name, images, config.picture)
    return results


def evaluate_budget(config: Config, ways: budget.Budget, settings: dict) -> dict:
    """Draw the prompts in every way to spend less; each row is printed and saved at once."""
    results = {"ways": {}, "settings": settings}
    print(budget.HEAD)
    for name, row in ways.rows():
        results["ways"][name] = row
        print(budget.line(name, row), flush=True)
        if config.json:
            write_whole(config.json, json.dumps(results, indent=1))
    return results


def evaluate_file(config: Config, preset: Preset, settings: dict) -> dict:
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
    names = dict.fromkeys(name.strip() for name in config.judges.split(",") if name.strip())
    check(names, f"--judges is empty, expected some of: {', '.join(JUDGES)}")
    judges = []
    for name in names:
        model = getattr(config, f"{name}_model", None)
        judges.append(JudgeFiles.find(name, model, config.judge_processor))

    path = writable_folder(config.output)
    drawn_by = {"model": preset.name, "seed": config.seed, "prompts": [asdict(p) for p in prompts]}
    for name, value in (asdict(preset.models) | asdict(preset.sampling)).items():
        if name not in compare.NOT_DRAWING:
            drawn_by[name] = identity(value)
    advice = "repeat that run's options, or choose another --output"
    used = any(path.glob("p*-s*-*.png"))  # without images it belongs to nobody
    check_provenance(path / "settings.json", drawn_by, advice, used)
    folder = compare.ImageFolder(path, prompts, config.seed)
    scores = [compare.Scores(folder, files) for files in judges]
    if any(folder.lacks(prompts, arm) for arm in compare.ARMS):
        for one in scores:
            if one.missing():
                ClipJudge.open(one.source)  # finds a missing file in seconds, not after hours
        compare.release()
        compare.draw_missing(folder, IMG(preset=preset))

    results = {"judges": {}}
    for one in scores:
        compare.release()
        one.fill()
        result = results["judges"][one.source.name] = one.results()
        compare.print_table(one.title, result)
    results["settings"] = settings | {
        "prompt_file": config.prompt_file,
        "prompts": len(prompts),
        "judges": [asdict(files) for files in judges],
    }
    print(f"\n{len(prompts)} prompts; images, scores and results.json in {path}")
    write_whole(path / "results.json", json.dumps(results, indent=1))
    if config.picture:
        compare.before_and_after(folder, scores, config.picture)
    return results


if __name__ == "__main__":
    run(main)
