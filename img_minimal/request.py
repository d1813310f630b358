"""Check what is asked for, and spread it over images: prompts, seeds, a call's arguments."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from img_minimal.cli import check
from img_minimal.files import as_pictures
from img_minimal.presets import Sampling

# Arguments of a pipeline's call that hold a value for each prompt.
TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
EMBEDS = ("prompt_embeds", "pooled_prompt_embeds")
EMBEDS += tuple(f"negative_{name}" for name in EMBEDS)
TENSORS = (*EMBEDS, "latents", "masked_image_latents")
PER_PROMPT = {*TEXTS, *TENSORS, "image", "mask_image", "control_image"}
# Arguments that IMG decides; it has its own image prompt.
OWN = {"self", "kwargs", "prompt", "generator", "num_inference_steps", "num_images_per_prompt"}
OWN |= {"output_type", "return_dict", "ip_adapter_image", "ip_adapter_image_embeds"}
OWN |= {f"negative_{name}" for name in OWN if name.startswith("ip_adapter")}
# Whole numbers, or torch's generators; one generator draws all images together, as in diffusers.
Seeds = list[int] | list[torch.Generator] | torch.Generator


def call_parameters(pipe: object) -> set[str]:
    """Return the names of the arguments that a pipeline's call takes."""
    return set(signature(type(pipe).__call__).parameters)


def call_arguments(pipe: DiffusionPipeline, call: dict[str, Any], count: int) -> dict[str, Any]:
    """Return further arguments of the pipeline's call, with a text for each of `count` prompts.

    Raises UserError for an argument that the call does not take or IMG decides itself, and for
    another number of texts.
    """
    kind, result = type(pipe).__name__, {}
    for name, value in call.items():
        taken = name in call_parameters(pipe) | {*TEXTS} and name not in OWN
        check(taken, f"unknown argument {name!r}; expected a setting, or one of {kind}'s call")
        if name in TEXTS and (isinstance(value, str) or len(value) == 1):
            value = [value if isinstance(value, str) else value[0]] * count
        if isinstance(value, Tensor) and (value.ndim == 4 or name in TENSORS):
            value = list(value.split(1))
        if name in TEXTS or name in EMBEDS:
            found = f"{name} has {len(value)} entries"
            check(len(value) == count, f"{found}, expected one for each prompt: {count}")
        result[name] = value
    return result


def select(inputs: dict[str, Any], rows: Sequence[int], count: int) -> dict[str, Any]:
    """Pick these rows of all arguments that list a value for each of `count` prompts."""
    chosen = dict(inputs)
    for name in inputs.keys() & PER_PROMPT:
        if isinstance(inputs[name], list) and len(inputs[name]) == count:
            chosen[name] = [inputs[name][i] for i in rows]
    return chosen


def check_seeds(seeds: Seeds, count: int) -> None:
    """Raise UserError unless there is a whole number or a generator for each of `count` prompts."""
    if isinstance(seeds, torch.Generator):
        return
    check(len(seeds) == count, f"{count} prompts and {len(seeds)} seeds; expected one for each")
    for seed in seeds:
        whole = hasattr(seed, "__index__") and 0 <= int(seed) < 2**63
        fits = whole or isinstance(seed, torch.Generator)
        check(fits, f"a seed is {seed!r}, expected a whole number from 0 on or a torch.Generator")


def generator(seed: int | torch.Generator) -> torch.Generator:
    """Return the generator of a seed's noise."""
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(int(seed))


def consecutive(seed: int, count: int) -> list[int]:
    """Return `count` seeds from `seed` on."""
    check_seeds([seed], 1)
    return [seed + k for k in range(count)]


def renewed(noise: torch.Generator | list[torch.Generator]) -> Seeds:
    """Copy generators, whose states drawing changes."""
    if isinstance(noise, torch.Generator):
        return noise.clone_state()
    return [each.clone_state() for each in noise]


def question_seeds(seeds: Seeds, count: int) -> list[int]:
    """Return a number for each of the first `count` images, by which the MLLM is asked."""
    if isinstance(seeds, torch.Generator):
        return consecutive(seeds.initial_seed(), count)
    return [generator(seed).initial_seed() for seed in seeds[:count]]


def check_request(prompts: Sequence[str], seeds: Seeds) -> None:
    """Raise UserError unless there are prompts, all of words, and as many seeds."""
    check(len(prompts) > 0, "there are no prompts; say what to draw")
    for prompt in prompts:
        words = isinstance(prompt, str) and prompt.strip()
        check(words, f"a prompt is {prompt!r}, expected words that say what to draw")
    check_seeds(seeds, len(prompts))


def check_questions(
    images: Sequence[Image], prompts: Sequence[str], seeds: Sequence[int]
) -> list[Image]:
    """Return images as pictures. Raises UserError unless each has a prompt and a seed."""
    counts = f"{len(images)} images and {len(prompts)} prompts"
    check(len(images) == len(prompts), f"{counts}; expected one for each")
    check_request(prompts, seeds)
    return as_pictures(images)


def check_drawing(
    prompts: list[str], seeds: Seeds, sampling: Sampling, one_look: bool, call: dict[str, object]
) -> None:
    """Raise UserError for a request that cannot be drawn as it says."""
    check_request(prompts, seeds)
    several = one_look and len(set(prompts)) > 1
    check(not several, "one look serves the seeds of one prompt, and these are several")
    some = isinstance(seeds, torch.Generator) and (one_look or sampling.only_wrong)
    advice = "for one_look or only_wrong pass a list, one for each"
    check(not some or len(prompts) == 1, f"one generator draws all images together; {advice}")
    fixed = sampling.draft_steps and call.keys() & {"sigmas", "timesteps"}
    check(not fixed, "draft_steps and given sigmas or timesteps exclude each other; drop one")
