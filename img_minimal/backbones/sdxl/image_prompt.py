"""The image prompt of IP-Adapter Plus: image -> CLIP vision features -> Resampler -> 16 tokens.

IMG aligns these tokens, so they are its c_l, c_w and f(c). Module names are those of the public IP-Adapter files.
"""

import math
from pathlib import Path
from typing import Self

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from img_minimal.attention import PerceiverLayers, layer_sizes
from img_minimal.files.hub import variant
from img_minimal.files.weights import WeightsError, fill, opening, read_weights
from img_minimal.runtime.devices import Precision


class Resampler(nn.Module):
    """Learned queries that read P patch features and become N tokens; the defaults are those of SDXL's adapter."""

    def __init__(
        self,
        feature_width: int,
        token_width: int,
        tokens: int = 16,
        width: int = 1280,
        depth: int = 4,
        heads: int = 20,
        head_dim: int = 64,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, tokens, width) / width**0.5)  # the N queries
        self.proj_in = nn.Linear(feature_width, width)
        self.layers = PerceiverLayers(width, depth, heads, head_dim)
        self.proj_out = nn.Linear(width, token_width)
        self.norm_out = nn.LayerNorm(token_width)

    def forward(self, features: Tensor) -> Tensor:
        """Patch features (B, P, W) -> image tokens (B, N, D)."""
        latents = self.latents.expand(len(features), -1, -1)  # (B, N, width)
        return self.norm_out(self.proj_out(self.layers(latents, self.proj_in(features))))

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], head_dim: int = 64) -> Self:
        """A Resampler of the sizes and dtype that the `image_proj` part of an IP-Adapter file has.

        Raises WeightsError if the state dict is that of another kind of image projection.
        """
        try:
            _, tokens, width = state["latents"].shape
            feature_width, token_width = state["proj_in.weight"].shape[1], state["proj_out.weight"].shape[0]
            sizes = layer_sizes(state, head_dim)
        except KeyError as key:
            raise WeightsError(f"image_proj: lacks {key}; use the weights of an IP-Adapter *Plus*") from None
        with torch.device("meta"):  # no time spent on initial values that the file replaces
            resampler = cls(feature_width, token_width, tokens, width, **sizes)
        fill(resampler, state, "image_proj")
        return resampler


