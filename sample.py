"""Draw a prompt, look at the result with an MLLM, and draw it again better aligned.

    python sample.py --prompt "a red circle above a blue square"
    python sample.py --prompt "two yellow triangles left of a red square" --num-images 1 --seed 7 --rounds 2
    python sample.py --model sdxl --prompt "a robot penguin wearing a top hat" --offload

Saves the first image, the last one, and both side by side.
"""

from dataclasses import dataclass

from img_minimal.flags import SamplingFlags
from img_minimal.presets import PRESETS, find_preset
from img_minimal.runtime.cli import check, option, parse, printable, quiet_libraries, run, warn, writable_folder


@dataclass
class Config(SamplingFlags):
    """The command line; None means: as the preset says."""

    prompt: str = option("a red circle above a blue square", "what to draw")
    model: str = option("tiny-sdxl", "which models and settings", choices=list(PRESETS))
    seed: int = option(0, "of the first image; the same seed gives the same images")
    num_images: int = option(4, "images, from consecutive seeds", most=1000)
    rounds: int = option(1, "times to look and draw again", most=100)
    keep_better: bool = option(False, "keep the first image where the MLLM is more content with it")
    explain: bool = option(True, "decode what the MLLM says (guidance itself needs no decoding)")
    output: str = option("outputs/sample", "folder for the pictures")


if __name__ == "__main__":
    parse(Config, __doc__)  # answers --help before torch is imported, which takes seconds

from img_minimal.load import load_img
from img_minimal.runtime.images import from_pil, to_pil
from img_minimal.runtime.plots import labelled_grid
from img_minimal.tiny.grammar import parse as parse_prompt
from img_minimal.tiny.oracle import judge


def main() -> int:
    """Check the request, load, draw, look, draw again, save."""
    config = parse(Config, __doc__)
    check(bool(config.prompt.strip()), '--prompt is empty; say what to draw, e.g. "a red circle above a blue square"')
    check(config.seed >= 0, f"--seed is {config.seed}, expected 0 or more")
    check(config.num_images >= 1, f"--num-images is {config.num_images}, expected 1 or more")
    check(config.rounds >= 1, f"--rounds is {config.rounds}, expected 1 or more")
    preset = config.applied_to(find_preset(config.model))
    wanted = parse_prompt(config.prompt) if preset.world == "tiny" else None
    folder = writable_folder(config.output)
    quiet_libraries()
    img = load_img(preset)
    prompt = str(wanted or printable(config.prompt))
    prompts = [prompt] * config.num_images
    seeds = [config.seed + k for k in range(config.num_images)]
    cut, limit = img.backbone.truncated_part(prompt)
    if cut:
        warn(f"the text encoders read {limit} tokens and do not see the prompt's end, {cut!r}; shorten the prompt")
    stages = img.stages(prompts, seeds, rounds=config.rounds, progress=True)
    pictures = [to_pil(images) for images in stages]
    kept = [True] * config.num_images
    if config.keep_better:
        kept = img.better(pictures[0], pictures[-1], prompts, seeds)
        pictures[-1] = [last if better else first for first, last, better in zip(pictures[0], pictures[-1], kept)]
        stages[-1] = from_pil(pictures[-1])
    notes = [[""] * config.num_images for _ in stages]
    if config.explain:
        for k, images in enumerate(pictures[:-1]):
            notes[k] = [f"MLLM: {answer}" for answer in img.explain(images, prompts, [seed + k for seed in seeds])]
    if wanted:
        for k, images in enumerate(stages):
            for i, verdict in enumerate(judge(images, [wanted] * config.num_images)):
                said = "right" if verdict.strict else f"wrong: {verdict.words}"
                notes[k][i] = "\n".join(filter(None, (notes[k][i], f"oracle: {said}")))
    rows = []
    for i, seed in enumerate(seeds):
        rows.append([])
        for k, images in enumerate(pictures):
            name = "initial" if k == 0 else f"round {k}"
            said = name if k + 1 < len(pictures) or kept[i] else f"{name}, first image kept"
            images[i].save(folder / f"seed{seed}-{k}-{name.replace(' ', '')}.png")
            rows[-1].append((images[i], f"{said}\n{notes[k][i]}"))
            print(f"seed {seed}, {said}: " + notes[k][i].replace("\n", "; "))
    labelled_grid(rows, folder / "side-by-side.png", f'"{prompt}"', f"{preset.name}, seeds {seeds[0]} to {seeds[-1]}")
    print(f"saved to {folder}/side-by-side.png")
    return 0


if __name__ == "__main__":
    run(main)
