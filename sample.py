"""Draw a prompt, look at the result with an MLLM, and draw it again better aligned.

    python sample.py --prompt "a red circle above a blue square"
    python sample.py --prompt "two yellow triangles left of a red square" --seed 7 --rounds 2
    python sample.py --prompt-file prompts.txt --negative-prompt "a green cross"
    python sample.py --image mine.png --prompt "a red circle"     start from your own picture
    python sample.py --num-images 8 --one-look --draft-steps 7    eight alike, for 8.7 drawings
    python sample.py --sweep scale=0,0.8,1.6                      vary the last pass
    python sample.py --model sdxl --prompt "a robot penguin wearing a top hat" --offload

--draft-steps, --only-wrong and --one-look spare drawings and combine: drafts are looked at, what is
right is not corrected, and the last round draws every image whole; --keep-better draws the first
images whole, too, and --rounds looks again at drafts of the corrected images.

Saves every image with its prompt, seed and settings inside, results.json, and a sheet of them all.
"""

from dataclasses import dataclass, replace

from img_minimal.cli import (
    UserError,
    check,
    check_value,
    one_line,
    option,
    parse,
    printable,
    quiet_libraries,
    run,
    warn,
    writable_folder,
)
from img_minimal.presets import PRESETS, Models, Sampling, find_preset


@dataclass
class Config:
    """Flags of this command; all others override one number of the preset."""

    prompt: str = option("a red circle above a blue square", "what to draw")
    prompt_file: str | None = option(
        None, "file of prompts: .txt (one a line), .csv, .tsv, .json, .jsonl"
    )
    image: str | None = option(None, "picture to start from instead of drawing one")
    model: str = option("tiny-sdxl", "models and settings", choices=list(PRESETS))
    guidance: str = option("mllm", "what guides the aligner", choices=["mllm", "stock", "text"])
    seed: int = option(0, "seed of the first image; the same seed gives the same images")
    num_images: int = option(4, "images per prompt, from consecutive seeds", least=1, most=1000)
    rounds: int = option(1, "times to look and draw again", least=1, most=100)
    one_look: bool = option(False, "let one look at one draft serve all images of the prompt")
    keep_better: bool = option(False, "keep the first image where the MLLM prefers it")
    sweep: str | None = option(None, "values for the last pass: scale=0,0.2,0.5 or passes=1,3")
    explain: bool = option(True, "decode what the MLLM says; guidance needs no decoding")
    mllm_device: str | None = option(None, "separate device for the MLLM, e.g. cuda:1")
    serve: bool = option(False, "open a page in the browser instead; needs Gradio")
    output: str = option("outputs/sample", "folder for the pictures")


if __name__ == "__main__":
    # Answers --help before torch is imported, which takes seconds.
    parse(Config, __doc__, Models, Sampling)

import json
import os
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL.Image import Image, Resampling
from PIL.ImageOps import scale

from img_minimal.evaluate.prompts import read_prompts
from img_minimal.files import open_image, png, to_pil, write_whole
from img_minimal.pipeline import IMG
from img_minimal.plots import sheet
from img_minimal.tiny.grammar import parse as parse_prompt
from img_minimal.tiny.oracle import judge_pictures

INSTALL = "pip install -r requirements.txt gradio==6.31.0"
NOTED = (
    "steps guidance_scale negative_prompt scale scale_end passes draft_steps only_wrong"
).split()
SWEPT = {"scale": float, "scale_end": float, "guidance_scale": float, "steps": int, "passes": int}


