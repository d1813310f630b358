"""IMG from end to end (Fig. 2): draw, look, align, draw again with the same seed.

    prompt --backbone--> image --MLLM--> h --------+
                           |                       +--aligner--> tokens --backbone--> image
                           +--image prompt--> c_l--+                      same seed

h are the MLLM's guidance features, c_l the tokens of the first image.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from os import PathLike

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from img_minimal.aligner import ImplicitAligner, align
from img_minimal.backbone import Backbone
from img_minimal.cli import check
from img_minimal.files import Clock, as_pictures, from_pil, to_pil
from img_minimal.hub.parts import open_parts
from img_minimal.mllm import GuidanceEncoder, guidance_features, padded
from img_minimal.presets import Preset, Sampling
from img_minimal.request import (
    Seeds,
    call_arguments,
    check_drawing,
    check_request,
    generators,
    numbers,
    renewed,
    select,
)

# A negative prompt may also be a list, one for each prompt.
SETTINGS = {field.name for field in fields(Sampling)} - {"negative_prompt"}


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
        parts = open_parts(pipe, mllm, aligner, preset, guidance, mllm_device, changes)
        self.backbone, self.guide, self.aligner, preset = parts
        self.turns = self.backbone.turns
        models = [self.backbone.branch, self.backbone.image_prompt, self.aligner]
        # Guidance by text has no model of its own; an MLLM on its own device stays there.
        self.guide_takes_turns = hasattr(self.guide, "model") and mllm_device is None
        if self.guide_takes_turns:
            models.append(self.guide.model)
        self.turns.settle(self.backbone.pipe, *models)
        self.passes, self.mllm_batch = preset.sampling.passes, preset.models.mllm_batch
        self.clock = Clock()  # seconds of each step so far

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
        seeds = numbers(seed, len(prompts)) if generator is None else generator
        with self.drawing(**settings):
            stages = self.stages(prompts, seeds, one_look=one_look, call=call)
            initial, last = map(to_pil, stages)
            said = [""] * len(initial)
            if hasattr(self.guide, "explain"):
                asked = numbers(seeds, len(prompts))
                said = self.explain(initial, prompts[: len(initial)], asked[: len(initial)])
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
        sampling, count = self.backbone.sampling, len(prompts)
        check_drawing(prompts, seeds, sampling, one_look, call or {})
        looked = prompts[:1] if one_look else prompts
        asked = numbers(seeds, count)[: len(looked)]
        first = generators(seeds)
        noise = renewed(first)
        # Steps and number of the images of each stage.
        plan = [(sampling.draft_steps or sampling.steps, len(looked))] * rounds
        plan.append((sampling.steps, count))
        kept: dict[int, Tensor] = {}
        if whole or start is not None:
            plan[0] = plan[-1]
        if start is not None:
            kept = {i: from_pil([image])[0] for i, image in enumerate(as_pictures(start))}
        tokens: list[Tensor | None] = [None] * len(looked)  # what the latest images were drawn with
        stages: list[list[Tensor]] = []
        for k, (steps, drawn) in enumerate(plan):
            if k:
                pictures = to_pil(stages[-1][: len(looked)])
                aligned, wrong = self._look(pictures, looked, [seed + k - 1 for seed in asked])
                tokens = [new if bad else old for new, old, bad in zip(aligned, tokens, wrong)]
                # A right image that has all its steps stays; a right draft is drawn whole.
                same = steps == plan[k - 1][0]
                kept = {i: stages[-1][i] for i, bad in enumerate(wrong) if same and not bad}
            given = {**(call or {}), "prompt": prompts, "generator": renewed(noise) if k else first}
            each = tokens * drawn if one_look else tokens
            label = f"round {k}" if k else "initial"
            label = label if progress else None
            clock = self.clock("draw again" if k else "draw")
            with clock, self.drawing(steps=steps, draft_steps=None):
                stages.append(self._draw(given, each[:drawn], kept, label))
        return stages

    def _draw(
        self,
        call: dict[str, object],
        tokens: list[Tensor | None],
        kept: dict[int, Tensor],
        progress: str | None,
    ) -> list[Tensor]:
        """Draw the images that are not `kept`, each with its tokens or without: one for each."""
        images, count = dict(kept), len(call["prompt"])
        left = [i for i in range(len(tokens)) if i not in kept]
        for guided in (False, True):
            rows = [i for i in left if (tokens[i] is not None) == guided]
            if rows:
                given = torch.stack([tokens[i] for i in rows]) if guided else None
                own = select(call, rows, count)
                prompts, seeds = own.pop("prompt"), own.pop("generator")
                drawn = self.backbone.draw(prompts, seeds, given, call=own, progress=progress)
                images |= zip(rows, drawn)
        return [images[i] for i in range(len(tokens))]

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
        guidance, mask = self.guidance(pictures, prompts, numbers(seeds, len(pictures)))
        return self.correct(self.backbone.tokens(pictures), guidance, mask, passes)

    def guidance(
        self,
        images: list[Image],
        prompts: list[str],
        seeds: Sequence[int],
        progress: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Look (step 2): guidance features h (B, L, H) and mask (B, L). A seed draws a question."""
        request = self._asked(images, prompts, seeds)
        return padded(*guidance_features(self.guide, *request, self.mllm_batch, progress))

    def finds_wrong(self, guidance: Tensor, mask: Tensor) -> list[bool]:
        """Return True for each image, by its guidance features, that the MLLM finds wrong."""
        asks = hasattr(self.guide, "finds_wrong")
        check(asks, "only_wrong asks an MLLM what is wrong, and guidance by text has none")
        self._bring_guide()
        return self.guide.finds_wrong(guidance, mask)

    def correct(
        self, tokens: Tensor, guidance: Tensor, mask: Tensor, passes: int | None = None
    ) -> Tensor:
        """Align (step 3): tokens (B, N, D) -> f(h, c), (B, N, D)."""
        self.turns.bring(self.aligner)
        passes = self.passes if passes is None else passes
        return align(self.aligner, tokens, guidance, mask, passes)

    def explain(self, images: list[Image], prompts: list[str], seeds: Sequence[int]) -> list[str]:
        """Decode what the MLLM says about images. For inspection only."""
        return self.guide.explain(*self._asked(images, prompts, seeds))

    def satisfaction(
        self, images: list[Image], prompts: list[str], seeds: Sequence[int]
    ) -> list[float]:
        """Compute the log-probability that the MLLM says "nothing" is wrong with each image."""
        return self.guide.satisfaction(*self._asked(images, prompts, seeds), self.mllm_batch)

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

    def _asked(
        self, images: list[Image], prompts: list[str], seeds: Sequence[int]
    ) -> tuple[list[Image], list[str], Sequence[int]]:
        """Bring the MLLM for a question about each image. Raises UserError for other numbers."""
        check_request(prompts, seeds, images)
        self._bring_guide()
        return as_pictures(images), prompts, seeds

    def _bring_guide(self) -> None:
        if self.guide_takes_turns:
            self.turns.bring(self.guide.model)


def load_img(preset: Preset | str, **options: object) -> IMG:
    """Open the whole method by a preset or its name; `options` are those of `IMG`."""
    return IMG(preset=preset, **options)
