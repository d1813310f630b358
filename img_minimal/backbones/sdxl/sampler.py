"""Drawing with a diffusers SDXL pipeline, with or without image tokens: steps 1 and 4 of IMG."""

from contextlib import nullcontext

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from tqdm import tqdm

from img_minimal.backbones import computes_on
from img_minimal.backbones.sdxl.injection import ImageBranch, inject
from img_minimal.runtime.devices import Precision
from img_minimal.runtime.images import check_finite


@torch.no_grad()
def draw(
    pipe: StableDiffusionXLPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    steps: int,
    guidance_scale: float,
    branch: ImageBranch | None = None,
    tokens: Tensor | None = None,
    negative: Tensor | None = None,
    scale: float = 0.0,
    scale_end: float = 1.0,
    precision: Precision | None = None,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str | None = None,
    batch_size: int = 64,
    progress: str | None = None,
) -> Tensor:
    """One image per prompt, (B, 3, H, W) in [0, 1] on the CPU. Without a negative prompt its embedding is zeros.

    Every image has its own CPU generator, so a seed gives the same start noise alone or in a batch, in the first pass
    or in the second, on every device. tokens (B, N, D) are injected beside the text, with `scale` in the first step
    and `scale * scale_end` in the last one, linear in between; `negative` (1, N, D) takes their place in the
    unconditional half of classifier-free guidance. Without a size images have the model's own, without a `precision`
    it is "mixed". SDXL's VAE overflows in fp16, so load it in fp32.
    """
    device = computes_on(pipe.unet)
    precision = precision or Precision.named("mixed", device)
    starts = range(0, len(prompts), batch_size)
    bar = tqdm(total=len(starts) * steps, desc=progress, disable=progress is None, leave=False, delay=1)
    scales = torch.linspace(scale, scale * scale_end, steps)
    current = torch.empty(())  # what `inject` reads in every step

    def after_step(_: object, step: int, timestep: object, tensors: dict) -> dict:
        """Diffusers calls this after each step, and goes on with the latents that it returns."""
        bar.update()
        current.copy_(scales[min(step + 1, steps - 1)])
        if step < steps - 1:
            return {}
        check_finite(tensors["latents"], start)
        return {"latents": tensors["latents"].to(pipe.vae.dtype)}  # fp32, whatever the UNet computes in

    pipe._guidance_scale = guidance_scale  # what the call sets as well: its own rule says if the batch is doubled
    images = []
    for start in starts:
        part = slice(start, start + batch_size)
        current.copy_(scales[0])
        injected = nullcontext()
        if tokens is not None and scale != 0:
            positive = tokens[part].to(device)
            both = torch.cat([negative.to(positive).expand_as(positive), positive])
            injected = inject(pipe.unet, branch, both if pipe.do_classifier_free_guidance else positive, current)
        with injected, precision.sampling(device):
            decoded = pipe(
                prompt=prompts[part],
                negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts[part]),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                output_type="pt",
                callback_on_step_end=after_step,
            ).images
            check_finite(decoded, start)
        images.append(decoded.float().cpu())
    bar.close()
    return torch.cat(images)