def main() -> int:
    """Check the request, draw, look, align, draw again, save."""
    config, changes = parse(Config, __doc__, Models, Sampling)
    preset = find_preset(config.model).changed(**changes)
    prompts = read_request(config, preset.world)
    folder = writable_folder(config.output)
    answers = config.guidance != "text" or not config.keep_better
    check(answers, "--keep-better asks an MLLM, and guidance by text has none")
    picture = open_image(config.image) if config.image else None
    swept = parse_sweep(config.sweep, preset.sampling) if config.sweep else None
    quiet_libraries()
    files = {name: changes[name] for name in ("mllm", "aligner") if name in changes}
    img = IMG(preset=preset, guidance=config.guidance, mllm_device=config.mllm_device, **files)
    if config.serve:
        serve(img, config, prompts)
        return 0
    for prompt in dict.fromkeys(prompts):
        unseen, limit = img.backbone.truncated_part(prompt)
        if unseen:
            warn(
                f"the text encoders read {limit} tokens and do not see the prompt's end, "
                f"{unseen!r}; shorten the prompt"
            )

    captions = [prompt for prompt in prompts for _ in range(config.num_images)]
    seeds = [config.seed + k for k in range(config.num_images)] * len(prompts)
    drawn = img.stages(
        captions,
        seeds,
        rounds=config.rounds,
        one_look=config.one_look,
        whole=config.keep_better,
        start=[picture] * len(captions) if picture else None,
        progress=True,
    )
    stages, clock = list(map(to_pil, drawn)), img.clock

    if config.keep_better:
        with clock("compare"):
            better = img.better(stages[0], stages[-1], captions, seeds)
        pairs = zip(better, stages[0], stages[-1])
        stages[-1] = [last if improved else first for improved, first, last in pairs]
    said = []
    if config.explain and config.guidance != "text":
        with clock("put in words"):
            for k, images in enumerate(stages):
                asked = [seed + k for seed in seeds[: len(images)]]
                said.append(img.explain(images, captions[: len(images)], asked))
    save(config, img.backbone.sampling, folder, captions, seeds, stages, said)
    if swept:
        seen = stages[-2][:1] if config.one_look else stages[-2]
        sweep(img, *swept, captions, seeds, seen, folder / "sweep.png")
        print(f"saved to {folder}/sweep.png")
    print(f"saved to {folder}/side-by-side.png, in {clock}")
    return 0


def read_request(config: Config, world: str | None) -> list[str]:
    """Return the prompts to draw. Raises UserError for one that is empty or foreign to the twin."""
    check(
        config.prompt.strip(),
        '--prompt is empty; say what to draw, e.g. "a red circle above a blue square"',
    )
    prompts = [printable(config.prompt)]
    if config.prompt_file:
        prompts = [prompt.text for prompt in read_prompts(config.prompt_file)]
    if world == "tiny":
        prompts = [str(parse_prompt(text)) for text in prompts]
    return prompts


def save(
    config: Config,
    sampling: Sampling,
    folder: Path,
    captions: list[str],
    seeds: list[int],
    stages: list[list[Image]],
    said: list[list[str]],
) -> None:
    """Save every image with its settings, results.json, and the sheet; print what was said."""
    settings = {"model": config.model} | {name: getattr(sampling, name) for name in NOTED}
    names = ["initial", *(f"round {k}" for k in range(1, len(stages)))]
    if sampling.draft_steps and not config.keep_better:
        names[0] = "draft"
    if config.image:
        names[0] = "given"
    rows, results, report = [], [], []
    for i, (caption, seed) in enumerate(zip(captions, seeds)):
        words, entries, row = [f'"{caption}", seed {seed}'], [], []
        stem = f"prompt{i // config.num_images}-" if len(captions) > config.num_images else ""
        for k, (stage, images) in enumerate(zip(names, stages)):
            image = images[i] if i < len(images) else None
            row.append((image, ""))
            if image is None:
                continue  # one look served all seeds
            file = f"{stem}seed{seed}-{k}-{stage.replace(' ', '')}.png"
            text = settings | {"prompt": caption, "seed": seed, "stage": stage}
            write_whole(folder / file, png(image, text))
            notes = {"MLLM": said[k][i]} if said else {}
            if find_preset(config.model).world == "tiny":
                [verdict] = judge_pictures([image], [parse_prompt(caption)])
                notes["oracle"] = "right" if verdict.strict else f"wrong: {verdict.words}"
            if k and any(image is first for first in stages[0]):
                notes["kept"] = "the first image"
            entries.append({"file": file, "stage": stage} | notes)
            lines = [f"{who}: {what}" for who, what in notes.items()]
            report.append(f"seed {seed}, {stage}: " + "; ".join(lines))
            words += [f"{stage}:", *lines]
        rows.append([*row, (None, "\n".join(words))])
        results.append({"prompt": caption, "seed": seed, "images": entries})
    content = {"settings": settings, "results": results}
    write_whole(folder / "results.json", json.dumps(content, indent=1))
    title = f"{config.model}, seeds {min(seeds)} to {max(seeds)}"
    heads = [names[0], *(f"→ {name}" for name in names[1:])]
    sheet(rows, folder / "side-by-side.png", title, heads=heads)
    # Last, for whoever reads may have gone.
    print("\n".join(report))


