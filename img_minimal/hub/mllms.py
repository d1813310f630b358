"""Open multimodal LLMs: which ones, from which layouts of files, and how each is asked.

LLaVA in transformers' layout (llava-hf) and in its authors' (as the release), and Qwen2.5-VL, which
sees an image at its own size, so that images of one batch may differ in their number of tokens.

The authors' layout is a Llama folder with a few more weights and settings (`mm_*`), which
transformers opens once names are mapped. Its tokenizer has no token for the image: the text is cut
there. Here one is added, as in transformers, with an embedding that image features replace.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers.normalizers import Prepend, Replace, Sequence
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from img_minimal.cli import check
from img_minimal.devices import count_parameters
from img_minimal.files import read_json
from img_minimal.hub.weights import WeightsError, opening
from img_minimal.hub.where import fetch_file, fetch_folder

Model = TypeVar("Model", bound=PreTrainedModel)
Device = torch.device | str
Opened = tuple[PreTrainedModel, ProcessorMixin]

# How transformers asks LLaVA-1.5, and the twins.
CONVERSATION = "USER: <image>\n{question} ASSISTANT:"
# The first conversation of LLaVA, with which the release asks its own.
CONVERSATION_V0 = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
    "###Human: <image>\n{question}###Assistant:"
)
CONVERSATION_QWEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)

# The authors' names of LLaVA's weights -> transformers', one pattern after the other.
RENAMES = {
    r"^module\.": "",
    r"^model\.embed_tokens": "model.language_model.embed_tokens",
    r"^model\.layers": "model.language_model.layers",
    r"^model\.norm": "model.language_model.norm",
    r"^model\.mm_projector\.0": "model.multi_modal_projector.linear_1",
    r"^model\.mm_projector\.2": "model.multi_modal_projector.linear_2",
    r"^model\.vision_tower\.vision_tower\.vision_model": "model.vision_tower",
}
EXPECTED = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (False, None),
    "image_aspect_ratio": ("pad", "square", None),
}
LLAMA_SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("rope_theta", "rope_scaling", "bos_token_id", "eos_token_id"),
)
TOWER_FLAG = "mm_vision_tower in LLaVA's config.json"  # for messages
# The vision tower of every LLaVA-1.5. Its settings are here so that a folder that has the weights
# needs no network.
CLIP_336 = "openai/clip-vit-large-patch14-336"
CLIP_336_CONFIG = {
    "image_size": 336,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 768,
}
# Spellings of the place for the prompt in a file of questions.
PROMPT_PLACE = re.compile(r"\{(?:prompt|caption|)\}|<(?:prompt|caption)>|\[(?:prompt|caption)\]")


# LLaVA in transformers' layout


def open_llava(folder: Path, settings: dict, dtype: torch.dtype, device: Device) -> Opened:
    """Open a folder in llava-hf's layout. Raises UserError if a file is missing or damaged."""
    with opening(folder, "LLaVA"):
        config = LlavaConfig(**settings)
        # LLaVA-1.5 was trained on images padded to a square; some folders' settings would crop them
        # instead, or name another size than the vision tower's.
        square = padded_square(config.vision_config)
        images = LlavaImageProcessorPil.from_pretrained(folder, **square)
        processor = llava_processor(config, images, AutoTokenizer.from_pretrained(folder))
    model, _ = open_model(LlavaForConditionalGeneration, config, folder, dtype, device)
    return model, processor


def llava_processor(
    config: LlavaConfig, images: LlavaImageProcessorPil, tokenizer: PreTrainedTokenizerBase
) -> LlavaProcessor:
    """Combine an image processor and a tokenizer for the vision tower of `config`."""
    vision = config.vision_config
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        # CLIP has a class token, SigLIP has none.
        num_additional_image_tokens=int("siglip" not in vision.model_type),
    )


def padded_square(vision: CLIPVisionConfig) -> dict:
    """Return settings of an image processor that pads images to the vision tower's squares."""
    side = vision.image_size
    crop = {"height": side, "width": side}
    return {"size": {"shortest_edge": side}, "crop_size": crop, "do_pad": True}


# LLaVA in its authors' layout


