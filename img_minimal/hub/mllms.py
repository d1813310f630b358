"""Open multimodal LLMs: any that transformers opens as an image-text model, asked in its own way.

Every kind is opened by its own processor and asked with its own chat template. Two are special:
LLaVA-1.5, which was trained on images padded to a square, and LLaVA in its authors' layout (as the
release), which is asked with its first conversation.

The authors' layout is a Llama folder with a few more weights and settings (`mm_*`), which
transformers opens once names are mapped. Its tokenizer has no token for the image: the text is cut
there. Here one is added, as in transformers, with an embedding that image features replace.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import torch
from PIL.Image import Image, Resampling, new
from tokenizers.normalizers import Prepend, Replace, Sequence
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoProcessor,
    BatchFeature,
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
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.models.smolvlm import processing_smolvlm

from img_minimal.cli import AnyPath, check, warn
from img_minimal.files import read_json
from img_minimal.hub.weights import opening
from img_minimal.hub.where import check_depth, fetch_file, fetch_folder, split_hub_id

Model = TypeVar("Model", bound=PreTrainedModel)
Device = torch.device | str
Opened = tuple[PreTrainedModel, ProcessorMixin]

MAX_PIXELS = 2**20  # of an image that the MLLM sees
# How transformers asks LLaVA-1.5, and the twins: "USER: <image>\n{question} ASSISTANT:".
CHAT = (
    "{% for message in messages %}{{ message.role | upper + ': ' }}"
    "{% for part in message.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# The first conversation of LLaVA, with which the release asks its own.
CHAT_V0 = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
    "{% for message in messages %}###Human: <image>\n"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% endfor %}###Assistant:"
)
STOP_V0 = "###"  # ends an answer, in addition to the end-of-text token

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
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads hidden_act max_position_embeddings rope_theta rope_scaling bos_token_id "
    "eos_token_id"
).split()
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


# Any kind


def mllm_config(what: AnyPath, settings: dict | None = None) -> PreTrainedConfig:
    """Interpret the config.json of an MLLM, of a local folder or on the hub, or its `settings`.

    Raises UserError if it is missing, damaged, or of a kind that cannot serve. The latter is known
    without weights: transformers must open it as an image-text model, and it must read image and
    question in one sequence, whose states are the guidance.
    """
    settings = settings or read_settings(str(what), "--mllm")
    if is_original(settings):
        return transformers_config(settings, what)
    kind = str(settings.get("model_type"))
    advice = "use a LLaVA, Qwen-VL, InternVL, Gemma 3 or another image-text model of transformers"
    known = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    check(known, f"{what}: model_type {kind!r} is no MLLM known here; {advice}")
    with opening(what, "multimodal LLM"):
        config = AutoConfig.for_model(**settings)
    check(
        not config.is_encoder_decoder,
        f"{what}: {kind!r} reads image and question in two networks, so it has no guidance "
        f"features; {advice}",
    )
    return config


def open_mllm(location: str, dtype: torch.dtype, device: Device) -> Opened:
    """Open an MLLM's folder or hub id: model and processor.

    Raises UserError if it cannot be had, is of a kind that cannot serve, or a file is missing or
    damaged.
    """
    if split_hub_id(location, "--mllm"):
        mllm_config(location)  # refuses other kinds before their weights are downloaded
    folder = fetch_folder(location, "--mllm")
    settings = read_config(folder)
    config = mllm_config(folder, settings)
    if is_original(settings):
        return open_original_llava(folder, settings, config, dtype, device)
    processor = open_processor(folder, config)
    if isinstance(config, LlavaConfig):
        fit_llava(processor, config)
    check_processor(processor, config, location)
    if getattr(config, "quantization_config", None):
        warn(f"{location} is quantized: its features differ a little from those of the whole model")
    cls = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    model, _ = open_model(cls, config, folder, dtype, device)
    return model, processor


def open_processor(folder: Path, config: PreTrainedConfig) -> ProcessorMixin:
    """Open a model's own processor, without the half for videos, which needs other packages.

    Images are resized by Pillow, as in the release; torchvision, where it is installed, would give
    slightly other pixels. Raises UserError if it is damaged, or made for text alone.
    """
    with opening(folder, "processor of images and text"), without_videos():
        processor = AutoProcessor.from_pretrained(folder, config=config, backend="pil")
        if not isinstance(processor, ProcessorMixin):
            raise TypeError("it reads text alone")
    tokenizer = processor.tokenizer
    processor.chat_template = processor.chat_template or tokenizer.chat_template
    if config.model_type == "llava":  # llava-hf's first folders have none
        processor.chat_template = processor.chat_template or CHAT
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return processor


class NoVideos(dict):
    """Take the place of a processor's half for videos; it has no settings, so all are None."""

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def without_videos() -> Iterator[None]:
    """Let processors open without their half for videos."""
    check_part = ProcessorMixin.check_argument_for_proper_class

    def check_unless_video(self: ProcessorMixin, name: str, part: object) -> object:
        return None if isinstance(part, NoVideos) else check_part(self, name, part)

    with (
        patch.object(AutoVideoProcessor, "from_pretrained", lambda *_, **__: NoVideos()),
        patch.object(ProcessorMixin, "check_argument_for_proper_class", check_unless_video),
        # A package that spells out numbers, in what it says about videos.
        patch.object(processing_smolvlm, "num2words", processing_smolvlm.num2words or str),
    ):
        yield