def parse_sweep(words: str, sampling: Sampling) -> tuple[str, list]:
    """Parse "scale=0,0.2" to ("scale", [0.0, 0.2]). Raises UserError for what no flag takes."""
    name, _, values = words.partition("=")
    try:
        parsed = [SWEPT[name](value) for value in values.split(",")]
    except (KeyError, ValueError):
        raise UserError(
            f"--sweep is {words!r}, expected a name of {', '.join(SWEPT)} and values, as in "
            "scale=0,0.2,0.5"
        ) from None
    for value in parsed:
        replace(sampling, draft_steps=None, **{name: value})
    return name, parsed


def sweep(
    img: IMG,
    name: str,
    values: list,
    captions: list[str],
    seeds: list[int],
    seen: list[Image],
    path: Path,
) -> None:
    """Save a row for each image: a pass from the images `seen`, drawn at every value.

    What is right is corrected here, too. One look at one image serves all.
    """
    one_look, rows = len(seen) < len(captions), [[] for _ in captions]
    start = seen * (len(captions) // len(seen))
    for value in values:
        with img.drawing(draft_steps=None, only_wrong=False, **{name: value}):
            _, drawn = img.stages(captions, seeds, one_look=one_look, start=start)
        for row, image, caption, seed in zip(rows, to_pil(drawn), captions, seeds):
            note = "" if row else f'\n"{caption}", seed {seed}'
            row.append((image, f"{name} {value:g}{note}"))
    sheet(rows, path, f"the last pass at several values of {name}")


def enlarged(image: Image, least: int = 512) -> Image:
    """Scale a small image up by a whole number, so that a page does not blur or shrink it."""
    return scale(image, max(1, least // image.width), Resampling.NEAREST)


def serve(img: IMG, config: Config, examples: list[str]) -> None:
    """Open a page in the browser until the program is stopped; only this machine can reach it.

    Raises UserError if Gradio cannot be imported.
    """
    # Gradio serves every file below this folder, which by default all programs share.
    folder = TemporaryDirectory()
    os.environ["GRADIO_TEMP_DIR"] = os.environ["GRADIO_EXAMPLES_CACHE"] = folder.name
    try:
        import gradio
    except Exception as error:  # an old one beside new packages fails in many ways
        raise UserError(f"--serve cannot import Gradio ({error!r}); {INSTALL}") from None

    def draw(prompt: str | None, seed: object) -> tuple[Image, str, Image]:
        try:
            check_value(Config.__dataclass_fields__["seed"], seed)
            asked = replace(config, prompt=prompt or "", prompt_file=None)
            [prompt] = read_request(asked, img.backbone.preset.world)
            gradio.Progress()(0, "drawing")
            out = img(prompt, seed=seed)
        except Exception as error:
            # The page takes messages for HTML; users' mistakes need no traceback in the terminal.
            words = one_line(error)
            raise gradio.Error(escape(words or repr(error)), print_exception=not words) from error
        first, again = (enlarged(images[0]) for images in (out.initial, out.images))
        return first, out.said[0], again

    page = gradio.Interface(
        draw,
        inputs=[gradio.Textbox(examples[0], label="prompt"), gradio.Number(0, label="seed")],
        outputs=[
            gradio.Image(label="first picture", format="png"),
            gradio.Textbox(label="what the MLLM says"),
            gradio.Image(label="drawn again", format="png"),
        ],
        examples=[[example, 0] for example in examples],
        title=f"IMG: {config.model}",
        flagging_mode="never",
        analytics_enabled=False,
        cache_examples=False,
    )
    page.launch(
        server_name="127.0.0.1",
        share=False,
        inbrowser=True,
        show_error=True,
        max_file_size=1,
    )


if __name__ == "__main__":
    run(main)
