"""A folder with everything that `--model flux` needs, small and random, in the public layouts."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from release_folder import lively
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from img_minimal.aligner import ImplicitAligner
from img_minimal.flux import TokenProjection
from img_minimal.flux import ImageBranch
from img_minimal.presets import TINY, Preset, find_preset, with_overrides

TRANSFORMER = {"in_channels": 64, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
               "num_attention_heads": 2, "joint_attention_dim": 48, "pooled_projection_dim": 32,
               "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)}  # fmt: skip
WORDS = "a red blue green circle square triangle cross two three and above below left right of".split()


def new_transformer(seed: int = 0, **changed: object) -> FluxTransformer2DModel:
    return lively(FluxTransformer2DModel(**(TRANSFORMER | changed)), seed)


def new_pipeline() -> FluxPipeline:
    clip = CLIPTokenizer.from_pretrained(TINY / "sdxl" / "tokenizer", model_max_length=77)
    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((f"▁{w}", -1.0) for w in WORDS),
        *letters,
    ]
    t5 = T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=24)
    text = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
    )  # fmt: skip
    states = T5Config(vocab_size=len(t5), d_model=48, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
                      feed_forward_proj="gated-gelu")  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=16,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, sample_size=64, scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FluxPipeline(
        scheduler=scheduler, vae=lively(vae, 1), text_encoder=lively(CLIPTextModel(text), 2), tokenizer=clip,
        text_encoder_2=lively(T5EncoderModel(states), 3), tokenizer_2=t5, transformer=new_transformer(4),
    )  # fmt: skip


def public_names(projection: TokenProjection, branch: ImageBranch) -> dict[str, torch.Tensor]:
    """The state of an adapter under the keys of XLabs' file."""
    state = {f"ip_adapter_proj_model.{key}": value for key, value in projection.state_dict().items()}
    for key, value in branch.state_dict().items():
        block, kind, name = key.split(".")
        state[f"double_blocks.{block}.processor.ip_adapter_double_stream_{kind[3]}_proj.{name}"] = value
    return state


def write_flux(folder: Path) -> None:
    new_pipeline().save_pretrained(folder / "base")
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=64, image_size=56, patch_size=14, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=24,
    )  # fmt: skip
    lively(CLIPVisionModelWithProjection(vision), 6).save_pretrained(folder / "image_encoder")
    square = {"height": 56, "width": 56}
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square).save_pretrained(folder / "image_encoder")
    projection = lively(TokenProjection(24, 48), 7)
    branch = lively(ImageBranch.for_transformer(new_transformer()), 8)
    save_file(public_names(projection, branch), folder / "ip_adapter.safetensors")
    llava = LlavaConfig.from_pretrained(TINY / "llava-stock")
    lively(LlavaForConditionalGeneration(llava), 10).save_pretrained(folder / "llava")
    LlavaProcessor.from_pretrained(TINY / "llava-stock").save_pretrained(folder / "llava")
    aligner = lively(ImplicitAligner(48, llava.text_config.hidden_size, depth=2, heads=1), 11)
    torch.save({f"module.{k}": v for k, v in aligner.state_dict().items()}, folder / "aligner_flux.pth")


def locations(folder: Path) -> dict[str, str]:
    names = {"base": "base", "image_encoder": "image_encoder", "ip_adapter": "ip_adapter.safetensors",
             "mllm": "llava", "aligner": "aligner_flux.pth"}  # fmt: skip
    return {name: str(folder / path) for name, path in names.items()}


def preset(folder: Path, **more: object) -> Preset:
    settings = locations(folder) | {"dtype": "fp32", "height": 64, "width": 64, "sampling_steps": 4}
    return with_overrides(find_preset("flux"), **(settings | more))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
