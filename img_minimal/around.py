"""IMG around a diffusers pipeline that somebody else has loaded: what is missing beside it is opened, nothing twice."""

import torch
from diffusers import DiffusionPipeline

from img_minimal.aligner import ImplicitAligner
from img_minimal.backbones import Backbone, Sampling, backbone_class
from img_minimal.files.mllm_layouts import announced_width
from img_minimal.mllm import MLLM, Guide
from img_minimal.places import TOKENIZER, check_guidance_width, check_token_width, fetch
from img_minimal.presets import Preset, find_preset, with_overrides
from img_minimal.questions import find_questions
from img_minimal.runtime.devices import Precision, known_device
from img_minimal.runtime.errors import UserError

KINDS = {"StableDiffusionXLPipeline": "sdxl", "FluxPipeline": "flux"}


def sampling_of(preset: Preset) -> Sampling:
    """The numbers of drawing that a preset holds."""
    return Sampling(
        steps=preset.sampling_steps,
        guidance_scale=preset.guidance_scale,
        true_cfg_scale=preset.true_cfg_scale,
        scale=preset.scale,
        scale_end=preset.scale_end,
        draw_batch=preset.draw_batch,
        encode_batch=preset.encode_batch,
        height=preset.height,
        width=preset.width,
        negative_prompt=preset.negative_prompt,
    )


def open_around(
    pipe: DiffusionPipeline,
    mllm: Guide | str | None,
    aligner: ImplicitAligner | str | None,
    preset: str | None,
    mllm_device: torch.device | str | None,
    changes: dict,
) -> tuple[Backbone, Guide, ImplicitAligner, Preset]:
    """The parts of IMG beside `pipe`; what is not given comes from the preset, as do all numbers.

    Raises UserError for a pipeline of another kind, or files that are missing or do not belong together.
    """
    kind = KINDS.get(type(pipe).__name__)
    if kind is None:
        raise UserError(f"IMG goes around {' or '.join(KINDS)}, and this is a {type(pipe).__name__}")
    chosen = find_preset(preset or kind)
    if chosen.backbone != kind:
        raise UserError(f"preset {chosen.name!r} is for {chosen.backbone}, and the pipeline is of {kind}")
    locations = {"mllm": mllm, "aligner": aligner}
    chosen = with_overrides(chosen, **changes, **{k: str(v) for k, v in locations.items() if is_place(v)})
    wanted = [name for name, given in locations.items() if given is None or is_place(given)]
    chosen = fetch(chosen, [*TOKENIZER, *wanted])
    f = ImplicitAligner.from_file(chosen.aligner) if "aligner" in wanted else aligner
    check_token_width(f, backbone_class(kind).token_width(chosen), chosen)
    if "mllm" in wanted:
        check_guidance_width(f, announced_width(chosen.mllm), chosen.mllm)
    backbone = backbone_class(kind).around(pipe, chosen, sampling_of(chosen))
    device = known_device(str(mllm_device)) if mllm_device else backbone.placement.device
    if "mllm" in wanted:
        dtype = Precision.named(chosen.dtype, device).mllm
        mllm = MLLM.from_pretrained(chosen.mllm, dtype, device, find_questions(chosen.questions))
    check_guidance_width(f, mllm.width, chosen.mllm)
    return backbone, mllm, f, chosen


def is_place(given: object) -> bool:
    """Is this where something is, and not the thing itself?"""
    return isinstance(given, str) or hasattr(given, "__fspath__")
