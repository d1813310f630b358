"""The Resampler, pretrained without a UNet: its 16 tokens must suffice to rebuild the latents of the picture.

Its queries start at sixteen places of the picture. From a random start, attention did not learn to tell places apart.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from img_minimal.attention import PerceiverLayers
from img_minimal.image_prompt import Resampler
from img_minimal.tiny.build.clip import SIDE, WIDTH, sine_position_2d
from img_minimal.tiny.build.loop import autocast, fit
from img_minimal.weights import write_safetensors


def new_resampler() -> Resampler:
    """16 queries of width 128, one for each 2 x 2 patches."""
    resampler = Resampler(WIDTH, WIDTH, tokens=16, width=WIDTH, depth=3, heads=2)
    places = sine_position_2d(WIDTH, SIDE).unflatten(0, (SIDE // 2, 2, SIDE // 2, 2)).mean((1, 3)).flatten(0, 1)
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


def build(workdir: Path, target: Path, steps: int = 1000, batch: int = 128) -> None:
    """Write `workdir/resampler.safetensors`."""
    torch.manual_seed(30)
    data = torch.load(workdir / "scenes.pt", weights_only=True, mmap=True)
    latents, features = data["latents"], data["features"]
    unseen = min(1000, len(latents) // 10)
    models = nn.ModuleDict({"resampler": new_resampler(), "decoder": Decoder()})

    def rebuild(i: Tensor | slice) -> Tensor:
        with autocast():
            return F.mse_loss(models["decoder"](models["resampler"](features[i].float())).float(), latents[i].float())

    @torch.no_grad()
    def watch(step: int) -> str:
        return f"unexplained on unseen pictures {rebuild(slice(-unseen, None)) / latents[-unseen:].float().var():.3f}"

    fit("resampler", models, lambda step: rebuild(torch.randint(len(latents) - unseen, (batch,))), steps, workdir,
        lr=2e-3, hold=0.3, watch=watch, watch_every=200, seed=31)  # fmt: skip
    write_safetensors(workdir / "resampler.safetensors", models["resampler"].state_dict())
