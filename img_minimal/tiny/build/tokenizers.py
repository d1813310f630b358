"""Tokenizers of the tiny world: CLIP's byte-pair kind, T5's unigram kind, and a word-level one for the MLLM."""

import json

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5TokenizerFast

from img_minimal.tiny.grammar import COLOURS, FORMS, NUMBERS, PLURALS, RELATIONS

WORDS = sorted({*COLOURS, *FORMS, *PLURALS.values(), *NUMBERS.values(), *" ".join(RELATIONS).split(), "an", "and", ","})
TEXT_LENGTH = 16  # tokens; the longest caption takes 13


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which each word of the grammar is one token (byte-pair merges learnt from the words)."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = list("abcdefghijklmnopqrstuvwxyz,.!?'-0123456789")
    # The end of the text must not get id 2: CLIPTextModel takes that for a legacy file and pools elsewhere.
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|startoftext|>", "<|endoftext|>"], initial_alphabet=letters,
        end_of_word_suffix="</w>", show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator([word for word in WORDS for _ in range(5)] + letters * 5, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    return CLIPTokenizer(
        vocab=model["vocab"], merges=merges, unk_token="<|endoftext|>", bos_token="<|startoftext|>",
        eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=TEXT_LENGTH,
    )  # fmt: skip


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer in which each word of the grammar is one token, and other words are spelt."""
    words = [(f"▁{word}", -1.0) for word in WORDS if word != ","]
    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz,.!?'-0123456789"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5TokenizerFast(vocab=special + words + letters, extra_ids=0, model_max_length=TEXT_LENGTH)


def llava_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `words`, lower-case, with LLaVA's <image> and <pad>."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocab = {word: k for k, word in enumerate([*special, *sorted(set(words))])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="right", model_max_length=256,
    )  # fmt: skip
