"""FLUX.1-dev as IMG's backbone, with XLabs' IP-Adapter.

Image -> CLIP's pooled embedding -> projection -> 4 tokens. The attention is diffusers' own: each of
the 19 double-stream blocks adds, after its MLP and to the image stream alone,

    scale * Attention(Q, K_image, V_image)       Q: the block's query of the image, before RoPE

Drawing follows the authors': Euler steps along the flow, true classifier-free guidance from step 1
on, and their shift of the schedule. Its first picture is therefore not FluxPipeline's.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Self

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.embeddings import ImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from img_minimal import backbone
from img_minimal.backbone import Backbone, unseen_end
from img_minimal.cli import check
from img_minimal.devices import Precision
from img_minimal.files import check_finite
from img_minimal.hub.adapters import (
    XLABS_V1,
    check_encoder_width,
    check_flux_folder,
    check_guidance_embedding,
    open_vision_encoder,
    read_xlabs_adapter,
)
from img_minimal.hub.weights import WeightsError, fill, opening
from img_minimal.presets import Models

TOKENS = 4  # of the adapter's version 1; version 2 has 16, and IMG's aligner was trained for 4
Condition = tuple[
    Tensor, Tensor
]  # T5's states (1, 512, E), unmasked; CLIP's pooled embedding (1, W)

# 1. Image -> tokens


class ImagePrompt(backbone.ImagePrompt):
    """CLIP ViT-L and a projection. One pooled vector says less of *where* than SDXL's patches."""

    @classmethod
    def open(cls, models: Models, precision: Precision, device: torch.device) -> Self:
        """Load from local files: the encoder in the weights' dtype, the projection in fp32."""
        state, _ = read_xlabs_adapter(models.ip_adapter)
        width, rows = state["norm.weight"].shape[0], state["image_embeds.weight"].shape[0]
        if rows != TOKENS * width:
            made = f"makes {rows // width} tokens of an image, expected {TOKENS}"
            raise WeightsError(f"{models.ip_adapter}: {made}; {XLABS_V1}")
        with torch.device("meta"):  # no initial values, which the file would replace
            head = ImageProjection(state["image_embeds.weight"].shape[1], width, TOKENS)
        fill(head, state, models.ip_adapter)
        encoder, processor = open_vision_encoder(models.image_encoder, precision)
        found, expected = encoder.config.projection_dim, head.image_embeds.in_features
        check_encoder_width(models.image_encoder, found, expected, "CLIP ViT-L/14")
        return cls(encoder, processor, head.float(), precision).to(device)

    @staticmethod
    def head_size(models: Models) -> tuple[int, tuple[int, int]]:
        """Count the projection's parameters; also return the tokens' (N, D)."""
        state, _ = read_xlabs_adapter(models.ip_adapter)
        width = state["norm.weight"].shape[0]
        shape = state["image_embeds.weight"].shape[0] // width, width
        return sum(value.numel() for value in state.values()), shape

    @property
    def token_shape(self) -> tuple[int, int]:
        """(N, D) of one image."""
        return TOKENS, self.head.norm.normalized_shape[0]

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
            dtype=transformer.dtype,
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


