"""Measure what parts of the method cost. `python -m img_minimal.bench [SUBJECT]`

    memory        which card holds sampling and training, computed from shapes (--model, --mllm)
    aligner       one and three passes and a training step at true size
    injection     what image tokens add to a block of SDXL's UNet
    features      pairs on their way to features: read, decode, image tokens, MLLM
    sampling      IMG's steps: the twin's measured, at true size computed (--model, --mllm)
    growth        how cost grows with passes, guidance length, images, pairs (--output)

Without a subject, those that take seconds are measured, in one table. Times are of this machine, so
read the ratios: calls are made in turn, and compared with the first of them; *spread* is the lowest
and the highest ratio. Keep the machine idle meanwhile.
`python -m img_minimal.bench.true_size` runs everything at true size on a GPU.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from statistics import median

from img_minimal.cli import PICTURES, quiet_libraries, run, writable_file

MLLMS = ("llava-13b", "llava-7b", "qwen2.5-vl-7b")
QUICK = ("aligner", "sampling", "features")
SUBJECTS = ("memory", *QUICK, "injection", "growth")


def command_line() -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("subject", nargs="?", choices=SUBJECTS, help="default: the quick ones")
    for flag, choices in (("--mllm", MLLMS), ("--model", ("sdxl", "flux"))):
        text = f"to compute for (default: {choices[0]})"
        parser.add_argument(flag, default=choices[0], choices=choices, help=text)
    text = "picture of growth (default: growth.png)"
    parser.add_argument("--output", default="growth.png", help=text)
    return parser.parse_args()


if __name__ == "__main__":
    command_line()  # answers --help before torch is imported, which takes seconds

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from img_minimal.aligner import ImplicitAligner
from img_minimal.bench.memory import (
    DRAFT,
    MLLM_TOKENS,
    Calls,
    matmul_rate,
    operations_table,
    seconds,
    table,
)
from img_minimal.data.load import load_encoder
from img_minimal.data.pairs import pair_stream, prompts_of
from img_minimal.devices import Precision, best_device
from img_minimal.files import peak_bytes, to_pil
from img_minimal.mllm import guidance_features
from img_minimal.pipeline import IMG
from img_minimal.plots import curves
from img_minimal.presets import find_preset
from img_minimal.sdxl import DecoupledAttention

TWIN = find_preset("tiny-sdxl")
PROMPT = "a red circle above a blue square"


class Report:
    """A Markdown table of times, with remarks below it."""

    def __init__(self, rounds: int = 5, picture: str = "growth.png"):
        self.rounds, self.picture, self.device = rounds, picture, best_device()
        self.lines = ["| measured | ms | ratio | spread |", "|---|---|---|---|"]
        self.remarks: list[str] = []

    def in_turn(self, title: str, calls: Calls) -> dict[str, float]:
        """Make each call once per round, add a row for each, and return its median in seconds.

        The first round only warms up. Ratios to the first call are taken within a round, so that
        the drift of a busy machine cancels.
        """
        rounds = []
        for _ in range(self.rounds + 1):
            rounds.append([seconds(call) for call in calls.values()])
        medians = {}
        for name, times in zip(calls, zip(*rounds[1:])):
            medians[name] = median(times)
            ratios = [time / row[0] for time, row in zip(times, rounds[1:])]
            spread = f"{median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f}"
            self.lines.append(f"| {title}, {name} | {1e3 * median(times):.1f} | {spread} |")
        return medians

    def __str__(self) -> str:
        return "\n\n".join(["\n".join(self.lines), *self.remarks])


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
    medians = report.in_turn("aligner", calls | {"training step": step})
    with FlopCounterMode(display=False) as counter:
        step()
    share = counter.get_total_flops() / medians["training step"] / matmul_rate(report.device)
    report.remarks.append(f"A training step runs at {share:.0%} of the machine's matmul rate.")


@torch.no_grad()
def injection(report: Report, blocks: tuple = ((640, 10, 64), (1280, 20, 32))) -> None:
    """Measure blocks of SDXL's UNet without and with image tokens, and diffusers' IP-Adapter.

    `blocks` are (width, heads, side of the feature map). FLUX's processors are diffusers' own.
    """
    for inner, heads, side in blocks:
        width, device = 2048, report.device
        sizes = inner, heads, inner // heads
        block = BasicTransformerBlock(*sizes, cross_attention_dim=width).to(device)
        x = torch.randn(2, side * side, inner, device=device)  # classifier-free guidance
        text = torch.randn(2, 77, width, device=device)
        tokens = torch.randn(2, 16, width, device=device)
        branch = nn.ModuleDict()
        for name in ("to_k_ip", "to_v_ip"):
            branch[name] = nn.Linear(width, inner, bias=False, device=device)
        diffusers = IPAdapterAttnProcessor2_0(inner, width, num_tokens=(16,), scale=[0.2])

        def call(processor: object, states: object, block=block, x=x) -> None:
            block.attn2.set_processor(processor)
            block(x, encoder_hidden_states=states)

        calls = {
            "plain": partial(call, block.attn2.processor, text),
            "ours": partial(call, DecoupledAttention(branch, tokens, 0.2), text),
            "diffusers": partial(call, diffusers.to(device), (text, [tokens[:, None]])),
        }
        report.in_turn(f"SDXL block of {inner}", calls)


def features(report: Report, pairs: int = 256) -> None:
    """Measure the twin's stages from pairs to features; ratios are shares of the whole."""
    encoder, source = load_encoder(TWIN, "mllm", 0), TWIN.data.pairs

    def decode() -> list:
        return next(pair_stream(source, pairs, pairs).chunks()).items

    items = decode()
    look = [item.loser for item in items], [item.prompt for item in items], range(pairs)
    calls = {
        "all": lambda: encoder(decode()),
        "read": lambda: list(islice(prompts_of(pair_stream(source)), pairs)),
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


@torch.no_grad()
def growth(
    report: Report,
    sizes: tuple[int, int] = (2048, 5120),
    images: tuple[int, ...] = (1, 4, 16, 64),
    pairs: tuple[int, ...] = (1024, 4096, 16384),
) -> None:
    """Measure how seconds grow, and draw it; the memory of a stream should not grow at all."""
    points, panels, peaks = [], {}, {}

    def measure(title: str, amounts: Sequence[int], call: Callable[[int], object]) -> None:
        medians = report.in_turn(title, {str(n): partial(call, n) for n in amounts})
        points.extend({"amount": int(n), title: value} for n, value in medians.items())
        panels[f"seconds by {title}"] = (title,)

    def stream(count: int) -> None:
        for _ in pair_stream(TWIN.data.pairs, 512, count).chunks():
            pass
        peaks.setdefault(count, round(peak_bytes() / 1e6))

    # First, and the smallest first: the peak of a process never falls.
    measure("pairs read and decoded", pairs, stream)
    report.remarks.append(f"Peak memory in MB, by pairs: {peaks}")
    device, draw = report.device, IMG(preset=TWIN).backbone.draw
    f, c = ImplicitAligner(*sizes).to(device), torch.randn(1, 16, sizes[0], device=device)
    h = torch.randn(1, 2048, sizes[1], device=device)
    measure("passes of the aligner", range(1, 6), lambda n: f(h[:, :512], c, passes=n))
    measure("length of the guidance", (128, 256, 512, 1024, 2048), lambda n: f(h[:, :n], c))
    measure("images of the twin", images, lambda n: draw([PROMPT] * n, list(range(n))))
    curves({"": points}, panels, report.picture, "amount")
    report.remarks.append(f"drawn in {report.picture}")


MEASURES = {f.__name__: f for f in (aligner, sampling, features, injection, growth)}


def main() -> int:
    """Measure and print."""
    options = command_line()
    if options.subject == "memory":
        print(table(options.model, options.mllm))
        return 0
    if options.subject == "growth":
        writable_file(options.output, "--output", PICTURES)
    quiet_libraries()
    report = Report(rounds=5 if options.subject else 3, picture=options.output)
    compute = Precision.named("fp32", report.device).described(report.device)
    print(f"{compute}; {torch.get_num_threads()} threads\n", flush=True)
    for subject in [options.subject] if options.subject else QUICK:
        MEASURES[subject](report)
    print(report)
    if options.subject in ("sampling", "features"):
        print(f"\n{operations_table(options.model, options.mllm)}")
    return 0


if __name__ == "__main__":
    run(main)
