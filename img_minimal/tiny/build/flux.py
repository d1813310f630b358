"""FLUX's transformer with its T5 and its image branch, trained together from the start by flow matching.

As for the UNet, four kinds of condition are mixed: text alone, image tokens alone, both, none. T5 learns along; the
real one was trained on text alone, by others. The guidance embedding is fed every value and so comes to mean nothing:
in FLUX.1-dev it comes from a distillation that has no counterpart here. True classifier-free guidance does its work.
"""

import random
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from img_minimal.devices import Precision
from img_minimal.flux import (
    TOKENS,
    Condition,
    ImageBranch,
    TokenProjection,
    draw,
    inject,
    public_names,
)
from img_minimal.hub.weights import read_weights, write_safetensors
from img_minimal.tiny.build.clip import TEXT_WIDTH, WIDTH
from img_minimal.tiny.build.flux_encoder import latents_of
from img_minimal.tiny.build.loop import CPU, autocast, fit, save_pipeline
from img_minimal.tiny.build.tokenizers import TEXT_LENGTH, t5_tokenizer
from img_minimal.tiny.build.unet import random_conditions
from img_minimal.tiny.build.vae import random_pictures
from img_minimal.tiny.grammar import CATEGORIES, sample_prompt
from img_minimal.tiny.oracle import judge
from img_minimal.tiny.world import place, render

SHIFT = 1.6  # of the noise levels towards pure noise, where the layout is decided; as the sampler's own, e^mu
SAMPLING = {"steps": 12, "guidance_scale": 3.5, "true_cfg_scale": 3.5, "height": 64, "width": 64}


