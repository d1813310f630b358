"""A small LLaVA, twice: `stock` describes pictures, `detector` says how to match them to a prompt.

The detector is the stock model, finetuned on triplets {image, prompt, edit instruction}.
"""

import random
import shutil
from pathlib import Path

import torch
from PIL.Image import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from img_minimal.detector import IGNORE, Detector, Rows
from img_minimal.files import to_pil
from img_minimal.hub.mllms import CHAT
from img_minimal.mllm import MLLM, QUESTIONS
from img_minimal.tiny.build.encoders import PATCH, SIDE, SQUARE, WORDS, open_vision
from img_minimal.tiny.build.fit import fit, run_train
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

WIDTH, LAYERS = 160, 4
CONVERSATION = "USER: <image>\n{question} ASSISTANT:"  # a turn, as CHAT puts it
TURNS = 4  # questions about one picture, in one conversation
DESCRIBE = ("describe the image", "what is in the picture?", "give a caption of the image")
OTHER_WORDS = (
    "change add remove move to the nothing one unclear shape shapes "  # of edits
    "is there in how many are yes no none where everything relative top middle bottom "
    "user assistant : ?"
)
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
# Shares of the questions. Lists teach where each shape is: without them, a shape's name never found
# its position.
TOPICS = {
    "caption": 0.15,
    "list": 0.25,
    "presence": 0.1,
    "number": 0.1,
    "place": 0.15,
    "relation": 0.15,
    "compare": 0.1,
}
Talk = list[tuple[str, str]]  # questions and answers


# The model


def word_tokenizer(words: set[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer over lower-case words, with LLaVA's <image> and <pad>."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocabulary = {word: k for k, word in enumerate([*special, *sorted(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="right",
        model_max_length=256,
    )


def new_processor() -> LlavaProcessor:
    """Build LLaVA's processor for 64 pixels and every word that the tiny world says or asks."""
    asked = " ".join([*QUESTIONS, *DESCRIBE]).lower()
    for mark in ("{}", ":", "?"):
        asked = asked.replace(mark, " ")
    words = {*WORDS, *asked.split(), *OTHER_WORDS.split()}
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(**SQUARE, do_pad=True),
        tokenizer=word_tokenizer(words),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )


