"""Writes tiny random MLLMs exactly as the public ones are stored; names and shapes are spelled out from their files."""

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

from img_minimal.mllm import QUESTIONS

CLIP = {"image_size": 56, "patch_size": 14, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "projection_dim": 16, "hidden_act": "quick_gelu"}  # fmt: skip
LLAMA = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 4, "vocab_size": 420, "max_position_embeddings": 4096}  # fmt: skip
# The rest of llava-v1.5's config.json that matters.
LLAVA = {"architectures": ["LlavaLlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
         "hidden_act": "silu", "image_aspect_ratio": "pad", "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 32,
         "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
         "mm_vision_select_layer": -2, "model_type": "llava", "rms_norm_eps": 1e-5, "rope_scaling": None,
         "tie_word_embeddings": False, "torch_dtype": "float16", "use_mm_proj": True}  # fmt: skip
WORDS = [q.format("a red circle and two blue squares") for q in QUESTIONS] + [
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions.###Human: ###Assistant: remove the cat and add a dog nothing",
]


def clip_shapes(c: dict, prefix: str = "vision_model.") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CLIP vision model in its public files."""
    w, m, patches = c["hidden_size"], c["intermediate_size"], (c["image_size"] // c["patch_size"]) ** 2
    shapes = {"embeddings.class_embedding": (w,), "embeddings.position_embedding.weight": (patches + 1, w),
              "embeddings.patch_embedding.weight": (w, 3, c["patch_size"], c["patch_size"])}  # fmt: skip
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{norm}.weight": (w,), f"{norm}.bias": (w,)}
    for i in range(c["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{norm}.weight": (w,), f"{layer}.{norm}.bias": (w,)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}.self_attn.{name}.weight": (w, w), f"{layer}.self_attn.{name}.bias": (w,)}
        shapes |= {f"{layer}.mlp.fc1.weight": (m, w), f"{layer}.mlp.fc1.bias": (m,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (w, m), f"{layer}.mlp.fc2.bias": (w,)}
    return {prefix + name: shape for name, shape in shapes.items()}


def llava_shapes(c: dict, clip: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of LLaVA-1.5 in the original layout, with its vision tower."""
    w, m, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    shapes = {"model.embed_tokens.weight": (v, w), "model.norm.weight": (w,), "lm_head.weight": (v, w)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (w, w) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.gate_proj.weight": (m, w), f"{layer}.mlp.up_proj.weight": (m, w)}
        shapes |= {f"{layer}.mlp.down_proj.weight": (w, m)}
        shapes |= {f"{layer}.input_layernorm.weight": (w,), f"{layer}.post_attention_layernorm.weight": (w,)}
    shapes |= {"model.mm_projector.0.weight": (w, clip["hidden_size"]), "model.mm_projector.0.bias": (w,)}
    shapes |= {"model.mm_projector.2.weight": (w, w), "model.mm_projector.2.bias": (w,)}
    return shapes | clip_shapes(clip, "model.vision_tower.vision_tower.vision_model.")


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights of a scale at which every part has a say in the result."""
    g = torch.Generator().manual_seed(seed)
    norms = ("norm.weight", "norm1.weight", "norm2.weight", "layrnorm.weight")
    return {
        name: torch.randn(shape, generator=g) * (0.1 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5)
        + (1.0 if name.endswith(norms) else 0.0)
        for name, shape in shapes.items()
    }


def square(image: Image.Image) -> torch.Tensor:
    """What LLaVA sees, written out: padded with CLIP's mean colour, resized, normalised; (1, 3, S, S)."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), (122, 116, 104))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(canvas.resize((CLIP["image_size"],) * 2, Image.Resampling.BICUBIC)) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return torch.tensor((pixels - mean) / std).permute(2, 0, 1)[None].float()


def write_weights(folder: Path, state: dict[str, Tensor], kind: str = "bin", shards: int = 2) -> None:
    """Shards and their index, as `pytorch_model-00001-of-00002.bin` or `model-00001-of-00002.safetensors`."""
    stem, suffix = ("pytorch_model", "bin") if kind == "bin" else ("model", "safetensors")
    names, weight_map = list(state), {}
    for k in range(shards):
        file = f"{stem}-{k + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: state[name].contiguous() for name in names[k::shards]}
        weight_map |= dict.fromkeys(part, file)
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_sentencepiece(folder: Path, size: int = LLAMA["vocab_size"]) -> None:
    """A tokenizer.model of Llama's kind, and nothing else but its settings, as in LLaVA's folders."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS), model_prefix=str(folder / "tokenizer"), vocab_size=size, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, pad_id=-1, unk_id=0, bos_id=1, eos_id=2, minloglevel=2, num_threads=1,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": None, "legacy": False, "model_max_length": 2048, "padding_side": "right",
        "tokenizer_class": "LlamaTokenizer", "clean_up_tokenization_spaces": False,
    }))  # fmt: skip


def write_clip(folder: Path, state: dict[str, Tensor]) -> None:
    """A whole CLIP, as openai's: the vision model under `vision_model.`, and parts that LLaVA has no use for."""
    folder.mkdir(parents=True)
    vision = {"model_type": "clip_vision_model", **CLIP}
    text = {"model_type": "clip_text_model", "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps({
        "model_type": "clip", "architectures": ["CLIPModel"], "vision_config": vision, "text_config": text,
    }))  # fmt: skip
    extra = {"logit_scale": torch.zeros(()), "text_projection.weight": torch.zeros(16, 8),
             "vision_model.embeddings.position_ids": torch.arange(17)[None]}  # fmt: skip
    torch.save(state | extra, folder / "pytorch_model.bin")


