"""Drawing with FLUX as the authors do: Euler steps along the flow, true classifier-free guidance from step 1 on."""

from contextlib import nullcontext

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from tqdm import tqdm

from img_minimal.backbones import computes_on
from img_minimal.backbones.flux.injection import ImageBranch, inject
from img_minimal.runtime.devices import Precision
from img_minimal.runtime.images import check_finite

Condition = tuple[Tensor, Tensor]  # T5's states (B, L, E) and CLIP's pooled embedding (B, W)


def denoise(
    transformer: FluxTransformer2DModel,
    x: Tensor,
    places: Tensor,
    sigmas: Tensor,
    positive: Condition,
    negative: Condition,
    *,
    guidance_scale: float,
    true_cfg_scale: float,
    scales: Tensor,
    current: Tensor,
    bar: tqdm,
) -> Tensor:
    """x_(i+1) = x_i + (sigma_(i+1) - sigma_i) v(x_i, sigma_i), for noise x (B, S, C) at sigma_0 = 1 down to 0.

    v = v_neg + s (v_pos - v_neg) with s = `true_cfg_scale`, and v_pos alone in step 0; both halves in one call.
    `guidance_scale` is the embedding that FLUX.1-dev was distilled with, of both halves alike. places (S, 3) say where
    each of the S patches lies. `current` becomes the step's `scales` of the image tokens, for `inject` to read.
    """
    states, pooled = (torch.cat(pair) for pair in zip(negative, positive))
    shared = {
        "encoder_hidden_states": states,
        "pooled_projections": pooled,
        "txt_ids": torch.zeros(states.shape[1], 3).to(places),
        "img_ids": places,
        "guidance": torch.full([len(states)], guidance_scale, device=x.device),
        "return_dict": False,
    }
    for i, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        current.copy_(scales[i])
        both = torch.cat([x, x])
        (v,) = transformer(both, timestep=sigma.expand(len(both)).to(x.dtype), **shared)
        v_neg, v_pos = v.chunk(2)
        v = v_pos if i == 0 else v_neg + true_cfg_scale * (v_pos - v_neg)
        x = (x.float() + (following - sigma) * v).to(x.dtype)
        bar.update()
    return x


def schedule(pipe: FluxPipeline, steps: int, patches: int, device: torch.device) -> Tensor:
    """sigma_0 = 1, ..., sigma_steps = 0, shifted as the authors do: (steps + 1,).

    They measure the length of an image in pixels of latents over 256, which is a 64th of its patches, so both ends of
    the scheduler's line move by 64. This changes pictures: mu at 1024 x 1024 is .4675 and not 1.15.
    """
    config = pipe.scheduler.config
    ends = 64 * config.base_image_seq_len, 64 * config.max_image_seq_len
    mu = calculate_shift(patches, *ends, config.base_shift, config.max_shift)
    pipe.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu, device=device)
    return pipe.scheduler.sigmas.to(device)


@torch.no_grad()
def draw(
    pipe: FluxPipeline,
    conditions: list[Condition],
    negative_condition: Condition,
    seeds: list[int],
    *,
    steps: int,
    guidance_scale: float,
    true_cfg_scale: float,
    height: int,
    width: int,
    branch: ImageBranch,
    tokens: Tensor | None = None,
    negative: Tensor | None = None,
    scale: float = 0.0,
    scale_end: float = 1.0,
    precision: Precision,
    batch_size: int = 1,
    progress: str | None = None,
) -> Tensor:
    """One image for each encoded prompt, (B, 3, H, W) in [0, 1] on the CPU.

    Every image has its own CPU generator (the authors' demo draws its noise on the GPU, so their seed gives another
    picture). tokens (B, N, D) are injected in the positive half, `negative` (1, N, D) in the other, with `scale` in the
    first step and `scale * scale_end` in the last one. The VAE decodes in its own dtype: load it in fp32.
    """
    device = computes_on(pipe.transformer)
    dtype = pipe.transformer.dtype
    starts = range(0, len(conditions), batch_size)
    scales = torch.linspace(scale, scale * scale_end, steps)
    current = torch.empty(())
    images = []
    with tqdm(total=len(starts) * steps, desc=progress, disable=progress is None, leave=False, delay=1) as bar:
        for start in starts:
            part = slice(start, start + batch_size)
            positive = tuple(torch.cat(column).to(device, dtype) for column in zip(*conditions[part]))
            size = len(positive[0])
            unconditional = tuple(x.to(device, dtype).expand(size, *x.shape[1:]) for x in negative_condition)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            channels = pipe.transformer.config.in_channels // 4
            x, places = pipe.prepare_latents(size, channels, height, width, dtype, device, generators)
            injected = nullcontext()
            if tokens is not None and scale != 0:
                own = tokens[part].to(device)
                both = torch.cat([negative.to(own).expand_as(own), own])
                injected = inject(pipe.transformer, branch, both, current)
            with injected, precision.sampling(device):
                sigmas = schedule(pipe, steps, x.shape[1], device)
                x = denoise(
                    pipe.transformer, x, places, sigmas, positive, unconditional, guidance_scale=guidance_scale,
                    true_cfg_scale=true_cfg_scale, scales=scales, current=current, bar=bar,
                )  # fmt: skip
                latents = pipe._unpack_latents(x, height, width, pipe.vae_scale_factor)
                latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
                decoded = pipe.vae.decode(latents.to(pipe.vae.dtype)).sample
            check_finite(decoded, start)
            images.append(pipe.image_processor.postprocess(decoded, output_type="pt").float().cpu())
    return torch.cat(images)
