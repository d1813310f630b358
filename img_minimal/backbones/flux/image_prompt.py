"""The image prompt of XLabs' IP-Adapter for FLUX: image -> CLIP's pooled embedding -> one projection -> 4 tokens.

IMG aligns these tokens, so they are its c_l, c_w and f(c). One pooled vector says less of *where* things are than the
patches of SDXL's Resampler.
"""

import re
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from img_minimal.files.weights import WeightsError, fill, opening, read_weights
from img_minimal.runtime.devices import Precision

PROJECTION = "ip_adapter_proj_model."
BRANCH = re.compile(r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\.(weight|bias)")
INSTEAD = "use ip_adapter.safetensors of XLabs-AI/flux-ip-adapter (version 1, 4 tokens)"
TOKENS = 4  # of version 1; version 2 has 16, and IMG's aligner was trained for 4


class TokenProjection(nn.Module):
    """A pooled embedding (B, W) -> image tokens (B, N, D)."""

    def __init__(self, embed_width: int = 768, token_width: int = 4096, tokens: int = TOKENS):
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(embed_width, tokens * token_width)
        self.norm = nn.LayerNorm(token_width)

    def forward(self, embeds: Tensor) -> Tensor:
        """Cut into N tokens, each normalised."""
        return self.norm(self.proj(embeds).unflatten(-1, (self.tokens, -1)))

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], what: str | Path) -> Self:
        """A projection of the sizes that the file has. Raises WeightsError if it is not one of 4 tokens."""
        if not {"proj.weight", "norm.weight"} <= state.keys():
            raise WeightsError(f"{what}: its {PROJECTION}* lacks proj or norm; {INSTEAD}")
        width, rows = state["norm.weight"].shape[0], state["proj.weight"].shape[0]
        if rows != TOKENS * width:
            raise WeightsError(f"{what}: makes {rows // width} tokens of an image, expected {TOKENS}; {INSTEAD}")
        with torch.device("meta"):
            projection = cls(state["proj.weight"].shape[1], width)
        fill(projection, state, str(what))
        return projection


class ImagePrompt(nn.Module):
    """A frozen image -> tokens pipeline."""

    def __init__(
        self,
        encoder: CLIPVisionModelWithProjection,
        processor: CLIPImageProcessorPil,
        projection: TokenProjection,
        precision: Precision,
    ):
        super().__init__()
        self.encoder = encoder
        self.processor = processor
        self.projection = projection
        self.precision = precision

    @classmethod
    def from_pretrained(
        cls,
        encoder_dir: str | Path,
        projection: TokenProjection,
        precision: Precision,
        device: torch.device | str = "cpu",
    ) -> Self:
        """`encoder_dir`: a local folder with a CLIP vision model; a whole CLIP's will do.

        The projection stays in fp32. Raises WeightsError if the folder holds no such model, or one of another width.
        """
        settled = (Path(encoder_dir) / "preprocessor_config.json").exists()
        with opening(encoder_dir, "CLIP vision model"):
            processor = CLIPImageProcessorPil.from_pretrained(encoder_dir) if settled else CLIPImageProcessorPil()
            encoder, report = CLIPVisionModelWithProjection.from_pretrained(
                encoder_dir, dtype=precision.weights, output_loading_info=True
            )
        if report["missing_keys"]:
            missing = min(report["missing_keys"])
            raise WeightsError(f"{encoder_dir}: lacks {missing!r}; use the folder of openai/clip-vit-large-patch14")
        width, expected = encoder.config.projection_dim, projection.proj.in_features
        if width != expected:
            raise WeightsError(
                f"{encoder_dir}: its embeddings have width {width}, the IP-Adapter expects {expected}; use the image "
                "encoder that the IP-Adapter was trained with (CLIP ViT-L/14)"
            )
        return cls(encoder.eval(), processor, projection.float(), precision).to(device).requires_grad_(False)

    @property
    def token_shape(self) -> tuple[int, int]:
        """(N, D) of one image's tokens."""
        return self.projection.tokens, self.projection.norm.normalized_shape[0]

    @torch.no_grad()
    def tokens(self, images: list[Image.Image]) -> Tensor:
        """Images -> image tokens (B, N, D) in fp32; FLUX: (B, 4, 4096)."""
        pixels = self.processor(images, return_tensors="pt").pixel_values
        with self.precision.sampling(self.encoder.device):
            embeds = self.encoder(pixels.to(self.encoder.device, self.encoder.dtype)).image_embeds
        return self.projection(embeds.float())

    def places(self, images: list[Image.Image]) -> Tensor:
        """Where each token reads its image, as maps (B, N, 1, 1): all of it, for the embedding is pooled."""
        return torch.ones(len(images), self.projection.tokens, 1, 1)

    def negative(self) -> Tensor:
        """The tokens (1, N, D) of a black picture, which stand for "no image": neither zeros nor SDXL's mid-grey."""
        side = self.encoder.config.image_size
        return self.tokens([Image.new("RGB", (side, side))])


def load_ip_adapter(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """XLabs' file -> (state of its `TokenProjection`, state of its `ImageBranch`). Every key has to find its place.

    diffusers drops keys that it does not know without a word. Raises WeightsError naming the first of them, or the part
    that is missing.
    """
    projection, branch = {}, {}
    for key, value in read_weights(path).items():
        match = BRANCH.fullmatch(key)
        if match:
            block, kind, name = match.groups()
            branch[f"{block}.to_{kind}_ip.{name}"] = value
        elif key.startswith(PROJECTION):
            projection[key.removeprefix(PROJECTION)] = value
        else:
            raise WeightsError(f"{path}: has an unknown key {key!r}, so it is not XLabs' IP-Adapter; {INSTEAD}")
    for part, name in ((projection, PROJECTION), (branch, "double_blocks.*")):
        if not part:
            raise WeightsError(f"{path}: has no {name!r} weights; {INSTEAD}")
    return projection, branch


def public_names(projection: dict[str, Tensor], branch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `load_ip_adapter`: both states under the keys of XLabs' file."""
    state = {f"{PROJECTION}{key}": value for key, value in projection.items()}
    for key, value in branch.items():
        block, kind, name = key.split(".")  # "0", "to_k_ip", "weight"
        state[f"double_blocks.{block}.processor.ip_adapter_double_stream_{kind[3]}_proj.{name}"] = value
    return state
