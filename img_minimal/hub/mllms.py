"""Which MLLMs can be opened, from which layouts of files, and how each is asked.

LLaVA in transformers' layout (llava-hf) and in its authors' (and the release's), and Qwen2.5-VL, which sees an image at
its own size, so that images of one batch may differ in their number of tokens.

The authors' layout is a Llama folder with a few more weights and settings (`mm_*`), which transformers opens once the
names are told apart. Its tokenizer has no token for the image: the text is cut there. Here one is added, as in
transformers, with an embedding that image features replace.
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

from img_minimal.cli import UserError, check
from img_minimal.devices import count_parameters
from img_minimal.files import read_json
from img_minimal.hub.weights import WeightsError, opening
from img_minimal.hub.where import fetch_file, fetch_folder

CONVERSATION = (
    "USER: <image>\n{question} ASSISTANT:"  # LLaVA-1.5 as transformers asks it, and the twins
)
CONVERSATION_V0 = (  # the first conversation of LLaVA, with which the release asks its own
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions.###Human: <image>\n{question}###Assistant:"
)
CONVERSATION_QWEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)


def open_llava(
    folder: Path, settings: dict, dtype: torch.dtype, device: torch.device | str
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model and processor from a folder in the llava-hf layout. Raises UserError if a file is missing or damaged."""
    with opening(folder, "LLaVA"):
        config = LlavaConfig(**settings)
        # LLaVA-1.5 was trained on images padded to a square; some folders' settings would cut them instead, or name
        # another size than the vision tower's.
        images = LlavaImageProcessorPil.from_pretrained(
            folder, **padded_square(config.vision_config)
        )
        processor = llava_processor(config, images, AutoTokenizer.from_pretrained(folder))
    return open_model(LlavaForConditionalGeneration, config, folder, dtype, device), processor


def llava_processor(
    config: LlavaConfig, images: LlavaImageProcessorPil, tokenizer: PreTrainedTokenizerBase
) -> LlavaProcessor:
    """Of these parts, for a vision tower of the config's kind."""
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int("siglip" not in config.vision_config.model_type),  # CLIP has a class token
    )  # fmt: skip


def padded_square(vision: CLIPVisionConfig) -> dict:
    """Settings of an image processor that gives the squares that a vision tower takes, and cuts nothing off."""
    side = vision.image_size
    return {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "do_pad": True,
    }


# LLaVA as its authors store it

RENAMES = {  # one after the other
    r"^module\.": "",
    r"^model\.embed_tokens": "model.language_model.embed_tokens",
    r"^model\.layers": "model.language_model.layers",
    r"^model\.norm": "model.language_model.norm",
    r"^model\.mm_projector\.0": "model.multi_modal_projector.linear_1",
    r"^model\.mm_projector\.2": "model.multi_modal_projector.linear_2",
    r"^model\.vision_tower\.vision_tower\.vision_model": "model.vision_tower",
}
UNUSED = "image_newline"  # separates rows of tiles in later LLaVAs
TOWER = "model.vision_tower."
# The vision tower of every LLaVA-1.5; its numbers are here so that a folder that has the weights needs no network.
CLIP_336 = "openai/clip-vit-large-patch14-336"
TOWER_FLAG = "mm_vision_tower in LLaVA's config.json"  # for messages
CLIP_336_CONFIG = dict(
    image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16, projection_dim=768,
)  # fmt: skip
EXPECTED = {"mm_projector_type": ("mlp2x_gelu",), "mm_use_im_start_end": (False, None),
            "image_aspect_ratio": ("pad", "square", None)}  # fmt: skip
