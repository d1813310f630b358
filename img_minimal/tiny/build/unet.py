"""The UNet and its image branch, trained together from the start.

Four kinds of condition are mixed: text alone, image tokens alone, both, none. An adapter added to a finished UNet
learnt nothing useful here, because the queries of a UNet that never needed places do not know them.
"""

import random
from pathlib import Path

import torch
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
    CLIPVisionModelWithProjection,
)

from img_minimal.hub.weights import read_weights, write_safetensors
from img_minimal.sdxl import ImageBranch, Resampler, draw, inject
from img_minimal.tiny.build.clip import TEXT_WIDTH, WIDTH
from img_minimal.tiny.build.loop import autocast, fit, save_pipeline
from img_minimal.tiny.build.scenes import encode_text
from img_minimal.tiny.grammar import CATEGORIES, sample_prompt
from img_minimal.tiny.oracle import judge
from img_minimal.tiny.world import place, render

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
SIZES = torch.tensor([[64.0, 64, 0, 0, 64, 64]])  # SDXL's time_ids: original size, crop, target size
# Shares of a batch: text alone, nothing, text and image, image alone; the rest has the negative image. The second half
# of the training is for what the base draws from text, and for colours, which the less noisy steps decide.
SHARES = (0.32, 0.05, 0.26, 0.32), (0.46, 0.05, 0.22, 0.22)


def new_unet() -> UNet2DConditionModel:
    """SDXL's kind of UNet, two levels small: 4.4 M parameters, seven cross-attentions."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=2 * TEXT_WIDTH,
        attention_head_dim=(2, 4),  # the number of heads, whatever its name says
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=WIDTH + 6 * 16,
    )


def assemble(target: Path, unet: UNet2DConditionModel) -> StableDiffusionXLPipeline:
    """The whole SDXL pipeline around a UNet."""
    sdxl = target / "sdxl"
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(sdxl / "vae", dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(sdxl / "text_encoder", dtype=torch.float32),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(sdxl / "text_encoder_2", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(sdxl / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(sdxl / "tokenizer_2"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing", steps_offset=1),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def image_tokens(vision: nn.Module, resampler: Resampler, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, 64, 64) in [0, 1] -> image tokens (B, 16, D)."""
    with autocast():
        return torch.cat(
            [resampler(vision(x * 2 - 1, output_hidden_states=True).hidden_states[-2]) for x in pixels.split(250)]
        ).float()


def four_layers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Resampler's state with a fourth layer that adds zero: diffusers' loader knows no Resampler of three."""
    fourth = {k.replace("layers.2.", "layers.3."): v.clone() for k, v in state.items() if k.startswith("layers.2.")}
    for last in ("layers.3.0.to_out.weight", "layers.3.1.3.weight"):
        fourth[last].zero_()
    return state | fourth


def random_conditions(batch: int, late: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Which samples have text, image tokens, and among these the negative image's: (B,) each, in the drawn shares."""
    kind, (text_alone, nothing, both, image) = torch.rand(batch), SHARES[late]
    has_text = (kind < text_alone) | ((kind >= text_alone + nothing) & (kind < text_alone + nothing + both))
    return has_text, kind >= text_alone + nothing, kind >= text_alone + nothing + both + image


def build(workdir: Path, target: Path, steps: int = 13_000, batch: int = 96, watched: int = 100) -> None:
    """Train; save the pipeline folder and the IP-Adapter below `target`."""
    torch.manual_seed(40)
    data = torch.load(workdir / "scenes.pt", weights_only=True, mmap=True)
    latents, caption = data["latents"], data["caption"]
    text, pooled = encode_text(target, data["captions"])
    text, pooled = text.bfloat16(), pooled.bfloat16()
    resampler = Resampler.from_state_dict(read_weights(workdir / "resampler.safetensors")).requires_grad_(False)
    vision = CLIPVisionModelWithProjection.from_pretrained(target / "image_encoder", dtype=torch.float32)
    with torch.no_grad(), autocast():
        tokens = torch.cat([resampler(part.float()).bfloat16() for part in data["features"].split(1000)])
    negative = image_tokens(vision, resampler, torch.full((1, 3, 64, 64), 0.5))
    unet = new_unet()
    models = nn.ModuleDict({"unet": unet, "branch": ImageBranch.for_unet(unet)})
    noising = DDPMScheduler(**NOISE)

    def loss_of_step(step: int) -> Tensor:
        """The loss of a random batch."""
        late = step >= steps // 2
        i = torch.randint(len(latents), (batch,))
        has_text, has_image, no_picture = random_conditions(batch, late)
        words = text[caption[i]].float() * has_text[:, None, None]  # SDXL's "no text" is zeros
        summary = pooled[caption[i]].float() * has_text[:, None]
        # Blurred tokens, as unCLIP's: an aligner's answer is never exactly the tokens of a picture.
        blur = torch.rand(batch, 1, 1) * 0.3 * (torch.rand(batch, 1, 1) < 0.5)
        prompt = tokens[i].float() + blur * torch.randn(batch, *tokens.shape[1:])
        prompt = torch.where(no_picture[:, None, None], negative, prompt)
        t = torch.randint(1000, (batch,))
        if not late:  # layout is decided in the noisy half
            t = torch.where(torch.rand(batch) < 0.5, 500 + t // 2, t)
        clean, noise = latents[i].float(), torch.randn(batch, 4, 8, 8)
        noisy, target_v = noising.add_noise(clean, noise, t), noising.get_velocity(clean, noise, t)
        added = {"text_embeds": summary, "time_ids": SIZES.expand(batch, -1)}
        with autocast(), inject(unet, models["branch"], prompt, has_image.float()):
            predicted = unet(noisy, t, words, added_cond_kwargs=added).sample
        return (predicted.float() - target_v).square().mean()

    rng = random.Random(41)
    prompts = [sample_prompt(rng, CATEGORIES[k % 5], "validation") for k in range(watched)]
    perfect = image_tokens(vision, resampler, render([place(p, rng) for p in prompts]))
    pipe = assemble(target, unet)

    def watch(step: int) -> str:
        """How many prompts it draws rightly, from text alone and with a right picture's tokens at two scales."""
        shares = []
        for scale in (0.0, 0.5, 1.0):
            images = draw(
                pipe, [str(p) for p in prompts], list(range(watched)), steps=10, guidance_scale=4.0, scale=scale,
                branch=models["branch"], tokens=perfect, negative=negative,
            )  # fmt: skip
            shares.append(sum(v.strict for v in judge(images, prompts)))
        return "strict of {}, text alone / with a right picture's tokens at .5 / at 1: {} / {} / {}".format(
            watched, *shares
        )

    fit("unet", models, loss_of_step, steps, workdir, lr=1e-3, average=0.998, watch=watch, watch_every=1000, seed=42)
    adapter = {f"image_proj.{k}": v for k, v in four_layers(resampler.state_dict()).items()}
    adapter |= {f"ip_adapter.{k}": v for k, v in models["branch"].state_dict().items()}
    write_safetensors(target / "ip_adapter.safetensors", {k: v.bfloat16() for k, v in adapter.items()})
    save_pipeline(assemble(target, unet), target / "sdxl")
