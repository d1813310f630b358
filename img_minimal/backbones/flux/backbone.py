"""FLUX.1-dev as IMG's backbone: the pipeline with XLabs' IP-Adapter, opened from files and put together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from diffusers import FluxPipeline
from torch import Tensor

from img_minimal.backbones import Backbone, Sampling, computes_on, unread_end
from img_minimal.backbones.flux.image_prompt import ImagePrompt, TokenProjection, load_ip_adapter
from img_minimal.backbones.flux.injection import ImageBranch
from img_minimal.backbones.flux.sampler import Condition, draw
from img_minimal.files.weights import WeightsError, fill, opening
from img_minimal.presets import Preset
from img_minimal.runtime.cli import check
from img_minimal.runtime.devices import Placement, Precision
from img_minimal.runtime.json_files import read_json

TEXT_TOKENS = 512  # that T5 reads; CLIP's 77 give one pooled vector only


@dataclass
class FluxBackbone(Backbone):
    """A backbone with its three parts and how it computes."""

    pipe: FluxPipeline
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
        """Load vision encoder and pipeline; with offloading T5 and CLIP make room once a prompt is encoded.

        Raises UserError if a file is missing or wrong, or of another FLUX.
        """
        sampling.check_size(16)
        check_kind(Path(files.base))
        check(not files.unet, f"--unet {files.unet}: FLUX has a transformer and no UNet; give --base another folder")
        state, ip_adapter = load_ip_adapter(files.ip_adapter)
        projection = TokenProjection.from_state_dict(state, files.ip_adapter)
        image_prompt = ImagePrompt.from_pretrained(files.image_encoder, projection, precision, placement.waiting)
        loaded()
        with opening(files.base, "FLUX pipeline"):
            pipe = FluxPipeline.from_pretrained(files.base, dtype={"default": precision.weights, "vae": torch.float32})
        loaded()
        pipe.set_progress_bar_config(disable=True)
        branch = ImageBranch.for_transformer(pipe.transformer, image_prompt.token_shape[1])
        fill(branch, {key: value.to(pipe.transformer.dtype) for key, value in ip_adapter.items()}, files.ip_adapter)
        loaded()
        placement.add("text", pipe.text_encoder, pipe.text_encoder_2)
        placement.add("diffusion", pipe.transformer, pipe.vae, branch)
        placement.add("image_prompt", image_prompt)
        return cls(pipe, branch.requires_grad_(False), image_prompt, sampling, precision, placement)

    @classmethod
    def around(cls, pipe: FluxPipeline, files: Preset, sampling: Sampling) -> Self:
        """Beside a pipeline that the caller has loaded; VAE, LoRAs, types and hooks stay as they are.

        The steps are the authors' (see sampler.py), of which the pipeline's scheduler gives the shift. Raises UserError
        if a file is missing or wrong, or does not fit the transformer.
        """
        sampling.check_size(16)
        check_guided(pipe.transformer.config, "this pipeline")
        device, dtype = computes_on(pipe.transformer), pipe.transformer.dtype
        precision = Precision(weights=dtype, mllm=dtype, compute=dtype)
        state, ip_adapter = load_ip_adapter(files.ip_adapter)
        projection = TokenProjection.from_state_dict(state, files.ip_adapter)
        image_prompt = ImagePrompt.from_pretrained(files.image_encoder, projection, precision, device)
        branch = ImageBranch.for_transformer(pipe.transformer, image_prompt.token_shape[1]).to(device)
        fill(branch, {key: value.to(dtype) for key, value in ip_adapter.items()}, files.ip_adapter)
        placement = Placement(device)
        placement.add("image_prompt", image_prompt)
        return cls(pipe, branch.requires_grad_(False), image_prompt, sampling, precision, placement)

    @staticmethod
    def open_tokenizer(files: Preset, precision: Precision, device: torch.device) -> ImagePrompt:
        """Vision encoder and projection alone. Raises UserError if a file is missing or wrong."""
        projection = TokenProjection.from_state_dict(load_ip_adapter(files.ip_adapter)[0], files.ip_adapter)
        return ImagePrompt.from_pretrained(files.image_encoder, projection, precision, device)

    @staticmethod
    def token_width(files: Preset) -> int | None:
        """D of the tokens by the adapter's file, before anything big is loaded. Raises UserError for other adapters."""
        state, _ = load_ip_adapter(files.ip_adapter)
        return TokenProjection.from_state_dict(state, files.ip_adapter).norm.normalized_shape[0]

    @property
    def text_width(self) -> int:
        """Width of T5's states."""
        return self.pipe.transformer.config.joint_attention_dim

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
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        scale = sampling.scale if scale is None else scale
        negative = None
        if tokens is not None and scale:
            negative = self.negative_tokens()
        unwanted = sampling.negative_prompt or ""
        encoded = {prompt: self._encode(prompt) for prompt in dict.fromkeys([*prompts, unwanted])}  # each text once
        self.placement.bring("diffusion")
        return draw(
            self.pipe,
            [encoded[prompt] for prompt in prompts],
            encoded[unwanted],
            seeds,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            true_cfg_scale=sampling.true_cfg_scale,
            height=sampling.height or side,
            width=sampling.width or side,
            branch=self.branch,
            tokens=tokens,
            negative=negative,
            scale=scale,
            scale_end=sampling.scale_end if scale_end is None else scale_end,
            precision=self.precision,
            batch_size=sampling.draw_batch,
            progress=progress,
        )

    @property
    def _text_limit(self) -> int:
        """How many tokens T5 is given."""
        return min(TEXT_TOKENS, self.pipe.tokenizer_2.model_max_length)

    @torch.no_grad()
    def _encode(self, prompt: str) -> Condition:
        """T5's states (1, 512, E), padded and without a mask, and CLIP's pooled embedding (1, W)."""
        self.placement.bring("text")
        device = computes_on(self.pipe.text_encoder)
        with self.precision.sampling(device):
            states, pooled, _ = self.pipe.encode_prompt(prompt, device=device, max_sequence_length=self._text_limit)
        return states, pooled

    def text_states(self, prompts: list[str]) -> Tensor:
        """T5's states (B, 512, 4096)."""
        return torch.cat([self._encode(prompt)[0] for prompt in prompts])

    def truncated_part(self, prompt: str) -> tuple[str, int]:
        """(end of the prompt that T5 does not see, "" if there is none; how many tokens it sees)."""
        return unread_end(self.pipe.tokenizer_2, prompt, self._text_limit), self._text_limit


def check_kind(base: Path) -> None:
    """Raises UserError, before anything big is loaded, if a folder is not FLUX.1-dev's kind of pipeline."""
    instead = "IMG's adapter and aligner are made for black-forest-labs/FLUX.1-dev"
    kind = read_json(base / "model_index.json", dict, instead, WeightsError).get("_class_name")
    if kind != "FluxPipeline":
        raise WeightsError(f"{base}: is a {kind}, not a FluxPipeline (FLUX.2, Kontext and others differ); {instead}")
    check_guided(read_json(base / "transformer" / "config.json", dict, instead, WeightsError), base)


def check_guided(settings: Mapping, place: str | Path) -> None:
    """Raises WeightsError for the configuration of a transformer without guidance embedding."""
    if not settings.get("guidance_embeds"):
        raise WeightsError(
            f"{place}: has no guidance embedding, as FLUX.1-schnell has none; IMG's adapter and aligner are made for "
            "black-forest-labs/FLUX.1-dev"
        )