class Flux(Backbone):
    """Draw with the models of a FluxPipeline, in the authors' way."""

    multiple, network = 16, "transformer"
    image_prompts = ImagePrompt

    def read(self, prompts: list[str]) -> list[Condition]:
        """Encode each text once; then the text encoders make room for the transformer."""
        negative = self.sampling.negative_prompt or ""
        states = {}
        for prompt in [*prompts, negative]:
            if prompt not in states:
                states[prompt] = self.encode(prompt)
        self.negative = states[negative]
        self.turns.bring(self.pipe.transformer, self.pipe.vae, self.branch)
        return [states[prompt] for prompt in prompts]

    @torch.no_grad()
    def encode(self, prompt: str) -> Condition:
        """Encode a prompt to T5's states and CLIP's pooled embedding."""
        pipe = self.pipe
        self.turns.bring(pipe.text_encoder, pipe.text_encoder_2)
        device = get_module_execution_device(pipe.text_encoder)
        with self.precision.sampling(device):
            encoded = pipe.encode_prompt(prompt, device=device, max_sequence_length=self.text_limit)
        return encoded[:2]

    def draw_batch(
        self,
        texts: list[Condition],
        generators: list[torch.Generator],
        tokens: tuple[Tensor, Tensor] | None,
        scales: list[float],
        bar: tqdm,
    ) -> Tensor:
        """Draw a batch (B, 3, H, W), guided by `tokens`: those of "no image" and of the images.

            x_(i+1) = x_i + (sigma_(i+1) - sigma_i) v(x_i, sigma_i)     noise x_0, sigma from 1 to 0
            v = v_neg + s (v_pos - v_neg)                               s = true_cfg_scale
            v = v_pos                                                   in step 0

        `guidance_scale` is the embedding that FLUX.1-dev was distilled with, for both halves. The
        authors' demo draws its noise on the GPU, so the same seed gives another picture there.
        """
        pipe, sampling, device, size = self.pipe, self.sampling, self.turns.device, len(texts)
        transformer, dtype = pipe.transformer, pipe.transformer.dtype
        native = pipe.default_sample_size * pipe.vae_scale_factor
        height, width = sampling.height or native, sampling.width or native
        channels = transformer.config.in_channels // 4
        x, img_ids = pipe.prepare_latents(size, channels, height, width, dtype, device, generators)
        # Both halves of the guidance go through the transformer in one call, the negative first.
        both = []
        for negative, *positive in zip(self.negative, *texts):
            expanded = negative.expand(size, *negative.shape[1:])
            both.append(torch.cat([expanded, *positive]).to(device, dtype))
        states, pooled = both
        inputs = {
            "encoder_hidden_states": states,
            "pooled_projections": pooled,
            "img_ids": img_ids,
            "txt_ids": torch.zeros(states.shape[1], 3).to(img_ids),
            "guidance": torch.full([2 * size], sampling.guidance_scale, device=device),
            "return_dict": False,
        }
        injected = nullcontext()
        if tokens:
            hidden = torch.cat(tokens)[:, None].to(dtype)
            inputs["joint_attention_kwargs"] = {"ip_hidden_states": [hidden]}
            injected = inject(transformer, self.branch)

        sigmas = self.schedule(x.shape[1])
        with injected:
            for i, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
                set_scale(self.branch, scales[i])
                timestep = sigma.expand(2 * size).to(dtype)
                (v,) = transformer(torch.cat([x, x]), timestep=timestep, **inputs)
                v_neg, v = v.chunk(2)
                if i > 0:
                    v = v_neg + sampling.true_cfg_scale * (v - v_neg)
                x = (x.float() + (following - sigma) * v).to(dtype)
                bar.update()
        latents = pipe._unpack_latents(x, height, width, pipe.vae_scale_factor)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        decoded = pipe.vae.decode(latents.to(pipe.vae.dtype)).sample
        check_finite(decoded, self.first_image)
        return pipe.image_processor.postprocess(decoded, output_type="pt")

    def schedule(self, patches: int) -> Tensor:
        """Return sigma_0 = 1, ..., sigma_steps = 0, (steps + 1,), shifted as the authors do.

        They measure the length of an image in latent pixels over 256, a 64th of its patches, so
        both ends of the scheduler's line move by 64. At 1024 x 1024 this makes mu .4675 instead of
        1.15, which changes pictures.
        """
        scheduler, steps = self.pipe.scheduler, self.sampling.steps
        config = scheduler.config
        ends = 64 * config.base_image_seq_len, 64 * config.max_image_seq_len
        mu = calculate_shift(patches, *ends, config.base_shift, config.max_shift)
        sigmas = torch.linspace(1, 1 / steps, steps).tolist()
        scheduler.set_timesteps(sigmas=sigmas, mu=mu, device=self.turns.device)
        return scheduler.sigmas.to(self.turns.device)

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
    def check_folder(base: Path) -> None:
        """Raise WeightsError for another kind of FLUX, by its settings alone."""
        check_flux_folder(base)

    @staticmethod
    def open_branch(models: Models, transformer: FluxTransformer2DModel) -> nn.ModuleDict:
        """Load the adapter's branch for this transformer."""
        check_guidance_embedding(transformer.config, "this pipeline")
        _, state = read_xlabs_adapter(models.ip_adapter)
        branch = new_branch(transformer, state["0.to_k_ip.0.weight"].shape[1])
        state = {key: value.to(transformer.dtype) for key, value in state.items()}
        fill(branch, state, models.ip_adapter)
        return branch
