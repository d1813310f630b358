"""The VAE: 64 x 64 x 3 pictures <-> 8 x 8 x 4 latents (factor 8, as SDXL's)."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from img_minimal.tiny.build.loop import autocast, fit
from img_minimal.tiny.grammar import sample_prompt
from img_minimal.tiny.world import place, render


def random_pictures(count: int, seed: int) -> tuple[list, Tensor]:
    """Training prompts and rendered scenes of them: (prompts, uint8 (count, 3, 64, 64))."""
    rng = random.Random(seed)
    prompts = [sample_prompt(rng) for _ in range(count)]
    pictures = torch.cat([(render([place(p, rng)]) * 255).round().byte() for p in prompts])
    return prompts, pictures


def new_vae() -> AutoencoderKL:
    """The architecture: one layer a block, no attention in the middle, 0.5 M parameters."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        force_upcast=False,
    )


def build(workdir: Path, target: Path, steps: int = 1600, count: int = 20_000) -> None:
    """Train and save to `target`; the scaling factor makes the latents' deviation 1."""
    torch.manual_seed(0)
    vae = new_vae().to(memory_format=torch.channels_last)
    _, pictures = random_pictures(count, seed=1)
    _, unseen = random_pictures(256, seed=2)

    def loss_of_step(step: int) -> Tensor:
        """The loss of a random batch."""
        x = pictures[torch.randint(len(pictures), (24,))].float() / 127.5 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        return F.mse_loss(y.float(), x) + 0.1 * F.l1_loss(y.float(), x) + 1e-6 * posterior.kl().float().mean()

    @torch.no_grad()
    def watch(step: int) -> str:
        """What unseen pictures lose on their way through the latents."""
        x = unseen.float() / 127.5 - 1
        with autocast():
            z = vae.encode(x).latent_dist.mode()
            y = vae.decode(z).sample
        deviations = [round(d, 2) for d in z.float().std((0, 2, 3)).tolist()]
        return f"unseen squared error {F.mse_loss(y.float(), x):.5f}, deviation of the channels {deviations}"

    fit("vae", nn.ModuleDict({"vae": vae}), loss_of_step, steps, workdir, lr=2.5e-3, weight_decay=0.0, watch=watch)
    with torch.no_grad():
        z = vae.encode(pictures[:1000].float() / 127.5 - 1).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    vae.to(torch.bfloat16).save_pretrained(target)
