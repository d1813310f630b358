"""What IMG asks of a text-to-image model, whichever it is; a folder beside this file answers for one kind of model.

Each folder holds the same four names: `injection` (how image tokens enter its network), `image_prompt` (how an image
becomes tokens), `sampler` (how it draws), and `backbone` (the four opened and put together), beside `true_size`, the
public model's shapes. Nothing outside of them knows what a UNet is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol, Self

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from img_minimal.runtime.cli import check
from img_minimal.runtime.devices import Placement, Precision


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The numbers of drawing."""

    steps: int
    guidance_scale: float  # of classifier-free guidance; for FLUX.1-dev, which is distilled, its embedding
    true_cfg_scale: float = 1.0  # of classifier-free guidance beside the embedding, FLUX only
    scale: float  # of the image tokens in the second pass, at its first step
    scale_end: float  # share of it that is left at the last step, linear in between
    draw_batch: int  # images drawn at once
    encode_batch: int  # images that the vision encoder sees at once
    height: int | None = None  # pixels; None: the model's own size
    width: int | None = None
    negative_prompt: str | None = None  # None: as the model was made, for SDXL zeros and for FLUX the empty prompt

    def check_size(self, multiple: int) -> None:
        """Raises UserError, before anything is loaded, for a size that the model cannot draw."""
        for name, value in (("height", self.height), ("width", self.width)):
            fits = value is None or (value > 0 and value % multiple == 0)
            check(fits, f"--{name} is {value}, this model draws multiples of {multiple}; try 1024")


def check_injected(tokens: Tensor, width: int, scale: float | Tensor) -> None:
    """Raises ValueError unless tokens are (B, N, width), and the scale is a number, (), or one per sample, (B,)."""
    if tokens.ndim != 3 or tokens.shape[-1] != width:
        raise ValueError(f"image tokens have shape {tuple(tokens.shape)}, expected (batch, tokens, {width})")
    if isinstance(scale, Tensor) and scale.shape not in ((), tokens.shape[:1]):
        raise ValueError(f"scale has shape {tuple(scale.shape)}, expected a number or one per sample, ({len(tokens)},)")


class ImageTokenizer(Protocol):
    """What turns images into tokens; all that aligner training needs of a backbone."""

    token_shape: tuple[int, int]  # (N, D) of one image

    def tokens(self, images: list[Image]) -> Tensor:
        """Image tokens (B, N, D)."""

    def negative(self) -> Tensor:
        """The tokens (1, N, D) that stand for "no image" in classifier-free guidance."""


class Backbone(Protocol):
    """A frozen model that draws from text alone or with image tokens beside it."""

    image_prompt: ImageTokenizer
    sampling: Sampling
    placement: Placement  # knows the part "image_prompt", and those that draw
    text_width: int  # of the text's states, for the control that guides by text

    @classmethod
    def open(
        cls, files: Any, sampling: Sampling, precision: Precision, placement: Placement,
        loaded: Callable[[], object] = lambda: None,
    ) -> Self:  # fmt: skip
        """Open it from a preset whose locations are local paths; `loaded` is called after each of its models."""

    @classmethod
    def around(cls, pipe: DiffusionPipeline, files: Any, sampling: Sampling) -> Self:
        """The same around a pipeline that the caller has loaded, which is neither moved nor changed."""

    @staticmethod
    def open_tokenizer(files: Any, precision: Precision, device: torch.device) -> ImageTokenizer:
        """Open what turns images into tokens, and nothing else of it."""

    @staticmethod
    def token_width(files: Any) -> int | None:
        """D of the tokens by the adapter's file, before anything big is loaded; None if it cannot be told."""

    def draw(
        self, prompts: list[str], seeds: list[int], tokens: Tensor | None = None, *, scale: float | None = None,
        scale_end: float | None = None, progress: str | None = None,
    ) -> Tensor:  # fmt: skip
        """Images (B, 3, H, W) in [0, 1]; with `tokens` (B, N, D) as image prompt, at its own scale or another."""

    def text_states(self, prompts: list[str]) -> Tensor:
        """What the text encoders make of the prompts: (B, L, text_width)."""

    def truncated_part(self, prompt: str) -> tuple[str, int]:
        """(end of the prompt that the text encoders do not see, "" if there is none; how many tokens they see)."""

    # The same for all, given the above.

    @property
    def token_shape(self) -> tuple[int, int]:
        """(N, D) of one image's tokens."""
        return self.image_prompt.token_shape

    def tokens(self, images: list[Image], progress: str | None = None) -> Tensor:
        """Image tokens (B, N, D) of images."""
        self.placement.bring("image_prompt")
        size = self.sampling.encode_batch
        starts = tqdm(range(0, len(images), size), desc=progress, disable=progress is None, leave=False)
        return torch.cat([self.image_prompt.tokens(images[k : k + size]).cpu() for k in starts])

    def negative_tokens(self) -> Tensor:
        """The tokens (1, N, D) that stand for "no image" in classifier-free guidance."""
        self.placement.bring("image_prompt")
        return self.image_prompt.negative()


def computes_on(module: nn.Module) -> torch.device:
    """Where a model computes: where it lies or, if hooks of accelerate keep it elsewhere, where they bring it."""
    place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return module.device if place is None else torch.device(place)


CLASSES = {
    "sdxl": "img_minimal.backbones.sdxl.backbone:SDXLBackbone",
    "flux": "img_minimal.backbones.flux.backbone:FluxBackbone",
}


def unread_end(tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int) -> str:
    """The end of the prompt that an encoder of `limit` tokens does not see, "" if there is none."""
    starts = [start for start, _ in tokenizer(prompt, return_offsets_mapping=True).offset_mapping]
    # Both counts include the marks of the text's start and end; the last token seen is the mark of the end.
    return prompt[starts[limit - 1] :] if len(starts) > limit else ""


def true_size(kind: str) -> ModuleType:
    """The shapes of the public model behind a preset's `backbone`."""
    return import_module(f"img_minimal.backbones.{kind}.true_size")


def backbone_class(kind: str) -> type[Backbone]:
    """The class behind a preset's `backbone`; only its own folder is imported."""
    module, name = CLASSES[kind].split(":")
    return getattr(import_module(module), name)