def new_transformer() -> FluxTransformer2DModel:
    """FLUX's kind of transformer: four double-stream and four single-stream blocks, 16 patches of 2 x 2 latents."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=4,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    # At first every block adds nothing (adaLN-Zero).
    for module in transformer.modules():
        if hasattr(module, "linear") and type(module).__name__.startswith("AdaLayerNorm"):
            nn.init.zeros_(module.linear.weight)
            nn.init.zeros_(module.linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def new_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Three layers of T5's kind."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=32, d_ff=2 * WIDTH, num_layers=3, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    return T5EncoderModel(config)


def assemble(target: Path, transformer: FluxTransformer2DModel, t5: T5EncoderModel) -> FluxPipeline:
    """The whole FLUX pipeline; VAE and CLIP are SDXL's twins."""
    sdxl = target / "sdxl"
    pipe = FluxPipeline(
        vae=AutoencoderKL.from_pretrained(sdxl / "vae", dtype=torch.float32, shift_factor=0.0),
        text_encoder=CLIPTextModel.from_pretrained(sdxl / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(sdxl / "tokenizer"),
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def condition(pipe: FluxPipeline, prompt: str) -> Condition:
    """What the transformer reads of a prompt: T5's states (1, L, E) and CLIP's pooled embedding (1, W)."""
    return pipe.encode_prompt(prompt, device=CPU, max_sequence_length=TEXT_LENGTH)[:2]


@torch.no_grad()
def embeds_of(target: Path, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, 64, 64) in [0, 1] -> pooled embeddings (B, W) of FLUX's image encoder."""
    encoder = CLIPVisionModelWithProjection.from_pretrained(target / "flux_image_encoder", dtype=torch.float32)
    with autocast():
        return torch.cat([encoder(x * 2 - 1).image_embeds for x in pictures.split(250)]).float()


def training_data(target: Path, projection: TokenProjection, count: int) -> dict[str, Tensor]:
    """Of random pictures: latents (N, 16, 16), image tokens (N, 4, D), T5's ids (N, L), CLIP's summary (N, W)."""
    prompts, pictures = random_pictures(count, seed=61)
    vae = AutoencoderKL.from_pretrained(target / "sdxl/vae", dtype=torch.float32)
    captions = [str(p) for p in prompts]
    tokenizer = CLIPTokenizer.from_pretrained(target / "sdxl/tokenizer")
    clip = CLIPTextModel.from_pretrained(target / "sdxl/text_encoder", dtype=torch.float32)
    with torch.no_grad():
        ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        return {
            "latents": rearrange(latents_of(vae, pictures), "n c (y i) (x j) -> n (y x) (c i j)", i=2, j=2),
            "tokens": projection(embeds_of(target, pictures.float() / 255)),
            "ids": t5_tokenizer()(captions, padding="max_length", return_tensors="pt").input_ids,
            "pooled": torch.cat([clip(part).pooler_output for part in ids.split(1000)]),
        }


def build(
    workdir: Path, target: Path, steps: int = 8000, batch: int = 96, count: int = 48_000, watched: int = 100
) -> None:
    """Train; save the pipeline folder `target/flux` and the adapter `target/flux_ip_adapter.safetensors`."""
    torch.manual_seed(60)
    state = read_weights(workdir / "projection.safetensors")
    projection = TokenProjection.from_state_dict(state, "projection").requires_grad_(False)
    data = training_data(target, projection, count)
    transformer, tokenizer = new_transformer(), t5_tokenizer()
    models = nn.ModuleDict({"transformer": transformer, "t5": new_t5(tokenizer)})
    models["branch"] = ImageBranch.for_transformer(transformer, WIDTH)
    pipe = assemble(target, transformer, models["t5"])
    places = pipe._prepare_latent_image_ids(1, 4, 4, CPU, torch.float32)
    words_at = torch.zeros(TEXT_LENGTH, 3)
    empty = condition(pipe, "")
    empty_ids = tokenizer([""], padding="max_length", return_tensors="pt").input_ids
    black = projection(embeds_of(target, torch.zeros(1, 3, 64, 64)))

    def loss_of_step(step: int) -> Tensor:
        """The loss of a random batch."""
        i = torch.randint(len(data["latents"]), (batch,))
        has_text, has_image, no_picture = random_conditions(batch, step >= steps // 2)
        ids = torch.where(has_text[:, None], data["ids"][i], empty_ids)
        summary = torch.where(has_text[:, None], data["pooled"][i], empty[1])
        # Blurred tokens, as unCLIP's: an aligner's answer is never exactly the tokens of a picture.
        blur = torch.rand(batch, 1, 1) * 0.3 * (torch.rand(batch, 1, 1) < 0.5)
        prompt = data["tokens"][i] + blur * torch.randn(batch, TOKENS, WIDTH)
        prompt = torch.where(no_picture[:, None, None], black, prompt)
        sigma = torch.randn(batch, 1, 1).sigmoid()
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        clean, noise = data["latents"][i], torch.randn(batch, 16, 16)
        noisy = (1 - sigma) * clean + sigma * noise
        with autocast(), inject(transformer, models["branch"], prompt, has_image.float()):
            words = models["t5"](ids).last_hidden_state
            velocity = transformer(
                noisy, encoder_hidden_states=words, pooled_projections=summary, timestep=sigma.flatten(),
                img_ids=places, txt_ids=words_at, guidance=1 + 4 * torch.rand(batch),
            ).sample  # fmt: skip
        return (velocity.float() - (noise - clean)).square().mean()

    rng = random.Random(62)
    prompts = [sample_prompt(rng, CATEGORIES[k % 5], "validation") for k in range(watched)]
    perfect = projection(embeds_of(target, render([place(p, rng) for p in prompts])))

    def watch(step: int) -> str:
        """How many prompts it draws rightly, from text alone and with a right picture's tokens at two scales."""
        shares = []
        conditions = [condition(pipe, str(p)) for p in prompts]
        for scale in (0.0, 0.5, 1.0):
            images = draw(
                pipe, conditions, condition(pipe, ""), list(range(watched)), **SAMPLING, branch=models["branch"],
                tokens=perfect, negative=black, scale=scale, precision=Precision.named("fp32", CPU), batch_size=50,
            )  # fmt: skip
            shares.append(sum(v.strict for v in judge(images, prompts)))
        return "strict of {}, text alone / with a right picture's tokens at .5 / at 1: {} / {} / {}".format(
            watched, *shares
        )

    fit("flux", models, loss_of_step, steps, workdir, lr=1e-3, average=0.998, watch=watch, watch_every=1000, seed=63)
    adapter = public_names(projection.state_dict(), models["branch"].state_dict())
    write_safetensors(target / "flux_ip_adapter.safetensors", {key: value.bfloat16() for key, value in adapter.items()})
    save_pipeline(pipe, target / "flux")
