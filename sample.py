"""Draw a prompt, look at the result with an MLLM, and draw it again better aligned.

    python sample.py --prompt "a red circle above a blue square"
    python sample.py --prompt "two yellow triangles left of a red square" --num-images 1 --seed 7 --rounds 2
    python sample.py --prompt-file prompts.txt --negative-prompt "a green cross"
    python sample.py --image mine.png --prompt "a red circle"        begin with a picture that you have
    python sample.py --sweep scale=0,0.8,1.6                         the last pass at several settings, side by side
    python sample.py --model sdxl --prompt "a robot penguin wearing a top hat" --offload

Saves every image with its prompt, seed and settings inside, results.json, and a sheet of all of them.
"""

from dataclasses import dataclass

from img_minimal.flags import SamplingFlags
from img_minimal.presets import PRESETS, find_preset
from img_minimal.runtime.cli import check, option, parse, printable, quiet_libraries, run, warn, writable_folder


@dataclass
class Config(SamplingFlags):
    """The command line; None means: as the preset says."""

    prompt: str = option("a red circle above a blue square", "what to draw")
    prompt_file: str | None = option(None, "many prompts: one a line (.txt), or .jsonl, .tsv, .json")
    image: str | None = option(None, "a picture to begin with instead of drawing one")
    model: str = option("tiny-sdxl", "which models and settings", choices=list(PRESETS))
    seed: int = option(0, "of the first image; the same seed gives the same images")
    num_images: int = option(4, "images of each prompt, from consecutive seeds", most=1000)
    rounds: int = option(1, "times to look and draw again", most=100)
    keep_better: bool = option(False, "keep the first image where the MLLM is more content with it")
    sweep: str | None = option(None, "draw the last pass at several values, e.g. scale=0,0.2,0.5 or passes=1,3")
    explain: bool = option(True, "decode what the MLLM says (guidance itself needs no decoding)")
    mllm_device: str | None = option(None, "another device for the MLLM, e.g. cuda:1")
    serve: bool = option(False, "open a page in the browser instead (needs: pip install gradio)")
    output: str = option("outputs/sample", "folder for the pictures")


if __name__ == "__main__":
    parse(Config, __doc__)  # answers --help before torch is imported, which takes seconds

import json
from pathlib import Path

from PIL import Image
from torch import Tensor

from img_minimal.evaluate.prompt_files import read_prompts
from img_minimal.load import load_img
from img_minimal.pipeline import IMG
from img_minimal.presets import Preset
from img_minimal.runtime.atomic import write_whole
from img_minimal.runtime.clock import Clock
from img_minimal.runtime.images import open_image, png, to_pil
from img_minimal.runtime.plots import labelled_grid, worded_rows
from img_minimal.serve import serve
from img_minimal.tiny.grammar import parse as parse_prompt
from img_minimal.tiny.oracle import judge_pictures

SWEPT = {"scale": float, "scale_end": float, "guidance_scale": float, "steps": int, "passes": int}


def main() -> int:
    """Check the request, load, draw, look, draw again, save."""
    config = parse(Config, __doc__)
    preset, prompts = checked(config)
    folder, picture = writable_folder(config.output), open_image(config.image) if config.image else None
    name, values = swept(config.sweep) if config.sweep else ("", [])
    quiet_libraries()
    img = load_img(preset, mllm_device=config.mllm_device)
    if config.serve:
        serve(img, f"IMG: {preset.name}", prompts)
        return 0
    for prompt in dict.fromkeys(prompts):
        cut, limit = img.backbone.truncated_part(prompt)
        if cut:
            warn(f"the text encoders read {limit} tokens and do not see the prompt's end, {cut!r}; shorten the prompt")
    seeds = [config.seed + k for k in range(config.num_images)]
    captions = [prompt for prompt in prompts for _ in seeds]
    seeds = seeds * len(prompts)
    clock = Clock()
    with clock("draw"):
        first = [picture] * len(captions) if picture else to_pil(img.backbone.draw(captions, seeds, progress="initial"))
    stages, tokens = [first], None
    for k in range(config.rounds):
        with clock("look"):
            asked = [seed + k for seed in seeds]
            features, mask = img.guidance(stages[-1], captions, asked)
        with clock("align"):
            own = img.backbone.tokens(stages[-1])
            tokens = img.correct(own, features, mask)
        with clock("draw again"):
            stages.append(to_pil(img.backbone.draw(captions, seeds, tokens, progress=f"round {k + 1}")))
    kept = [True] * len(captions)
    if config.keep_better:
        with clock("compare"):
            kept = img.better(first, stages[-1], captions, seeds)
        stages[-1] = [last if better else before for before, last, better in zip(first, stages[-1], kept)]
    said = [[""] * len(captions) for _ in stages]
    if config.explain:
        with clock("put in words"):
            said = [img.explain(images, captions, [seed + k for seed in seeds]) for k, images in enumerate(stages)]
    save(config, preset, folder, captions, seeds, stages, said, kept)
    if name:
        with clock("sweep"):
            sweep(img, name, values, captions, seeds, (own, features, mask, tokens), f"{folder}/sweep.png")
        print(f"saved to {folder}/sweep.png")
    print(f"saved to {folder}/side-by-side.png, in {clock}")
    return 0