def check_processor(processor: ProcessorMixin, config: PreTrainedConfig, what: str) -> None:
    """Ask about a small image. Raises UserError if image or question get lost on the way."""
    token = getattr(config, "image_token_id", None)
    with opening(what, "multimodal LLM"):
        image = new("RGB", (64, 64))
        chats = [chat(processor, image, question) for question in ("red", "blue, green")]
        inputs = tokenize(processor, chats)
    shown = token is None or (inputs["input_ids"] == token).any(1).all()
    asked = len(inputs["input_ids"].unique(dim=0)) == 2
    check(
        shown and asked,
        f"{what}: its tokenizer or chat template leaves out the image or the question; download "
        "them again, or use an MLLM tuned for chats",
    )


def chat(processor: ProcessorMixin, image: Image, question: str) -> list[dict]:
    """Put an image and a question into a conversation of transformers' form.

    Images of more than a million pixels are shrunk, as the number of their tokens may grow with
    their size, but not for LLaVA-1.5, which always sees its square.
    """
    image = image.convert("RGB")
    scale = (MAX_PIXELS / (image.width * image.height)) ** 0.5
    if scale < 1 and not isinstance(processor, LlavaProcessor):
        size = [max(1, int(side * scale)) for side in image.size]
        image = image.resize(size, Resampling.BICUBIC)
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def tokenize(processor: ProcessorMixin, chats: list[list[dict]]) -> BatchFeature:
    """Build a model's inputs for conversations: `input_ids`, `attention_mask` (B, L), and pixels.

    Padded on the right, so that the features of a prompt do not depend on its batch.
    """
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right"},
    )


# LLaVA-1.5


def fit_llava(processor: LlavaProcessor, config: LlavaConfig) -> None:
    """Make a processor see whole images in the size of the vision tower of `config`.

    LLaVA-1.5 was trained on images padded to a square; some folders' settings would crop them
    instead, or name another size than the vision tower's, or lack its numbers.
    """
    vision = config.vision_config
    side = vision.image_size
    crop = {"height": side, "width": side}
    square = {"size": {"shortest_edge": side}, "crop_size": crop, "do_pad": True}
    settings = processor.image_processor.to_dict() | square
    processor.image_processor = LlavaImageProcessorPil.from_dict(settings)
    processor.patch_size = vision.patch_size
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    # CLIP has a class token, SigLIP has none.
    processor.num_additional_image_tokens = int("siglip" not in vision.model_type)


# LLaVA in its authors' layout


def is_original(settings: dict) -> bool:
    """Recognise the authors' layout by its config.json."""
    original = "mm_vision_tower" in settings and "text_config" not in settings
    return original and settings.get("model_type") in ("llava", "llava_llama")


def open_original_llava(
    folder: Path, settings: dict, config: LlavaConfig, dtype: torch.dtype, device: Device
) -> Opened:
    """Open a folder in the authors' layout. Raises UserError if a file is missing or damaged."""
    tokenizer = read_tokenizer(folder)
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
    processor = LlavaProcessor(LlavaImageProcessorPil(), tokenizer, chat_template=CHAT_V0)
    fit_llava(processor, config)
    return model, processor


def tower_of(settings: dict) -> str:
    """Locate the vision tower, which may be a path on the computer that trained the model."""
    location = str(settings["mm_vision_tower"])
    moved = Path(location).name == Path(CLIP_336).name and not Path(location).is_dir()
    return CLIP_336 if moved else location


def transformers_config(settings: dict, what: AnyPath) -> LlavaConfig:
    """Translate a config.json of the authors' layout.

    `what` names the folder in messages. Raises UserError if it is no LLaVA-1.5, or its vision tower
    cannot be found.
    """
    for key, values in EXPECTED.items():
        check(
            settings.get(key) in values,
            f"{what}: config.json says {key} = {settings.get(key)!r}, expected {values[0]!r}; use "
            "a LLaVA-1.5",
        )
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


# Folders of transformers models


def read_config(folder: Path) -> dict:
    """Read a folder's config.json. Raises UserError if it is missing, damaged or too deep."""
    settings = read_json(folder / "config.json", dict, "download it again")
    check_depth(folder / "config.json")
    return settings


def read_settings(location: str, flag: str) -> dict:
    """Read a model's config.json, of a local folder or on the hub. Raises UserError."""
    folder = Path(location).expanduser()
    if split_hub_id(location, flag):
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
    or the files, need not have. Raises UserError naming a weight that is missing, unknown or of
    another shape.
    """
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
    check(
        not problems,
        f"{folder}: {next(iter(problems), '')}, so it is not the {cls.__name__} that its "
        "config.json says; download both again",
    )
    return model, missing