def open_original_llava(folder: Path, settings: dict, dtype: torch.dtype, device: Device) -> Opened:
    """Open a folder in the authors' layout. Raises UserError if a file is missing or damaged."""
    config, tokenizer = transformers_config(settings, folder), read_tokenizer(folder)
    model, missing = open_model(
        LlavaForConditionalGeneration,
        config,
        folder,
        dtype,
        device,
        renames=RENAMES,
        unused="image_newline",  # separates rows of tiles in later LLaVAs
        optional=r"^model\.vision_tower\.",
    )
    if missing:  # the vision tower was frozen, so it was not saved
        frozen = len(missing) == len(model.model.vision_tower.state_dict())
        check(frozen, f"{folder}: lacks {min(missing)!r} of its vision tower; download it again")
        tower = fetch_folder(tower_of(settings), f"{TOWER_FLAG}, whose weights are not in {folder}")
        vision = config.vision_config
        clip, _ = open_model(CLIPVisionModel, vision, tower, dtype, device, unused="")
        model.model.vision_tower.load_state_dict(clip.state_dict())
    # The embedding of <image> is never seen, and its score of zero never wins.
    words, image = config.text_config.vocab_size, tokenizer.convert_tokens_to_ids("<image>")
    if image >= words:
        model.resize_token_embeddings(image + 1, mean_resizing=False)
        for table in (model.get_input_embeddings(), model.lm_head):
            table.weight.data[words:] = 0
    model.config.image_token_id = image
    images = LlavaImageProcessorPil(**padded_square(config.vision_config))
    return model, llava_processor(config, images, tokenizer)


def tower_of(settings: dict) -> str:
    """Locate the vision tower, which may be a path on the computer that trained the model."""
    location = str(settings["mm_vision_tower"])
    moved = Path(location).name == Path(CLIP_336).name and not Path(location).is_dir()
    return CLIP_336 if moved else location


def transformers_config(settings: dict, what: str | Path) -> LlavaConfig:
    """Translate a config.json of the authors' layout.

    `what` names the folder in messages. Raises UserError if it is no LLaVA-1.5, or its vision tower
    cannot be found.
    """
    for key, values in EXPECTED.items():
        found = f"config.json says {key} = {settings.get(key)!r}, expected {values[0]!r}"
        check(settings.get(key) in values, f"{what}: {found}; use a LLaVA-1.5")
    tower = tower_of(settings)
    vision = CLIPVisionConfig(**CLIP_336_CONFIG, hidden_act="quick_gelu")
    if tower != CLIP_336:
        with opening(tower, "CLIP"):
            vision = CLIPVisionConfig.from_pretrained(fetch_folder(tower, TOWER_FLAG))
    with opening(what, "LLaVA"):
        known = {name: settings[name] for name in LLAMA_SETTINGS if settings.get(name) is not None}
        epsilon = settings.get("rms_norm_eps", 1e-5)
        text = LlamaConfig(**known, rms_norm_eps=epsilon, tie_word_embeddings=False)
        features = {"patch": "default", "cls_patch": "full", None: "default"}
        return LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=text.vocab_size,
            tie_word_embeddings=False,
            vision_feature_select_strategy=features[settings.get("mm_vision_select_feature")],
            vision_feature_layer=settings.get("mm_vision_select_layer", -2),
        )


