"""SDXL as IMG's backbone: IP-Adapter Plus, decoupled cross-attention, and drawing.

Image -> CLIP's patch features -> Resampler -> 16 tokens. IMG aligns these tokens: they are its c_l,
c_w and f(c). Each of the UNet's 70 cross-attentions gets a second pair of key and value projections
for them, so that its output becomes

    to_out( Attention(Q, K_text, V_text) + scale * Attention(Q, K_image, V_image) )

Module names are those of the public IP-Adapter files.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Self

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from einops import rearrange
from PIL.Image import Image
from torch import Tensor, nn

from img_minimal import backbone
from img_minimal.aligner import PerceiverLayers, layer_sizes
from img_minimal.backbone import Backbone, Shape, unseen_end
from img_minimal.devices import Precision, compute_dtype
from img_minimal.hub.adapters import (
    check_encoder_width,
    check_sdxl,
    open_vision_encoder,
    read_ip_adapter,
)
from img_minimal.hub.weights import fill, opening
from img_minimal.hub.where import variant
from img_minimal.presets import Models
from img_minimal.request import Call

# 1. Image -> tokens


class Resampler(nn.Module):
    """Read P patch features with learned queries, into N tokens. The defaults are SDXL's."""

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

    def forward(self, features: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Turn patch features (B, P, W) into image tokens (B, N, D)."""
        latents = self.latents.expand(len(features), -1, -1)  # (B, N, width)
        x = self.layers(latents, self.proj_in(features), maps=maps)
        return self.norm_out(self.proj_out(x))

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], source: str = "image_proj") -> Self:
        """Build a Resampler of the sizes and dtype of an adapter's `image_proj`.

        Raises UserError, naming the `source`, for another kind of projection.
        """
        with opening(source, "Resampler of an IP-Adapter *Plus*"):
            _, tokens, width = state["latents"].shape
            feature_width = state["proj_in.weight"].shape[1]
            token_width = state["proj_out.weight"].shape[0]
            sizes = layer_sizes(state)
            with torch.device("meta"):  # no initial values, which the file would replace
                resampler = cls(feature_width, token_width, tokens, width, **sizes)
        fill(resampler, state, source)
        return resampler


class ImagePrompt(backbone.ImagePrompt):
    """CLIP ViT-H and the Resampler. The release makes the tokens of "no image" by another one."""

    def __init__(
        self, encoder, processor, head: Resampler, precision, negative_head: Resampler | None = None
    ):
        super().__init__(encoder, processor, head, precision)
        self.negative_head = (negative_head or head).requires_grad_(False)

    @classmethod
    def open(cls, models: Models, precision: Precision, device: torch.device) -> Self:
        """Load from local files: the encoder in the weights' dtype, the small Resampler in fp32."""
        state, _, replaced = read_ip_adapter(models)
        head = Resampler.from_state_dict(state).float()
        negative_head = Resampler.from_state_dict(replaced).float() if replaced else None
        # The layers after the penultimate are unused, and CLIP files without them are common.
        folder = models.image_encoder
        encoder, processor = open_vision_encoder(folder, precision, used="vision_model.e")
        width = encoder.config.hidden_size
        check_encoder_width(folder, width, head.proj_in.in_features, "CLIP ViT-H")
        return cls(encoder, processor, head, precision, negative_head).to(device)

    @staticmethod
    def open_head(models: Models) -> Resampler:
        """Load the Resampler alone."""
        source = models.resampler or models.ip_adapter
        return Resampler.from_state_dict(read_ip_adapter(models)[0], source)

    @staticmethod
    def shape_of(head: Resampler) -> Shape:
        """Return (N, D) of one image."""
        return head.latents.shape[1], head.proj_out.out_features

    def features(self, pixels: Tensor) -> Tensor:
        """Compute penultimate features (B, P, W) of pixels, class token first.

        The last layer is shaped by CLIP's contrast of whole images and has lost detail.
        """
        states = self.encoder(pixels, output_hidden_states=True).hidden_states
        return states[-2].to(self.head.latents.dtype)

    @torch.no_grad()
    def tokens(self, images: list[Image]) -> Tensor:
        """Compute the image tokens (B, N, D); SDXL: (B, 16, 2048)."""
        return self._read(self.pixels(images), self.head)

    @torch.no_grad()
    def negative(self) -> Tensor:
        """Compute the tokens (1, N, D) of "no image": pixels that are zero *after* normalisation.

        That is a mid-grey image, as in IP-Adapter; neither zero tokens nor a black image.
        """
        side = self.encoder.config.image_size
        grey = torch.zeros(1, 3, side, side).to(self.encoder.device, self.encoder.dtype)
        return self._read(grey, self.negative_head)

    def _read(self, pixels: Tensor, head: Resampler) -> Tensor:
        with self.precision.sampling(pixels.device):
            tokens = head(self.features(pixels))
        return tokens.to(self.head.latents.dtype)

    @torch.no_grad()
    def token_maps(self, images: list[Image]) -> Tensor:
        """Map where each token reads its image: (B, N, side, side) over patches, each summing to 1.

        This is the Resampler's attention to the patches, averaged over layers and heads.
        """
        maps: list[Tensor] = []
        features = self.features(self.pixels(images))
        self.head(features, maps)
        # The class token comes first, the tokens themselves after the patches.
        patches = torch.stack(maps).mean((0, 2))[..., 1 : features.shape[1]]  # (B, N, P - 1)
        side = math.isqrt(patches.shape[-1])
        return (patches / patches.sum(-1, keepdim=True)).unflatten(-1, (side, side))


# 2. Tokens -> UNet


def cross_attentions(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """Return the cross-attentions by their number among *all* attention processors.

    IP-Adapter files number them so: odd ones only, and down blocks before up blocks before the
    middle.
    """
    layers = {}
    for number, name in enumerate(unet.attn_processors):
        if "attn2" in name.split("."):
            layers[str(number)] = unet.get_submodule(name.removesuffix(".processor"))
    return layers


def new_branch(unet: UNet2DConditionModel, token_width: int | None = None) -> nn.ModuleDict:
    """Create the image keys and values, `{N}.to_k_ip` and `{N}.to_v_ip`, of each cross-attention.

    Without a `token_width` they start as copies of the text's projections, so that tokens near the
    text's embeddings mean something from the first step on.
    """
    dtype, device = compute_dtype(unet), next(unet.parameters()).device
    branch = nn.ModuleDict()
    for number, attn in cross_attentions(unet).items():
        branch[number] = nn.ModuleDict()
        for name, text in (("to_k_ip", attn.to_k), ("to_v_ip", attn.to_v)):
            width = token_width or text.in_features
            image = nn.Linear(width, text.out_features, False, device=device, dtype=dtype)
            if token_width is None and not text.weight.is_meta:
                image.load_state_dict({"weight": text.weight.detach()})
            branch[number][name] = image
    return branch


class DecoupledAttention:
    """Attention processor of one cross-attention: diffusers' for the text, plus the image tokens.

    Written for SDXL's UNet, whose cross-attentions have no group, spatial or query/key norms.
    """

    def __init__(self, projections: nn.ModuleDict, tokens: Tensor, scale: float | Tensor):
        # The same in every denoising step, hence computed once: (B, N, layer width).
        self.keys = projections["to_k_ip"](tokens)
        self.values = projections["to_v_ip"](tokens)
        self.scale = scale

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute spatial features (B, S, C) from text (B, T, E): (B, S, C).

        Raises ValueError if B is neither the tokens' batch nor half of it. Half a batch are the
        positive ones, where classifier-free guidance is off or has ended.
        """
        check_batch(len(hidden_states), len(self.keys))
        query, *text_and_image = self.project(attn, hidden_states, encoder_hidden_states)
        key, value, image_key, image_value = text_and_image
        if attention_mask is not None:  # of the text: (B, 1, T) -> (B, heads, 1, T)
            length, batch = encoder_hidden_states.shape[1], len(hidden_states)
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = rearrange(attention_mask, "(b h) q t -> b h q t", b=batch)
        text = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        image = F.scaled_dot_product_attention(query, image_key, image_value)  # the same query

        scale = self.scale
        if isinstance(scale, Tensor):
            scale = scale.to(image)[-len(image) :, None, None] if scale.ndim else scale.item()
        linear, dropout = attn.to_out
        return dropout(linear(merge_heads(text) + scale * merge_heads(image)))

    def project(self, attn: Attention, hidden_states: Tensor, text: Tensor) -> list[Tensor]:
        """Compute the query (B, heads, S, d), and keys and values of text and image, per head."""
        query = attn.to_q(hidden_states)
        keys, values = (x[-len(query) :].to(query.dtype) for x in (self.keys, self.values))
        projected = query, attn.to_k(text), attn.to_v(text), keys, values
        return [rearrange(x, "b n (h d) -> b h n d", h=attn.heads) for x in projected]

    @torch.no_grad()
    def attend(
        self, attn: Attention, hidden_states: Tensor, text: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Open up both terms of the formula, for inspection.

        {"text" and "image": (output (B, S, C), weights (B, heads, S, T or N) in fp32)}
        """
        query, *text_and_image = self.project(attn, hidden_states, text)
        terms = {}
        for name, key, value in zip(("text", "image"), text_and_image[::2], text_and_image[1::2]):
            scores = (query * query.shape[-1] ** -0.5) @ key.mT
            weights = scores.softmax(dim=-1, dtype=torch.float32)
            terms[name] = merge_heads(weights.to(value.dtype) @ value), weights
        return terms


def merge_heads(heads: Tensor) -> Tensor:
    """(B, heads, S, d) -> (B, S, heads * d)."""
    return rearrange(heads, "b h n d -> b n (h d)")


def check_batch(batch: int, tokens: int) -> None:
    """Raise ValueError unless the UNet's batch is the tokens' or its positive half."""
    if tokens not in (batch, 2 * batch):
        raise ValueError(
            f"the UNet sees a batch of {batch}, but there are image tokens for {tokens}: with "
            "classifier-free guidance the batch is doubled, so pass torch.cat([negative, positive])"
        )


@contextmanager
def inject(
    unet: UNet2DConditionModel, branch: nn.ModuleDict, tokens: Tensor, scale: float | Tensor
) -> Iterator[UNet2DConditionModel]:
    """Let the UNet attend to image tokens within this context; restore it afterwards.

        with inject(unet, branch, tokens, scale=0.2):
            noise = unet(latents, t, text, ...).sample

    tokens (B, N, D) are those of the UNet's batch: `torch.cat([negative, positive])` under
    classifier-free guidance. scale is a number, a tensor (B,) with one per sample, or a tensor ()
    that may change between calls; with the number 0 the UNet is left alone. Keys and values are
    computed on entry, so open a new context after a change of the branch's weights. Raises
    ValueError if tokens, scale or branch do not fit.
    """
    if not isinstance(scale, Tensor) and scale == 0:
        yield unet
        return
    layers = cross_attentions(unet)
    check_injection(layers, branch, tokens, scale)
    tokens = tokens.to(next(branch.parameters()))
    before = {number: attn.processor for number, attn in layers.items()}
    try:
        for number, attn in layers.items():
            attn.set_processor(DecoupledAttention(branch[number], tokens, scale))
        yield unet
    finally:
        for number, attn in layers.items():
            attn.set_processor(before[number])


def check_injection(
    layers: dict[str, Attention], branch: nn.ModuleDict, tokens: Tensor, scale: float | Tensor
) -> None:
    """Raise ValueError unless the branch has the UNet's layers, and tokens and scale fit."""
    width = next(branch.parameters()).shape[1]
    fits = layers.keys() == branch.keys() and tokens.ndim == 3 and tokens.shape[-1] == width
    if isinstance(scale, Tensor):
        fits = fits and scale.shape in ((), tokens.shape[:1])
    if not fits:
        raise ValueError(
            f"image tokens have shape {tuple(tokens.shape)}, expected (batch, tokens, {width}); a "
            "scale is a number or one per sample, and a branch is made for this UNet"
        )


# 3. Drawing


class SDXL(Backbone):
    """Draw with diffusers' own pipeline, whose scheduler, VAE, LoRAs and hooks stay its own."""

    image_prompts = ImagePrompt
    check_pipe = staticmethod(check_sdxl)

    def read(self, prompts: list[str], call: Call) -> Call:
        """Return the arguments that say what to draw; the pipeline encodes texts itself."""
        self.turns.bring(self.pipe, self.branch)
        inputs = {"prompt": prompts}
        if self.sampling.negative_prompt is not None:
            inputs["negative_prompt"] = [self.sampling.negative_prompt] * len(prompts)
        for text in ("prompt", "negative_prompt"):
            if f"{text}_embeds" in call:
                inputs.pop(text, None)
        return inputs | call

    def attending(
        self, inputs: Call, tokens: tuple[Tensor, Tensor] | None, weight: Tensor
    ) -> AbstractContextManager:
        """Let the UNet attend to the tokens. Without guidance, it takes the positive half."""
        if tokens is None:
            return nullcontext()
        return inject(self.pipe.unet, self.branch, torch.cat(tokens), weight)

    @property
    def text_width(self) -> int:
        """Width of `text_states`."""
        return self.pipe.unet.config.cross_attention_dim

    @torch.no_grad()
    def text_states(self, prompts: list[str]) -> Tensor:
        """Encode prompts to both text encoders' states side by side: (B, 77, 2048)."""
        self.turns.bring(self.pipe, self.branch)
        return self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0]

    def truncated_part(self, prompt: str) -> tuple[str, int]:
        """Return the end of the prompt that the text encoders do not see, and their token limit."""
        tokenizers = self.pipe.tokenizer, self.pipe.tokenizer_2
        ends = [unseen_end(t, prompt, t.model_max_length) for t in tokenizers]
        return max(ends, key=len), tokenizers[1].model_max_length

    @staticmethod
    def open_pipe(models: Models, precision: Precision) -> StableDiffusionXLPipeline:
        """Load the pipeline, with `models.unet` in the place of its UNet if that is given.

        SDXL's VAE overflows in fp16, so it is loaded in fp32.
        """
        dtype, parts = precision.weights, {}
        if models.unet:
            with opening(models.unet, "UNet"):
                parts["unet"] = UNet2DConditionModel.from_pretrained(
                    models.unet, dtype=dtype, variant=variant(models.unet, dtype)
                )
        with opening(models.base, "SDXL pipeline"):
            return StableDiffusionXLPipeline.from_pretrained(
                models.base,
                **parts,
                add_watermarker=False,
                dtype={"default": dtype, "vae": torch.float32},
                variant=variant(models.base, dtype),
            )

    @staticmethod
    def open_branch(models: Models, unet: UNet2DConditionModel) -> nn.ModuleDict:
        """Load the adapter's branch for this UNet."""
        _, state, _ = read_ip_adapter(models)
        dtype = compute_dtype(unet)
        token_width = next(iter(state.values())).shape[1]
        branch = new_branch(unet, token_width)
        fill(branch, {key: value.to(dtype) for key, value in state.items()}, models.ip_adapter)
        return branch
