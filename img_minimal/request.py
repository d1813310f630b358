"""Check what is asked for, and spread it over images: prompts, seeds, a call's arguments."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from img_minimal.cli import check
from img_minimal.presets import Sampling

# Arguments of a pipeline's call that hold a value for each prompt.
TEXTS = "prompt prompt_2 negative_prompt negative_prompt_2".split()
EMBEDS = (
    "prompt_embeds pooled_prompt_embeds negative_prompt_embeds negative_pooled_prompt_embeds"
).split()
TENSORS = (*EMBEDS, "latents", "masked_image_latents")
PER_PROMPT = {*TEXTS, *TENSORS, "image", "mask_image", "control_image", "generator"}
# Arguments that IMG decides; it has its own image prompt.
OWN = set(
    "self kwargs prompt generator num_inference_steps num_images_per_prompt output_type "
    "return_dict".split()
)
# One generator for each image, or one that draws all images together, as in diffusers.
Noise = list[torch.Generator] | torch.Generator
Seeds = list[int] | Noise
Call = dict[str, Any]  # arguments of a pipeline's call, by name


def call_parameters(pipe: object) -> set[str]:
    """Return the names of the arguments that a pipeline's call takes."""
    return set(signature(type(pipe).__call__).parameters)


def call_arguments(pipe: DiffusionPipeline, call: Call, count: int) -> Call:
    """Return further arguments of the pipeline's call, with a text for each of `count` prompts.

    Raises UserError for an argument that the call does not take or IMG decides itself, and for
    another number of texts.
    """
    kind, result = type(pipe).__name__, {}
    known = call_parameters(pipe).union(TEXTS) - OWN
    for name, value in call.items():
        taken = name in known and "ip_adapter" not in name
        check(taken, f"unknown argument {name!r}; expected a setting, or one of {kind}'s call")
        if name in TEXTS:
            texts = [value] if isinstance(value, str) else list(value)
            value = texts * count if len(texts) == 1 else texts
        if isinstance(value, Tensor) and (value.ndim == 4 or name in TENSORS):
            value = list(value.split(1))
        if name in TEXTS or name in EMBEDS:
            check(
                len(value) == count,
                f"{name} has {len(value)} entries, expected one for each prompt: {count}",
            )
        result[name] = value
    return result


def select(inputs: Call, rows: Sequence[int], count: int) -> Call:
    """Pick these rows of all arguments that list a value for each of `count` prompts."""
    chosen = dict(inputs)
    for name in inputs.keys() & PER_PROMPT:
        if isinstance(inputs[name], list) and len(inputs[name]) == count:
            chosen[name] = [inputs[name][i] for i in rows]
    return chosen


def generator(seed: int | torch.Generator) -> torch.Generator:
    """Return the generator of a seed's noise. Raises UserError unless it is a whole number."""
    if isinstance(seed, torch.Generator):
        return seed
    whole = hasattr(seed, "__index__") and 0 <= int(seed) < 2**63
    check(whole, f"a seed is {seed!r}, expected a whole number from 0 on or a torch.Generator")
    return torch.Generator().manual_seed(int(seed))


def generators(seeds: Seeds) -> Noise:
    """Return a generator for each seed, or the one that draws all images together."""
    if isinstance(seeds, torch.Generator):
        return seeds
    return [generator(seed) for seed in seeds]


def renewed(noise: Noise) -> Noise:
    """Copy generators, whose states drawing changes."""
    if isinstance(noise, torch.Generator):
        return noise.clone_state()
    return [each.clone_state() for each in noise]


def numbers(seeds: Seeds | int, count: int) -> list[int]:
    """Return the whole numbers of seeds, by which the MLLM is asked: `count` from a single one."""
    if isinstance(seeds, Sequence):
        return [generator(seed).initial_seed() for seed in seeds]
    first = generator(seeds).initial_seed()
    return [first + k for k in range(count)]


def check_counts(prompts: Sequence[str], **others: Sequence | torch.Generator) -> None:
    """Raise UserError unless there is one of each of `others`, if it is a list, per prompt."""
    for name, given in others.items():
        if not isinstance(given, torch.Generator):
            check(
                len(given) == len(prompts),
                f"{len(prompts)} prompts and {len(given)} {name}; expected one for each",
            )


def check_request(
    prompts: Sequence[str], seeds: Seeds, images: Sequence[Image] | None = None
) -> None:
    """Raise UserError unless there are prompts, all of words, and as many seeds, and images."""
    check(len(prompts) > 0, "there are no prompts; say what to draw")
    for prompt in prompts:
        words = isinstance(prompt, str) and prompt.strip()
        check(words, f"a prompt is {prompt!r}, expected words that say what to draw")
    check_counts(prompts, seeds=seeds, images=prompts if images is None else images)


def check_drawing(
    prompts: list[str], seeds: Seeds, sampling: Sampling, one_look: bool, call: Call
) -> None:
    """Raise UserError for a request that cannot be drawn as it says."""
    check_request(prompts, seeds)
    given = min({"sigmas", "timesteps"} & call.keys(), default=None)
    check(
        not (given and sampling.draft_steps),
        f"draft_steps saves nothing where {given} are given; leave out one of the two",
    )
    several = one_look and len(set(prompts)) > 1
    check(not several, "one look serves the seeds of one prompt, and these are several")
    some = isinstance(seeds, torch.Generator) and (one_look or sampling.only_wrong)
    check(
        not some or len(prompts) == 1,
        "one generator draws all images together; for one_look or only_wrong pass a list, one for "
        "each",
    )