def write_original_llava(
    folder: Path, *, kind: str = "bin", tower: bool = True, prefix: str = "", seed: int = 0
) -> dict[str, Tensor]:
    """A LLaVA-1.5 in the original layout, its CLIP beside it; `tower` says whether it also holds the CLIP's weights.

    Returns all weights, the tower's included, under the names of the original layout.
    """
    folder.mkdir(parents=True)
    state = random_weights(llava_shapes(LLAMA, CLIP), seed)
    inside = "model.vision_tower.vision_tower."
    own = {name.removeprefix(inside): value for name, value in state.items() if name.startswith(inside)}
    write_clip(folder.with_name(folder.name + "-clip"), own)
    kept = {name: value for name, value in state.items() if tower or not name.startswith(inside)}
    kept["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(6)  # in files of older transformers
    kept["model.image_newline"] = torch.rand(LLAMA["hidden_size"])
    write_weights(folder, {prefix + name: value for name, value in kept.items()}, kind)
    config = {**LLAVA, **LLAMA, "mm_vision_tower": str(folder.with_name(folder.name + "-clip"))}
    (folder / "config.json").write_text(json.dumps(config))
    write_sentencepiece(folder)
    return state


def write_llava_hf(folder: Path, original: dict[str, Tensor], tokenizer: Path) -> None:
    """The same weights as llava-hf's folders have them: two more tokens, rows up to a multiple of 64, other names."""
    folder.mkdir(parents=True)
    state = {}
    for name, value in original.items():
        name = name.replace("model.vision_tower.vision_tower.", "vision_tower.")
        if name.startswith("model.mm_projector"):
            name = "multi_modal_projector.linear_" + ("1" if ".0." in name else "2") + "." + name.rpartition(".")[2]
        elif not name.startswith("vision_tower."):
            name = f"language_model.{name}"
        state[name] = value
    rows = -(-(LLAMA["vocab_size"] + 2) // 64) * 64
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        state[name] = torch.cat([state[name], torch.randn(rows - LLAMA["vocab_size"], LLAMA["hidden_size"])])
    write_weights(folder, state, "safetensors")
    text = {"model_type": "llama", **LLAMA, "vocab_size": rows, "rms_norm_eps": 1e-5, "torch_dtype": "float16"}
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "ignore_index": -100,
              "image_token_index": LLAMA["vocab_size"], "pad_token_id": LLAMA["vocab_size"] + 1,
              "projector_hidden_act": "gelu", "text_config": text, "vision_feature_layer": -2,
              "vision_feature_select_strategy": "default",
              "vision_config": {"model_type": "clip_vision_model", **CLIP}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    side = {"height": CLIP["image_size"], "width": CLIP["image_size"]}
    settings = {"crop_size": side, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
                "do_rescale": True, "do_resize": True, "image_processor_type": "CLIPImageProcessor",
                "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
                "processor_class": "LlavaProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
                "size": {"shortest_edge": CLIP["image_size"]}}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    words = LlamaTokenizer.from_pretrained(tokenizer, legacy=True)
    words.add_tokens(["<image>", "<pad>"], special_tokens=True)
    words.pad_token = "<pad>"
    words.save_pretrained(folder)


def write_qwen(folder: Path, seed: int = 0) -> None:
    """Qwen2.5-VL with its public names (`model.*` is the text model, `visual.*` the encoder) and flat config.json."""
    folder.mkdir(parents=True)
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
             "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {mark: tokenizer.token_to_id(mark) for mark in marks}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "bos_token": None, "unk_token": None, "model_max_length": 131072, "additional_special_tokens": marks[1:],
    }))  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
    }))  # fmt: skip
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
              "fullatt_block_indexes": [1], "window_size": 112, "patch_size": 14, "spatial_merge_size": 2,
              "temporal_patch_size": 2, "tokens_per_second": 2, "in_chans": 3, "hidden_act": "silu",
              "model_type": "qwen2_5_vl"}  # fmt: skip
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": 64,
              "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "vocab_size": max(ids.values()) + 9, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
              "max_position_embeddings": 128000, "max_window_layers": 2, "sliding_window": 32768,
              "use_sliding_window": False, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
              "tie_word_embeddings": False, "image_token_id": ids["<|image_pad|>"],
              "video_token_id": ids["<|video_pad|>"], "vision_start_token_id": ids["<|vision_start|>"],
              "vision_end_token_id": ids["<|vision_end|>"], "vision_config": vision}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**json.loads(json.dumps(config))))
    state = random_weights({name: tuple(value.shape) for name, value in model.state_dict().items()}, seed)
    public = {name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
              for name, value in state.items()}  # fmt: skip
    write_weights(folder, public, "safetensors")
