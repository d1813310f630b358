"""A small LLaVA, twice: `stock` talks about pictures, `detector` says how to make a picture match a prompt.

The detector is the stock model finetuned on triplets {image, prompt of the edited scene, edit instruction}.
"""

import random
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

from img_minimal.files.mllm_layouts import CONVERSATION
from img_minimal.questions import QUESTIONS
from img_minimal.tiny.build.loop import autocast, fit, run_train
from img_minimal.tiny.build.tokenizers import WORDS, llava_tokenizer
from img_minimal.tiny.grammar import COLOURS, FORMS, HELD_OUT, NUMBERS, PLURALS, Group, sample_prompt
from img_minimal.tiny.world import place, render

WIDTH, LAYERS, PATCHES = 160, 4, 64
DESCRIBE = ("describe the image", "what is in the picture?", "give a caption of the image")
EDIT_WORDS = "change add remove move to the nothing one unclear shape shapes".split()
TALK = "is there in how many are yes no none user assistant : ? <image>".split()


def processor() -> LlavaProcessor:
    """Tokenizer over every word that the tiny world says or asks, and LLaVA's image processor at 64 pixels."""
    asked = " ".join(QUESTIONS).lower().replace("{}", "").replace(":", " ").split()
    words = {*WORDS, *asked, *" ".join(DESCRIBE).replace("?", "").split(), *EDIT_WORDS, *TALK} - {"<image>"}
    images = LlavaImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        do_pad=True,
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=images, tokenizer=llava_tokenizer(sorted(words)), patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def new_model(target: Path, vocabulary: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Untrained language model and projector behind the trained, frozen vision encoder."""
    vision = CLIPVisionModelWithProjection.from_pretrained(target / "image_encoder", dtype=torch.float32)
    tokenizer = vocabulary.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=256, rms_norm_eps=1e-5, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision.config, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(
        CLIPVisionModel.from_pretrained(target / "image_encoder", dtype=torch.float32).state_dict()
    )
    model.model.vision_tower.requires_grad_(False)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def small_talk(rng: random.Random, prompt) -> tuple[str, str]:
    """A question about a picture drawn for `prompt`, and its answer: a caption, a presence or a number."""
    if rng.random() < 0.5:
        return rng.choice(DESCRIBE), str(prompt)
    kind = rng.choice(prompt.kinds)
    while rng.random() < 0.5 or kind in HELD_OUT:
        kind = rng.choice(COLOURS), rng.choice(FORMS)
    count = prompt.kinds.count(kind)
    if rng.random() < 0.5:
        return f"is there {Group(1, *kind)} in the image?", "yes" if count else "no"
    numbers = {0: "none", 1: "one", **{n: NUMBERS[n] for n in (2, 3, 4)}}
    return f"how many {kind[0]} {PLURALS[kind[1]]} are in the image?", numbers[count]


class TalkData:
    """Questions and answers as token rows, beside the frozen vision features of their pictures."""

    def __init__(self, model: LlavaForConditionalGeneration, vocabulary: LlavaProcessor):
        self.model, self.tokenizer = model, vocabulary.tokenizer
        self.image = model.config.image_token_id
        self.features: list[Tensor] = []

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> None:
        """Add pictures (B, 3, 64, 64) in [0, 1]: their penultimate patch features, without the class token."""
        with autocast():
            states = self.model.model.vision_tower(pixels * 2 - 1, output_hidden_states=True).hidden_states[-2]
        self.features.append(states[:, 1:].bfloat16())

    def rows(self, questions: list[str], answers: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and labels (B, L), padded on the right; labels are -100 outside the answers."""
        rows, labels = [], []
        for question, answer in zip(questions, answers, strict=True):
            text = CONVERSATION.format(question=question).replace("<image>", "<image>" * PATCHES)
            prompt = self.tokenizer(text).input_ids
            reply = self.tokenizer(answer, add_special_tokens=False).input_ids + [self.tokenizer.eos_token_id]
            rows.append(torch.tensor(prompt + reply))
            labels.append(torch.tensor([-100] * len(prompt) + reply))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return ids, nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)

    def logits(self, features: Tensor, ids: Tensor) -> Tensor:
        """Next-token scores after the image part, (B, L - 1 - first, V); `first` is where the text begins."""
        inner = self.model.model
        words = inner.language_model.embed_tokens(ids)
        patches = inner.multi_modal_projector(features.float())
        is_image = (ids == self.image)[..., None].expand_as(words)
        embeds = words.masked_scatter(is_image, patches.to(words.dtype))
        states = inner.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return self.model.lm_head(states[:, self.first : -1])

    first = PATCHES + 2  # <s> user : and the image tokens come before anything that is asked

    def loss(self, features: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the answers alone."""
        with autocast():
            logits = self.logits(features, ids)
        return F.cross_entropy(logits.float().flatten(0, 1), labels[:, self.first + 1 :].flatten(), ignore_index=-100)

    @torch.no_grad()
    def exact(self, features: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        """(B,) is every token of the answer the likeliest one, given the right ones before it?"""
        with autocast():
            guess = self.logits(features, ids).argmax(-1)
        labels = labels[:, self.first + 1 :]
        return ((guess == labels) | (labels == -100)).all(1)


def train(
    name: str, examples: TalkData, questions, answers: list[str], steps: int, workdir: Path, lr: float, seed: int
) -> None:
    """Train on all but the last 1,000 pictures; `questions(i, rng)` words the question of picture i."""
    features, rng = torch.cat(examples.features), random.Random(seed)
    unseen = min(1000, len(features) // 10)
    count = len(features) - unseen
    test = range(count, len(features))
    fixed = examples.rows([questions(i, rng) for i in test], [answers[i] for i in test])
    model = examples.model

    def loss_of_step(step: int) -> Tensor:
        """The loss of a random batch."""
        i = torch.randint(count, (64,))
        rng = random.Random(1_000_003 * seed + step)  # of the step, so that a resumed run asks the same questions
        ids, labels = examples.rows([questions(k, rng) for k in i.tolist()], [answers[k] for k in i.tolist()])
        return examples.loss(features[i], ids, labels)

    def watch(step: int) -> str:
        """Share of unseen pictures whose answer is right in every token."""
        parts = zip(features[count:].split(250), *(t.split(250) for t in fixed))
        right = torch.cat([examples.exact(*part) for part in parts])
        return f"answers all right {right.float().mean():.3f} of {unseen}"

    parts = nn.ModuleDict({"projector": model.model.multi_modal_projector, "language": model.model.language_model,
                           "head": model.lm_head})  # fmt: skip
    fit(name, parts, loss_of_step, steps, workdir, lr=lr, weight_decay=0.02, hold=0.3, watch=watch, watch_every=250,
        seed=seed)  # fmt: skip


def build_stock(workdir: Path, target: Path, steps: int = 1000, count: int = 16_000) -> None:
    """Captions, presence and counting on rendered scenes; saves `llava-stock`."""
    torch.manual_seed(50)
    vocabulary = processor()
    model = new_model(target, vocabulary)
    examples, rng = TalkData(model, vocabulary), random.Random(51)
    prompts = [sample_prompt(rng) for _ in range(count)]
    for start in tqdm(range(0, len(prompts), 250), desc="stock pictures"):
        examples.encode(render([place(p, rng) for p in prompts[start : start + 250]]))
    talk = [small_talk(rng, p) for p in prompts]
    train("stock", examples, lambda i, rng: talk[i][0], [answer for _, answer in talk], steps, workdir, 1.5e-3, 52)
    save(model, vocabulary, target / "llava-stock")


def build_detector(workdir: Path, target: Path, steps: int = 9900) -> None:
    """Finetune the stock model on the triplets, with the command that finetunes any MLLM; saves `llava-detector`."""
    folder = workdir / "detector"
    places = ("--mllm", target / "llava-stock", "--triplets", workdir / "triplets.parquet")
    run_train(folder, "--stage", "mllm", "--seed", 1, *places, "--steps", steps)
    shutil.copytree(folder / "mllm", target / "llava-detector", dirs_exist_ok=True)


def save(model: LlavaForConditionalGeneration, vocabulary: LlavaProcessor, folder: Path) -> None:
    """A folder in the llava-hf layout, bf16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    vocabulary.save_pretrained(folder)
