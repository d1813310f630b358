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

from img_minimal.hub.mllms import CONVERSATION
from img_minimal.mllm import QUESTIONS
from img_minimal.tiny.build.loop import autocast, fit, run_train
from img_minimal.tiny.build.tokenizers import WORDS, llava_tokenizer
from img_minimal.tiny.grammar import (
    COLOURS,
    FORMS,
    HELD_OUT,
    NUMBERS,
    PLURALS,
    RELATIONS,
    Group,
    Prompt,
    sample_prompt,
)
from img_minimal.tiny.world import SIZE, Scene, Shape, place, related, render

WIDTH, LAYERS, PATCHES = 160, 4, 64
TURNS = 4  # questions about one picture, in one conversation
DESCRIBE = ("describe the image", "what is in the picture?", "give a caption of the image")
EDIT_WORDS = "change add remove move to the nothing one unclear shape shapes".split()
TALK = "is there in how many are yes no none where everything relative top middle bottom".split()
MARKS = "user assistant : ? <image>".split()
THIRD = SIZE / 3
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
# Shares of the questions. The lists teach it which shape is where: without them a shape's name never found its place.
TOPICS = {
    "caption": 0.15,
    "list": 0.25,
    "presence": 0.1,
    "number": 0.1,
    "place": 0.15,
    "relation": 0.15,
    "compare": 0.1,
}


def processor() -> LlavaProcessor:
    """Tokenizer over every word that the tiny world says or asks, and LLaVA's image processor at 64 pixels."""
    asked = " ".join(QUESTIONS).lower().replace("{}", "").replace(":", " ").split()
    words = {*WORDS, *asked, *" ".join(DESCRIBE).replace("?", "").split(), *EDIT_WORDS, *TALK, *MARKS} - {"<image>"}
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
        num_attention_heads=4, max_position_embeddings=256, rms_norm_eps=1e-5,
        initializer_range=0.08,  # the usual .02 is for wide models; here attention would begin as a plain mean
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
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


def where(shape: Shape) -> str:
    """The third of the picture that a shape is in, in words."""
    return f"{ROWS[int(shape.y / THIRD)]} {COLUMNS[int(shape.x / THIRD)]}".strip() or "middle"


def small_talk(rng: random.Random, prompt: Prompt, scene: Scene, topic: str) -> tuple[str, str] | None:
    """A question on one of TOPICS about a scene laid out for `prompt`, and its answer; None if it cannot be asked."""
    if topic == "caption":
        return rng.choice(DESCRIBE), str(prompt)
    if topic in ("presence", "number"):
        kind = rng.choice(prompt.kinds)
        while rng.random() < 0.5 or kind in HELD_OUT:
            kind = rng.choice(COLOURS), rng.choice(FORMS)
        count = prompt.kinds.count(kind)
        if topic == "presence":
            return f"is there {Group(1, *kind)} in the image?", "yes" if count else "no"
        numbers = {0: "none", 1: "one", **{n: NUMBERS[n] for n in (2, 3, 4)}}
        return f"how many {kind[0]} {PLURALS[kind[1]]} are in the image?", numbers[count]
    if topic == "list":
        parts = [f"{Group(1, *shape.kind)} {where(shape)}" for shape in rng.sample(scene, len(scene))]
        return "where is everything?", ", ".join(parts)
    single = [s for s in scene if prompt.kinds.count(s.kind) == 1]
    if len(single) < (1 if topic == "place" else 2):
        return None
    single = rng.sample(single, len(single))
    names = [f"the {shape.colour} {shape.form}" for shape in single]
    if topic == "place":
        return f"where is {names[0]}?", where(single[0])
    held = [relation for relation in RELATIONS if related(relation, single[:1], single[1:2], judging=True)]
    if topic == "relation":
        return f"where is {names[0]} relative to {names[1]}?", " and ".join(held)
    asked = rng.choice(RELATIONS)
    return f"is {names[0]} {asked} {names[1]}?", "yes" if asked in held else "no"


