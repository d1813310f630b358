"""FLUX's twin: transformer, T5 and image branch, trained together from the start by flow matching.

Conditions are mixed as for SDXL's twin. T5 learns along; the real one was trained on text alone, by
others. The guidance embedding is fed every value, and so comes to mean nothing: in FLUX.1-dev it
comes from a distillation that has no counterpart here. True classifier-free guidance replaces it.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.embeddings import ImageProjection
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from img_minimal.devices import Turns
from img_minimal.flux import TOKENS, Flux, ImagePrompt, inject, new_branch, set_scale
from img_minimal.hub.weights import fill, read_weights, write_weights
from img_minimal.presets import find_preset
from img_minimal.tiny.build.encoders import (
    LETTERS,
    TEXT_LENGTH,
    TEXT_WIDTH,
    WIDTH,
    WORDS,
    encode_latents,
    image_processor,
    in_batches,
    normalized,
    open_vision,
    random_pictures,
    token_ids,
)
from img_minimal.tiny.build.fit import CPU, MIXED, autocast, fit, save_pipeline
from img_minimal.tiny.build.image_tokens import EMBED
from img_minimal.tiny.build.sdxl import drawing_test, random_conditions, random_image_prompts

SHIFT = 1.6  # e^mu of noise levels, towards pure noise, where the layout is decided; as in sampling


def t5_tokenizer() -> T5TokenizerFast:
    """Build a T5 tokenizer with a token for each word of the grammar; it spells other words."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(f"▁{word}", -1.0) for word in WORDS if word != ","]
    vocabulary += [(letter, -5.0) for letter in LETTERS]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=TEXT_LENGTH)