def checked(config: Config) -> tuple[Preset, list[str]]:
    """The preset as the flags change it, and the prompts. Raises UserError for requests that cannot be."""
    check(bool(config.prompt.strip()), '--prompt is empty; say what to draw, e.g. "a red circle above a blue square"')
    check(config.seed >= 0, f"--seed is {config.seed}, expected 0 or more")
    check(config.num_images >= 1, f"--num-images is {config.num_images}, expected 1 or more")
    check(config.rounds >= 1, f"--rounds is {config.rounds}, expected 1 or more")
    preset = config.applied_to(find_preset(config.model))
    texts = [p.text for p in read_prompts(config.prompt_file)] if config.prompt_file else [printable(config.prompt)]
    return preset, [str(parse_prompt(text)) for text in texts] if preset.world == "tiny" else texts


def swept(words: str) -> tuple[str, list]:
    """ "scale=0,0.2" -> ("scale", [0.0, 0.2]). Raises UserError for anything else."""
    name, _, values = words.partition("=")
    expected = f"--sweep is {words!r}, expected a name of {', '.join(SWEPT)} and values, as in scale=0,0.2,0.5"
    check(name in SWEPT, expected)
    try:
        return name, [SWEPT[name](value) for value in values.split(",")]
    except ValueError:
        check(False, expected)


def sweep(
    img: IMG, name: str, values: list, captions: list[str], seeds: list[int], aligned: tuple[Tensor, ...], path: str
) -> None:
    """A row for each image: its last pass, drawn at every value."""
    own, features, mask, tokens = aligned
    rows: list[list[tuple[Image.Image, str]]] = [[] for _ in captions]
    for value in values:
        if name == "passes":
            images = img.backbone.draw(captions, seeds, img.correct(own, features, mask, value))
        else:
            with img.drawing(**{name: value}):
                images = img.backbone.draw(captions, seeds, tokens)
        for row, image, caption, seed in zip(rows, to_pil(images), captions, seeds):
            row.append((image, f"{name} {value:g}" + ("" if row else f'\n"{caption}", seed {seed}')))
    labelled_grid(rows, path, f"the last pass at several values of {name}")


def save(
    config: Config, preset: Preset, folder: Path, captions: list[str], seeds: list[int],
    stages: list[list[Image.Image]], said: list[list[str]], kept: list[bool],
) -> None:  # fmt: skip
    """Every image as a PNG that knows how it was made, a table of what was said, the sheet."""
    settings = {"model": preset.name, "steps": preset.sampling_steps, "guidance_scale": preset.guidance_scale,
                "negative_prompt": preset.negative_prompt, "scale": preset.scale, "scale_end": preset.scale_end,
                "passes": preset.passes}  # fmt: skip
    rows, results = [], []
    several = len(captions) > config.num_images
    for i, (caption, seed) in enumerate(zip(captions, seeds)):
        words, row = [f'"{caption}", seed {seed}'], {"prompt": caption, "seed": seed, "images": []}
        for k, images in enumerate(stages):
            name = "given" if config.image and k == 0 else f"round {k}" if k else "initial"
            note = {"kept first": True} if k + 1 == len(stages) and not kept[i] else {}
            if said[k][i]:
                note["MLLM"] = said[k][i]
            if preset.world == "tiny":
                verdict = judge_pictures([images[i]], [parse_prompt(caption)])[0]
                note["oracle"] = "right" if verdict.strict else f"wrong: {verdict.words}"
            stem = f"prompt{i // config.num_images}-" if several else ""
            file = f"{stem}seed{seed}-{k}-{name.replace(' ', '')}.png"
            text = settings | {"prompt": caption, "seed": seed, "stage": name}
            (folder / file).write_bytes(png(images[i], text))
            row["images"].append({"file": file, "stage": name} | note)
            name += ", first image kept" if note.pop("kept first", False) else ""
            notes = [f"{who}: {what}" for who, what in note.items()]
            print(f"seed {seed}, {name}: " + "; ".join(notes))
            words += [f"{name}:", *notes]
        rows.append(([images[i] for images in stages], "\n".join(words)))
        results.append(row)
    write_whole(folder / "results.json", json.dumps({"settings": settings, "results": results}, indent=1))
    worded_rows(rows, folder / "side-by-side.png", f"{preset.name}, seeds {min(seeds)} to {max(seeds)}")


if __name__ == "__main__":
    run(main)
