"""What IMG costs beside the base alone: seconds of its steps on the twin, and operations at true size, computed."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from img_minimal.backbone import true_size
from img_minimal.bench.measure import in_turn, rows
from img_minimal.bench.memory import MLLM_TOKENS
from img_minimal.bench.true_sizes import MLLMS, models
from img_minimal.files import to_pil
from img_minimal.load import load_img
from img_minimal.presets import find_preset


def operations(call: Callable[[], object]) -> float:
    """FLOP of a call on meta tensors."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def true_size_operations(model: str, mllm: str) -> dict[str, float]:
    """FLOP of every step of one image, 1024 x 1024, with the preset's steps and passes."""
    preset = find_preset(model)
    shapes, built = true_size(preset.backbone), models(mllm, preset.backbone)
    calls = shapes.activations(built, 1)
    width = MLLMS[mllm]["hidden_size"]
    language, vision = built["mllm"].model.language_model, getattr(built["mllm"].model, "vision_tower", None)
    mask = (1, 1, MLLM_TOKENS, MLLM_TOKENS)  # given whole, for what transformers asks of a shorter one has no answer
    look = operations(
        lambda: language(
            inputs_embeds=torch.empty(1, MLLM_TOKENS, width), attention_mask=torch.empty(mask), use_cache=False
        )
    )
    if vision is not None:  # LLaVA's; an MLLM of another kind sees at less cost than it thinks, too
        look += operations(lambda: vision(torch.empty(1, 3, 336, 336)))
    return {
        "draw": preset.sampling_steps * operations(calls["draw"]) + operations(calls["decode"]),
        "look": look,
        "image tokens": operations(calls["encode"]),
        "align": operations(
            lambda: built["aligner"](
                torch.empty(1, MLLM_TOKENS, width), torch.empty(1, *shapes.TOKEN_SHAPE), passes=preset.passes
            )
        ),
    }


def true_size_table(model: str, mllm: str) -> str:
    """The same as a table, with what IMG adds to one drawing."""
    found, preset = true_size_operations(model, mllm), find_preset(model)
    draw = found["draw"]
    lines = [f"| {model}, {mllm}: a step, computed | TFLOP | of a drawing |", "|---|---|---|"]
    for name, flop in (found | {"draw again": draw}).items():
        lines.append(f"| {name} | {flop / 1e12:,.1f} | {flop / draw:.1%} |")
    added = sum(flop for name, flop in found.items() if name != "draw")
    lines.append(f"| **IMG's own steps**, of both drawings | {added / 1e12:,.1f} | {added / (2 * draw):.1%} |")
    return "\n".join(lines) + f"\n\n{preset.sampling_steps} denoising steps, passes of the aligner: {preset.passes}."


def twin_table(count: int = 4, rounds: int = 5, steps: int | None = None) -> str:
    """Seconds of every step on the twin, of `count` images at once."""
    preset = find_preset("tiny-sdxl")
    img = load_img(replace(preset, sampling_steps=steps or preset.sampling_steps))
    prompts, seeds = ["a red circle above a blue square"] * count, list(range(count))
    pictures = to_pil(img.backbone.draw(prompts, seeds))
    h, mask = img.guidance(pictures, prompts, seeds)
    tokens = img.backbone.tokens(pictures)
    aligned = img.correct(tokens, h, mask)
    timings = in_turn(
        {
            "draw": lambda: img.backbone.draw(prompts, seeds),
            "look": lambda: img.guidance(pictures, prompts, seeds),
            "image tokens": lambda: img.backbone.tokens(pictures),
            "align": lambda: img.correct(tokens, h, mask),
            "draw again": lambda: img.backbone.draw(prompts, seeds, aligned),
            "put in words, for people": lambda: img.explain(pictures, prompts, seeds),
            "the same, one image at a time": lambda: img.guide.explain(pictures, prompts, seeds, batch_size=1),
        },
        rounds,
    )
    return rows(f"the twin, {count} images", timings)


def sampling_costs(model: str, mllm: str) -> str:
    """Both tables."""
    return twin_table() + "\n\n" + true_size_table(model, mllm)