def conversation(rng: random.Random, prompt: Prompt, scene: Scene) -> list[tuple[str, str]]:
    """TURNS questions on random topics and their answers."""
    talk: list[tuple[str, str]] = []
    while len(talk) < TURNS:
        topic = rng.choices([*TOPICS], [*TOPICS.values()])[0]
        talk += filter(None, [small_talk(rng, prompt, scene, topic)])
    return talk


class TalkData:
    """Conversations as token rows, beside the frozen vision features of the pictures that they are about."""

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

    def rows(self, conversations: list[list[tuple[str, str]]]) -> tuple[Tensor, Tensor]:
        """Token ids and labels (B, L), padded on the right; labels are -100 outside the answers."""
        rows, labels = [], []
        for talk in conversations:
            row, label = [self.tokenizer.bos_token_id], [-100]
            for turn, (question, answer) in enumerate(talk):
                text = CONVERSATION.format(question=question).replace("<image>", "" if turn else "<image>" * PATCHES)
                asked, said = self.tokenizer([text, answer], add_special_tokens=False).input_ids
                said = [*said, self.tokenizer.eos_token_id]
                row += asked + said
                label += [-100] * len(asked) + said
            rows.append(torch.tensor(row))
            labels.append(torch.tensor(label))
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


def build_stock(workdir: Path, target: Path, steps: int = 6000, count: int = 40_000) -> None:
    """Conversations about rendered scenes: what is there, how many, and where; saves `llava-stock`."""
    torch.manual_seed(50)
    vocabulary = processor()
    model = new_model(target, vocabulary)
    examples, rng = TalkData(model, vocabulary), random.Random(51)
    prompts = [sample_prompt(rng) for _ in range(count)]
    scenes = [place(prompt, rng) for prompt in prompts]
    for start in tqdm(range(0, count, 250), desc="stock pictures"):
        examples.encode(render(scenes[start : start + 250]))
    features, seen = torch.cat(examples.features), count - min(1000, count // 10)

    def loss_of_step(step: int) -> Tensor:
        """The loss of a random batch."""
        i = torch.randint(seen, (32,))
        rng = random.Random(52_000_000 + step)  # of the step, so that a resumed run asks the same questions
        talk = [conversation(rng, prompts[k], scenes[k]) for k in i.tolist()]
        return examples.loss(features[i], *examples.rows(talk))

    def watch(step: int) -> str:
        """For each topic, the share of unseen pictures about which a question is answered rightly in every token."""
        rng, shares = random.Random(53), []
        for topic in TOPICS:
            talk = {k: [small_talk(rng, prompts[k], scenes[k], topic)] for k in range(seen, count)}
            asked = [k for k in talk if talk[k] != [None]]
            right = examples.exact(features[asked], *examples.rows([talk[k] for k in asked]))
            shares.append(f"{topic} {right.float().mean():.3f}")
        return "answers all right: " + ", ".join(shares)

    parts = nn.ModuleDict({"projector": model.model.multi_modal_projector, "language": model.model.language_model,
                           "head": model.lm_head})  # fmt: skip
    fit("stock", parts, loss_of_step, steps, workdir, lr=3e-3, muon=True, weight_decay=0.02, watch=watch,
        watch_every=250, seed=52)  # fmt: skip
    save(model, vocabulary, target / "llava-stock")


def build_detector(workdir: Path, target: Path, steps: int = 5500) -> None:
    """Finetune the stock model on the triplets, with the command that finetunes any MLLM; saves `llava-detector`."""
    folder = workdir / "detector"
    places = ("--mllm", target / "llava-stock", "--triplets", workdir / "triplets.parquet")
    run_train(folder, "--stage", "mllm", "--seed", 1, *places, "--steps", steps)
    shutil.copytree(folder / "mllm", target / "llava-detector", dirs_exist_ok=True)


def save(model: LlavaForConditionalGeneration, vocabulary: LlavaProcessor, folder: Path) -> None:
    """A folder in the llava-hf layout, bf16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    vocabulary.save_pretrained(folder)
