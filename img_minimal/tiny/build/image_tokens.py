"""Image prompts of both twins, pretrained without a network that draws.

SDXL's Resampler makes 16 tokens of CLIP's patches. FLUX's projection makes four of one pooled
vector, and its vision encoder is trained along: a CLIP that was only contrasted with captions says
in its vector what is in a picture, and little of where (`python -m img_minimal.tiny.diagnose`).

The tokens must suffice to rebuild the picture's latents, and each must describe its own position
alone. Trained to rebuild and nothing else, a Resampler spreads every shape evenly over all tokens,
and an aligner has to rewrite 16 of them to recolour one circle. So pictures are also cut up and put
together from two: the tokens of a patchwork must be the patchwork of the tokens.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from img_minimal.aligner import PerceiverLayers
from img_minimal.flux import TOKENS
from img_minimal.hub.weights import write_weights
from img_minimal.sdxl import Resampler
from img_minimal.tiny.build.encoders import (
    SIDE,
    WIDTH,
    encode_latents,
    image_processor,
    normalized,
    open_vision,
    random_pictures,
    sine_positions,
)
from img_minimal.tiny.build.fit import autocast, fit
from img_minimal.tiny.world import SIZE

CELLS = SIDE // 2  # the Resampler's tokens along an edge
EMBED = 256  # width of FLUX's pooled vector
NOISE = 0.3  # on the tokens the decoder reads; the variance of their content has to stand out
LOCALITY = 0.1  # weight of the patchwork's error, in units of the tokens' variance


class Decoder(nn.Module):
    """Rebuild latents (B, 4, 8, 8) from tokens (B, N, D); used in this pretraining only."""

    def __init__(self, depth: int, heads: int, names: int = 0):
        """`names`: number of tokens that get a learned vector each, which tells them apart."""
        super().__init__()
        self.positions = nn.Parameter(sine_positions(WIDTH, SIDE)[None])
        self.names = nn.Parameter(torch.randn(1, names, WIDTH) * 0.5) if names else 0.0
        self.layers = PerceiverLayers(WIDTH, depth, heads)
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        """Let each position of the latents read the tokens."""
        positions = self.positions.expand(len(tokens), -1, -1)
        latents = self.out(self.layers(positions, tokens + self.names))
        return latents.transpose(1, 2).unflatten(2, (SIDE, SIDE))


def enlarge(mask: Tensor, side: int) -> Tensor:
    """Repeat the cells of a mask (B, 1, n, n): (B, 1, side, side)."""
    times = side // mask.shape[-1]
    return mask.repeat_interleave(times, -1).repeat_interleave(times, -2)


def pretrain(
    folder: Path,
    modules: nn.ModuleDict,
    encode: Callable[[Tensor], Tensor],
    spread: Callable[[Tensor], Tensor],
    side: int,
    inputs: Callable[[Tensor], Tensor],
    latents: Tensor,
    steps: int,
    batch_size: int,
    **settings: object,
) -> None:
    """Train `modules`, of which "decoder" rebuilds latents (N, 4, 8, 8) from side * side tokens.

    `inputs` looks up encoder inputs by number, `encode` turns them into tokens, and `spread` turns
    a mask of the tokens' cells (B, 1, side, side) into one of the inputs.
    """
    count = len(latents)
    unseen = min(1000, count // 10)

    def errors(i: Tensor, j: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        """Return the squared error of latents, and the share of variance from other cells."""
        mask = torch.rand(len(i), 1, side, side) < torch.rand(len(i), 1, 1, 1)
        a, b = inputs(i), inputs(j)
        with autocast():
            tokens = encode(torch.cat([a, b, torch.where(spread(mask), a, b)])).float()
        tokens_a, tokens_b, tokens_mixed = tokens.chunk(3)
        expected = torch.where(mask.flatten(2).mT, tokens_a, tokens_b)
        noisy = torch.cat([tokens_a, expected])
        noisy = noisy + noise * torch.randn_like(noisy)
        with autocast():
            rebuilt = modules["decoder"](noisy)
        true = torch.cat([latents[i], torch.where(enlarge(mask, SIDE), latents[i], latents[j])])
        # While the variance grows, locality must not hold it down.
        variance = tokens_a.var(0).mean().detach().clamp(min=0.05)
        stray = (tokens_mixed - expected).square().mean() / variance
        return F.mse_loss(rebuilt.float(), true.float()), stray

    def loss_of_step(step: int) -> Tensor:
        i, j = torch.randint(count - unseen, (2, batch_size))
        # The noise grows: before anything is learned, it would drown the tokens' content.
        error, stray = errors(i, j, NOISE * min(1.0, step / (0.4 * steps)))
        return error + LOCALITY * stray

    @torch.no_grad()
    def measure() -> dict[str, float]:
        i, j = torch.arange(count - unseen, count).chunk(2)
        error, stray = errors(i, j, 0.0)
        return {"unexplained": error.item(), "patchwork_error": stray.item()}

    fit(folder, modules, loss_of_step, steps, measure=measure, **settings)


def new_resampler() -> Resampler:
    """Build 16 queries of width 128 that start at positions: one for each 2 x 2 patches.

    From a random start, attention did not learn to tell positions apart.
    """
    resampler = Resampler(WIDTH, WIDTH, tokens=CELLS**2, width=WIDTH, depth=3, heads=2)
    positions = sine_positions(WIDTH, SIDE).unflatten(0, (CELLS, 2, CELLS, 2))
    with torch.no_grad():
        resampler.latents.copy_(positions.mean((1, 3)).flatten(0, 1)[None])
    return resampler


def spread_to_features(mask: Tensor) -> Tensor:
    """Spread a mask of cells to patches and, at random, to the class token: (B, 65, 1)."""
    patches = enlarge(mask, SIDE).flatten(1)
    summary = torch.rand(len(mask), 1) < 0.5
    return torch.cat([summary, patches], 1)[..., None]


def build_resampler(workdir: Path, target: Path, steps: int = 1000, batch_size: int = 96) -> None:
    """Train the Resampler on the scenes' features; write `workdir/resampler.safetensors`."""
    torch.manual_seed(30)
    data = torch.load(workdir / "scenes.pt", weights_only=True, mmap=True)
    resampler = new_resampler()
    pretrain(
        workdir / "resampler",
        nn.ModuleDict({"resampler": resampler, "decoder": Decoder(depth=2, heads=2)}),
        encode=resampler,
        spread=spread_to_features,
        side=CELLS,
        inputs=lambda i: data["features"][i].float(),
        latents=data["latents"],
        steps=steps,
        batch_size=batch_size,
        lr=2e-3,
        hold=0.3,
        save_every=200,
        seed=31,
    )
    write_weights(workdir / "resampler.safetensors", resampler.state_dict())


