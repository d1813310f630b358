"""The Resampler, pretrained without a UNet: its 16 tokens must suffice to rebuild the latents of the picture.

Its queries start at sixteen places of the picture. From a random start, attention did not learn to tell places apart.

And each token must speak of its own place alone. Trained to rebuild and nothing else, a Resampler spreads every shape
evenly over all 16 tokens; to recolour one circle, an aligner then has to rewrite all of them. So pictures are also cut
up and put together from two: the tokens of the patchwork must be the patchwork of the tokens.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from img_minimal.aligner import PerceiverLayers
from img_minimal.hub.weights import write_safetensors
from img_minimal.sdxl import Resampler
from img_minimal.tiny.build.clip import SIDE, WIDTH, sine_position_2d
from img_minimal.tiny.build.loop import autocast, fit

CELLS = SIDE // 2  # tokens in a row
NOISE = 0.3  # on the tokens that the decoder reads; the variance of a token's content has to stand out from it
LOCALITY = 0.1  # weight of the patchwork's error, in units of the tokens' variance


def new_resampler() -> Resampler:
    """16 queries of width 128, one for each 2 x 2 patches."""
    resampler = Resampler(WIDTH, WIDTH, tokens=16, width=WIDTH, depth=3, heads=2)
    places = sine_position_2d(WIDTH, SIDE).unflatten(0, (CELLS, 2, CELLS, 2)).mean((1, 3)).flatten(0, 1)
    with torch.no_grad():
        resampler.latents.copy_(places[None])
    return resampler


class Decoder(nn.Module):
    """Tokens (B, 16, D) -> latents (B, 4, 8, 8); thrown away after this part."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(sine_position_2d(WIDTH, SIDE)[None])
        self.layers = PerceiverLayers(WIDTH, depth=2, heads=2)
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        """Each place of the latent reads the tokens."""
        places = self.layers(self.places.expand(len(tokens), -1, -1), tokens)
        return self.out(places).transpose(1, 2).unflatten(2, (SIDE, SIDE))


def patchwork(batch: int) -> tuple[Tensor, Tensor]:
    """Which of two pictures each place comes from: of the tokens (B, 16, 1), of class token and patches (B, 65, 1)."""
    tokens = torch.rand(batch, CELLS, CELLS) < torch.rand(batch, 1, 1)
    patches = tokens.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    summary = torch.rand(batch, 1) < 0.5
    return tokens.flatten(1)[..., None], torch.cat([summary, patches], 1)[..., None]


def build(workdir: Path, target: Path, steps: int = 1000, batch: int = 96) -> None:
    """Write `workdir/resampler.safetensors`."""
    torch.manual_seed(30)
    data = torch.load(workdir / "scenes.pt", weights_only=True, mmap=True)
    latents, features = data["latents"], data["features"]
    unseen = min(1000, len(latents) // 10)
    resampler, decoder = new_resampler(), Decoder()

    def loss_of_step(step: int) -> Tensor:
        """The loss of a random batch."""
        i, j = torch.randint(len(latents) - unseen, (2, batch))
        of_tokens, of_patches = patchwork(batch)
        a, b = features[i].float(), features[j].float()
        with autocast():
            three = resampler(torch.cat([a, b, torch.where(of_patches, a, b)])).float()
        tokens_a, tokens_b, tokens = three.chunk(3)
        expected = torch.where(of_tokens, tokens_a, tokens_b)
        variance = three.var(0).mean().detach().clamp(min=0.05)  # while it grows, locality must not hold it down
        of_latents = of_patches[:, 1:].view(-1, 1, SIDE, SIDE)
        rebuilt = torch.cat([latents[i], torch.where(of_latents, latents[i], latents[j])])
        noisy = torch.cat([tokens_a, expected])
        # Without noise at first: before it has learnt anything, a token's content would drown.
        noisy = noisy + min(1.0, step / (0.4 * steps)) * NOISE * torch.randn_like(noisy)
        with autocast():
            error = F.mse_loss(decoder(noisy).float(), rebuilt.float())
        return error + LOCALITY * (tokens - expected).square().mean() / variance

    @torch.no_grad()
    def watch(step: int) -> str:
        """What unseen pictures lose on their way through the tokens."""
        a, b = features[-unseen:].float().chunk(2)
        of_tokens, of_patches = patchwork(len(a))
        with autocast():
            tokens_a, tokens_b, tokens = (resampler(x).float() for x in (a, b, torch.where(of_patches, a, b)))
            rebuilt = decoder(tokens_a).float()
        real = latents[-unseen:].float()
        unexplained = F.mse_loss(rebuilt, real[: len(a)]) / real.var()
        stray = F.mse_loss(tokens, torch.where(of_tokens, tokens_a, tokens_b)) / tokens_a.var(0).mean()
        return f"on unseen pictures: unexplained {unexplained:.3f}, patchwork error {stray:.3f}"

    fit("resampler", nn.ModuleDict({"resampler": resampler, "decoder": decoder}), loss_of_step, steps, workdir,
        lr=2e-3, hold=0.3, watch=watch, watch_every=200, seed=31)  # fmt: skip
    write_safetensors(workdir / "resampler.safetensors", resampler.state_dict())
