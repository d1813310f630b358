"""IMG from end to end (Fig. 2): draw, look, align, draw again with the same seed.

    prompt --backbone--> image --MLLM--> h  \\
                           |                 aligner --> tokens --backbone, same seed--> image
                           +--image prompt--> c_l /
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from os import PathLike

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from img_minimal.aligner import ImplicitAligner, align
from img_minimal.backbone import (
    Backbone,
    announced_token_width,
    check_adapter,
    open_backbone,
    pipeline_kind,
)
from img_minimal.cli import check, warn
from img_minimal.devices import TRAINING, Precision, Turns, best_device, known_device
from img_minimal.files import Clock, as_pictures, from_pil, model_name, to_pil
from img_minimal.hub.mllms import mllm_config
from img_minimal.hub.questions import find_questions
from img_minimal.hub.weights import opening
from img_minimal.hub.where import fetch
from img_minimal.mllm import (
    MLLM,
    GuidanceEncoder,
    TextGuidance,
    guidance_features,
    padded,
)
from img_minimal.presets import Models, Preset, Sampling, find_preset
from img_minimal.request import (
    Seeds,
    call_arguments,
    check_drawing,
    check_questions,
    consecutive,
    generator,
    question_seeds,
    renewed,
    select,
)

# A negative prompt may also be a list, one for each prompt.
SETTINGS = {field.name for field in fields(Sampling)} - {"negative_prompt"}
ADAPTER = ("ip_adapter", "resampler", "image_encoder")  # what turns images into tokens


@dataclass(frozen=True)
class IMGOutput:
    """One entry per prompt: first images, what the MLLM said about them, and last images.

    First images are drafts with `draft_steps`, and there is one with `one_look`.
    """

    initial: list[Image]
    said: list[str]
    images: list[Image]


class IMG:
    """The whole method: `img = IMG(preset="tiny-sdxl")`, then `img("a red circle", seed=0).images`.

    Around a pipeline of your own: `IMG(pipe)`, or `IMG(pipe, mllm="llava-hf/...", aligner="...")`;
    SDXL's and FLUX.1's, for text, img2img, inpainting or ControlNet. Calls from several threads, of
    one IMG or of several around one network, take turns. A call of the pipeline itself does not
    wait for them: it must not run at the same time, for it shares scheduler and network.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline | Backbone | None = None,
        mllm: GuidanceEncoder | str | PathLike | None = None,
        aligner: ImplicitAligner | str | PathLike | None = None,
        *,
        preset: Preset | str | None = None,
        guidance: str = "mllm",
        mllm_device: torch.device | str | None = None,
        **changes: object,
    ):
        """Open whatever is not given, small files before big ones.

        `pipe`, `mllm` and `aligner` are loaded objects, or locations of files. A pipeline of your
        own keeps its scheduler, VAE, LoRAs, dtype, device and hooks. Everything else comes from the
        `preset`, by default the pipeline's kind or "tiny-sdxl"; `changes` replace its fields, e.g.
        ip_adapter, questions, scale or passes. `guidance` is "mllm", "stock" or "text".
        Raises UserError for another kind of pipeline, or files that are missing or do not fit.
        """
        preset = find_preset_for(pipe, preset)
        changes = {name: value for name, value in changes.items() if value is not None}
        check_changes(pipe, mllm, guidance, changes)
        for name, given in (("mllm", mllm), ("aligner", aligner)):
            if isinstance(given, str | PathLike):
                changes[name] = str(given)
        preset = preset.guided_by(guidance).changed(**changes)
        opens_aligner = aligner is None or "aligner" in changes
        opens_mllm = guidance != "text" and (mllm is None or "mllm" in changes)
        opens = {"aligner": opens_aligner, "mllm": opens_mllm}
        opens |= dict.fromkeys(ADAPTER, not isinstance(pipe, Backbone))
        opens |= dict.fromkeys(("unet", "base"), pipe is None)
        width = (
            mllm_config(preset.models.mllm).get_text_config().hidden_size if opens_mllm else None
        )
        location = preset.models.mllm if opens_mllm else guide_location(mllm)
        self.aligner = None if opens_aligner else aligner.eval()
        names = [name for name, wanted in opens.items() if wanted]
        preset = fetch(preset, *names, inspect=partial(self._check_files, pipe, width))
        if mllm_device is not None:
            mllm_device = known_device(str(mllm_device))
        with tqdm(total=4, desc="loading models", leave=False, delay=2) as bar:
            if isinstance(pipe, Backbone):
                self.backbone = pipe
            else:
                self.backbone = open_backbone(preset, pipe, bar.update)
            self.turns = self.backbone.turns
            if opens_mllm or mllm is None:
                mllm = open_guide(preset.models, guidance, self.backbone, mllm_device)
        self.guide = mllm
        warn_of_other_guide(self.aligner, location)
        self.aligner.check_widths(self.guide.width, None)
        self.aligner.to(self.turns.home)
        # Guidance by text has no model of its own; an MLLM on its own device stays there.
        self.guide_takes_turns = hasattr(mllm, "model") and mllm_device is None
        models = [self.backbone.branch, self.backbone.image_prompt, self.aligner]
        if self.guide_takes_turns:
            models.append(mllm.model.to(self.turns.home))
        self.turns.settle(self.backbone.pipe, *models)
        self.passes, self.mllm_batch = preset.sampling.passes, preset.models.mllm_batch
        self.clock = Clock()  # seconds of each step so far

    def _check_files(self, pipe: object, width: int | None, preset: Preset) -> None:
        """Open the aligner. Raises UserError for an MLLM, adapter or base that does not fit it.

        That is known by the small files; weights are not downloaded yet.
        """
        if self.aligner is None:
            self.aligner = ImplicitAligner.from_file(preset.sampling.aligner).eval()
        self.aligner.check_widths(width, None)
        if not isinstance(pipe, Backbone):
            self.aligner.check_widths(None, announced_token_width(preset.backbone, preset.models))
        if pipe is None:
            check_adapter(preset.backbone, preset.models)

    def __call__(
        self,
        prompt: str | list[str],
        seed: int = 0,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        num_images_per_prompt: int = 1,
        one_look: bool = False,
        **more: object,
    ) -> IMGOutput:
        """Draw, look, align, draw again. Names are diffusers'; defaults are the preset's.

        Several images get consecutive seeds from `seed` on, or the noise of the `generator`, which
        is advanced as in diffusers; the second drawing starts from the same noise. `more` are
        settings of `Sampling` (guidance_scale, height, negative_prompt, scale, draft_steps, ...),
        and whatever else the pipeline's own call takes, for both drawings: image, strength, eta,
        clip_skip, callback_on_step_end, ... With prompt_embeds, the MLLM still reads `prompt`; of
        a list, each prompt gets one. With `one_look` (see `stages`), there is one initial image.
        """
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        more = {"steps": num_inference_steps, **more}
        more = {name: value for name, value in more.items() if value is not None}
        settings = {name: more.pop(name) for name in SETTINGS & more.keys()}
        call = call_arguments(self.backbone.pipe, more, len(prompts))
        rows = [i for i in range(len(prompts)) for _ in range(num_images_per_prompt)]
        call = select(call, rows, len(prompts))
        prompts = [prompts[i] for i in rows]
        seeds = consecutive(seed, len(prompts)) if generator is None else generator
        with self.drawing(**settings):
            stages = self.stages(prompts, seeds, one_look=one_look, call=call)
            initial, last = map(to_pil, stages)
            said = [""] * len(initial)
            if hasattr(self.guide, "explain"):
                asked = question_seeds(seeds, len(initial))
                said = self.explain(initial, prompts[: len(initial)], asked)
        return IMGOutput(initial, said, last)

    def stages(
        self,
        prompts: list[str],
        seeds: Seeds,
        *,
        rounds: int = 1,
        one_look: bool = False,
        whole: bool = False,
        start: list[Image] | None = None,
        call: dict[str, object] | None = None,
        progress: bool = False,
    ) -> list[list[Tensor]]:
        """Draw the first images and those of each round: `rounds + 1` lists of (3, H, W).

        Every round looks at the latest images and draws again from the same seeds. Images that only
        the MLLM sees take `draft_steps`; `whole` first images take all steps, and those of `start`
        are not drawn. With `only_wrong`, what the MLLM finds right is not corrected. With
        `one_look`, the first image alone is looked at until the last round, which draws all seeds.
        """
        sampling, count, call = self.backbone.sampling, len(prompts), call or {}
        check_drawing(prompts, seeds, sampling, one_look, call)
        looked = 1 if one_look else count
        # Steps and number of the images of each stage.
        plan = [(sampling.draft_steps or sampling.steps, looked)] * rounds
        plan.append((sampling.steps, count))
        kept: dict[int, Tensor] | None = None
        if whole or start is not None:
            plan[0] = plan[-1]
        if start is not None:
            kept = {i: from_pil([image])[0] for i, image in enumerate(as_pictures(start))}
        tokens: list[Tensor | None] = [None] * looked  # what the latest images were drawn with
        if not isinstance(seeds, torch.Generator):
            seeds = [generator(seed) for seed in seeds]
        stages, noise, asked = [], renewed(seeds), question_seeds(seeds, looked)
        for k, (steps, drawn) in enumerate(plan):
            if k:
                pictures = to_pil(stages[-1][:looked])
                asked_now = [seed + k - 1 for seed in asked]
                aligned, wrong = self._look(pictures, prompts[:looked], asked_now)
                tokens = [new if bad else old for new, old, bad in zip(aligned, tokens, wrong)]
                # A right image that has all its steps stays; a right draft is drawn whole.
                kept = {}
                if steps == plan[k - 1][0]:
                    kept = {i: stages[-1][i] for i, bad in enumerate(wrong) if not bad}
            label = f"round {k}" if k else "initial"
            given = seeds if k == 0 else renewed(noise)
            each = tokens * drawn if one_look else tokens
            label *= progress
            stages.append(self.draw_each(prompts, given, each[:drawn], steps, label, kept, call))
        return stages

    def _look(
        self, pictures: list[Image], prompts: list[str], seeds: list[int]
    ) -> tuple[Tensor, list[bool]]:
        """Look and align: tokens (B, N, D), and True for each picture that is to be corrected."""
        with self.clock("look"):
            guidance, mask = self.guidance(pictures, prompts, seeds)
            wrong = [True] * len(pictures)
            if self.backbone.sampling.only_wrong:
                wrong = self.finds_wrong(guidance, mask)
        with self.clock("align"):
            return self.correct(self.backbone.tokens(pictures), guidance, mask), wrong

    def draw_each(
        self,
        prompts: list[str],
        seeds: Seeds,
        tokens: list[Tensor | None],
        steps: int,
        progress: str = "",
        kept: dict[int, Tensor] | None = None,
        call: dict[str, object] | None = None,
    ) -> list[Tensor]:
        """Draw the images that are not `kept`, each with its tokens or without: one for each."""
        images, step = dict(kept or {}), "draw" if kept is None else "draw again"
        with self.clock(step), self.drawing(steps=steps, draft_steps=None):
            for guided in (False, True):
                chosen = []
                for i in range(len(tokens)):
                    if i not in images and (tokens[i] is not None) == guided:
                        chosen.append(i)
                if chosen:
                    given = torch.stack([tokens[i] for i in chosen]) if guided else None
                    texts, noise = [prompts[i] for i in chosen], seeds
                    if not isinstance(seeds, torch.Generator):
                        noise = [seeds[i] for i in chosen]
                    own = select(call or {}, chosen, len(prompts))
                    label = progress or None
                    drawn = self.backbone.draw(texts, noise, given, call=own, progress=label)
                    images |= zip(chosen, drawn)
        return [images[i] for i in range(len(tokens))]

    def align(
        self,
        images: Tensor | Image | list[Image],
        prompts: str | list[str],
        seeds: Sequence[int] | int = 0,
        passes: int | None = None,
    ) -> Tensor:
        """Look and align (steps 2, 3): images, see `as_pictures` -> tokens (B, N, D)."""
        pictures = as_pictures(images)
        prompts = [prompts] * len(pictures) if isinstance(prompts, str) else prompts
        seeds = seeds if isinstance(seeds, Sequence) else consecutive(seeds, len(pictures))
        guidance, mask = self.guidance(pictures, prompts, seeds)
        return self.correct(self.backbone.tokens(pictures), guidance, mask, passes)

    def guidance(
        self,
        images: list[Image],
        prompts: list[str],
        seeds: Sequence[int],
        progress: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Look (step 2): guidance features h (B, L, H) and mask (B, L). A seed draws a question."""
        images = check_questions(images, prompts, seeds)
        guide = self._bring_guide()
        look = guidance_features(guide, images, prompts, seeds, self.mllm_batch, progress)
        return padded(*look)

    def finds_wrong(self, guidance: Tensor, mask: Tensor) -> list[bool]:
        """Return True for each image, by its guidance features, that the MLLM finds wrong."""
        asks = hasattr(self.guide, "finds_wrong")
        check(asks, "only_wrong asks an MLLM what is wrong, and guidance by text has none")
        return self._bring_guide().finds_wrong(guidance, mask)

    def correct(
        self, tokens: Tensor, guidance: Tensor, mask: Tensor, passes: int | None = None
    ) -> Tensor:
        """Align (step 3): tokens (B, N, D) -> f(h, c), (B, N, D)."""
        self.turns.bring(self.aligner)
        passes = self.passes if passes is None else passes
        return align(self.aligner, tokens, guidance, mask, passes)

    def explain(self, images: list[Image], prompts: list[str], seeds: Sequence[int]) -> list[str]:
        """Decode what the MLLM says about images. For inspection only."""
        images = check_questions(images, prompts, seeds)
        return self._bring_guide().explain(images, prompts, seeds)

    def satisfaction(
        self, images: list[Image], prompts: list[str], seeds: Sequence[int]
    ) -> list[float]:
        """Compute the log-probability that the MLLM says "nothing" is wrong with each image."""
        images = check_questions(images, prompts, seeds)
        return self._bring_guide().satisfaction(images, prompts, seeds, self.mllm_batch)

    def better(
        self,
        first: list[Image],
        second: list[Image],
        prompts: list[str],
        seeds: Sequence[int],
    ) -> list[bool]:
        """For each pair, True if the MLLM prefers the second image. Needs no extra sampling."""
        before = self.satisfaction(first, prompts, seeds)
        after = self.satisfaction(second, prompts, seeds)
        return [b > a for a, b in zip(before, after)]

    @contextmanager
    def drawing(self, **changes: object) -> Iterator[None]:
        """Use other settings of `Sampling`, e.g. scale or passes, within this context."""
        with self.backbone.lock:
            sampling, passes = self.backbone.sampling, self.passes
            self.backbone.sampling = replace(sampling, **changes)
            self.passes = changes.get("passes", passes)
            try:
                yield
            finally:
                self.backbone.sampling, self.passes = sampling, passes

    def _bring_guide(self) -> GuidanceEncoder:
        if self.guide_takes_turns:
            self.turns.bring(self.guide.model)
        return self.guide


def load_img(preset: Preset | str, **options: object) -> IMG:
    """Open the whole method by a preset or its name; `options` are those of `IMG`."""
    return IMG(preset=preset, **options)


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
    home = device or turns.home
    with opening(models.mllm, "multimodal LLM"):
        dtype = Precision.named(models.dtype, device or turns.device).mllm
        guide = MLLM.from_pretrained(models.mllm, dtype, home, find_questions(models.questions))
    if backbone is None:  # in training, where it stays on the device, and so does the image encoder
        turns.settle(guide.model, room=TRAINING)
        turns.bring(guide.model)
    return guide


def guide_location(guide: GuidanceEncoder | None) -> str:
    """Locate a loaded guide: the folder or hub id of an MLLM, "text" for guidance by text."""
    return guide.model.name_or_path if isinstance(guide, MLLM) else "text"


def warn_of_other_guide(aligner: ImplicitAligner, location: str) -> None:
    """Say in one line if an aligner is known to have been trained with another guide."""
    if not (location and aligner.guide):
        return
    name = model_name(location)
    # A copy in another folder has the same fingerprint, which comes last.
    if aligner.guide.split()[-1] != name.split()[-1]:
        found = f"this aligner was trained with {aligner.guide}, and is guided by {name}"
        warn(f"{found}; unless these are the same model, its corrections will be wrong")


def check_changes(pipe: object, mllm: object, guidance: str, changes: dict) -> None:
    """Raise UserError for settings that could have no effect."""
    if isinstance(pipe, Backbone):
        fixed = changes.keys() - {"passes", "mllm_batch", "questions"}
        advice = "is a setting of this backbone; open it with that, or use img.drawing(...)"
        check(not fixed, f"{min(fixed, default='')!r} {advice}")
    own = pipe is not None and changes.get("offload", "none") not in ("none", False)
    check(not own, "offload is for models opened here; use diffusers' hooks on your pipeline")
    check(guidance != "text" or mllm is None, "guidance by text needs no mllm; leave it out")


def find_preset_for(pipe: object, preset: Preset | str | None) -> Preset:
    """Choose the named preset or the pipeline's. Raises UserError if they do not fit."""
    if isinstance(pipe, Backbone) and preset is None:
        return pipe.preset
    kind = None
    if pipe is not None and not isinstance(pipe, Backbone):
        kind = pipeline_kind(pipe)
    if not isinstance(preset, Preset):
        preset = find_preset(preset or kind or "tiny-sdxl")
    message = f"preset {preset.name!r} is for {preset.backbone}, and the pipeline is of {kind}"
    check(kind in (None, preset.backbone), message)
    return preset
