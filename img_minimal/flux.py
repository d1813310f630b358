"""FLUX.1-dev as IMG's backbone, with XLabs' IP-Adapter.

Image -> CLIP's pooled embedding -> projection -> 4 tokens. The attention is diffusers' own: each of
the 19 double-stream blocks adds, after its MLP and to the image stream alone,

    scale * Attention(Q, K_image, V_image)       Q: the block's query of the image, before RoPE

Drawing is FluxPipeline's own call with two things of the authors': true classifier-free guidance
from step 1 on, and their shift of an Euler schedule. Its first picture is therefore not
FluxPipeline's, unless `authors_sampler` is False and `true_cfg_scale` 1.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Self

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.embeddings import ImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image
from torch import Tensor, nn

from img_minimal import backbone
from img_minimal.backbone import Backbone, Shape, unseen_end
from img_minimal.cli import check
from img_minimal.devices import Precision, compute_dtype
from img_minimal.hub.adapters import (
    XLABS_V1,
    check_encoder_width,
    check_flux_folder,
    check_guidance_embedding,
    open_vision_encoder,
    read_xlabs_adapter,
)
from img_minimal.hub.weights import fill, opening
from img_minimal.presets import Models
from img_minimal.request import EMBEDS, Call

TOKENS = 4  # of the adapter's version 1; version 2 has 16, and IMG's aligner was trained for 4

# The transformer's inputs that have an entry for each image.
DOUBLED = set(
    "hidden_states timestep guidance encoder_hidden_states pooled_projections "
    "controlnet_block_samples controlnet_single_block_samples".split()
)

# 1. Image -> tokens


class ImagePrompt(backbone.ImagePrompt):
    """CLIP ViT-L and a projection. One pooled vector says less of *where* than SDXL's patches."""

    @classmethod
    def open(cls, models: Models, precision: Precision, device: torch.device) -> Self:
        """Load from local files, in fp32: in half precision tokens err more than the release's."""
        head = cls.open_head(models)
        exact = replace(precision, weights=torch.float32)
        encoder, processor = open_vision_encoder(models.image_encoder, exact)
        found, expected = encoder.config.projection_dim, head.image_embeds.in_features
        check_encoder_width(models.image_encoder, found, expected, "CLIP ViT-L/14")
        return cls(encoder, processor, head, precision).to(device)

    @staticmethod
    def open_head(models: Models) -> ImageProjection:
        """Load the projection alone. Raises UserError for the adapter's version 2."""
        state, _ = read_xlabs_adapter(models.ip_adapter)
        width, rows = state["norm.weight"].shape[0], state["image_embeds.weight"].shape[0]
        made = f"makes {rows // width} tokens of an image, expected {TOKENS}"
        check(rows == TOKENS * width, f"{models.ip_adapter}: {made}; {XLABS_V1}")
        with torch.device("meta"):  # no initial values, which the file would replace
            head = ImageProjection(state["image_embeds.weight"].shape[1], width, TOKENS)
        fill(head, state, models.ip_adapter)
        return head.float()

    @staticmethod
    def shape_of(head: ImageProjection) -> Shape:
        """Return (N, D) of one image."""
        return TOKENS, head.norm.normalized_shape[0]

    @torch.no_grad()
    def tokens(self, images: list[Image.Image]) -> Tensor:
        """Compute the image tokens (B, N, D) in fp32; FLUX: (B, 4, 4096)."""
        with self.precision.sampling(self.encoder.device):
            embeds = self.encoder(self.pixels(images)).image_embeds
        return self.head(embeds.float())

    def negative(self) -> Tensor:
        """Compute the tokens (1, N, D) of "no image": a black picture, not SDXL's mid-grey."""
        side = self.encoder.config.image_size
        return self.tokens([Image.new("RGB", (side, side))])

    def token_maps(self, images: list[Image.Image]) -> Tensor:
        """Map where each token reads its image: (B, N, 1, 1), all of it, for it is pooled."""
        return torch.ones(len(images), TOKENS, 1, 1)


# 2. Tokens -> transformer


def new_branch(
    transformer: FluxTransformer2DModel, token_width: int | None = None
) -> nn.ModuleDict:
    """Create diffusers' attention processors with image keys and values, one for each block."""
    token_width = token_width or transformer.config.joint_attention_dim
    branch = nn.ModuleDict()
    for i in range(len(transformer.transformer_blocks)):
        branch[str(i)] = FluxIPAdapterAttnProcessor(
            transformer.inner_dim,
            token_width,
            (TOKENS,),
            device=transformer.device,
            dtype=compute_dtype(transformer),
        )
    return branch


