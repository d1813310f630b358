"""Drawing with a diffusers SDXL pipeline, with or without image tokens: steps 1 and 4 of IMG."""

from contextlib import nullcontext

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from tqdm import tqdm

from img_minimal.injection import ImageBranch, inject


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
    batch_size: int = 64,
    progress: str | None = None,
) -> Tensor:
    """One image per prompt, (B, 3, H, W) in [0, 1] on the CPU.

    Every image has its own CPU generator, so a seed gives the same start noise alone or in a batch, in the first pass
    or in the second, on every device. tokens (B, N, D) are injected with `scale` beside the text; `negative` (1, N, D)
    takes their place in the unconditional half of classifier-free guidance.
    """
    images = []
    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, desc=progress, disable=progress is None or len(starts) == 1, leave=False):
        part = slice(start, start + batch_size)
        context = nullcontext()
        if tokens is not None and scale != 0:
            positive = tokens[part].to(pipe.device)
            both = torch.cat([negative.to(positive).expand_as(positive), positive])
            context = inject(pipe.unet, branch, both if guidance_scale > 1 else positive, scale)
        with context, torch.autocast(pipe.device.type, torch.bfloat16):
            result = pipe(
                prompt=prompts[part],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                output_type="pt",
            )
        images.append(result.images.float().cpu())
    return torch.cat(images)