def new_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Build T5's kind of encoder with three layers."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=32,
        d_ff=2 * WIDTH,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def new_transformer() -> FluxTransformer2DModel:
    """Build FLUX's kind of transformer: four double-stream and four single-stream blocks.

    It reads 16 patches of 2 x 2 latents.
    """
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
        if type(module).__name__.startswith("AdaLayerNorm"):
            nn.init.zeros_(module.linear.weight)
            nn.init.zeros_(module.linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def assemble(target: Path, transformer: FluxTransformer2DModel, t5: T5EncoderModel) -> FluxPipeline:
    """Build the FLUX pipeline; VAE and CLIP are those of SDXL's twin."""
    sdxl, dtype = target / "sdxl", torch.float32
    pipe = FluxPipeline(
        vae=AutoencoderKL.from_pretrained(sdxl / "vae", dtype=dtype, shift_factor=0.0),
        text_encoder=CLIPTextModel.from_pretrained(sdxl / "text_encoder", dtype=dtype),
        tokenizer=CLIPTokenizer.from_pretrained(sdxl / "tokenizer"),
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_image_prompt(workdir: Path, target: Path) -> ImagePrompt:
    """Load vision encoder and projection."""
    encoder = open_vision(target / "flux_image_encoder")
    with torch.device("meta"):  # no initial values, which the file would replace
        projection = ImageProjection(EMBED, WIDTH, TOKENS)
    file = workdir / "projection.safetensors"
    fill(projection, read_weights(file), str(file))
    return ImagePrompt(encoder, image_processor(), projection, MIXED)


def training_data(pipe: FluxPipeline, image_prompt: ImagePrompt, count: int) -> dict[str, Tensor]:
    """Encode random pictures and their captions.

    latents (N, 16, 16), image tokens (N, 4, D), T5's ids (N, L), CLIP's embeddings (N, W).
    """
    prompts, pictures = random_pictures(count, seed=61)
    captions = list(map(str, prompts))
    latents = encode_latents(pipe.vae, pictures)
    embeds = in_batches(lambda x: image_prompt.encoder(normalized(x)).image_embeds, pictures)
    return {
        "latents": rearrange(latents, "n c (y i) (x j) -> n (y x) (c i j)", i=2, j=2),
        "tokens": image_prompt.head(embeds.float()),
        "ids": token_ids(pipe.tokenizer_2, captions),
        "pooled": encode_pooled(pipe, captions),
    }


def encode_pooled(pipe: FluxPipeline, captions: list[str]) -> Tensor:
    """Compute CLIP's pooled embeddings (N, W) of captions."""
    ids = token_ids(pipe.tokenizer, captions)
    return in_batches(lambda x: pipe.text_encoder(x).pooler_output, ids).float()


def build_flux(
    workdir: Path,
    target: Path,
    steps: int = 8000,
    batch_size: int = 96,
    count: int = 48_000,
    watched: int = 100,
) -> None:
    """Train all three; save `target/flux` and `target/flux_ip_adapter.safetensors`."""
    torch.manual_seed(60)
    image_prompt = open_image_prompt(workdir, target)
    transformer, t5 = new_transformer(), new_t5(t5_tokenizer())
    branch = new_branch(transformer)
    pipe = assemble(target, transformer, t5)
    data = training_data(pipe, image_prompt, count)
    empty_ids, empty_pooled = token_ids(pipe.tokenizer_2, [""]), encode_pooled(pipe, [""])
    negative = image_prompt.negative()
    positions = {
        "img_ids": pipe._prepare_latent_image_ids(1, 4, 4, CPU, torch.float32),
        "txt_ids": torch.zeros(TEXT_LENGTH, 3),
    }

    def loss_of_step(step: int) -> Tensor:
        i = torch.randint(count, (batch_size,))
        has_text, has_image, is_negative = random_conditions(batch_size, step >= steps // 2)
        ids = torch.where(has_text[:, None], data["ids"][i], empty_ids)
        pooled = torch.where(has_text[:, None], data["pooled"][i], empty_pooled)
        image = random_image_prompts(data["tokens"][i], negative, is_negative)
        # Levels of noise as in Stable Diffusion 3: most are in the middle.
        sigma = torch.randn(batch_size, 1, 1).sigmoid()
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        clean = data["latents"][i]
        noise = torch.randn_like(clean)
        set_scale(branch, has_image.float()[:, None, None])
        with autocast(), inject(transformer, branch):
            velocity = transformer(
                (1 - sigma) * clean + sigma * noise,
                encoder_hidden_states=t5(ids).last_hidden_state,
                pooled_projections=pooled,
                timestep=sigma.flatten(),
                guidance=1 + 4 * torch.rand(batch_size),
                joint_attention_kwargs={"ip_hidden_states": [image[:, None]]},
                **positions,
            ).sample
        return F.mse_loss(velocity.float(), noise - clean)

    backbone = Flux(pipe, image_prompt, branch, find_preset("tiny-flux"), Turns(CPU))
    fit(
        workdir / "flux",
        nn.ModuleDict({"transformer": transformer, "t5": t5, "branch": branch}),
        loss_of_step,
        steps,
        lr=1e-3,
        average=0.998,
        measure=drawing_test(backbone, seed=62, count=watched),
        save_every=1000,
        seed=63,
    )
    adapter = xlabs_adapter(image_prompt.head, branch)
    write_weights(target / "flux_ip_adapter.safetensors", adapter)
    save_pipeline(pipe, target / "flux")


def xlabs_adapter(projection: ImageProjection, branch: nn.ModuleDict) -> dict[str, Tensor]:
    """Rename the weights as in XLabs' file, in bf16."""
    adapter = {}
    for key, value in projection.state_dict().items():
        name = key.replace("image_embeds", "proj")
        adapter[f"ip_adapter_proj_model.{name}"] = value.bfloat16()
    for key, value in branch.state_dict().items():
        block, kind, _, name = key.split(".")  # e.g. 0.to_k_ip.0.weight
        prefix = f"double_blocks.{block}.processor.ip_adapter_double_stream_{kind[3]}_proj"
        adapter[f"{prefix}.{name}"] = value.bfloat16()
    return adapter
