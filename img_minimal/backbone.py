"""What IMG needs of a text-to-image model: draw, with or without image tokens, and make tokens.

sdxl.py and flux.py implement it; the method never sees a UNet. A backbone is a diffusers
pipeline plus an IP-Adapter in two halves: the *image prompt* turns images into tokens, the *branch*
lets the network attend to them.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from img_minimal.cli import check
from img_minimal.devices import Precision, Turns, best_device, compute_dtype, count_parameters
from img_minimal.files import as_pictures, check_finite, read_json
from img_minimal.hub.weights import opening
from img_minimal.presets import Models, Preset, Sampling
from img_minimal.request import (
    TENSORS,
    Call,
    Seeds,
    call_parameters,
    check_counts,
    generators,
    select,
)

CLASSES = {"sdxl": "SDXL", "flux": "Flux"}
PREFIXES = {"StableDiffusionXL": "sdxl", "Flux": "flux"}  # of the pipelines' names
NETWORKS = {"sdxl": "UNet2DConditionModel", "flux": "FluxTransformer2DModel"}
Shape = tuple[int, int]  # (N, D), of the tokens of one image
LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


class ImagePrompt(nn.Module):
    """Turn images into tokens: CLIP's vision model, then the adapter's projection `head`. Frozen.

    Subclasses add

        open(models, precision, device)   load from local files; raises UserError
        open_head(models)                 load the projection alone, without CLIP
        shape_of(head)                    (N, D) of one image, by the projection
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

    @property
    def token_shape(self) -> Shape:
        """(N, D) of one image."""
        return self.shape_of(self.head)

    def pixels(self, images: list[Image]) -> Tensor:
        """Normalise images to pixels (B, 3, S, S) in the encoder's dtype and on its device."""
        pixels = self.processor(images, return_tensors="pt").pixel_values
        return pixels.to(self.encoder.device, self.encoder.dtype)


class Backbone:
    """A frozen text-to-image model that can also attend to image tokens.

    `sampling` holds the current settings of drawing; `turns` decides what is on the device. Drawing
    is the pipeline's own call, so its scheduler, VAE, LoRAs, hooks and caches stay its own.
    Subclasses add

        open_pipe(models, precision)      load the diffusers pipeline
        open_branch(models, network)      load the adapter's branch for it
        read(prompts, call)               arguments of the call that say what to draw
        attending(inputs, tokens, weight) context in which the pipeline's call attends to
                                          (negative, positive) tokens; may change its `inputs`
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
        # One drawing at a time: a pipeline keeps its state, and a network its tokens.
        self.lock = LOCKS.setdefault(getattr(pipe, self.network), RLock())

    @staticmethod
    def check_folder(base: Path) -> None:
        """Raise UserError for settings of another kind of pipeline."""

    @staticmethod
    def check_pipe(pipe: DiffusionPipeline, location: str) -> None:
        """Raise UserError for parts of a pipeline that do not fit each other."""

    def draw(
        self,
        prompts: list[str],
        seeds: Seeds,
        tokens: Tensor | None = None,
        *,
        scale: float | None = None,
        scale_end: float | None = None,
        call: Call | None = None,
        progress: str | None = None,
    ) -> Tensor:
        """Draw one image per prompt: (B, 3, H, W) in [0, 1] on the CPU.

        Each seed has its own CPU generator, so it gives the same noise alone and in a batch, in the
        first pass and in the second, on every device. `tokens` (B, N, D) are weighted by `scale` in
        the network's first call and `scale * scale_end` in its last one, linearly in between; in
        the unconditional half of classifier-free guidance the tokens of "no image" take their
        place. `call` are further arguments of the pipeline's call, see `select`. Raises UserError
        for lengths and sizes that do not fit, or if an image is not finite.
        """
        sampling, device, count = self.sampling, self.turns.device, len(prompts)
        check_counts(prompts, seeds=seeds)
        self.check_size(sampling)
        scale = sampling.scale if scale is None else scale
        scale_end = sampling.scale_end if scale_end is None else scale_end
        guided = tokens is not None and scale != 0
        expected = (count, *self.token_shape)
        if guided and tokens.shape != expected:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected {expected}")
        together = isinstance(seeds, torch.Generator)
        starts = range(0, count, count if together else sampling.draw_batch)
        noise = {"generator": generators(seeds)}
        bar = tqdm(
            total=len(starts) * sampling.steps,
            desc=progress,
            disable=progress is None,
            leave=False,
            delay=1,
        )
        images = []
        with self.lock, bar:
            negative = self.negative_tokens().to(device) if guided else None
            inputs = self.read(prompts, call or {}) | noise
            for start in starts:
                rows = range(count)[start : start + starts.step]
                both = None
                if guided:
                    positive = tokens[start : start + starts.step].to(device)
                    both = negative.to(positive).expand_as(positive), positive
                chosen = select(inputs, rows, count)
                for name in TENSORS:
                    if isinstance(chosen.get(name), list):
                        chosen[name] = torch.cat(chosen[name]).to(device)
                scales = scale, scale * scale_end
                with torch.no_grad(), self.precision.sampling(device):
                    drawn = self.draw_batch(chosen, both, scales, start, bar)
                check_finite(drawn, start)
                images.append(drawn.float().cpu())
        return torch.cat(images)

    def draw_batch(
        self,
        inputs: Call,
        tokens: tuple[Tensor, Tensor] | None,
        scales: tuple[float, float],
        first: int,
        bar: tqdm,
    ) -> Tensor:
        """Draw a batch (B, 3, H, W) by the pipeline's call, guided by `tokens`: those of "no image"
        and of the images. `first` numbers the first image in messages."""
        weight = torch.tensor(scales[0])  # of the tokens, read in every call of the network
        theirs = inputs.pop("callback_on_step_end", None)
        names = inputs.pop("callback_on_step_end_tensor_inputs", [])
        names = ["latents", *getattr(theirs, "tensor_inputs", names)]

        def after_step(pipe: DiffusionPipeline, step: int, timestep: object, tensors: dict) -> dict:
            bar.update()
            changed = theirs(pipe, step, timestep, tensors) if theirs else {}
            calls = pipe.num_timesteps  # more than steps where the scheduler's order is 2
            if step + 1 < calls:
                weight.fill_(torch.linspace(*scales, calls)[step + 1])
                if not getattr(pipe, "_interrupt", False):
                    return changed
            latents = changed.get("latents", tensors["latents"])
            check_finite(latents, first)
            # The VAE may be in another dtype than the network.
            return changed | {"latents": latents.to(pipe.vae.dtype)}

        sampling = self.sampling
        own = {
            "num_inference_steps": sampling.steps,
            "guidance_scale": sampling.guidance_scale,
            "height": sampling.height,
            "width": sampling.width,
            "output_type": "pt",
            "callback_on_step_end": after_step,
            "callback_on_step_end_tensor_inputs": names,
        }
        with self.attending(inputs, tokens, weight):
            return self.pipe(**own, **inputs).images

    @classmethod
    def check_size(cls, sampling: Sampling) -> None:
        """Raise UserError for sizes that the model would cut."""
        for name in ("height", "width"):
            size = getattr(sampling, name)
            check(
                (size or 0) % cls.multiple == 0,
                f"--{name} is {size}, this model draws multiples of {cls.multiple}; try 1024",
            )

    @property
    def token_shape(self) -> Shape:
        """(N, D) of one image's tokens."""
        return self.image_prompt.token_shape

    def tokens(self, images: list[Image]) -> Tensor:
        """Compute the image tokens (B, N, D) of images."""
        self.turns.bring(self.image_prompt)
        size = self.preset.models.encode_batch
        batches = [as_pictures(images[k : k + size]) for k in range(0, len(images), size)]
        return torch.cat([self.image_prompt.tokens(pictures).cpu() for pictures in batches])

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
    models = preset.models
    kind.check_size(preset.sampling)
    if pipe is None:
        turns = Turns(best_device(), models.offload)
        precision = Precision.named(models.dtype, turns.device)
    else:
        network = getattr(pipe, kind.network)
        own = getattr(network, "encoder_hid_proj", None)
        check(own is None, "this pipeline has an IP-Adapter; call pipe.unload_ip_adapter() first")
        # The pipeline's own, for offloaded modules lie on the meta device.
        turns, dtype = Turns(pipe._execution_device), compute_dtype(network)
        precision = Precision(dtype, dtype, dtype)
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
    """Load only what turns images into tokens, from local files. Raises UserError."""
    device = best_device()
    precision = Precision.named(models.dtype, device)
    return backbone_class(kind).image_prompts.open(models, precision, device)


