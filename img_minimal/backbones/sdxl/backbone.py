"""SDXL as IMG's backbone: the pipeline with its IP-Adapter, opened from files and put together."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from img_minimal.backbones import Backbone, Sampling, computes_on, unread_end
from img_minimal.backbones.sdxl.image_prompt import ImagePrompt, load_ip_adapter, own_projection
from img_minimal.backbones.sdxl.injection import ImageBranch
from img_minimal.backbones.sdxl.sampler import draw
from img_minimal.files.hub import variant
from img_minimal.files.weights import WeightsError, fill, opening
from img_minimal.presets import Preset
from img_minimal.runtime.devices import Placement, Precision


@dataclass
class SDXLBackbone(Backbone):
    """A backbone with its three parts and how it computes."""

    pipe: StableDiffusionXLPipeline
    branch: ImageBranch
    image_prompt: ImagePrompt
    sampling: Sampling
    precision: Precision
    placement: Placement

    @classmethod
    def open(
        cls,
        files: Preset,
        sampling: Sampling,
        precision: Precision,
        placement: Placement,
        loaded: Callable[[], object] = lambda: None,
    ) -> Self:
        """Load vision encoder, UNet and pipeline; the UNet once, from `files.unet` if that is given, else the base's.

        Raises UserError if a file is missing or wrong.
        """
        sampling.check_size(8)
        image_proj, ip_adapter = load_ip_adapter(files.ip_adapter, files.resampler)
        image_prompt = ImagePrompt.from_pretrained(
            files.image_encoder,
            image_proj,
            precision,
            placement.waiting,
            own_projection(files.ip_adapter, files.resampler),
        )
        loaded()
        unet_folder = files.unet or Path(files.base) / "unet"
        with opening(unet_folder, "UNet"):
            unet = UNet2DConditionModel.from_pretrained(
                unet_folder, dtype=precision.weights, variant=variant(unet_folder, precision.weights)
            )
        loaded()
        branch = ImageBranch.for_unet(unet, token_width=next(iter(ip_adapter.values())).shape[1])
        fill(branch, {key: value.to(unet.dtype) for key, value in ip_adapter.items()}, files.ip_adapter)
        with opening(files.base, "SDXL pipeline"):
            pipe = StableDiffusionXLPipeline.from_pretrained(
                files.base,
                unet=unet,
                add_watermarker=False,
                dtype={"default": precision.weights, "vae": torch.float32},
                variant=variant(files.base, precision.weights),
            )
        loaded()
        check_parts(pipe, unet_folder)
        pipe.set_progress_bar_config(disable=True)
        models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        placement.add("diffusion", *models, branch)
        placement.add("image_prompt", image_prompt)
        return cls(pipe, branch.requires_grad_(False), image_prompt, sampling, precision, placement)

    @classmethod
    def around(cls, pipe: StableDiffusionXLPipeline, files: Preset, sampling: Sampling) -> Self:
        """Beside a pipeline that the caller has loaded; scheduler, VAE, LoRAs, types and hooks stay as they are.

        Raises UserError if a file is missing or wrong, or does not fit the pipeline's UNet.
        """
        sampling.check_size(8)
        check_parts(pipe, "this pipeline")
        device, dtype = computes_on(pipe.unet), pipe.unet.dtype
        precision = Precision(weights=dtype, mllm=dtype, compute=dtype)
        image_proj, ip_adapter = load_ip_adapter(files.ip_adapter, files.resampler)
        negative_proj = own_projection(files.ip_adapter, files.resampler)
        image_prompt = ImagePrompt.from_pretrained(files.image_encoder, image_proj, precision, device, negative_proj)
        branch = ImageBranch.for_unet(pipe.unet, next(iter(ip_adapter.values())).shape[1], device)
        fill(branch, {key: value.to(dtype) for key, value in ip_adapter.items()}, files.ip_adapter)
        placement = Placement(device)
        placement.add("image_prompt", image_prompt)
        return cls(pipe, branch.requires_grad_(False), image_prompt, sampling, precision, placement)

    @staticmethod
    def open_tokenizer(files: Preset, precision: Precision, device: torch.device) -> ImagePrompt:
        """Vision encoder and Resampler alone. Raises UserError if a file is missing or wrong."""
        image_proj, _ = load_ip_adapter(files.ip_adapter, files.resampler)
        return ImagePrompt.from_pretrained(files.image_encoder, image_proj, precision, device)

    @staticmethod
    def token_width(files: Preset) -> int | None:
        """D of the tokens by the adapter's file, before anything big is loaded; None if it has another layout."""
        projection = load_ip_adapter(files.ip_adapter, files.resampler)[0].get("proj_out.weight")
        return None if projection is None else projection.shape[0]

    @property
    def text_width(self) -> int:
        """Width of the text's states."""
        return self.pipe.unet.config.cross_attention_dim

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
        """Images (B, 3, H, W) in [0, 1]; with `tokens` (B, N, D) as image prompt, at its own scale or another."""
        sampling = self.sampling
        scale = sampling.scale if scale is None else scale
        negative = None
        if tokens is not None and scale:
            negative = self.negative_tokens()
        self.placement.bring("diffusion")
        return draw(
            self.pipe,
            prompts,
            seeds,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            branch=self.branch,
            tokens=tokens,
            negative=negative,
            scale=scale,
            scale_end=sampling.scale_end if scale_end is None else scale_end,
            precision=self.precision,
            height=sampling.height,
            width=sampling.width,
            negative_prompt=sampling.negative_prompt,
            batch_size=sampling.draw_batch,
            progress=progress,
        )

    @torch.no_grad()
    def text_states(self, prompts: list[str]) -> Tensor:
        """Both text encoders' states side by side, (B, 77, 2048)."""
        self.placement.bring("diffusion")
        return self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0]

    def truncated_part(self, prompt: str) -> tuple[str, int]:
        """(end of the prompt that the text encoders do not see, "" if there is none; how many tokens they see)."""
        tokenizers = self.pipe.tokenizer, self.pipe.tokenizer_2
        ends = [unread_end(tokenizer, prompt, tokenizer.model_max_length) for tokenizer in tokenizers]
        return max(ends, key=len), tokenizers[1].model_max_length


def check_parts(pipe: StableDiffusionXLPipeline, unet_folder: str | Path) -> None:
    """Raises WeightsError if a UNet is not one that draws from text with this pipeline's other parts.

    Inpainting UNets take more channels, and the refiner's reads another text encoder and other sizes.
    """
    unet, encoders = pipe.unet.config, (pipe.text_encoder, pipe.text_encoder_2)
    instead = "use a UNet of SDXL that draws from text alone"
    channels = pipe.vae.config.latent_channels
    if (unet.in_channels, unet.out_channels) != (channels, channels):
        raise WeightsError(
            f"{unet_folder}: its UNet takes {unet.in_channels} channels and gives {unet.out_channels}, the VAE has "
            f"{channels}: it is made for inpainting or for another VAE; {instead}"
        )
    if None in encoders:
        raise WeightsError(f"{unet_folder}: the pipeline lacks a text encoder, as the refiner does; {instead}")
    text = sum(encoder.config.hidden_size for encoder in encoders)
    added = pipe.text_encoder_2.config.projection_dim + 6 * (unet.addition_time_embed_dim or 0)
    if (unet.cross_attention_dim, unet.projection_class_embeddings_input_dim) != (text, added):
        raise WeightsError(
            f"{unet_folder}: its UNet reads text of width {unet.cross_attention_dim}, the text encoders give {text}: "
            f"it is the refiner's or of another model; {instead}"
        )
