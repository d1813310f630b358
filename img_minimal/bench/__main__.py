"""Measure what parts of the method cost. `python -m img_minimal.bench [SUBJECT]`

    memory        which card holds sampling and training, computed from shapes (--model, --mllm)
    aligner       one and three passes and a training step at true size (SDXL, LLaVA-13B)
    features      pairs on their way to features: decode, image tokens, MLLM
    sampling      IMG on the twin: its steps, the whole, with drafts and with one look

Without a subject, all but memory are measured. Times are of this machine, so read the
ratios: calls are made in turn, and compared with the subject's first, in operations (on a CPU those
of attention are not counted) and in time. Keep the machine idle meanwhile.
`python -m img_minimal.bench.true_size` does all of it at true size on a GPU.
"""

import argparse
from collections.abc import Iterable
from functools import partial

from img_minimal.cli import quiet_libraries, run


def command_line() -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("subject", nargs="?", choices=("memory", "aligner", "features", "sampling"))
    parser.add_argument("--model", default="sdxl", choices=("sdxl", "flux"))
    mllms = "llava-13b", "llava-7b", "qwen2.5-vl-7b"
    parser.add_argument("--mllm", default=mllms[0], choices=mllms)
    return parser.parse_args()


if __name__ == "__main__":
    command_line()  # answers --help before torch is imported, which takes seconds

import torch
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from img_minimal.aligner import ImplicitAligner
from img_minimal.bench.memory import GIB, MLLM_TOKENS, Calls, markdown, table
from img_minimal.bench.plan import PUBLIC_HEADS
from img_minimal.data.features import Encoder
from img_minimal.data.pairs import pair_stream
from img_minimal.devices import Precision, best_device
from img_minimal.files import to_pil
from img_minimal.mllm import guidance_features
from img_minimal.pipeline import IMG
from img_minimal.presets import find_preset

DRAFT = 0.3  # of the denoising steps
PAIRS = find_preset("tiny-sdxl").data.pairs


def aligner(img: IMG, guidance_width: int = 5120) -> Calls:
    """Return passes and a training step of the backbone's public aligner, at true size."""
    device, (_, tokens) = best_device(), PUBLIC_HEADS[img.backbone.preset.backbone]
    f = ImplicitAligner(tokens[1], guidance_width).to(device)
    h = torch.randn(1, MLLM_TOKENS, guidance_width, device=device)
    c = torch.randn(1, *tokens, device=device)
    one_pass = torch.no_grad()(partial(f, h, c))
    return {
        "aligner, passes: 1": one_pass,
        "aligner, passes: 3": partial(one_pass, passes=3),
        "aligner, training step": lambda: f(h, c).square().mean().backward(),
    }


def features(img: IMG, pairs: int = 256) -> Calls:
    """Return the stages from the twin's pairs to features; ratios are shares of the whole."""
    prompt, guide, models = img.backbone.image_prompt, img.guide, img.backbone.preset.models
    img.turns.bring(prompt, guide.model)
    encoder = Encoder(prompt, guide, 0.0, 0, models.encode_batch, models.mllm_batch)

    def decode() -> list:
        return next(pair_stream(PAIRS, pairs, pairs).chunks()).items

    items = decode()
    look = [item.loser for item in items], [item.prompt for item in items], range(pairs)
    return {
        f"features of {pairs} pairs": lambda: encoder(decode()),
        "read and decode": decode,
        "image tokens": partial(encoder.tokens, items),
        "MLLM": partial(guidance_features, guide, *look, models.mllm_batch),
    }


def sampling(img: IMG, count: int = 4) -> Calls:
    """Return steps of the method, and the whole with the MLLM's words, for images of a prompt."""
    prompts, seeds = ["a red circle above a blue square"] * count, list(range(count))
    look = to_pil(img.backbone.draw(prompts, seeds)), prompts, seeds
    draft = max(1, round(DRAFT * img.backbone.sampling.steps))
    return {
        f"draw {count} images": partial(img.backbone.draw, prompts, seeds),
        "look and align": partial(img.align, *look),
        "explain": partial(img.explain, *look),
        "IMG": partial(img, prompts),
        f"IMG, draft of {draft} steps": partial(img, prompts, draft_steps=draft),
        "IMG, one look at the draft": partial(img, prompts, draft_steps=draft, one_look=True),
    }


MEASURES = {f.__name__: f for f in (aligner, features, sampling)}


def in_turn(calls: Calls, rounds: int) -> dict[str, list]:
    """Make each call once per round; return columns, which compare each call with the first.

    A round before warms up and counts. Ratios of times are taken within a round, so that the drift
    of a busy machine cancels.
    """
    flop, peaks = torch.zeros(2, len(calls))
    times = torch.zeros(rounds, len(calls))
    for k, call in enumerate(calls.values()):
        with FlopCounterMode(display=False) as counter:
            call()
        flop[k] = counter.get_total_flops()
    for own in times:
        for k, call in enumerate(calls.values()):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            start = timer()
            call()
            own[k] = timer() - start
            peaks[k] = torch.cuda.max_memory_allocated()
    ratios = times / times[:, :1]
    columns = {
        "GFLOP": flop / 1e9,
        "GFLOP ratio": flop / flop[0].clamp(1),
        "ms": 1e3 * times.median(0).values,
        "ratio": ratios.median(0).values,
        "lowest": ratios.amin(0),
        "highest": ratios.amax(0),
        "GPU GiB": peaks / GIB,
    }
    return {"measured": [*calls], **{name: column.tolist() for name, column in columns.items()}}


def measure(img: IMG, subjects: Iterable[str], rounds: int = 5) -> dict[str, dict[str, list]]:
    """Measure subjects; print a table of each, and return their columns."""
    found = {}
    for subject in subjects:
        columns = found[subject] = in_turn(MEASURES[subject](img), rounds)
        rows = [(name, *(f"{n:,.2f}" for n in values)) for name, *values in zip(*columns.values())]
        print(markdown([*columns], rows), end="\n\n", flush=True)
    return found


def main() -> int:
    """Print what is asked for."""
    options, device = command_line(), best_device()
    if options.subject == "memory":
        print(table(options.model, options.mllm))
        return 0
    quiet_libraries()
    compute = Precision.named("fp32", device).described(device)
    print(f"{compute}; {torch.get_num_threads()} threads\n", flush=True)
    img = IMG(preset="tiny-sdxl", dtype="fp32")
    measure(img, [options.subject] if options.subject else MEASURES)
    return 0


if __name__ == "__main__":
    run(main)