def check_adapter(kind: str, models: Models) -> None:
    """Raise UserError for an IP-Adapter of another base, by the base's settings alone."""
    backbone = backbone_class(kind)
    backbone.check_folder(Path(models.base))
    folder = Path(models.unet or f"{models.base}/{backbone.network}")
    settings = read_json(folder / "config.json", dict, "download it again")
    with opening(folder, backbone.network), torch.device("meta"):
        network = getattr(diffusers, str(settings.get("_class_name"))).from_config(settings)
        backbone.open_branch(models, network)


def announced_head(kind: str, models: Models) -> tuple[int, Shape]:
    """Count the parameters of the adapter's head; also return the tokens' (N, D).

    Without loading CLIP. Raises UserError if the adapter is damaged or of another kind.
    """
    with opening(models.ip_adapter, "IP-Adapter of this model"):
        image_prompts = backbone_class(kind).image_prompts
        head = image_prompts.open_head(models)
        return count_parameters(head), image_prompts.shape_of(head)


def unseen_end(tokenizer: Any, prompt: str, limit: int) -> str:
    """Return the end of the prompt beyond `limit` tokens, "" if there is none."""
    offsets = tokenizer(prompt, return_offsets_mapping=True).offset_mapping
    starts = [start for start, _ in offsets]
    # Both counts include the begin and end tokens; the last token seen is the end token.
    return prompt[starts[limit - 1] :] if len(starts) > limit else ""


def pipeline_kind(pipe: object) -> str:
    """Return "sdxl" or "flux" for a pipeline that IMG can go around. Raises UserError."""
    names = [base.__name__ for base in type(pipe).__mro__]
    takes = call_parameters(pipe)
    # Perturbed-attention guidance has three halves.
    fits = "callback_on_step_end" in takes and "pag_scale" not in takes
    for prefix, kind in PREFIXES.items():
        network = getattr(pipe, backbone_class(kind).network, None)
        network = getattr(network, "_orig_mod", network)  # as torch.compile wraps it
        named = any(name.startswith(prefix) for name in names)
        if fits and named and type(network).__name__ == NETWORKS[kind]:
            return kind
    expected = "SDXL's and FLUX.1's pipelines (text, img2img, inpaint, ControlNet)"
    check(False, f"IMG goes around {expected}, and this is a {names[0]}")