LLAMA_SETTINGS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    hidden_act max_position_embeddings rope_theta rope_scaling bos_token_id eos_token_id""".split()


def rename(key: str) -> str:
    """A weight's name in the authors' layout -> in transformers."""
    for pattern, name in RENAMES.items():
        key = re.sub(pattern, name, key)
    return key


def _tower(settings: dict) -> str:
    # The tower's name may be a path on the computer that trained the model.
    name = str(settings["mm_vision_tower"])
    return CLIP_336 if not Path(name).is_dir() and Path(name).name == Path(CLIP_336).name else name


def transformers_config(settings: dict, what: str | Path) -> LlavaConfig:
    """config.json of the authors' layout -> transformers' configuration, for the same weights.

    `what` names the folder in messages. Raises UserError if it is no LLaVA-1.5, or its vision tower cannot be found.
    """
    for key, values in EXPECTED.items():
        if settings.get(key) not in values:
            raise UserError(
                f"{what}: config.json says {key} = {settings.get(key)!r}, expected {values[0]!r} as in LLaVA-1.5; use "
                "a LLaVA-1.5"
            )
    with opening(what, "LLaVA"):
        known = {name: settings[name] for name in LLAMA_SETTINGS if settings.get(name) is not None}
        text = LlamaConfig(
            **known, rms_norm_eps=settings.get("rms_norm_eps", 1e-5), tie_word_embeddings=False
        )
    tower = _tower(settings)
    if tower == CLIP_336:
        vision = CLIPVisionConfig(**CLIP_336_CONFIG, hidden_act="quick_gelu")
    else:
        with opening(tower, "CLIP"):
            vision = CLIPVisionConfig.from_pretrained(fetch_folder(tower, TOWER_FLAG))
    features = {"patch": "default", "cls_patch": "full"}[
        settings.get("mm_vision_select_feature") or "patch"
    ]
    return LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=text.vocab_size, tie_word_embeddings=False,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2, vision_feature_select_strategy=features,
        vision_feature_layer=settings.get("mm_vision_select_layer", -2),
    )  # fmt: skip


def read_tokenizer(folder: Path) -> LlamaTokenizer:
    """Llama's tokenizer with `<image>` as one more token.

    LLaVA encodes the text before and after the image apart, each with the space that sentencepiece puts before a
    text; `legacy` puts that space after special tokens, which comes to the same. Raises UserError if there is none.
    """
    if not any(
        (folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")
    ):  # else an empty one opens
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
    """Model and processor from a folder in the authors' layout. Raises UserError if a file is missing or damaged."""
    config, tokenizer = transformers_config(settings, folder), read_tokenizer(folder)
    kind, without = LlavaForConditionalGeneration, set()
    model = open_model(
        kind, config, folder, dtype, device, RENAMES, unused=UNUSED, optional=TOWER, missing=without
    )
    if without:  # the vision tower was frozen, so it was not saved
        try:
            tower = fetch_folder(_tower(settings), TOWER_FLAG)
        except UserError as error:
            raise UserError(
                f"this LLaVA comes without the weights of its vision tower; {error}"
            ) from error
        clip = open_model(CLIPVisionModel, config.vision_config, tower, dtype, device, unused="")
        model.model.vision_tower.load_state_dict(clip.state_dict())
    # The embedding of <image> is never seen, and its score of zero never wins: one more row of zeros each.
    before, image = config.text_config.vocab_size, tokenizer.convert_tokens_to_ids("<image>")
    if image >= before:
        model.resize_token_embeddings(image + 1, mean_resizing=False)
        for table in (model.get_input_embeddings(), model.lm_head):
            table.weight.data[before:] = 0
    model.config.image_token_id = model.model.config.image_token_id = image
    images = LlavaImageProcessorPil(**padded_square(config.vision_config))
    return model, llava_processor(config, images, tokenizer)


class ImageProcessor(Qwen2_5_VLProcessor):
    """Qwen's processor without its video half, which would need torchvision."""

    def __init__(
        self, image_processor: Qwen2VLImageProcessorPil, tokenizer: PreTrainedTokenizerBase
    ):
        # A processor's parts are those that its signature names; the parent's signature also names a video processor.
        super().__init__(image_processor, tokenizer)


def open_qwen(
    folder: Path, settings: dict, dtype: torch.dtype, device: torch.device | str
) -> tuple[Qwen2_5_VLForConditionalGeneration, ImageProcessor]:
    """Model and processor from a folder of Qwen2.5-VL. Raises UserError if a file is missing or damaged."""
    with opening(folder, "Qwen2.5-VL"):
        config = Qwen2_5_VLConfig(**settings)
        images, words = (
            Qwen2VLImageProcessorPil.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )
    return open_model(
        Qwen2_5_VLForConditionalGeneration, config, folder, dtype, device
    ), ImageProcessor(images, words)


@dataclass(frozen=True)
class Family:
    """What differs between MLLMs: how a folder is opened, how a question is put, and where an answer ends."""

    open: Callable[
        [Path, dict, torch.dtype, torch.device | str], tuple[PreTrainedModel, ProcessorMixin]
    ]
    conversation: str
    stop: str | None = None  # beside the end-of-text token


FAMILIES = {
    "llava": Family(open_llava, CONVERSATION),
    "llava, original layout": Family(open_original_llava, CONVERSATION_V0, stop="###"),
    "qwen2_5_vl": Family(open_qwen, CONVERSATION_QWEN),
}


