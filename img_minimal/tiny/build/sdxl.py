"""SDXL's twin and its DPO variant: UNet and image branch, trained together from the start.

Four kinds of condition are mixed: text alone, image tokens alone, both, none. An adapter added to a
finished UNet learned nothing useful here: the queries of a UNet that never needed positions do not
know them.

SDXL-DPO's twin is this UNet, finetuned on the preference pairs by Diffusion-DPO (Wallace et al.,
arXiv 2311.12908, Eq. 14). It should predict the winner x_w better than the frozen UNet does, and
the loser x_l worse. With v the target of the prediction, and one noise and timestep for both:

    gain(x) = mean (v_ref(x_t, t) - v)^2 - mean (v_theta(x_t, t) - v)^2
    L = -log sigmoid(beta * (gain(x_w) - gain(x_l)))

Only the UNet changes: keys and values of the image prompt stay, so the aligner can be plugged in.
"""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from img_minimal.backbone import Backbone, open_backbone
from img_minimal.data.pairs import held_back
from img_minimal.devices import Turns
from img_minimal.files import decode, to_pil
from img_minimal.hub.weights import read_weights, write_weights
from img_minimal.sdxl import SDXL, ImagePrompt, Resampler, inject, new_branch
from img_minimal.tiny.build.encoders import (
    TEXT_WIDTH,
    WIDTH,
    encode_latents,
    image_processor,
    in_batches,
    normalized,
    open_vision,
    random_pictures,
)
from img_minimal.tiny.build.fit import CPU, MIXED, autocast, fit, preset_in, save_pipeline
from img_minimal.tiny.grammar import CATEGORIES, sample_prompt
from img_minimal.tiny.oracle import judge
from img_minimal.tiny.world import place, render

NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
# SDXL's time_ids: original size, crop, target size.
SIZES = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
# Shares of a batch: text alone, nothing, text and image, image alone; the rest has the tokens of
# "no image". The later half trains drawing from text, and colours, which less noisy steps decide.
EARLY, LATE = (0.32, 0.05, 0.26, 0.32), (0.46, 0.05, 0.22, 0.22)


# Data


def build_scenes(workdir: Path, target: Path, count: int = 48_000) -> None:
    """Compute the UNet's training data once: `workdir/scenes.pt`.

    latents (N, 4, 8, 8), CLIP's features (N, 65, 128), and N captions.
    """
    vae = AutoencoderKL.from_pretrained(target / "sdxl/vae")
    vision = open_vision(target / "image_encoder")
    prompts, pictures = random_pictures(count, seed=21)

    def encode(batch: Tensor) -> Tensor:
        states = vision(normalized(batch), output_hidden_states=True).hidden_states
        return states[-2].bfloat16()

    data = {
        "latents": encode_latents(vae, pictures).half(),
        "features": in_batches(encode, pictures),
        "captions": list(map(str, prompts)),
    }
    torch.save(data, workdir / "scenes.pt")


