"""FLUX's image encoder and token projection: one vector a picture, whose four tokens must suffice to rebuild it.

A CLIP that was only contrasted with captions says in its pooled vector what there is, and little of where
(`python -m img_minimal.tiny.diagnose --pooled`). So the twin's CLIP is trained on, with the token projection of XLabs'
kind behind it and a decoder of latents behind that. As with SDXL's Resampler each token must speak of its own place
alone, here a quarter of the picture: the tokens of a patchwork of two pictures are the patchwork of their tokens.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from img_minimal.aligner import PerceiverLayers
from img_minimal.flux import TOKENS, TokenProjection
from img_minimal.hub.weights import write_safetensors
from img_minimal.tiny.build.clip import SIDE, WIDTH, image_processor, sine_position_2d
from img_minimal.tiny.build.loop import autocast, fit
from img_minimal.tiny.build.vae import random_pictures

EMBED = 256  # width of the pooled embedding
NOISE = 0.3  # on the tokens that the decoder reads
LOCALITY = 0.1  # weight of the patchwork's error, in units of the tokens' variance


def new_encoder(target: Path) -> CLIPVisionModelWithProjection:
    """SDXL's vision encoder with a wider projection of its class token."""
    encoder = CLIPVisionModelWithProjection.from_pretrained(target / "image_encoder", dtype=torch.float32)
    encoder.visual_projection = nn.Linear(WIDTH, EMBED, bias=False)
    encoder.config.projection_dim = EMBED
    return encoder


class Decoder(nn.Module):
    """Tokens (B, 4, D) -> latents (B, 4, 8, 8); thrown away after this part."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(sine_position_2d(WIDTH, SIDE)[None])
        self.names = nn.Parameter(torch.randn(1, TOKENS, WIDTH) * 0.5)  # which token is which
        self.layers = PerceiverLayers(WIDTH, depth=3, heads=4)
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        """Each place of the latent reads the tokens."""
        places = self.layers(self.places.expand(len(tokens), -1, -1), tokens + self.names)
        return self.out(places).transpose(1, 2).unflatten(2, (SIDE, SIDE))


def enlarged(quarters: Tensor, side: int) -> Tensor:
    """One flag for each quarter of a picture (B, 1, 2, 2) -> one for each place (B, 1, side, side)."""
    return quarters.repeat_interleave(side // 2, -1).repeat_interleave(side // 2, -2)


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """uint8 pictures -> latents (N, 4, 8, 8), their deviation 1."""
    with autocast():
        parts = [vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in pictures.split(250)]
    return torch.cat(parts).float() * vae.config.scaling_factor


def build(workdir: Path, target: Path, steps: int = 2400, batch: int = 64, count: int = 24_000) -> None:
    """Save `target/flux_image_encoder` and the projection as `workdir/projection.safetensors`."""
    torch.manual_seed(50)
    vae = AutoencoderKL.from_pretrained(target / "sdxl/vae")
    encoder, projection, decoder = new_encoder(target), TokenProjection(EMBED, WIDTH, TOKENS), Decoder()
    _, pictures = random_pictures(count, seed=51)
    latents = latents_of(vae, pictures)
    unseen = min(1000, count // 10)

    def tokens_of(x: Tensor) -> Tensor:
        """Pixels in [-1, 1] -> tokens (B, 4, D)."""
        return projection(encoder(x).image_embeds.float()).float()

    def errors(i: Tensor, j: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        """Squared error of the rebuilt latents; stray share of a token's variance, of what other places change."""
        a, b = (pictures[k].float() / 127.5 - 1 for k in (i, j))
        of_a = torch.rand(len(a), 1, 2, 2) < torch.rand(len(a), 1, 1, 1)
        mixed = torch.where(enlarged(of_a, a.shape[-1]), a, b)
        mixed_latents = torch.where(enlarged(of_a, SIDE), latents[i], latents[j])
        with autocast():
            tokens_a, tokens_b, tokens = tokens_of(torch.cat([a, b, mixed])).chunk(3)
        expected = torch.where(of_a.flatten(2).mT, tokens_a, tokens_b)
        noisy = torch.cat([tokens_a, expected])
        with autocast():
            rebuilt = decoder(noisy + noise * torch.randn_like(noisy))
        stray = (tokens - expected).square().mean() / tokens_a.var(0).mean().detach().clamp(min=0.05)
        return F.mse_loss(rebuilt.float(), torch.cat([latents[i], mixed_latents])), stray

    def loss_of_step(step: int) -> Tensor:
        """The loss of a random batch."""
        i, j = torch.randint(len(pictures) - unseen, (2, batch))
        # Without noise at first: before it has learnt anything, a token's content would drown.
        rebuilding, stray = errors(i, j, min(1.0, step / (0.4 * steps)) * NOISE)
        return rebuilding + LOCALITY * stray

    @torch.no_grad()
    def watch(step: int) -> str:
        """What unseen pictures lose on their way through the tokens."""
        i, j = torch.arange(len(pictures) - unseen, len(pictures)).chunk(2)
        rebuilding, stray = errors(i, j, 0.0)
        return f"on unseen pictures: unexplained {rebuilding:.3f}, patchwork error {stray:.3f}"

    models = nn.ModuleDict({"encoder": encoder, "projection": projection, "decoder": decoder})
    fit("flux_encoder", models, loss_of_step, steps, workdir, lr={"encoder": 1e-3, "projection": 2e-3, "decoder": 2e-3},
        hold=0.4, watch=watch, watch_every=250, seed=52)  # fmt: skip
    write_safetensors(workdir / "projection.safetensors", projection.state_dict())
    encoder.to(torch.bfloat16).save_pretrained(target / "flux_image_encoder")
    image_processor().save_pretrained(target / "flux_image_encoder")
