"""Write tiny random MLLMs exactly as the public ones are stored, in names and shapes."""

import json
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from img_minimal.hub.questions import QUESTIONS

Shapes = dict[str, tuple[int, ...]]
CLIP = {
    "image_size": 56,
    "patch_size": 14,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "projection_dim": 16,
    "hidden_act": "quick_gelu",
}
LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 420,
    "max_position_embeddings": 4096,
}
# The rest of llava-v1.5's config.json that matters.
LLAVA = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "image_aspect_ratio": "pad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 32,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "model_type": "llava",
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_mm_proj": True,
}
WORDS = [question.format("a red circle and two blue squares") for question in QUESTIONS]
WORDS.append(
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions.###Human: ###Assistant: remove "
    "the cat and add a dog nothing"
)
TOWER = "model.vision_tower.vision_tower."
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def noise_images(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Draw images of random pixels, given as (height, width)."""
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 255, (*size, 3), dtype=np.uint8) for size in sizes]
    return [Image.fromarray(array) for array in arrays]


IMAGES = noise_images((60, 90), (200, 100), (64, 64))


def affine(name: str, *shape: int) -> Shapes:
    """Return the weight and bias of a linear layer or a norm."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def clip_shapes(c: dict, prefix: str = "vision_model.") -> Shapes:
    """Return names and shapes of a CLIP vision model in its public files."""
    w, m, p = c["hidden_size"], c["intermediate_size"], c["patch_size"]
    shapes = {
        "embeddings.class_embedding": (w,),
        "embeddings.position_embedding.weight": ((c["image_size"] // p) ** 2 + 1, w),
        "embeddings.patch_embedding.weight": (w, 3, p, p),
        **affine("pre_layrnorm", w),
        **affine("post_layernorm", w),
    }
    for i in range(c["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        shapes |= affine(f"{layer}.layer_norm1", w) | affine(f"{layer}.layer_norm2", w)
        for name in ("q", "k", "v", "out"):
            shapes |= affine(f"{layer}.self_attn.{name}_proj", w, w)
        shapes |= affine(f"{layer}.mlp.fc1", m, w) | affine(f"{layer}.mlp.fc2", w, m)
    return {prefix + name: shape for name, shape in shapes.items()}


def llava_shapes(c: dict, clip: dict) -> Shapes:
    """Return names and shapes of LLaVA-1.5 in the original layout, with its vision tower."""
    w, m, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    shapes = {
        "model.embed_tokens.weight": (v, w),
        "model.norm.weight": (w,),
        "lm_head.weight": (v, w),
    }
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (w, w)
        for name, shape in (("gate", (m, w)), ("up", (m, w)), ("down", (w, m))):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
        for name in ("input", "post_attention"):
            shapes[f"{layer}.{name}_layernorm.weight"] = (w,)
    shapes |= affine("model.mm_projector.0", w, clip["hidden_size"])
    shapes |= affine("model.mm_projector.2", w, w)
    return shapes | clip_shapes(clip, f"{TOWER}vision_model.")


def random_weights(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Draw weights of a scale at which every part has a say in the result."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    norms = ("norm.weight", "norm1.weight", "norm2.weight", "layrnorm.weight")
    for name, shape in shapes.items():
        scale = 0.1 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5
        weights[name] = torch.randn(shape, generator=generator) * scale + name.endswith(norms)
    return weights


def square(image: Image.Image) -> Tensor:
    """Pad as LLaVA does, with CLIP's mean colour, resize and normalise: (1, 3, S, S)."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), (122, 116, 104))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    size = CLIP["image_size"], CLIP["image_size"]
    pixels = np.asarray(canvas.resize(size, Image.Resampling.BICUBIC)) / 255
    return torch.tensor((pixels - MEAN) / STD).permute(2, 0, 1)[None].float()


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def edit(path: Path, **values: object) -> None:
    """Change values of a JSON file."""
    write_json(path, json.loads(path.read_text()) | values)


def write_weights(folder: Path, state: dict[str, Tensor], kind: str = "bin") -> None:
    """Write two shards and their index, as .bin or .safetensors."""
    name = "pytorch_model" if kind == "bin" else "model"
    weight_map = {}
    for k in range(2):
        file = f"{name}-{k + 1:05d}-of-00002.{kind}"
        part = {key: state[key].contiguous() for key in list(state)[k::2]}
        weight_map |= dict.fromkeys(part, file)
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    write_json(folder / f"{name}.{kind}.index.json", index)


def write_sentencepiece(folder: Path) -> None:
    """Write a tokenizer.model of Llama's kind, and its settings, as in LLaVA's folders."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=LLAMA["vocab_size"],
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        pad_id=-1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
        num_threads=1,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "legacy": False,
        "model_max_length": 2048,
        "padding_side": "right",
        "tokenizer_class": "LlamaTokenizer",
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_clip(folder: Path, state: dict[str, Tensor]) -> None:
    """Write a whole CLIP, as openai's, with parts that LLaVA has no use for."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "vision_config": {"model_type": "clip_vision_model", **CLIP},
        "text_config": {"model_type": "clip_text_model", "hidden_size": 8},
    }
    write_json(folder / "config.json", config)
    extra = {
        "logit_scale": torch.zeros(()),
        "text_projection.weight": torch.zeros(16, 8),
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    torch.save(state | extra, folder / "pytorch_model.bin")


def write_original_llava(
    folder: Path, *, kind: str = "bin", tower: bool = True, prefix: str = ""
) -> dict[str, Tensor]:
    """Write LLaVA-1.5 in the original layout, and its CLIP to a folder next to it.

    `tower`: the LLaVA's files hold the CLIP's weights, too. Returns all weights, including the
    tower's, under the names of the original layout.
    """
    folder.mkdir(parents=True)
    state = random_weights(llava_shapes(LLAMA, CLIP))
    clip = folder.with_name(folder.name + "-clip")
    in_tower = {key: value for key, value in state.items() if key.startswith(TOWER)}
    write_clip(clip, {key.removeprefix(TOWER): value for key, value in in_tower.items()})
    weights = {
        # In files of older transformers, and of later LLaVAs.
        f"{prefix}model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(6),
        f"{prefix}model.image_newline": torch.rand(LLAMA["hidden_size"]),
    }
    for key, value in state.items():
        if tower or key not in in_tower:
            weights[prefix + key] = value
    write_weights(folder, weights, kind)
    write_json(folder / "config.json", {**LLAVA, **LLAMA, "mm_vision_tower": str(clip)})
    write_sentencepiece(folder)
    return state


def write_llava_hf(folder: Path, original: dict[str, Tensor], tokenizer: Path) -> None:
    """Write the same weights as llava-hf does: other names, two more tokens, and padded rows."""
    folder.mkdir(parents=True)
    words = LLAMA["vocab_size"]
    rows = -(-(words + 2) // 64) * 64
    state = {}
    for name, value in original.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            value = torch.cat([value, torch.randn(rows - words, LLAMA["hidden_size"])])
        if name.startswith(TOWER):
            name = name.replace(TOWER, "vision_tower.")
        elif name.startswith("model.mm_projector"):
            name = name.replace("model.mm_projector.0", "multi_modal_projector.linear_1")
            name = name.replace("model.mm_projector.2", "multi_modal_projector.linear_2")
        else:
            name = f"language_model.{name}"
        state[name] = value
    write_weights(folder, state, "safetensors")
    text = {"model_type": "llama", **LLAMA, "vocab_size": rows, "rms_norm_eps": 1e-5}
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": words,
        "pad_token_id": words + 1,
        "projector_hidden_act": "gelu",
        "text_config": text | {"torch_dtype": "float16"},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": {"model_type": "clip_vision_model", **CLIP},
    }
    write_json(folder / "config.json", config)
    side = CLIP["image_size"]
    settings = {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": MEAN,
        "image_std": STD,
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": side},
    }
    write_json(folder / "preprocessor_config.json", settings)
    llama = LlamaTokenizer.from_pretrained(tokenizer, legacy=True)
    llama.add_tokens(["<image>", "<pad>"], special_tokens=True)
    llama.pad_token = "<pad>"
    llama.save_pretrained(folder)


QWEN_MARKS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
QWEN_TOKENIZER = {
    "tokenizer_class": "Qwen2Tokenizer",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "bos_token": None,
    "unk_token": None,
    "model_max_length": 131072,
    "additional_special_tokens": QWEN_MARKS[1:],
    "chat_template": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
QWEN_IMAGES = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": MEAN,
    "image_std": STD,
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
    "window_size": 112,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "in_chans": 3,
    "hidden_act": "silu",
    "model_type": "qwen2_5_vl",
}
QWEN = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "max_window_layers": 2,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": False,
    "vision_config": QWEN_VISION,
}


def write_qwen(folder: Path, seed: int = 0) -> None:
    """Write Qwen2.5-VL with its public names (`model.*` and `visual.*`) and flat config.json."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in QWEN_MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", QWEN_TOKENIZER)
    write_json(folder / "preprocessor_config.json", QWEN_IMAGES)
    ids = {
        "vocab_size": tokenizer.get_vocab_size() + 8,
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
    }
    write_json(folder / "config.json", QWEN | ids)
    # A copy, because the class changes the dicts that it is given.
    settings = Qwen2_5_VLConfig(**json.loads((folder / "config.json").read_text()))
    state = Qwen2_5_VLForConditionalGeneration(settings).state_dict()
    public = {}
    for name, value in state.items():
        name = name.replace("model.language_model.", "model.")
        public[name.replace("model.visual.", "visual.")] = tuple(value.shape)
    write_weights(folder, random_weights(public, seed), "safetensors")