def find_family(settings: dict, what: str | Path) -> Family:
    """The family of a model by its config.json. Raises UserError if it is none of ours; `what` is for the message."""
    kind = str(settings.get("model_type"))
    original = (
        kind in ("llava", "llava_llama")
        and "mm_vision_tower" in settings
        and "text_config" not in settings
    )
    name = "llava, original layout" if original else kind
    if name not in FAMILIES:
        raise UserError(
            f"{what}: model_type {kind!r} is no MLLM known here; expected one of: {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def announced_width(folder: str | Path) -> int | None:
    """H as a local folder's config.json has it, without loading the MLLM; None if it leaves that to a default."""
    settings = read_config(Path(folder))
    with opening(folder, "multimodal LLM"):
        width = settings.get("text_config", settings).get("hidden_size")
        return None if width is None else int(width)


# Folders of transformers models: read shard by shard, with every weight accounted for.

Model = TypeVar("Model", bound=PreTrainedModel)


def read_config(folder: Path) -> dict:
    """The folder's config.json. Raises WeightsError if it is missing or damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(
            f"{folder}: has no config.json, so it holds no model; check the path, or download it again"
        )
    return read_json(path, dict, "download it again", WeightsError)


def read_settings(location: str, flag: str) -> dict:
    """A model's config.json, of a local folder or on the hub. Raises UserError if it cannot be had."""
    folder = Path(location)
    return read_config(
        folder if folder.is_dir() else fetch_file(f"{location}/config.json", flag).parent
    )


def open_model(
    cls: type[Model], config: PreTrainedConfig, folder: Path, dtype: torch.dtype, device: torch.device | str,
    renames: dict[str, str] | None = None, unused: str | None = None, optional: str = " ", missing: set | None = None,
) -> Model:  # fmt: skip
    """A model of `config` with all weights of a folder, whose names are told by `renames`, in `dtype` on `device`.

    Raises WeightsError naming a key that is missing, unknown or of another shape.
    """
    if getattr(config, "quantization_config", None):
        raise WeightsError(
            f"{folder}: is quantized, which changes its features; use the same model in bf16 or fp16"
        )
    with (
        opening(folder, cls.__name__),
        torch.device("meta"),
    ):  # weights that no file has would be made up
        expected = count_parameters(cls(config))
    size = sum(
        file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")
    )
    if expected > 1.5 * size / 2:  # half precision takes two bytes
        raise WeightsError(
            f"{folder}: config.json asks for {expected:,} weights, the files hold fewer; download both"
        )
    with opening(folder, cls.__name__):
        model, report = cls.from_pretrained(
            folder, config=config, dtype=dtype, device_map={"": device}, output_loading_info=True,
            ignore_mismatched_sizes=True, key_mapping=renames,
        )  # fmt: skip
    absent = {key for key in report["missing_keys"] if not key.startswith(optional)}
    if missing is not None:
        missing |= set(report["missing_keys"]) - absent
    unknown = [key for key in report["unexpected_keys"] if unused is None or unused not in key]
    for keys, how in ((absent, "lacks"), (unknown, "has unknown keys:")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise WeightsError(
                f"{folder}: {how} {min(keys)!r}{more}, so it is not the {cls.__name__} that its config.json says; "
                "download it again"
            )
    for key, found, right in report["mismatched_keys"]:
        raise WeightsError(
            f"{folder}: {key!r} has shape {tuple(found)}, its config.json says {tuple(right)}; download both again"
        )
    return model


def open_mllm(
    location: str, dtype: torch.dtype, device: torch.device | str
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


# Spellings of the place for the prompt in a file of questions.
PROMPT_PLACES = (
    *("{}", "{prompt}", "<prompt>", "[prompt]"),
    *("{caption}", "<caption>", "[caption]"),
)


def read_questions(name: str) -> tuple[str, ...]:
    """Read phrasings from a JSON list of texts, each with one place for the prompt, as `{}`.

    Raises UserError for any other content.
    """
    path = Path(name).expanduser()
    expected = (
        'expected a JSON list of phrasings such as "How to make the image match the prompt: {}?"'
    )
    phrasings = read_json(path, list, expected)
    texts = phrasings and all(isinstance(phrasing, str) for phrasing in phrasings)
    check(texts, f"{path}: no list of texts; {expected}")
    questions = []
    for number, phrasing in enumerate(phrasings, 1):
        places = [place for place in PROMPT_PLACES for _ in range(phrasing.count(place))]
        check(
            len(places) == 1,
            f"{path}, entry {number}: has {len(places)} places for the prompt, expected one {{}}: "
            f"{phrasing[:80]!r}",
        )
        questions.append(phrasing.replace(places[0], "{}"))
    return tuple(questions)
