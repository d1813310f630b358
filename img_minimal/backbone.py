"""What IMG needs of a text-to-image model: draw, with or without image tokens, and make tokens.

sdxl.py and flux.py implement it; the method never sees a UNet. A backbone is a diffusers
pipeline plus an IP-Adapter in two halves: the *image prompt* turns images into tokens, the *branch*
lets the network attend to them.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from img_minimal.cli import check
from img_minimal.devices import Precision, Turns, best_device
from img_minimal.files import check_finite, read_json
from img_minimal.hub.weights import WeightsError, opening
from img_minimal.presets import Models, Preset

CLASSES = {"sdxl": "SDXL", "flux": "Flux"}
PIPELINES = {"StableDiffusionXLPipeline": "sdxl", "FluxPipeline": "flux"}


class ImagePrompt(nn.Module):
    """Turn images into tokens: CLIP's vision model, then the adapter's projection `head`. Frozen.

    Subclasses add

        open(models, precision, device)   load from local files; raises WeightsError
        head_size(models)                 parameters of the head, and (N, D), without CLIP
        token_shape                       (N, D) of one image
        tokens(images)                    image tokens (B, N, D) in fp32
        negative()                        tokens (1, N, D) of "no image", for guidance
        token_maps(images)                where each token reads its image, (B, N, side, side)
    """

    def __init__(
        self,
        encoder: CLIPVisionModelWithProjection,
        processor: CLIPImageProcessorPil,
        head: nn.Module,
        precision: Precision,
    ):
        super().__init__()
        self.encoder, self.processor = encoder, processor
        self.head, self.precision = head, precision
        self.eval().requires_grad_(False)

    def pixels(self, images: list[Image]) -> Tensor:
        """Normalise images to pixels (B, 3, S, S) in the encoder's dtype and on its device."""
        pixels = self.processor(images, return_tensors="pt").pixel_values
        return pixels.to(self.encoder.device, self.encoder.dtype)


class Backbone:
    """A frozen text-to-image model that can also attend to image tokens.

    `sampling` holds the current settings of drawing; `turns` decides what is on the device.
    Subclasses add

        open_pipe(models, precision)      load the diffusers pipeline
        open_branch(models, network)      load the adapter's branch for it
        read(prompts)                     prepare each prompt for `draw_batch`
        draw_batch(texts, generators, tokens, scales, bar)
                                          draw (B, 3, H, W), guided by (negative, positive) tokens
        text_states(prompts)              the text encoder's states (B, L, text_width)
        truncated_part(prompt)            the end that the text encoders do not see, and their limit
    """

    multiple = 8  # height and width must be multiples of this
    network = "unet"  # the pipeline's name for the part that attends to the tokens
    image_prompts = ImagePrompt

    def __init__(
        self,
        pipe: DiffusionPipeline,
        image_prompt: ImagePrompt,
        branch: nn.Module,
        preset: Preset,
        turns: Turns,
    ):
        self.pipe, self.image_prompt, self.branch = pipe, image_prompt, branch
        self.preset, self.sampling, self.turns = preset, preset.sampling, turns
        self.precision = image_prompt.precision

    @staticmethod
    def check_folder(base: Path) -> None:
        """Raise WeightsError for settings of another kind of pipeline."""

    @staticmethod
    def check_pipe(pipe: DiffusionPipeline, location: str) -> None:
        """Raise WeightsError for parts of a pipeline that do not fit each other."""

    def draw(
        self,
        prompts: list[str],
        seeds: list[int],
        tokens: Tensor | None = None,
        *,
        scale: float | None = None,
        scale_end: float | None = None,
        progress: str | None = None,
    ) -> Tensor:
        """Draw one image per prompt: (B, 3, H, W) in [0, 1] on the CPU.

        Each image has its own CPU generator, so a seed gives the same noise alone and in a batch,
        in the first pass and in the second, on every device. `tokens` (B, N, D) are weighted by
        `scale` in the first step and `scale * scale_end` in the last one, linearly in between; in
        the unconditional half of classifier-free guidance the tokens of "no image" take their
        place. Raises UserError if an image is not finite.
        """
        sampling, device = self.sampling, self.turns.device
        scale = sampling.scale if scale is None else scale
        scale_end = sampling.scale_end if scale_end is None else scale_end
        scales = torch.linspace(scale, scale * scale_end, sampling.steps).tolist()
        guided = tokens is not None and scale != 0
        expected = (len(prompts), *self.token_shape)
        if guided and tokens.shape != expected:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected {expected}")
        negative = self.negative_tokens().to(device) if guided else None
        texts = self.read(prompts)
        starts = range(0, len(prompts), sampling.draw_batch)
        bar = tqdm(
            total=len(starts) * sampling.steps,
            desc=progress,
            disable=progress is None,
            leave=False,
            delay=1,
        )
        images = []
        for start in starts:
            batch = slice(start, start + sampling.draw_batch)
            self.first_image = start  # its number, for messages
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
            both = None
            if guided:
                positive = tokens[batch].to(device)
                both = negative.to(positive).expand_as(positive), positive
            with torch.no_grad(), self.precision.sampling(device):
                drawn = self.draw_batch(texts[batch], generators, both, scales, bar)
            check_finite(drawn, start)
            images.append(drawn.float().cpu())
        bar.close()
        return torch.cat(images)

    @property
    def token_shape(self) -> tuple[int, int]:
        """(N, D) of one image's tokens."""
        return self.image_prompt.token_shape

    def tokens(self, images: list[Image]) -> Tensor:
        """Compute the image tokens (B, N, D) of images."""
        self.turns.bring(self.image_prompt)
        size = self.preset.models.encode_batch
        tokens = []
        for k in range(0, len(images), size):
            tokens.append(self.image_prompt.tokens(images[k : k + size]).cpu())
        return torch.cat(tokens)

    def negative_tokens(self) -> Tensor:
        """Compute the tokens (1, N, D) of "no image"."""
        self.turns.bring(self.image_prompt)
        return self.image_prompt.negative()


