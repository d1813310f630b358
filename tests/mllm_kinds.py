"""Write folders of today's MLLMs, tiny and random, with a processor and a chat template each."""

from pathlib import Path

import torch
from mllm_folders import MEAN, STD, WORDS, write_json
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

MARKS = [
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<img>", "</img>", "<IMG_CONTEXT>", "<boi>", "<eoi>", "<soft>", "<end_of_utterance>"),
    *("<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>"),
]
IDS = {mark: k for k, mark in enumerate(MARKS)}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "initializer_range": 0.3,
}
LLAMA = TEXT | {"model_type": "llama"}
QWEN2 = TEXT | {"model_type": "qwen2"}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.3,
}
CLIP = VISION | {"model_type": "clip_vision_model"}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 14, "initializer_range": 0.3}
QWEN_IDS = {
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
}
PIXELS = {"image_mean": MEAN, "image_std": STD}
QWEN_PIXELS = {"min_pixels": 784, "max_pixels": 78400, "patch_size": 14, "merge_size": 2}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
# The forms of the public templates: which mark stands for the image, and how a turn looks.
CHAT = (
    "{%% for message in messages %%}<|im_start|>{{ message.role }}\n"
    "{%% for part in message.content %%}{%% if part.type == 'image' %%}%s"
    "{%% else %%}{{ part.text }}{%% endif %%}{%% endfor %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)
GEMMA_CHAT = "{{ bos_token }}" + (CHAT % "<boi>").replace("part.text", "part.text | trim")
QWEN_CHAT = CHAT % "<|vision_start|><|image_pad|><|vision_end|>"


def idefics(name: str) -> tuple:
    """Return a kind whose large images are split into tiles."""
    return (
        {"text_config": LLAMA, "vision_config": VISION, "image_token_id": IDS["<image>"]},
        {
            "image_processor_type": f"{name}ImageProcessor",
            "size": {"longest_edge": 56},
            "max_image_size": {"longest_edge": 28},
        },
        {"processor_class": f"{name}Processor", "image_seq_len": 1},
        CHAT % "<image>",
    )


# Kind: config.json, settings of images, settings of the processor, chat template.
KINDS = {
    "qwen2_vl": (
        {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
            **QWEN_IDS,
        },
        QWEN_PIXELS | {"image_processor_type": "Qwen2VLImageProcessor"},
        {"processor_class": "Qwen2VLProcessor"},
        QWEN_CHAT,
    ),
    "qwen3_vl": (
        {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION
            | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
            | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            **QWEN_IDS,
        },
        QWEN_PIXELS | {"image_processor_type": "Qwen2VLImageProcessorFast"},
        {"processor_class": "Qwen3VLProcessor"},
        QWEN_CHAT,
    ),
    "llava_next": (
        {
            "text_config": LLAMA,
            "vision_config": CLIP,
            "image_token_index": IDS["<image>"],
            "image_grid_pinpoints": PINPOINTS,
        },
        {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": PINPOINTS,
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28},
        },
        {
            "processor_class": "LlavaNextProcessor",
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        CHAT % "<image>\n",
    ),
    "llava_onevision": (
        {
            "text_config": QWEN2,
            "vision_config": SIGLIP,
            "image_token_index": IDS["<image>"],
            "video_token_index": IDS["<video>"],
            "image_grid_pinpoints": PINPOINTS,
        },
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": PINPOINTS,
            "size": {"height": 28, "width": 28},
        },
        {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 4,
            "vision_feature_select_strategy": "full",
        },
        CHAT % "<image>\n",
    ),
    "internvl": (
        {
            "text_config": QWEN2,
            "vision_config": VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
            "image_token_id": IDS["<IMG_CONTEXT>"],
            "image_seq_length": 1,
        },
        {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "size": {"height": 28, "width": 28},
            "crop_to_patches": True,
        },
        {"processor_class": "InternVLProcessor", "image_seq_length": 1},
        CHAT % "<IMG_CONTEXT>\n",
    ),
    "idefics3": idefics("Idefics3"),
    "smolvlm": idefics("SmolVLM"),
    "gemma3": (
        {
            "text_config": TEXT | {"sliding_window": 16, "query_pre_attn_scalar": 16},
            "vision_config": SIGLIP | {"image_size": 56},
            "image_token_index": IDS["<soft>"],
            "boi_token_index": IDS["<boi>"],
            "eoi_token_index": IDS["<eoi>"],
            "mm_tokens_per_image": 4,
        },
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 56, "width": 56}},
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        GEMMA_CHAT,
    ),
}
# What the tokenizers of these kinds call their marks.
NAMED_MARKS = {
    "gemma3": {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"},
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}


def write_tokenizer(folder: Path, named_marks: dict[str, str]) -> None:
    """Write a byte-level tokenizer whose first tokens are MARKS."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(mark, special=True) for mark in MARKS],
    )
    core.train_from_iterator(WORDS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens=named_marks,
    )
    tokenizer.save_pretrained(folder)


def write_kind(folder: Path, kind: str) -> None:
    """Write the files that a public folder of this kind holds."""
    settings, images, processor, template = KINDS[kind]
    folder.mkdir(parents=True)
    write_tokenizer(folder, NAMED_MARKS.get(kind, {}))
    write_json(folder / "preprocessor_config.json", PIXELS | images | processor)
    write_json(folder / "processor_config.json", processor)
    (folder / "chat_template.jinja").write_text(template)
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
