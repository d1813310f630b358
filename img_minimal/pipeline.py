"""IMG from end to end (Fig. 2): draw, look, align, draw again with the same seed.

    prompt --backbone--> image --MLLM--> h  \\
                           |                 aligner --> tokens --backbone, same prompt and seed--> better image
                           +--image prompt--> c_l /

Nothing here knows which text-to-image model draws, where files are, or what a command line is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from img_minimal.aligner import ImplicitAligner, align
from img_minimal.around import open_around
from img_minimal.backbones import Backbone
from img_minimal.mllm import Guide, guidance_features
from img_minimal.runtime.images import to_pil


@dataclass(frozen=True)
class IMGOutput:
    """One entry for each prompt: the first images, what the MLLM said about them, and the last images."""

    initial: list[Image]
    said: list[str]
    images: list[Image]


class IMG:
    """The whole method: `img = load_img("tiny-sdxl")`, then `img("a red circle", seed=0).images`.

    Around a pipeline of one's own: `IMG(pipe)`, or `IMG(pipe, mllm="llava-hf/...", aligner="aligner.safetensors")`.
    """

    def __init__(
        self,
        pipe: Backbone | DiffusionPipeline,
        mllm: Guide | str | None = None,
        aligner: ImplicitAligner | str | None = None,
        passes: int | None = None,
        mllm_batch: int | None = None,
        *,
        preset: str | None = None,
        mllm_device: torch.device | str | None = None,
        **changes: object,
    ):
        """A diffusers pipeline draws with its own scheduler, VAE, LoRAs, types, device and hooks; only what it lacks
        is opened beside it. `mllm` and `aligner` are the things themselves, or places of files; `preset` ("sdxl", or
        "flux" for a FluxPipeline) says where the rest is, and `changes` replace what it says: ip_adapter,
        image_encoder, resampler, questions, scale, scale_end. With a backbone, all three are needed.

        `passes`: applications of the aligner; `mllm_batch`: images that the MLLM sees at once.
        Raises UserError for a pipeline of another kind, or files that are missing or do not belong together.
        """
        if isinstance(pipe, DiffusionPipeline):
            pipe, mllm, aligner, chosen = open_around(pipe, mllm, aligner, preset, mllm_device, changes)
            passes, mllm_batch = passes or chosen.passes, mllm_batch or chosen.mllm_batch
        self.backbone = pipe
        self.guide = mllm
        self.aligner = aligner.eval()
        self.passes = passes or 1
        self.mllm_batch = mllm_batch or 64
        self.placement = pipe.placement
        self.placement.add("aligner", aligner)
        self.takes_turns = hasattr(mllm, "model") and mllm_device is None  # guidance by text has no model of its own
        if self.takes_turns:
            self.placement.add("mllm", mllm.model)

    def _bring_guide(self) -> None:
        if self.takes_turns:
            self.placement.bring("mllm", self.guide.model)

    def guidance(
        self, images: list[Image], prompts: list[str], seeds: Sequence[int], progress: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Step 2: guidance features h (B, L, H) and their mask (B, L). An image's seed draws the question about it."""
        self._bring_guide()
        return guidance_features(self.guide, images, prompts, seeds, self.mllm_batch, progress)

    def correct(self, tokens: Tensor, features: Tensor, mask: Tensor, passes: int | None = None) -> Tensor:
        """Step 3: f(h, c), tokens (B, N, D) -> aligned tokens (B, N, D)."""
        self.placement.bring("aligner", self.aligner)
        return align(self.aligner, tokens, features, mask, passes or self.passes)

    def align(
        self,
        images: Tensor | Image | list[Image],
        prompts: str | list[str],
        seeds: Sequence[int] | int = 0,
        passes: int | None = None,
    ) -> Tensor:
        """Steps 2 and 3: images from anywhere, (B, 3, H, W) in [0, 1] or PIL -> aligned tokens (B, N, D)."""
        pictures = to_pil(images) if isinstance(images, Tensor) else images if isinstance(images, list) else [images]
        prompts = [prompts] * len(pictures) if isinstance(prompts, str) else prompts
        seeds = [seeds + k for k in range(len(pictures))] if isinstance(seeds, int) else seeds
        features, mask = self.guidance(pictures, prompts, seeds)
        return self.correct(self.backbone.tokens(pictures), features, mask, passes)

    def explain(self, images: list[Image], prompts: list[str], seeds: Sequence[int]) -> list[str]:
        """What the MLLM answers in words; needed by people, not by the method."""
        self._bring_guide()
        return self.guide.explain(images, prompts, seeds)

    def satisfaction(self, images: list[Image], prompts: list[str], seeds: Sequence[int]) -> list[float]:
        """Log-probability that the MLLM says "nothing" is wrong, of each image."""
        self._bring_guide()
        return self.guide.satisfaction(images, prompts, seeds, self.mllm_batch)

    def better(self, first: list[Image], second: list[Image], prompts: list[str], seeds: Sequence[int]) -> list[bool]:
        """Of each pair of images, whether the MLLM is more content with the second one. Costs no drawing."""
        scores = (self.satisfaction(images, prompts, seeds) for images in (first, second))
        return [after > before for before, after in zip(*scores)]

    def stages(self, prompts: list[str], seeds: list[int], *, rounds: int = 1, progress: bool = False) -> list[Tensor]:
        """Initial images and those of each round, `rounds + 1` tensors (B, 3, H, W) in [0, 1].

        Every round looks at the latest images and draws again from the same seeds.
        """
        images = [self.backbone.draw(prompts, seeds, progress="initial" if progress else None)]
        for k in range(rounds):
            tokens = self.align(images[-1], prompts, [seed + k for seed in seeds])
            title = f"round {k + 1}" if progress else None
            images.append(self.backbone.draw(prompts, seeds, tokens, progress=title))
        return images

    def __call__(
        self,
        prompt: str | list[str],
        seed: int = 0,
        *,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> IMGOutput:
        """Draw, look, align, draw again. The names are diffusers'; what is not given is the preset's.

        The images of several prompts have consecutive seeds, the first one `seed`, or that of a `generator`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seed = seed if generator is None else generator.initial_seed()
        seeds = [seed + k for k in range(len(prompts))]
        changes = dict(steps=num_inference_steps, guidance_scale=guidance_scale, negative_prompt=negative_prompt,
                       height=height, width=width)  # fmt: skip
        with self.drawing(**{name: value for name, value in changes.items() if value is not None}):
            initial, last = map(to_pil, self.stages(prompts, seeds))
        said = self.explain(initial, prompts, seeds) if hasattr(self.guide, "explain") else [""] * len(prompts)
        return IMGOutput(initial, said, last)

    @contextmanager
    def drawing(self, **changes: object) -> Iterator[None]:
        """Within this context other numbers of drawing hold: fields of `Sampling`."""
        before = self.backbone.sampling
        self.backbone.sampling = replace(before, **changes)
        try:
            yield
        finally:
            self.backbone.sampling = before