@torch.no_grad()
def encode_text(pipe: StableDiffusionXLPipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Encode N captions as the UNet reads them: states (N, 16, 128) and embeddings (N, 128)."""
    states, pooled = [], []
    for k in range(0, len(captions), 1000):
        batch = captions[k : k + 1000]
        encoded = pipe.encode_prompt(batch, do_classifier_free_guidance=False)
        states.append(encoded[0])
        pooled.append(encoded[2])
    return torch.cat(states), torch.cat(pooled)


# Conditions of a training batch, for FLUX's twin too


def random_conditions(batch_size: int, late: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Draw which samples have text, an image prompt, and the tokens of "no image": (B,) each."""
    kind = torch.rand(batch_size)
    text_alone, nothing, both, image = LATE if late else EARLY
    has_image = kind >= text_alone + nothing
    has_text = (kind < text_alone) | (has_image & (kind < text_alone + nothing + both))
    return has_text, has_image, kind >= text_alone + nothing + both + image


def random_image_prompts(tokens: Tensor, negative: Tensor, is_negative: Tensor) -> Tensor:
    """Blur half of the tokens (B, N, D), and put those of "no image" in the chosen places.

    As in unCLIP: an aligner's result is never exactly the tokens of a picture.
    """
    batch_size = len(tokens)
    blur = 0.3 * torch.rand(batch_size, 1, 1) * (torch.rand(batch_size, 1, 1) < 0.5)
    blurred = tokens + blur * torch.randn_like(tokens)
    return torch.where(is_negative[:, None, None], negative, blurred)


def drawing_test(
    backbone: Backbone, seed: int, count: int, scales: tuple[float, ...] = (0.0, 0.5, 1.0)
) -> Callable[[], dict[str, float]]:
    """Return a function that measures how many validation prompts are drawn right.

    From text alone, and with the tokens of a right picture at some scales.
    """
    rng = random.Random(seed)
    categories = [CATEGORIES[k % 5] for k in range(count)]
    prompts = [sample_prompt(rng, category, "validation") for category in categories]
    tokens = backbone.tokens(to_pil(render([place(prompt, rng) for prompt in prompts])))
    captions = list(map(str, prompts))

    def measure() -> dict[str, float]:
        shares = {}
        for scale in scales:
            images = backbone.draw(captions, [*range(count)], tokens, scale=scale, scale_end=1.0)
            right = sum(verdict.strict for verdict in judge(images, prompts))
            shares[f"strict_at_{scale}"] = right / count
        return shares

    return measure


# UNet and image branch


def new_unet() -> UNet2DConditionModel:
    """Build SDXL's kind of UNet, two levels small: 4.4 M parameters, seven cross-attentions."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=2 * TEXT_WIDTH,
        attention_head_dim=(2, 4),  # numbers of heads, in spite of the name
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=WIDTH + 6 * 16,
    )


def assemble(target: Path, unet: UNet2DConditionModel) -> StableDiffusionXLPipeline:
    """Build the SDXL pipeline around a UNet."""
    sdxl, dtype = target / "sdxl", torch.float32
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(sdxl / "vae", dtype=dtype),
        text_encoder=CLIPTextModel.from_pretrained(sdxl / "text_encoder", dtype=dtype),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(
            sdxl / "text_encoder_2", dtype=dtype
        ),
        tokenizer=CLIPTokenizer.from_pretrained(sdxl / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(sdxl / "tokenizer_2"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing", steps_offset=1),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_unet(
    workdir: Path, target: Path, steps: int = 13_000, batch_size: int = 96, watched: int = 100
) -> None:
    """Train UNet and branch; save `target/sdxl` and `target/ip_adapter.safetensors`."""
    torch.manual_seed(40)
    data = torch.load(workdir / "scenes.pt", weights_only=True, mmap=True)
    latents = data["latents"]
    resampler = Resampler.from_state_dict(read_weights(workdir / "resampler.safetensors"))
    vision = open_vision(target / "image_encoder")
    image_prompt = ImagePrompt(vision, image_processor(), resampler, MIXED)
    tokens = in_batches(lambda x: resampler(x.float()).bfloat16(), data["features"])
    negative = image_prompt.negative()
    unet, scheduler = new_unet(), DDPMScheduler(**NOISE)
    branch, pipe = new_branch(unet), assemble(target, unet)
    states, pooled = encode_text(pipe, data["captions"])
    states, pooled = states.bfloat16(), pooled.bfloat16()  # which halves 400 MB

    def loss_of_step(step: int) -> Tensor:
        late = step >= steps // 2
        i = torch.randint(len(latents), (batch_size,))
        has_text, has_image, is_negative = random_conditions(batch_size, late)
        # SDXL's "no text" is zeros.
        text = states[i].float() * has_text[:, None, None]
        embeds = pooled[i].float() * has_text[:, None]
        added = {"text_embeds": embeds, "time_ids": SIZES.expand(batch_size, -1)}
        image = random_image_prompts(tokens[i].float(), negative, is_negative)
        t = torch.randint(1000, (batch_size,))
        if not late:  # layout is decided in the noisy half
            t = torch.where(torch.rand(batch_size) < 0.5, 500 + t // 2, t)
        clean = latents[i].float()
        noise = torch.randn_like(clean)
        noisy = scheduler.add_noise(clean, noise, t)
        with autocast(), inject(unet, branch, image, has_image.float()):
            predicted = unet(noisy, t, text, added_cond_kwargs=added).sample
        return F.mse_loss(predicted.float(), scheduler.get_velocity(clean, noise, t))

    backbone = SDXL(pipe, image_prompt, branch, preset_in(target), Turns(CPU))
    fit(
        workdir / "unet",
        nn.ModuleDict({"unet": unet, "branch": branch}),
        loss_of_step,
        steps,
        lr=1e-3,
        average=0.998,
        measure=drawing_test(backbone, seed=41, count=watched),
        save_every=1000,
        seed=42,
    )
    adapter = {}
    for key, value in add_fourth_layer(resampler.state_dict()).items():
        adapter[f"image_proj.{key}"] = value.bfloat16()
    for key, value in branch.state_dict().items():
        adapter[f"ip_adapter.{key}"] = value.bfloat16()
    write_weights(target / "ip_adapter.safetensors", adapter)
    save_pipeline(pipe, target / "sdxl")


def add_fourth_layer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add a layer that changes nothing to a Resampler: diffusers opens none with three layers."""
    fourth = {}
    for key, value in state.items():
        if key.startswith("layers.2."):
            fourth[key.replace("layers.2.", "layers.3.")] = value.clone()
    for last in ("layers.3.0.to_out.weight", "layers.3.1.3.weight"):
        fourth[last].zero_()
    return state | fourth


# Diffusion-DPO


def dpo_loss(ours: Tensor, reference: Tensor, target: Tensor, beta: float) -> Tensor:
    """Compute the mean loss of predictions and targets (2 B, 4, 8, 8), winners before losers."""
    error = (ours - target).square().mean((1, 2, 3))
    reference_error = (reference - target).square().mean((1, 2, 3))
    winner, loser = (reference_error - error).chunk(2)  # gains, (B,) each
    return -F.logsigmoid(beta * (winner - loser)).mean()


def build_dpo(
    workdir: Path,
    target: Path,
    steps: int = 400,
    batch_size: int = 32,
    beta: float = 1000.0,
    watched: int = 100,
) -> None:
    """Finetune the UNet on the pairs in `target`; save `target/unet-dpo`.

    One image of each pair was drawn and the other is rendered, and the drawn one loses more often.
    A loss that sees this learns to draw like a renderer and forgets the prompt. So half of every
    batch are pairs that the drawn image wins.
    """
    folder = target / "sdxl/unet"
    frozen = UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32)
    frozen.requires_grad_(False)
    unet = new_unet()  # a copy of `frozen` would keep the folder's name in its config
    unet.load_state_dict(frozen.state_dict())
    pipe, scheduler = assemble(target, unet), DDPMScheduler(**NOISE)
    captions, winner, loser, drawn_wins = read_pairs(target / "pairs.parquet")
    winner, loser = encode_latents(pipe.vae, winner), encode_latents(pipe.vae, loser)
    kinds = drawn_wins.nonzero().flatten(), (~drawn_wins).nonzero().flatten()
    states, pooled = encode_text(pipe, captions)

    def loss_of_step(step: int) -> Tensor:
        half = (batch_size // 2,)
        i = torch.cat([kind[torch.randint(len(kind), half)] for kind in kinds])
        clean = torch.cat([winner[i], loser[i]])
        noise = torch.randn(batch_size, *clean.shape[1:]).repeat(2, 1, 1, 1)
        t = torch.randint(1000, (batch_size,)).repeat(2)
        both = i.repeat(2)
        added = {"text_embeds": pooled[both], "time_ids": SIZES.expand(2 * batch_size, -1)}
        inputs = scheduler.add_noise(clean, noise, t), t, states[both]
        with autocast():
            ours = unet(*inputs, added_cond_kwargs=added).sample
            with torch.no_grad():
                reference = frozen(*inputs, added_cond_kwargs=added).sample
        velocity = scheduler.get_velocity(clean, noise, t)
        return dpo_loss(ours.float(), reference.float(), velocity, beta)

    backbone = open_backbone(preset_in(target), pipe)
    measure = drawing_test(backbone, seed=43, count=watched, scales=(0.0,))
    print(f"dpo, before: {measure()}")
    fit(
        workdir / "dpo",
        nn.ModuleDict({"unet": unet}),
        loss_of_step,
        steps,
        lr=1e-5,
        average=0.99,
        measure=measure,
        save_every=200,
        seed=44,
    )
    unet.to(torch.bfloat16).save_pretrained(target / "unet-dpo")


def read_pairs(path: Path) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """Read the pairs to train on.

    Returns N captions, winners and losers as uint8 (N, 3, 64, 64), and (N,) True where the drawn
    image wins.
    """
    captions, winner, loser, drawn_wins = [], [], [], []
    for row in pq.read_table(path).to_pylist():
        if held_back(row["caption"]):
            continue
        images = [np.asarray(decode(row[name])) for name in ("jpg_0", "jpg_1")]
        first_wins = row["label_0"] == 1
        if not first_wins:
            images.reverse()
        captions.append(row["caption"])
        winner.append(images[0])
        loser.append(images[1])
        drawn_wins.append(first_wins == (row["model_0"] == "tiny-sdxl"))
    winner, loser = torch.tensor(np.stack(winner)), torch.tensor(np.stack(loser))
    order = 0, 3, 1, 2
    return captions, winner.permute(order), loser.permute(order), torch.tensor(drawn_wins)
