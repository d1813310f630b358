"""Measure what parts of the method cost. `python -m img_minimal.bench [SUBJECT]`

    memory        which card holds sampling and training, computed from shapes (--model, --mllm)
    aligner       one and three passes and a training step at true size
    features      pairs on their way to features: decode, image tokens, MLLM
    sampling      IMG's steps: the twin's measured, at true size computed (--model, --mllm)

Without a subject, all but memory are measured, in one table. Times are of this machine, so read the
ratios: calls are made in turn, and compared with the first of them; *spread* is the lowest
and the highest ratio. Keep the machine idle meanwhile.
`python -m img_minimal.bench.true_size` runs everything at true size on a GPU.
"""

import argparse
from functools import partial
from statistics import median

from img_minimal.cli import quiet_libraries, run

MLLMS = ("llava-13b", "llava-7b", "qwen2.5-vl-7b")
TIMED = ("aligner", "sampling", "features")


def command_line() -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    text = "default: all but memory"
    parser.add_argument("subject", nargs="?", choices=("memory", *TIMED), help=text)
    for flag, choices in (("--mllm", MLLMS), ("--model", ("sdxl", "flux"))):
        text = f"to compute for (default: {choices[0]})"
        parser.add_argument(flag, default=choices[0], choices=choices, help=text)
    return parser.parse_args()


if __name__ == "__main__":
    command_line()  # answers --help before torch is imported, which takes seconds

import torch

from img_minimal.aligner import ImplicitAligner
from img_minimal.bench.memory import (
    DRAFT,
    MLLM_TOKENS,
    Calls,
    operations_table,
    seconds,
    table,
)
from img_minimal.data.load import load_encoder
from img_minimal.data.pairs import pair_stream
from img_minimal.devices import Precision, best_device
from img_minimal.files import to_pil
from img_minimal.mllm import guidance_features
from img_minimal.pipeline import IMG
from img_minimal.presets import find_preset

TWIN = find_preset("tiny-sdxl")
PROMPT = "a red circle above a blue square"


class Report:
    """A Markdown table of times."""

    def __init__(self, rounds: int = 5):
        self.rounds, self.device = rounds, best_device()
        self.lines = ["| measured | ms | ratio | spread |", "|---|---|---|---|"]

    def in_turn(self, title: str, calls: Calls) -> None:
        """Make each call once per round, and add a row for each.

        The first round only warms up. Ratios to the first call are taken within a round, so that
        the drift of a busy machine cancels.
        """
        rounds = []
        for _ in range(self.rounds + 1):
            rounds.append([seconds(call) for call in calls.values()])
        for name, times in zip(calls, zip(*rounds[1:])):
            ratios = [time / row[0] for time, row in zip(times, rounds[1:])]
            spread = f"{median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f}"
            self.lines.append(f"| {title}, {name} | {1e3 * median(times):.1f} | {spread} |")

    def __str__(self) -> str:
        return "\n".join(self.lines)


def aligner(report: Report, width: int = 2048, guidance_width: int = 5120) -> None:
    """Measure passes and a training step of the aligner of SDXL and LLaVA-13B."""
    torch.manual_seed(0)
    f = ImplicitAligner(width, guidance_width).to(report.device)
    h = torch.randn(1, MLLM_TOKENS, guidance_width, device=report.device)
    c = torch.randn(1, 16, width, device=report.device)

    def step() -> None:
        f.zero_grad(set_to_none=True)
        f(h, c).square().mean().backward()

    calls: Calls = {}
    for n in (1, 3):
        calls[f"passes: {n}"] = torch.no_grad()(partial(f, h, c, passes=n))
    report.in_turn("aligner", calls | {"training step": step})


def features(report: Report, pairs: int = 256) -> None:
    """Measure the twin's stages from pairs to features; ratios are shares of the whole."""
    encoder, source = load_encoder(TWIN, "mllm", 0), TWIN.data.pairs

    def decode() -> list:
        return next(pair_stream(source, pairs, pairs).chunks()).items

    items = decode()
    look = [item.loser for item in items], [item.prompt for item in items], range(pairs)
    calls = {
        "all": lambda: encoder(decode()),
        "read and decode": decode,
        "image tokens": partial(encoder.tokens, items),
        "MLLM": partial(guidance_features, encoder.guide, *look),
    }
    report.in_turn(f"features of {pairs} pairs of the twin", calls)


def sampling(report: Report, count: int = 4, steps: int = TWIN.sampling.steps) -> None:
    """Measure on the twin each step of the method, and the whole, of `count` images of a prompt.

    The whole includes the MLLM's words.
    """
    img, draft = IMG(preset=TWIN.changed(steps=steps)), max(1, round(DRAFT * steps))
    prompts, seeds = [PROMPT] * count, list(range(count))
    images = to_pil(img.backbone.draw(prompts, seeds))
    look = images, prompts, seeds
    h, mask = img.guidance(*look)
    c = img.backbone.tokens(images)
    aligned = img.correct(c, h, mask)
    calls = {
        "draw": partial(img.backbone.draw, prompts, seeds),
        "look": partial(img.guidance, *look),
        "image tokens": partial(img.backbone.tokens, images),
        "align": partial(img.correct, c, h, mask),
        "draw again": partial(img.backbone.draw, prompts, seeds, aligned),
        "explain": partial(img.explain, *look),
        "IMG": partial(img, prompts),
        f"IMG, draft of {draft} steps": partial(img, prompts, draft_steps=draft),
        "IMG, one look at the draft": partial(img, prompts, draft_steps=draft, one_look=True),
    }
    report.in_turn(f"{count} images of the twin", calls)


MEASURES = {f.__name__: f for f in (aligner, sampling, features)}


def main() -> int:
    """Measure and print."""
    options = command_line()
    if options.subject == "memory":
        print(table(options.model, options.mllm))
        return 0
    quiet_libraries()
    report = Report()
    compute = Precision.named("fp32", report.device).described(report.device)
    print(f"{compute}; {torch.get_num_threads()} threads\n", flush=True)
    for subject in [options.subject] if options.subject else TIMED:
        MEASURES[subject](report)
    print(report)
    if options.subject in ("sampling", "features"):
        print(f"\n{operations_table(options.model, options.mllm)}")
    return 0


if __name__ == "__main__":
    run(main)
