"""The twin's SDXL-DPO: its UNet, finetuned on the preference pairs with the objective of Diffusion-DPO.

A UNet that prefers x_w to x_l should predict x_w better than the frozen one does, and x_l worse. With v the target of
the prediction and one noise and one timestep for both images of a pair (Wallace et al., arXiv 2311.12908, Eq. 14):

    gain(x) = mean (v_ref(x_t, t) - v)^2 - mean (v_theta(x_t, t) - v)^2
    L = -log sigmoid(beta * (gain(x_w) - gain(x_l)))

One image of every pair was drawn and the other is rendered, and the drawn one loses more often. A loss that sees that
learns to draw like a renderer, and forgets the prompt. So half of every batch are pairs that the drawn image wins.

Only the UNet changes. Keys and values of the image prompt stay those of tiny-sdxl, so its aligner can be plugged in.
"""

import random
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm

from img_minimal.data.features import distinct
from img_minimal.data.pairs import PAIRS, Pair, held_back
from img_minimal.files import decode, from_pil
from img_minimal.sdxl import draw
from img_minimal.tiny.build.loop import autocast, fit
from img_minimal.tiny.build.pairs import BASE
from img_minimal.tiny.build.scenes import encode_text
from img_minimal.tiny.build.unet import NOISE, SIZES, assemble, new_unet
from img_minimal.tiny.grammar import CATEGORIES, sample_prompt
from img_minimal.tiny.oracle import judge


def dpo_loss(ours: Tensor, reference: Tensor, target: Tensor, beta: float) -> Tensor:
    """Predictions and targets (2 B, 4, 8, 8), the B winners before the B losers -> the mean of the loss above."""
    gain = (reference - target).square().mean((1, 2, 3)) - (ours - target).square().mean((1, 2, 3))  # (2 B,)
    winner, loser = gain.chunk(2)
    return -F.logsigmoid(beta * (winner - loser)).mean()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: list[Image]) -> Tensor:
    """Images -> latents (B, 4, 8, 8) as the UNet sees them; an object that occurs twice is encoded once."""
    once, number = distinct(images)
    with autocast():
        parts = [
            vae.encode(from_pil(once[k : k + 250]) * 2 - 1).latent_dist.mode()
            for k in tqdm(range(0, len(once), 250), desc="latents", leave=False)
        ]
    return torch.cat(parts).float()[number] * vae.config.scaling_factor


def read(path: Path, limit: int) -> tuple[list[Pair], Tensor]:
    """Pairs to train on, of the first `limit` rows (0: all), and which of them the drawn image wins."""
    rows = pq.read_table(path).slice(0, limit or None).to_pylist()
    rows = [row for row in rows if not held_back(row["caption"])]
    images: dict[bytes, Image] = {}
    parse_pair = next(iter(PAIRS.values()))
    pairs = [parse_pair(row, lambda data: images.setdefault(data, decode(data))) for row in rows]
    return pairs, torch.tensor([row["label_0" if row["model_0"] == BASE else "label_1"] == 1 for row in rows])


def build(
    workdir: Path, target: Path, steps: int = 400, batch: int = 32, beta: float = 1000.0, lr: float = 1e-5,
    limit: int = 0, watched: int = 100,
) -> None:  # fmt: skip
    """Finetune on the pairs of `target`, all or `limit` of them; save the UNet to `target/unet-dpo`."""
    pairs, drawn_wins = read(target / "pairs.parquet", limit)
    kinds = [part.nonzero().flatten() for part in (drawn_wins, ~drawn_wins)]
    vae = AutoencoderKL.from_pretrained(target / "sdxl/vae", torch_dtype=torch.float32)
    latents = encode(vae, [p.winner for p in pairs] + [p.loser for p in pairs])
    winner, loser = latents.split(len(pairs))
    captions = sorted({p.prompt for p in pairs})
    text, pooled = encode_text(target, captions)
    number = {caption: k for k, caption in enumerate(captions)}
    caption = torch.tensor([number[p.prompt] for p in pairs])
    frozen = UNet2DConditionModel.from_pretrained(target / "sdxl/unet", torch_dtype=torch.float32).requires_grad_(False)
    unet = new_unet()  # not a copy of `frozen`, whose config names the folder it came from
    unet.load_state_dict(frozen.state_dict())
    noising = DDPMScheduler(**NOISE)

    def loss_of_step(step: int) -> Tensor:
        """A batch of pairs, half of them won by the drawn image."""
        i = torch.cat([kind[torch.randint(len(kind), (batch // 2,))] for kind in kinds])
        clean = torch.cat([winner[i], loser[i]])
        noise, t = torch.randn(batch, 4, 8, 8).repeat(2, 1, 1, 1), torch.randint(1000, (batch,)).repeat(2)
        words, k = text[caption[i]].repeat(2, 1, 1), caption[i].repeat(2)
        added = {"text_embeds": pooled[k], "time_ids": SIZES.expand(2 * batch, -1)}
        noisy = noising.add_noise(clean, noise, t)
        with autocast():
            ours = unet(noisy, t, words, added_cond_kwargs=added).sample
            with torch.no_grad():
                reference = frozen(noisy, t, words, added_cond_kwargs=added).sample
        return dpo_loss(ours.float(), reference.float(), noising.get_velocity(clean, noise, t), beta)

    rng = random.Random(43)
    prompts = [sample_prompt(rng, CATEGORIES[k % 5], "validation") for k in range(watched)]
    pipe = assemble(target, unet)

    def watch(step: int) -> str:
        """How many prompts the UNet draws rightly from text alone."""
        images = draw(pipe, [str(p) for p in prompts], list(range(watched)), steps=10, guidance_scale=4.0)
        return f"strict {sum(v.strict for v in judge(images, prompts))} of {watched}"

    tqdm.write(f"before: {watch(0)}")
    modules = nn.ModuleDict({"unet": unet})
    fit("dpo", modules, loss_of_step, steps, workdir, lr=lr, average=0.99, watch=watch, watch_every=200, seed=44)
    unet.to(torch.bfloat16).save_pretrained(target / "unet-dpo")