def new_flux_encoder(target: Path) -> CLIPVisionModelWithProjection:
    """Load SDXL's vision encoder, with a wider projection of its class token."""
    encoder = open_vision(target / "image_encoder")
    encoder.visual_projection = nn.Linear(WIDTH, EMBED, bias=False)
    encoder.config.projection_dim = EMBED
    return encoder


def build_flux_encoder(
    workdir: Path, target: Path, steps: int = 2400, batch_size: int = 64, count: int = 24_000
) -> None:
    """Train FLUX's vision encoder and projection, whose four tokens stand for four quarters.

    Saves `target/flux_image_encoder` and `workdir/projection.safetensors`.
    """
    torch.manual_seed(50)
    vae = AutoencoderKL.from_pretrained(target / "sdxl/vae")
    encoder, projection = new_flux_encoder(target), ImageProjection(EMBED, WIDTH, TOKENS)
    decoder = Decoder(depth=3, heads=4, names=TOKENS)
    _, pictures = random_pictures(count, seed=51)
    pretrain(
        workdir / "flux-encoder",
        nn.ModuleDict({"encoder": encoder, "projection": projection, "decoder": decoder}),
        encode=lambda pixels: projection(encoder(pixels).image_embeds.float()),
        spread=lambda mask: enlarge(mask, SIZE),
        side=2,
        inputs=lambda i: normalized(pictures[i]),
        latents=encode_latents(vae, pictures),
        steps=steps,
        batch_size=batch_size,
        lr=2e-3,
        own_lr={"encoder": 1e-3},
        hold=0.4,
        save_every=250,
        seed=52,
    )
    write_weights(workdir / "projection.safetensors", projection.state_dict())
    encoder.to(torch.bfloat16).save_pretrained(target / "flux_image_encoder")
    image_processor().save_pretrained(target / "flux_image_encoder")