@contextmanager
def inject(transformer: FluxTransformer2DModel, branch: nn.ModuleDict) -> Iterator[None]:
    """Let the transformer attend to image tokens within this context; restore it afterwards.

    Pass the tokens (B, N, D) as `joint_attention_kwargs={"ip_hidden_states": [tokens[:, None]]}`;
    their weight is that of `set_scale`.
    """
    before = transformer.attn_processors
    names = {f"transformer_blocks.{i}.attn.processor": p for i, p in branch.items()}
    for name, processor in names.items():  # as set by set_attention_backend
        processor._attention_backend = getattr(before[name], "_attention_backend", None)
    try:
        transformer.set_attn_processor(before | names)
        yield
    finally:
        transformer.set_attn_processor(before)


def set_scale(branch: nn.ModuleDict, scale: float | Tensor) -> None:
    """Set the weight of the tokens: a number, or a tensor (B, 1, 1) with one per sample."""
    for processor in branch.values():
        processor.scale = [scale]


# 3. Drawing


@contextmanager
def guide(
    transformer: FluxTransformer2DModel, negative: dict[str, Tensor], scale: float, skipped: int
) -> Iterator[None]:
    """Guide the transformer's calls by `negative` inputs: T5's states, and CLIP's embedding.

        v = v_neg + scale (v_pos - v_neg)       v = v_pos in the first `skipped` calls

    Both halves go through the transformer in one call, the negative first. The pipeline around it
    sees an unguided one, so this serves every pipeline of FLUX.
    """
    calls = 0

    def double(module: nn.Module, args: tuple, inputs: dict) -> tuple[tuple, dict]:
        doubled = {}
        for name in DOUBLED & inputs.keys():
            value = inputs[name]
            if isinstance(value, Tensor):
                doubled[name] = torch.cat([negative.get(name, value), value])
            elif value is not None:  # a ControlNet's residuals
                doubled[name] = [torch.cat([residual] * 2) for residual in value]
        return args, inputs | doubled

    def combine(module: nn.Module, args: tuple, output: tuple[Tensor]) -> tuple[Tensor]:
        nonlocal calls
        calls += 1
        v_neg, v = output[0].chunk(2)
        return (v if calls <= skipped else v_neg + scale * (v - v_neg),)

    hooks = [
        transformer.register_forward_pre_hook(double, with_kwargs=True),
        transformer.register_forward_hook(combine),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def authors_scheduler(
    scheduler: FlowMatchEulerDiscreteScheduler,
) -> FlowMatchEulerDiscreteScheduler:
    """Copy a scheduler, with the authors' shift of its line.

    They measure the length of an image in latent pixels over 256, a 64th of its patches, so both
    ends of the line move by 64. At 1024 x 1024 this makes mu .4675 instead of 1.15, which changes
    pictures.
    """
    names = "base_image_seq_len", "max_image_seq_len"
    longer = {name: 64 * scheduler.config[name] for name in names}
    return type(scheduler).from_config(scheduler.config, **longer)


class Flux(Backbone):
    """Draw with a FluxPipeline's own call, guided in the authors' way.

    `guidance_scale` is the embedding that FLUX.1-dev was distilled with, for both halves.
    """

    multiple, network = 16, "transformer"
    image_prompts = ImagePrompt
    check_folder = staticmethod(check_flux_folder)

    def read(self, prompts: list[str], call: Call) -> Call:
        """Encode each text once; then the text encoders make room for the transformer."""
        sampling, inputs = self.sampling, dict(call)
        encode = cache(partial(self.encode, limit=call.get("max_sequence_length")))
        negative = [sampling.negative_prompt or ""] * len(prompts)
        texts = {"": prompts, "negative_": inputs.pop("negative_prompt", negative)}
        for kind, first in texts.items():
            second = inputs.pop(f"{kind}prompt_2", first)
            if f"{kind}prompt_embeds" in inputs or (kind and sampling.true_cfg_scale == 1):
                continue
            conditions = map(encode, first, second)
            names = f"{kind}prompt_embeds", f"{kind}pooled_prompt_embeds"
            inputs |= zip(names, map(list, zip(*conditions)))
        self.turns.bring(self.pipe.transformer, self.pipe.vae, self.branch)
        return inputs

    @torch.no_grad()
    def encode(
        self, prompt: str, prompt_2: str | None = None, limit: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode a prompt to T5's states (1, 512, E), unmasked, and CLIP's embedding (1, W)."""
        pipe, device = self.pipe, self.turns.device
        self.turns.bring(pipe.text_encoder, pipe.text_encoder_2)
        limit = limit or self.text_limit
        with self.precision.sampling(device):
            encoded = pipe.encode_prompt(prompt, prompt_2, device, max_sequence_length=limit)
        return encoded[:2]

    @contextmanager
    def attending(
        self, inputs: Call, tokens: tuple[Tensor, Tensor] | None, weight: Tensor
    ) -> Iterator[None]:
        """Let the transformer attend to the tokens, and guide it as the authors do.

        The authors' demo draws its noise on the GPU, so the same seed gives another picture there.
        """
        pipe, sampling = self.pipe, self.sampling
        dtype = self.precision.weights
        for name in inputs.keys() & {*EMBEDS}:
            inputs[name] = inputs[name].to(dtype)
        conditions = "encoder_hidden_states", "pooled_projections"
        negative = [inputs.pop(name, None) for name in EMBEDS[2:]]
        scheduler, theirs = pipe.scheduler, sampling.authors_sampler
        with ExitStack() as contexts:
            if self.turns.offload != "none":  # the pipeline computes where its first model lies
                for name in ("text_encoder", "text_encoder_2"):
                    contexts.callback(setattr, pipe, name, getattr(pipe, name))
                    setattr(pipe, name, None)
            if theirs and type(scheduler) is FlowMatchEulerDiscreteScheduler:
                contexts.callback(setattr, pipe, "scheduler", scheduler)
                pipe.scheduler = authors_scheduler(scheduler)
                line = torch.linspace(1, 1 / sampling.steps, sampling.steps)
                inputs.setdefault("sigmas", line.tolist())
            guides = negative[0] is not None and sampling.true_cfg_scale != 1
            if guides:
                both = dict(zip(conditions, negative))
                guided = guide(pipe.transformer, both, sampling.true_cfg_scale, int(theirs))
                contexts.enter_context(guided)
            if tokens:
                hidden = torch.cat(tokens) if guides else tokens[1]
                own = inputs.get("joint_attention_kwargs") or {}
                own = own | {"ip_hidden_states": [hidden[:, None].to(dtype)]}
                inputs["joint_attention_kwargs"] = own
                set_scale(self.branch, weight)
                contexts.enter_context(inject(pipe.transformer, self.branch))
            yield

    @property
    def text_width(self) -> int:
        """Width of `text_states`."""
        return self.pipe.transformer.config.joint_attention_dim

    @property
    def text_limit(self) -> int:
        """Number of tokens T5 reads; CLIP's 77 give one pooled vector only."""
        return min(512, self.pipe.tokenizer_2.model_max_length)

    def text_states(self, prompts: list[str]) -> Tensor:
        """Encode prompts to T5's states (B, 512, 4096)."""
        return torch.cat([self.encode(prompt)[0] for prompt in prompts])

    def truncated_part(self, prompt: str) -> tuple[str, int]:
        """Return the end of the prompt that T5 does not see, and its token limit."""
        return unseen_end(self.pipe.tokenizer_2, prompt, self.text_limit), self.text_limit

    @staticmethod
    def open_pipe(models: Models, precision: Precision) -> FluxPipeline:
        """Load the pipeline, its VAE in fp32. Raises UserError for another kind of FLUX."""
        advice = "FLUX has a transformer and no UNet; give --base another folder"
        check(not models.unet, f"--unet {models.unet}: {advice}")
        check_flux_folder(Path(models.base))
        dtype = {"default": precision.weights, "vae": torch.float32}
        with opening(models.base, "FLUX pipeline"):
            return FluxPipeline.from_pretrained(models.base, dtype=dtype)

    @staticmethod
    def open_branch(models: Models, transformer: FluxTransformer2DModel) -> nn.ModuleDict:
        """Load the adapter's branch for this transformer."""
        check_guidance_embedding(transformer.config, "this pipeline")
        _, state = read_xlabs_adapter(models.ip_adapter)
        branch = new_branch(transformer, state["0.to_k_ip.0.weight"].shape[1])
        dtype = compute_dtype(transformer)
        fill(branch, {key: value.to(dtype) for key, value in state.items()}, models.ip_adapter)
        return branch