def read_tokenizer(folder: Path) -> LlamaTokenizer:
    """Read Llama's tokenizer, with `<image>` as one more token. Raises UserError.

    LLaVA encodes the text before and after the image apart, each with the space that sentencepiece
    puts before a text; `legacy` puts that space after special tokens, which comes to the same.
    """
    # Without a file, transformers makes up an empty tokenizer.
    exists = (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file()
    check(exists, f"{folder}: has no tokenizer.model; download it again")
    with opening(folder, "tokenizer"):
        tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=True)
    # As sentencepiece does, and the release: a space before every text, runs of spaces stay.
    tokenizer.backend_tokenizer.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.add_tokens("<image>", special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    return tokenizer


# Qwen2.5-VL


class ImageProcessor(Qwen2_5_VLProcessor):
    """Qwen's processor without its video half, which would need torchvision."""

    # A processor's parts are those that its signature names; the parent's also names a video one.
    def __init__(
        self, image_processor: Qwen2VLImageProcessorPil, tokenizer: PreTrainedTokenizerBase
    ):
        super().__init__(image_processor, tokenizer)


def open_qwen(folder: Path, settings: dict, dtype: torch.dtype, device: Device) -> Opened:
    """Open a folder of Qwen2.5-VL. Raises UserError if a file is missing or damaged."""
    with opening(folder, "Qwen2.5-VL"):
        config = Qwen2_5_VLConfig(**settings)
        images = Qwen2VLImageProcessorPil.from_pretrained(folder)
        processor = ImageProcessor(images, AutoTokenizer.from_pretrained(folder))
    model, _ = open_model(Qwen2_5_VLForConditionalGeneration, config, folder, dtype, device)
    return model, processor


# Families


@dataclass(frozen=True)
class Family:
    """How to open MLLMs of one kind, how to ask them, and where an answer ends."""

    open: Callable[[Path, dict, torch.dtype, Device], Opened]
    conversation: str
    stop: str | None = None  # in addition to the end-of-text token


FAMILIES = {
    "llava": Family(open_llava, CONVERSATION),
    "llava, original layout": Family(open_original_llava, CONVERSATION_V0, stop="###"),
    "qwen2_5_vl": Family(open_qwen, CONVERSATION_QWEN),
}


def find_family(settings: dict, what: str | Path) -> Family:
    """Find a model's family by its config.json. Raises UserError, naming `what`, for others."""
    name = kind = str(settings.get("model_type"))
    original = "mm_vision_tower" in settings and "text_config" not in settings
    if original and kind in ("llava", "llava_llama"):
        name = "llava, original layout"
    expected = f"expected one of: {', '.join(FAMILIES)}"
    check(name in FAMILIES, f"{what}: model_type {kind!r} is no MLLM known here; {expected}")
    return FAMILIES[name]


def open_mllm(
    location: str, dtype: torch.dtype, device: Device
) -> tuple[PreTrainedModel, ProcessorMixin, Family]:
    """Open an MLLM's folder or hub id of any known family: model, processor, family.

    Raises UserError if it cannot be had, is of another kind, or a file is missing or damaged.
    """
    folder = fetch_folder(location, "--mllm")
    config = read_config(folder)
    family = find_family(config, location)
    model, processor = family.open(folder, config, dtype, device)
    # A tokenizer whose file is missing opens as an empty one.
    complete = processor.image_token_id == model.config.image_token_id
    advice = "its tokenizer lacks the model's image token; download the tokenizer again"
    check(complete, f"{location}: {advice}")
    return model, processor, family


def announced_width(folder: str | Path) -> int | None:
    """Read H from an MLLM's local config.json; None if it leaves that to a default."""
    settings = read_config(Path(folder))
    with opening(folder, "multimodal LLM"):
        width = settings.get("text_config", settings).get("hidden_size")
        return None if width is None else int(width)


# Folders of transformers models


def read_config(folder: Path) -> dict:
    """Read a folder's config.json. Raises WeightsError if it is missing or damaged."""
    return read_json(folder / "config.json", dict, "download it again", WeightsError)


def read_settings(location: str, flag: str) -> dict:
    """Read a model's config.json, of a local folder or on the hub. Raises UserError."""
    folder = Path(location)
    if not folder.is_dir():
        folder = fetch_file(f"{location}/config.json", flag).parent
    return read_config(folder)


def open_model(
    cls: type[Model],
    config: PreTrainedConfig,
    folder: Path,
    dtype: torch.dtype,
    device: Device,
    renames: dict[str, str] | None = None,
    unused: str = "^$",
    optional: str = "^$",
) -> tuple[Model, list[str]]:
    """Open a model with all weights of a folder, and return the missing ones that are optional.

    `renames` maps the files' names; `unused` and `optional` are patterns of names that the model,
    or the files, need not have. Raises WeightsError naming a weight that is missing, unknown or of
    another shape.
    """
    if getattr(config, "quantization_config", None):
        reason = "is quantized, which changes its features; use the same model in bf16 or fp16"
        raise WeightsError(f"{folder}: {reason}")
    # Before memory is taken for weights that no file has.
    with opening(folder, cls.__name__), torch.device("meta"):
        expected = count_parameters(cls(config))
    files = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")]
    # Half precision takes two bytes.
    if expected > 1.5 * sum(file.stat().st_size for file in files) / 2:
        reason = f"config.json asks for {expected:,} weights, the files hold fewer"
        raise WeightsError(f"{folder}: {reason}; download both")
    with opening(folder, cls.__name__):
        model, report = cls.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            key_mapping=renames,
        )
    missing = sorted(report["missing_keys"])
    problems = [f"lacks {key!r}" for key in missing if not re.search(optional, key)]
    for key in sorted(report["unexpected_keys"]):
        if not re.search(unused, key):
            problems.append(f"has an unknown key {key!r}")
    for key, found, right in report["mismatched_keys"]:
        problems.append(f"has {key!r} of shape {tuple(found)}, not {tuple(right)}")
    if problems:
        more = f" and {len(problems) - 1} more problems" if len(problems) > 1 else ""
        reason = f"so it is not the {cls.__name__} that its config.json says; download both again"
        raise WeightsError(f"{folder}: {problems[0]}{more}, {reason}")
    return model, missing


def read_questions(name: str) -> tuple[str, ...]:
    """Read phrasings from a JSON list of texts, each with one place for the prompt, as `{}`.

    Raises UserError for any other content.
    """
    path = Path(name).expanduser()
    example = "How to make the image match the prompt: {}?"
    expected = f'expected a JSON list of phrasings such as "{example}"'
    questions = []
    for number, phrasing in enumerate(read_json(path, list, expected), 1):
        check(isinstance(phrasing, str), f"{path}, entry {number}: is no text; {expected}")
        places = len(PROMPT_PLACE.findall(phrasing))
        found = f"has {places} places for the prompt, expected one {{}}: {phrasing[:80]!r}"
        check(places == 1, f"{path}, entry {number}: {found}")
        questions.append(PROMPT_PLACE.sub("{}", phrasing))
    check(questions, f"{path}: holds no phrasing; {expected}")
    return tuple(questions)