def new_model(target: Path, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Build an untrained language model and projector behind the trained vision encoder."""
    folder = target / "image_encoder"
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        initializer_range=0.08,  # the usual .02 is for wide models; attention began as a plain mean
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=open_vision(folder).config,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=SIDE**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    trained = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
    model.model.vision_tower.load_state_dict(trained.state_dict())
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


# Conversations


def where(shape: Shape) -> str:
    """Name the third of the picture that a shape is in: "top left", "middle"."""
    row, column = int(3 * shape.y / SIZE), int(3 * shape.x / SIZE)
    return f"{ROWS[row]} {COLUMNS[column]}".strip() or "middle"


def ask_about(
    rng: random.Random, prompt: Prompt, scene: Scene, topic: str
) -> tuple[str, str] | None:
    """Draw a question on one of TOPICS about a scene laid out for `prompt`, and its answer.

    Returns None if the topic needs shapes that the scene does not have.
    """
    if topic == "caption":
        return rng.choice(DESCRIBE), str(prompt)
    if topic == "list":
        shapes = [f"{Group(1, *s.kind)} {where(s)}" for s in rng.sample(scene, len(scene))]
        return "where is everything?", ", ".join(shapes)
    if topic in ("presence", "number"):
        return _ask_how_many(rng, prompt, topic)

    single = [shape for shape in scene if prompt.kinds.count(shape.kind) == 1]
    if len(single) < (1 if topic == "place" else 2):
        return None
    single = rng.sample(single, len(single))
    names = [f"the {shape.colour} {shape.form}" for shape in single]
    if topic == "place":
        return f"where is {names[0]}?", where(single[0])
    true = []
    for relation in RELATIONS:
        if related(relation, single[:1], single[1:2], judging=True):
            true.append(relation)
    if topic == "relation":
        return f"where is {names[0]} relative to {names[1]}?", " and ".join(true)
    relation = rng.choice(RELATIONS)
    return f"is {names[0]} {relation} {names[1]}?", "yes" if relation in true else "no"


def _ask_how_many(rng: random.Random, prompt: Prompt, topic: str) -> tuple[str, str]:
    """Ask for the presence or number of shapes of a kind, which half of the scenes lack."""
    kind = rng.choice(prompt.kinds)
    while rng.random() < 0.5 or kind in HELD_OUT:
        kind = rng.choice(COLOURS), rng.choice(FORMS)
    count = prompt.kinds.count(kind)
    if topic == "presence":
        return f"is there {Group(1, *kind)} in the image?", "yes" if count else "no"
    numbers = NUMBERS | {0: "none", 1: "one"}
    return f"how many {kind[0]} {PLURALS[kind[1]]} are in the image?", numbers[count]


def conversation(rng: random.Random, prompt: Prompt, scene: Scene) -> Talk:
    """Draw TURNS questions on random topics, with their answers."""
    talk: Talk = []
    while len(talk) < TURNS:
        (topic,) = rng.choices([*TOPICS], [*TOPICS.values()])
        turn = ask_about(rng, prompt, scene, topic)
        if turn:
            talk.append(turn)
    return talk


def tokenize(processor: LlavaProcessor, images: list[Image], talks: list[Talk]) -> Rows:
    """Tokenize conversations, each about one image; labels are those of the answers."""
    tokenizer = processor.tokenizer
    image, pad = "<image>" * SIDE**2, tokenizer.pad_token_id
    ids, labels = [], []
    for talk in talks:
        row, label = [tokenizer.bos_token_id], [IGNORE]
        for turn, (question, answer) in enumerate(talk):
            text = CONVERSATION.format(question=question)
            text = text.replace("<image>", "" if turn else image)
            asked, answered = tokenizer([text, answer], add_special_tokens=False).input_ids
            answered = [*answered, tokenizer.eos_token_id]
            row += asked + answered
            label += [IGNORE] * len(asked) + answered
        ids.append(torch.tensor(row))
        labels.append(torch.tensor(label))
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
    labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    inputs = processor.image_processor(images, return_tensors="pt")
    inputs.update(input_ids=ids, attention_mask=(ids != pad).long())
    return Rows(inputs, labels)


# Training


def build_stock(workdir: Path, target: Path, steps: int = 6000, count: int = 40_000) -> None:
    """Train on conversations about rendered scenes; save `llava-stock`."""
    torch.manual_seed(50)
    processor = new_processor()
    detector = Detector(MLLM(new_model(target, processor.tokenizer), processor))
    rng = random.Random(51)
    prompts = [sample_prompt(rng) for _ in range(count)]
    scenes = [place(prompt, rng) for prompt in prompts]
    images = []
    for start in tqdm(range(0, count, 250), desc="stock pictures"):
        images += to_pil(render(scenes[start : start + 250]))
    seen = count - min(1000, count // 10)

    def loss_of_step(step: int) -> Tensor:
        chosen = torch.randint(seen, (32,)).tolist()
        rng = random.Random(52_000_000 + step)  # a resumed run asks the same questions
        talks = [conversation(rng, prompts[k], scenes[k]) for k in chosen]
        rows = tokenize(processor, [images[k] for k in chosen], talks)
        return detector.loss(rows) / rows.answer_tokens

    @torch.no_grad()
    def measure() -> dict[str, float]:
        """Share of unseen pictures about which a question of a topic is answered word for word."""
        rng, shares = random.Random(53), {}
        for topic in TOPICS:
            asked, talks = [], []
            for k in range(seen, count):
                turn = ask_about(rng, prompts[k], scenes[k], topic)
                if turn:
                    asked.append(images[k])
                    talks.append([turn])
            rows = tokenize(processor, asked, talks)
            scores, tokens = detector.scores(rows)
            lengths = (rows.labels != IGNORE).sum(1).tolist()
            right = [answer.all() for answer in (scores.argmax(-1) == tokens).split(lengths)]
            shares[topic] = torch.stack(right).float().mean().item()
        return shares

    fit(
        workdir / "stock",
        nn.ModuleDict({"model": detector.model}),
        loss_of_step,
        steps,
        lr=3e-3,
        optimizer="muon",
        weight_decay=0.02,
        measure=measure,
        save_every=250,
        seed=52,
    )
    detector.save(target / "llava-stock")


def build_detector(workdir: Path, target: Path, steps: int = 5500) -> None:
    """Finetune the stock model on the triplets, as any MLLM is; save `llava-detector`."""
    run_train(
        workdir / "detector",
        *("--stage", "mllm", "--seed", 1, "--steps", steps),
        *("--mllm", target / "llava-stock", "--triplets", workdir / "triplets.parquet"),
    )
    shutil.copytree(workdir / "detector/mllm", target / "llava-detector", dirs_exist_ok=True)
