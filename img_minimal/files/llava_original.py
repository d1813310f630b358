"""LLaVA as its authors (and the release of IMG) store it, opened as transformers' LLaVA without a conversion step.

The original layout is a Llama folder with a few more weights and settings (`mm_*`). Its tokenizer has no token for the
image: the text is cut there. Here one is added, as in transformers, with an embedding that image features replace.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers.normalizers import Prepend, Replace, Sequence
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

from img_minimal.files.hub import fetch_folder
from img_minimal.files.pretrained import build, read_shards
from img_minimal.files.weights import opening
from img_minimal.runtime.errors import UserError

RENAMES = {
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
}
UNUSED = "model.image_newline"  # separates rows of tiles in later LLaVAs
EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")

# The vision tower of every LLaVA-1.5; its numbers are here so that a folder that has the weights needs no network.
CLIP_336 = "openai/clip-vit-large-patch14-336"
TOWER_FLAG = "mm_vision_tower in LLaVA's config.json"  # for messages
CLIP_336_CONFIG = dict(
    image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16, projection_dim=768,
)  # fmt: skip


def is_original(config: dict) -> bool:
    """Is this config.json that of the original layout?"""
    return "mm_vision_tower" in config and "text_config" not in config


def rename(key: str) -> str:
    """A weight's name in the original layout -> in transformers."""
    for pattern, name in RENAMES.items():
        key = re.sub(pattern, name, key)
    return key


def _tower(config: dict) -> str:
    # The tower's name may be a path on the computer that trained the model.
    name = str(config["mm_vision_tower"])
    return CLIP_336 if not Path(name).is_dir() and Path(name).name == Path(CLIP_336).name else name


def transformers_config(config: dict, what: str | Path) -> LlavaConfig:
    """config.json of the original layout, as a dict -> transformers' configuration, for the same weights.

    `what` names the folder in messages. Raises UserError if it is no LLaVA-1.5, or its vision tower cannot be found.
    """
    expected = {"mm_projector_type": ("mlp2x_gelu",), "mm_use_im_start_end": (False, None),
                "image_aspect_ratio": ("pad", "square", None)}  # fmt: skip
    for key, values in expected.items():
        if config.get(key) not in values:
            raise UserError(
                f"{what}: config.json says {key} = {config.get(key)!r}, expected {values[0]!r} as in LLaVA-1.5; use a "
                "LLaVA-1.5"
            )
    names = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
             "hidden_act max_position_embeddings rope_theta rope_scaling bos_token_id eos_token_id")  # fmt: skip
    settings = {name: config[name] for name in names.split() if config.get(name) is not None}
    with opening(what, "LLaVA"):
        text = LlamaConfig(**settings, rms_norm_eps=config.get("rms_norm_eps", 1e-5), tie_word_embeddings=False)
    tower = _tower(config)
    if tower == CLIP_336:
        vision = CLIPVisionConfig(**CLIP_336_CONFIG, hidden_act="quick_gelu")
    else:
        with opening(tower, "CLIP"):
            vision = CLIPVisionConfig.from_pretrained(fetch_folder(tower, TOWER_FLAG))
    features = {"patch": "default", "cls_patch": "full"}[config.get("mm_vision_select_feature") or "patch"]
    return LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=text.vocab_size, tie_word_embeddings=False,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2, vision_feature_select_strategy=features,
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
    )  # fmt: skip


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the original layout -> of transformers' LLaVA; tensors are passed on, not copied."""
    return {rename(key): value for key, value in state.items() if key != UNUSED}


def read_tower(location: str) -> dict[str, Tensor]:
    """The weights of a CLIP vision model, whole CLIPs included, under the names they have inside LLaVA."""
    try:
        state = read_shards(fetch_folder(location, TOWER_FLAG))
    except UserError as error:
        raise UserError(f"this LLaVA comes without the weights of its vision tower; {error}") from error
    own = {key: value for key, value in state.items() if key.startswith("vision_model.")}
    if not own:
        raise UserError(f"{location}: is not the CLIP that LLaVA's config.json says; check its mm_vision_tower")
    return {key.replace("vision_model.", "model.vision_tower.", 1): value for key, value in own.items()}


def read_tokenizer(folder: Path) -> LlamaTokenizer:
    """Llama's tokenizer with `<image>` as one more token.

    LLaVA encodes the text before and after the image apart, each with the space that sentencepiece puts before a
    text; `legacy` puts that space after special tokens, which comes to the same. Raises UserError if there is none.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):  # else an empty one opens
        raise UserError(f"{folder}: has no tokenizer.model; download it again")
    with opening(folder, "tokenizer"):
        tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=True)
    # As sentencepiece does, and the release: a space before every piece of text, runs of spaces kept.
    tokenizer.backend_tokenizer.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.add_tokens("<image>", special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    return tokenizer


def open_original_llava(
    folder: Path, settings: dict, dtype: torch.dtype, device: torch.device | str
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model and processor from a folder in the original layout, whose config.json is `settings`.

    Raises UserError if a file is missing, damaged, or of another LLaVA.
    """
    config, tokenizer = transformers_config(settings, folder), read_tokenizer(folder)
    vision, state = config.vision_config, convert(read_shards(folder))
    if not any(key.startswith("model.vision_tower.") for key in state):  # it was frozen, so it was not saved
        state |= read_tower(_tower(settings))
    # The embedding of <image> is never seen, and its score of zero never wins: one more row of zeros each.
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    added = max(0, config.image_token_id + 1 - config.text_config.vocab_size)
    config.text_config.vocab_size += added
    state |= {key: F.pad(state[key], (0, 0, 0, added)) for key in EMBEDDINGS if key in state and added}
    model = build(LlavaForConditionalGeneration, config, state, folder, dtype, device)
    side = vision.image_size
    images = LlavaImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_pad=True
    )
    return model, LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=vision.patch_size, num_additional_image_tokens=1,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )  # fmt: skip
