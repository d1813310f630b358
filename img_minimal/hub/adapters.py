"""Open the files of both image prompts: CLIP vision models and the two public IP-Adapter layouts.

IP-Adapter Plus (SDXL)   image_proj.* -> the Resampler, ip_adapter.{N}.* -> keys and values
XLabs (FLUX)             ip_adapter_proj_model.* -> the projection, double_blocks.* -> the same
"""

import re
from pathlib import Path

from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from img_minimal.cli import check
from img_minimal.devices import Precision
from img_minimal.files import read_json
from img_minimal.hub.weights import opening, read_weights
from img_minimal.hub.where import variant
from img_minimal.presets import Models

State = dict[str, Tensor]
XLABS_V1 = "use ip_adapter.safetensors of XLabs-AI/flux-ip-adapter (version 1, 4 tokens)"
FLUX_DEV = "IMG's adapter and aligner are made for black-forest-labs/FLUX.1-dev"
# XLabs' names -> diffusers', except for where the number of a block goes.
XLABS_NAMES = (
    (r"ip_adapter_proj_model\.(proj|norm)\.(weight|bias)", r"\1.\2"),
    (
        r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\.(weight|bias)",
        r"\1.to_\2_ip.0.\3",
    ),
)


def open_vision_encoder(
    folder: str, precision: Precision, used: str = ""
) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessorPil]:
    """Open a CLIP vision model, or that of a whole CLIP, with its image processor.

    IP-Adapter's own folder has no processor settings; CLIP's defaults are meant then. Raises
    UserError if weights whose names begin with `used` are missing.
    """
    with opening(folder, "CLIP vision model"):
        has_settings = (Path(folder) / "preprocessor_config.json").exists()
        processor = CLIPImageProcessorPil()
        if has_settings:
            processor = CLIPImageProcessorPil.from_pretrained(folder)
        encoder, report = CLIPVisionModelWithProjection.from_pretrained(
            folder,
            dtype=precision.weights,
            variant=variant(folder, precision.weights),
            output_loading_info=True,
        )
    for key in sorted(report["missing_keys"]):
        check(
            not key.startswith(used),
            f"{folder}: lacks {key!r}; use the folder of a CLIP vision model",
        )
    return encoder, processor


def check_encoder_width(folder: str, width: int, expected: int, encoder: str) -> None:
    """Raise UserError if the vision encoder's features do not fit the adapter."""
    check(
        width == expected,
        f"{folder}: its features have width {width}, the IP-Adapter expects {expected}; use the "
        f"image encoder that the IP-Adapter was trained with ({encoder})",
    )


def read_ip_adapter(models: Models) -> tuple[State, State, State | None]:
    """Read IP-Adapter Plus: states of the Resampler, the branch, and the adapter's own Resampler.

    The last one is None unless `models.resampler` names a file that replaces it, as in the
    authors' release. .bin files nest two dicts, .safetensors files prefix the keys instead. Raises
    UserError if a file is missing, damaged, or lacks a part.
    """
    state = read_weights(models.ip_adapter)
    branch, own = _part(state, "ip_adapter"), _part(state, "image_proj")
    resampler, replaced = own, None
    if models.resampler:
        state = read_weights(models.resampler, holds="latents")
        resampler = state if "latents" in state else _part(state, "image_proj")
        replaced = own or None
    parts = (
        ("ip_adapter", branch, models.ip_adapter),
        ("image_proj", resampler, models.resampler or models.ip_adapter),
    )
    for name, part, path in parts:
        check(
            part,
            f"{path}: has no {name!r} weights, so it is not an IP-Adapter; check which file it is",
        )
    return resampler, branch, replaced


def _part(state: dict, name: str) -> State:
    """Return what a file has under a name, nested or prefixed."""
    if name in state:
        return state[name]
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def read_xlabs_adapter(path: str) -> tuple[State, State]:
    """Read XLabs' adapter: states of the projection and of the branch.

    Raises UserError naming any key without a place; diffusers drops such keys silently.
    """
    projection, branch = {}, {}
    for key, value in read_weights(path).items():
        known = False
        for part, (theirs, ours) in zip((projection, branch), XLABS_NAMES):
            if re.fullmatch(theirs, key):
                known = True
                part[re.sub(theirs, ours, key).replace("proj.", "image_embeds.")] = value
        check(
            known, f"{path}: has an unknown key {key!r}, so it is not XLabs' IP-Adapter; {XLABS_V1}"
        )
    for part, key in (
        (projection, "norm.weight"),
        (projection, "image_embeds.weight"),
        (branch, "0.to_k_ip.0.weight"),
    ):
        check(key in part, f"{path}: lacks {key!r}; {XLABS_V1}")
    return projection, branch


def check_sdxl(pipe: StableDiffusionXLPipeline, location: str) -> None:
    """Raise UserError for a UNet that does not draw from text with this pipeline's other parts.

    Inpainting UNets take more channels; the refiner's reads another text encoder and other sizes.
    """
    unet, encoders = pipe.unet.config, (pipe.text_encoder, pipe.text_encoder_2)
    fits = unet.in_channels == unet.out_channels == pipe.vae.config.latent_channels
    if None in encoders:
        fits = False
    elif fits:
        added = encoders[1].config.projection_dim + 6 * (unet.addition_time_embed_dim or 0)
        fits = unet.cross_attention_dim == sum(part.config.hidden_size for part in encoders)
        fits = fits and unet.projection_class_embeddings_input_dim == added
    check(
        fits,
        f"{location}: its UNet does not fit the VAE and the two text encoders: it is made for "
        "inpainting, the refiner's, or of another model; use a UNet of SDXL that draws from text "
        "alone",
    )


def check_flux_folder(base: Path) -> None:
    """Raise UserError, before anything big is loaded, for another kind of FLUX."""
    kind = read_json(base / "model_index.json", dict, FLUX_DEV).get("_class_name")
    check(
        kind == "FluxPipeline",
        f"{base}: is a {kind}, not a FluxPipeline (FLUX.2, Kontext and others differ); {FLUX_DEV}",
    )
    config = read_json(base / "transformer" / "config.json", dict, FLUX_DEV)
    check_guidance_embedding(config, str(base))


def check_guidance_embedding(config: dict, location: str) -> None:
    """Raise UserError for a transformer without guidance embedding, as FLUX.1-schnell's."""
    check(
        config.get("guidance_embeds"),
        f"{location}: has no guidance embedding, as FLUX.1-schnell has none; {FLUX_DEV}",
    )