class ImagePrompt(nn.Module):
    """A frozen image -> tokens pipeline. To train a Resampler, call `resampler(features)` itself."""

    def __init__(
        self,
        encoder: CLIPVisionModelWithProjection,
        processor: CLIPImageProcessorPil,
        resampler: Resampler,
        precision: Precision,
        negative_resampler: Resampler | None = None,
    ):
        """`negative_resampler`: makes the tokens of "no image" only; without one `resampler` makes them, too."""
        super().__init__()
        self.encoder = encoder
        self.processor = processor
        self.resampler = resampler
        self.negative_resampler = negative_resampler or resampler
        self.precision = precision

    @classmethod
    def from_pretrained(
        cls,
        encoder_dir: str | Path,
        image_proj: dict[str, Tensor],
        precision: Precision,
        device: torch.device | str = "cpu",
        negative_proj: dict[str, Tensor] | None = None,
    ) -> Self:
        """`encoder_dir`: a local folder with a CLIP vision model; `image_proj`: from `load_ip_adapter`.

        `negative_proj` comes from `own_projection`.

        The encoder gets the weights' dtype, the Resampler is small and stays in fp32. IP-Adapter's own image_encoder
        folder has no processor settings; CLIP's defaults are meant then.
        Raises WeightsError if the folder holds no such model, or `image_proj` is no Resampler.
        """
        dtype = precision.weights
        resampler = Resampler.from_state_dict({key: value.float() for key, value in image_proj.items()})
        settled = (Path(encoder_dir) / "preprocessor_config.json").exists()
        with opening(encoder_dir, "CLIP vision model"):
            processor = CLIPImageProcessorPil.from_pretrained(encoder_dir) if settled else CLIPImageProcessorPil()
            encoder, report = CLIPVisionModelWithProjection.from_pretrained(
                encoder_dir, dtype=dtype, variant=variant(encoder_dir, dtype), output_loading_info=True
            )
        # What comes after the penultimate layer is not used, and CLIP files without it are common.
        missing = [key for key in report["missing_keys"] if key.startswith("vision_model.e")]
        if missing:
            raise WeightsError(f"{encoder_dir}: lacks {min(missing)!r} and more; use a CLIP vision model's folder")
        width, expected = encoder.config.hidden_size, resampler.proj_in.in_features
        if width != expected:
            raise WeightsError(
                f"{encoder_dir}: its features have width {width}, the Resampler expects {expected}; use the image "
                "encoder that the IP-Adapter was trained with (CLIP ViT-H for ip-adapter-plus_sdxl_vit-h)"
            )
        negative = None
        if negative_proj:
            negative = Resampler.from_state_dict({key: value.float() for key, value in negative_proj.items()})
        return cls(encoder.eval(), processor, resampler, precision, negative).to(device).requires_grad_(False)

    @property
    def token_shape(self) -> tuple[int, int]:
        """(N, D) of one image's tokens."""
        return self.resampler.latents.shape[1], self.resampler.proj_out.out_features

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> penultimate features of the encoder (B, P, W), class token first.

        Penultimate, because the last layer is shaped by CLIP's contrast of whole images and has lost detail.
        """
        pixels = pixels.to(self.encoder.device, self.encoder.dtype)
        return self.encoder(pixels, output_hidden_states=True).hidden_states[-2]

    def features(self, images: list[Image]) -> Tensor:
        """Images -> penultimate features (B, P, W); ViT-H: (B, 257, 1280)."""
        return self.encode(self.processor(images, return_tensors="pt").pixel_values)

    @torch.no_grad()
    def tokens(self, images: list[Image]) -> Tensor:
        """Images -> image tokens (B, N, D), in the Resampler's dtype; SDXL: (B, 16, 2048)."""
        with self.precision.sampling(self.encoder.device):
            return self._resample(self.resampler, self.features(images))

    @torch.no_grad()
    def places(self, images: list[Image]) -> Tensor:
        """Where each token reads its image: maps (B, N, side, side) over the encoder's patches, each summing to 1.

        They are the Resampler's attention, averaged over layers and heads; class token and other tokens left out.
        """
        features = self.features(images).to(self.resampler.latents.dtype)
        latents = self.resampler.latents.expand(len(images), -1, -1)
        maps: list[Tensor] = []
        layers = self.resampler.layers
        layers.read(latents, layers.keys_values(self.resampler.proj_in(features)), maps=maps)
        patches = torch.stack(maps).mean((0, 2))[..., 1 : features.shape[1]]  # (B, N, P - 1)
        side = math.isqrt(patches.shape[-1])
        return (patches / patches.sum(-1, keepdim=True)).unflatten(-1, (side, side))

    @staticmethod
    def _resample(resampler: Resampler, features: Tensor) -> Tensor:
        dtype = resampler.latents.dtype
        return resampler(features.to(dtype)).to(dtype)

    @torch.no_grad()
    def negative(self) -> Tensor:
        """The tokens (1, N, D) that stand for "no image" in classifier-free guidance.

        They are those of an all-zero tensor *after* normalisation, a mid-grey image, as in IP-Adapter; neither zero
        tokens nor a black image. Computed anew at each call, since the Resampler may have been trained meanwhile.
        """
        side = self.encoder.config.image_size
        with self.precision.sampling(self.encoder.device):
            return self._resample(self.negative_resampler, self.encode(torch.zeros(1, 3, side, side)))


def load_ip_adapter(
    path: str | Path, resampler: str | Path | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An IP-Adapter file -> (state of its Resampler, state of its `ImageBranch`).

    .bin files nest two dicts, .safetensors files put the same two names before the keys. `resampler` names a file that
    holds the Resampler apart, as IMG's release has it; what the adapter file has under `image_proj` is then ignored.
    Raises WeightsError if a file is missing, damaged, or lacks a part.
    """
    state = read_weights(path)
    branch = _part(state, "ip_adapter", path)
    if not resampler:
        return _part(state, "image_proj", path), branch
    state = read_weights(resampler, holds="latents")
    return (state if "latents" in state else _part(state, "image_proj", resampler)), branch


def own_projection(path: str | Path, resampler: str | Path | None) -> dict[str, Tensor] | None:
    """The Resampler in the adapter's file, if another one replaces it for images; None if that is not so.

    The authors make the tokens of "no image" with this one, and those of images with `resampler`.
    """
    if not resampler:
        return None
    try:
        return _part(read_weights(path), "image_proj", path)
    except WeightsError:  # a file of the branch alone
        return None


def _part(state: dict, name: str, path: str | Path) -> dict[str, Tensor]:
    flat = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    if part := state.get(name, flat):
        return part
    raise WeightsError(f"{path}: has no {name!r} weights, so it is not an IP-Adapter; check which file it is")
