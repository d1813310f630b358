"""Open the parts of the method, small files before big ones: backbone, guide and aligner."""

from os import PathLike

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from img_minimal.aligner import ImplicitAligner
from img_minimal.backbone import (
    Backbone,
    announced_head,
    check_adapter,
    open_backbone,
    pipeline_kind,
)
from img_minimal.cli import check, warn, without_loading_bars
from img_minimal.devices import TRAINING, Precision, Turns, best_device, known_device
from img_minimal.files import model_name
from img_minimal.hub.mllms import mllm_config
from img_minimal.hub.questions import find_questions
from img_minimal.hub.weights import opening
from img_minimal.hub.where import fetch
from img_minimal.mllm import MLLM, GuidanceEncoder, TextGuidance
from img_minimal.presets import Models, Preset, find_preset

ADAPTER = ("ip_adapter", "resampler", "image_encoder")  # what turns images into tokens
# Settings that are not a loaded backbone's.
FREE = {"passes", "mllm_batch", "questions", "mllm", "aligner"}


def open_parts(
    pipe: DiffusionPipeline | Backbone | None,
    mllm: GuidanceEncoder | str | PathLike | None,
    aligner: ImplicitAligner | str | PathLike | None,
    preset: Preset | str | None,
    guidance: str,
    mllm_device: torch.device | str | None,
    changes: dict[str, object],
) -> tuple[Backbone, GuidanceEncoder, ImplicitAligner, Preset]:
    """Open whatever is not given as a loaded object; arguments are those of `IMG`.

    Raises UserError for settings without effect, and for files that are missing or do not fit,
    which is known by the small ones: weights are not downloaded before.
    """
    preset = find_preset_for(pipe, preset)
    check(guidance != "text" or mllm is None, "guidance by text needs no mllm; leave it out")
    if isinstance(mllm, str | PathLike):
        changes["mllm"], mllm = str(mllm), None
    if isinstance(aligner, str | PathLike):
        changes["aligner"], aligner = str(aligner), None
    check_changes(changes, pipe, mllm)
    preset = preset.guided_by(guidance).changed(**changes)
    preset, aligner = fetch_parts(preset, guidance, pipe, mllm, aligner)
    device = None if mllm_device is None else known_device(str(mllm_device))
    bar = tqdm(total=4, desc="loading models", leave=False, delay=2)
    with without_loading_bars(), bar:
        if not isinstance(pipe, Backbone):
            pipe = open_backbone(preset, pipe, bar.update)
        home = pipe.turns.home
        if mllm is None:
            mllm = open_guide(preset.models, guidance, pipe, device)
        elif device is None and hasattr(mllm, "model"):
            mllm.model.to(home)
    aligner.check_widths(mllm.width, None)
    return pipe, mllm, aligner.eval().to(home), preset


def check_changes(changes: dict[str, object], pipe: object, mllm: GuidanceEncoder | None) -> None:
    """Raise UserError for settings of what is loaded already, on which they would do nothing."""
    fixed = set() if pipe is None else {"base", "unet", "offload"}
    if isinstance(pipe, Backbone):
        fixed = changes.keys() - FREE
    if mllm is not None:
        fixed = fixed | {"questions"}
    name = min(fixed & changes.keys(), default=None)
    check(
        name is None,
        f"{name!r} is a setting of this backbone or MLLM, which is loaded; open it with that, or "
        "use img.drawing(...)",
    )


def fetch_parts(
    preset: Preset,
    guidance: str,
    pipe: object,
    mllm: GuidanceEncoder | None,
    aligner: ImplicitAligner | None,
) -> tuple[Preset, ImplicitAligner]:
    """Fetch the files of what is not loaded, and open the aligner, by which others are checked."""
    names, width, location = [], None, "text"
    if aligner is None:
        names.append("aligner")
    if isinstance(mllm, MLLM):
        location = mllm.model.name_or_path
    elif mllm is None and guidance != "text":
        names.append("mllm")
        location = preset.models.mllm
        width = mllm_config(location).get_text_config().hidden_size
    if not isinstance(pipe, Backbone):
        names += ADAPTER
    if pipe is None:
        names += ["unet", "base"]

    def check_files(preset: Preset) -> None:
        nonlocal aligner
        aligner = aligner or ImplicitAligner.from_file(preset.sampling.aligner)
        check_guide(aligner, location)
        token_width = None
        if "ip_adapter" in names:
            _, (_, token_width) = announced_head(preset.backbone, preset.models)
        aligner.check_widths(width, token_width)
        if pipe is None:
            check_adapter(preset.backbone, preset.models)

    return fetch(preset, *names, inspect=check_files), aligner


def find_preset_for(pipe: object, preset: Preset | str | None) -> Preset:
    """Choose the named preset or the pipeline's. Raises UserError if they do not fit."""
    if isinstance(pipe, Backbone):
        return find_preset(preset or pipe.preset)
    kind = None if pipe is None else pipeline_kind(pipe)
    preset = find_preset(preset or kind or "tiny-sdxl")
    check(
        kind in (None, preset.backbone),
        f"preset {preset.name!r} is for {preset.backbone}, and the pipeline is of {kind}",
    )
    return preset


def open_guide(
    models: Models,
    guidance: str,
    backbone: Backbone | None = None,
    device: torch.device | None = None,
) -> GuidanceEncoder:
    """Open the MLLM of `models.mllm`, or guidance by the backbone's "text" encoders.

    The MLLM waits where the backbone's parts do, unless it has a `device` of its own.
    """
    if guidance == "text":
        return TextGuidance(backbone.text_states, backbone.text_width)
    turns = backbone.turns if backbone else Turns(best_device(), models.offload)
    with opening(models.mllm, "multimodal LLM"):
        dtype = Precision.named(models.dtype, device or turns.device).mllm
        questions = find_questions(models.questions)
        guide = MLLM.from_pretrained(models.mllm, dtype, device or turns.home, questions)
    if backbone is None:  # in training, where it stays on the device, and so does the image encoder
        turns.settle(guide.model, room=TRAINING)
        turns.bring(guide.model)
    return guide


def check_guide(aligner: ImplicitAligner, location: str) -> None:
    """Warn if an aligner is known to have been trained with another MLLM than that at a location.

    Raises UserError if one of both guides is text, whose features mean something else.
    """
    if not (location and aligner.guide):
        return
    name = model_name(location)
    found = f"this aligner was trained with {aligner.guide}, and is guided by {name}"
    fitting = "text" if aligner.guide == "text" else "mllm, or stock"
    same_kind = (aligner.guide == "text") == (location == "text")
    check(same_kind, f"{found}; choose --guidance {fitting}, or another --aligner")
    # A copy in another folder has the same fingerprint, which comes last.
    if aligner.guide.split()[-1] != name.split()[-1]:
        warn(f"{found}; unless these are the same model, its corrections will be wrong")
