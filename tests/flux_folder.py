"""Write everything that `--model flux` needs, small and random, in the public layouts."""

from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.embeddings import ImageProjection
from release_folder import lively, new_text_config, new_tokenizer, new_vae
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from img_minimal.aligner import ImplicitAligner
from img_minimal.flux import TOKENS, new_branch
from img_minimal.presets import TWINS, Preset, find_preset

WIDTH = 48  # of T5's states and of the image tokens
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = (
    "a red blue green circle square triangle cross two three and above below left right of".split()
)


def new_transformer(seed: int = 0) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return lively(transformer, seed)


def new_t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=24)


def new_pipeline() -> FluxPipeline:
    t5 = new_t5_tokenizer()
    states = T5Config(
        vocab_size=len(t5),
        d_model=WIDTH,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    vae = new_vae(
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=lively(CLIPTextModel(new_text_config()), 2),
        tokenizer=new_tokenizer(),
        text_encoder_2=lively(T5EncoderModel(states), 3),
        tokenizer_2=t5,
        transformer=new_transformer(4),
    )


def public_names(head: nn.Module, branch: nn.Module) -> dict[str, torch.Tensor]:
    """Return an adapter's weights under the keys of XLabs' file."""
    state = {}
    for key, value in head.state_dict().items():
        state["ip_adapter_proj_model." + key.replace("image_embeds", "proj")] = value
    for key, value in branch.state_dict().items():
        block, kind, _, name = key.split(".")  # as in 0.to_k_ip.0.weight
        layer = f"double_blocks.{block}.processor.ip_adapter_double_stream_{kind[3]}_proj"
        state[f"{layer}.{name}"] = value
    return state


def new_adapter(tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    head = lively(ImageProjection(24, WIDTH, tokens), 7)
    return public_names(head, lively(new_branch(new_transformer()), 8))


def write_flux(folder: Path) -> None:
    new_pipeline().save_pretrained(folder / "base")
    sizes = {"hidden_size": 48, "image_size": 56, "patch_size": 14, "projection_dim": 24}
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, **SMALL))
    square = {"height": 56, "width": 56}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square)
    for part in (lively(vision, 6), processor):
        part.save_pretrained(folder / "image_encoder")
    save_file(new_adapter(), folder / "ip_adapter.safetensors")
    aligner = ImplicitAligner(WIDTH, 160, depth=2, heads=1)  # 160: of the twin's MLLM
    lively(aligner, 11).save(folder / "aligner_flux.pth")


def locations(folder: Path) -> dict[str, str]:
    """Return the fields of a preset that name these files."""
    names = {
        "base": "base",
        "image_encoder": "image_encoder",
        "ip_adapter": "ip_adapter.safetensors",
        "mllm": TWINS / "llava-stock",
        "aligner": "aligner_flux.pth",
    }
    return {name: str(folder / path) for name, path in names.items()}


def preset(folder: Path, **more: object) -> Preset:
    """Return FLUX's preset for these files, with few steps and small images."""
    small = {"dtype": "fp32", "height": 64, "width": 64, "steps": 4}
    return find_preset("flux").changed(**(locations(folder) | small | more))