def backbone_class(kind: str) -> type[Backbone]:
    """Return SDXL or Flux, importing only that module."""
    return getattr(import_module(f"img_minimal.{kind}"), CLASSES[kind])


def open_backbone(
    preset: Preset,
    pipe: DiffusionPipeline | None = None,
    loaded: Callable[[], object] = lambda: None,
) -> Backbone:
    """Load a backbone from local files, or wrap a loaded pipeline without moving or changing it.

    `loaded` is called after each part. Raises UserError for files that are missing or do not fit
    each other.
    """
    kind = backbone_class(preset.backbone)
    models, sampling = preset.models, preset.sampling
    for name, size in (("height", sampling.height), ("width", sampling.width)):
        fits = size is None or size % kind.multiple == 0
        check(fits, f"--{name} is {size}, this model draws multiples of {kind.multiple}; try 1024")
    if pipe is None:
        turns = Turns(best_device(), models.offload)
        precision = Precision.named(models.dtype, turns.device)
    else:
        network = getattr(pipe, kind.network)
        turns = Turns(get_module_execution_device(network))
        precision = Precision(network.dtype, network.dtype, network.dtype)
    image_prompt = kind.image_prompts.open(models, precision, turns.home)
    loaded()
    if pipe is None:
        pipe = kind.open_pipe(models, precision).to(turns.home)
        pipe.set_progress_bar_config(disable=True)
    loaded()
    kind.check_pipe(pipe, models.unet or models.base)
    branch = kind.open_branch(models, getattr(pipe, kind.network)).to(turns.home)
    branch.requires_grad_(False)
    loaded()
    return kind(pipe, image_prompt, branch, preset, turns)


def open_image_prompt(kind: str, models: Models) -> ImagePrompt:
    """Load only what turns images into tokens, from local files. Raises WeightsError."""
    device = best_device()
    precision = Precision.named(models.dtype, device)
    return backbone_class(kind).image_prompts.open(models, precision, device)


def check_adapter(kind: str, models: Models) -> None:
    """Raise UserError for an IP-Adapter of another base, by the base's settings alone."""
    backbone = backbone_class(kind)
    backbone.check_folder(Path(models.base))
    folder = Path(models.unet or f"{models.base}/{backbone.network}")
    settings = read_json(folder / "config.json", dict, "download it again", WeightsError)
    with opening(folder, backbone.network), torch.device("meta"):
        network = getattr(diffusers, str(settings.get("_class_name"))).from_config(settings)
        backbone.open_branch(models, network)


def announced_token_width(kind: str, models: Models) -> int:
    """Return D by the adapter's file, without loading CLIP. Raises UserError."""
    with opening(models.ip_adapter, "IP-Adapter of this model"):
        return backbone_class(kind).image_prompts.head_size(models)[1][1]


def unseen_end(tokenizer: Any, prompt: str, limit: int) -> str:
    """Return the end of the prompt beyond `limit` tokens, "" if there is none."""
    offsets = tokenizer(prompt, return_offsets_mapping=True).offset_mapping
    starts = [start for start, _ in offsets]
    # Both counts include the begin and end tokens; the last token seen is the end token.
    return prompt[starts[limit - 1] :] if len(starts) > limit else ""
