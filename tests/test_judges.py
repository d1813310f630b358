"""Judges compute what their papers say, and prompt files are read as benchmarks publish them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)

from img_minimal.evaluate.judges import ClipJudge, find_judges
from img_minimal.evaluate.prompts import FilePrompt, read_prompts
from img_minimal.presets import find_preset

PROMPTS = [
    "a red circle",
    "three green squares and a blue triangle",
    "a red circle",
    "a purple cross above a yellow circle",
]
LENGTH = 12


def make_clip(folder: Path) -> Path:
    """Write a whole CLIPModel folder as on the hub, untrained and small."""
    base = find_preset("tiny-sdxl").models.base
    tokenizer = CLIPTokenizer.from_pretrained(f"{base}/tokenizer")
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config=sizes | text,
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
        logit_scale_init_value=3.1,
    )
    model = CLIPModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # the default start is so small that all scores are equal
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


def open_judge(name: str, model: Path, processor: Path | None = None) -> ClipJudge:
    locations = {f"{name}_model": str(model), "judge_processor": processor and str(processor)}
    [judge] = find_judges(name, None, **locations)
    return judge.open()


def pictures(n: int = 4) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 40, 48, 3), dtype=np.uint8)
    return [Image.fromarray(p).resize((96, 80)) for p in pixels]


@torch.no_grad()
def test_every_score_is_its_formula_of_the_cosine_in_float64(clip):
    model = CLIPModel.from_pretrained(clip).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessorPil.from_pretrained(clip)
    cosines, logits = [], []
    for image, prompt in zip(pictures(), PROMPTS):  # one image and one unpadded prompt at a time
        pixels = processor([image], return_tensors="pt").pixel_values
        out = model(**tokenizer([prompt], return_tensors="pt"), pixel_values=pixels)
        a, b = out.image_embeds[0].double().numpy(), out.text_embeds[0].double().numpy()
        cosines.append((a @ b) / np.sqrt((a @ a) * (b @ b)))
        logits.append(out.logits_per_image.item())
    cosine = np.array(cosines)
    assert cosine.min() < -0.01 and cosine.max() > 0.01, "or clipscore's floor shows nothing"
    expected = {
        "pickscore": np.exp(3.1) * cosine,
        "hpsv2": 100 * cosine,
        "clipscore": 100 * np.maximum(cosine, 0),
    }
    assert list(expected) == [judge.name for judge in find_judges(None, None)]
    for name, values in expected.items():
        scores = open_judge(name, clip).score(pictures(), PROMPTS)
        assert np.abs(scores - values).max() < 1e-4
    assert np.abs(expected["pickscore"] - logits).max() < 1e-4


def test_a_score_does_not_depend_on_the_other_images_and_prompts(clip):
    judge, images = open_judge("hpsv2", clip), pictures(40)  # more than one batch
    together = judge.score(images, PROMPTS * 10)
    alone = [judge.score([image], [prompt])[0] for image, prompt in zip(images, PROMPTS * 10)]
    assert np.abs(together - alone).max() < 1e-4


def test_a_prompt_too_long_for_the_judge_is_judged_by_its_beginning_and_counted(clip):
    judge, image = open_judge("hpsv2", clip), pictures(1)
    exact = "red circle blue square green triangle and four orange crosses"
    long = f"{exact} purple triangle yellow"
    assert judge.cut([exact, long, "a red circle"]) == [0, 3, 0]
    assert judge.score(image, [exact]) == judge.score(image, [long])
    assert judge.score(image, [exact]) != judge.score(image, [exact.rsplit(" ", 1)[0]])


def test_without_files_of_its_own_a_judge_takes_the_published_processor(clip, tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(clip, folder, ignore=shutil.ignore_patterns("tokenizer*", "preprocessor*"))
    with refused("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "--judge-processor"):
        open_judge("pickscore", folder)
    scores = open_judge("pickscore", folder, clip).score(pictures(1), PROMPTS[:1])
    assert scores == open_judge("pickscore", clip).score(pictures(1), PROMPTS[:1])


def test_a_processor_that_does_not_fit_the_model_is_refused(clip, tmp_path):
    for name in ("wordless", "large"):
        shutil.copytree(clip, tmp_path / name)
    for path in (tmp_path / "wordless").glob("tokenizer*"):
        path.unlink()
    CLIPImageProcessorPil().save_pretrained(tmp_path / "large")
    with refused("has 2 words", "--judge-processor"):
        open_judge("clipscore", clip, tmp_path / "wordless")
    with refused("224 x 224 pixels", "32 x 32", "--judge-processor"):
        open_judge("clipscore", clip, tmp_path / "large")


def test_a_judge_that_is_not_there_is_refused_with_its_flag():
    with refused("yuvalkirstain/PickScore_v1", "cannot be reached", "--pickscore-model"):
        find_judges("pickscore", None)[0].open()


def test_a_score_that_is_not_finite_is_refused(clip):
    judge = open_judge("hpsv2", clip)
    judge.model.visual_projection.weight.data[0, 0] = torch.nan
    with refused("'a red circle'", "is not finite"):
        judge.score(pictures(1), PROMPTS[:1])


# Prompt files


def write(folder: Path, name: str, content: str | bytes | list) -> Path:
    path = folder / name
    if isinstance(content, list):
        content = "\n".join(map(json.dumps, content))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


SAID = 'A robot. The words "Fly an airplane" are on the wall. '
GENEVAL = [
    {"tag": "one", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [], "exclude": [], "prompt": "a photo of two clocks"},
]
PARTI = [
    {"Prompt": "bond", "Category": "Abstract"},
    {"Prompt": SAID, "Category": "Outdoor Scenes", "Note": ""},
]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "\ufeffa cat\r\n\n  a dog, \u2028 twice \n", ["a cat", "a dog, \u2028 twice"]),
        (
            "geneval.jsonl",
            GENEVAL,
            [("a photo of a bench", "one"), ("a photo of two clocks", "counting")],
        ),
        ("parti.jsonl", PARTI, [("bond", "Abstract"), (SAID.strip(), "Outdoor Scenes")]),
        (
            "PartiPrompts.tsv",
            f"Prompt\tCategory\tNote\nbond\tAbstract\tBasic\n{SAID}\tOutdoor Scenes\tComplex\n",
            [("bond", "Abstract"), (SAID.strip(), "Outdoor Scenes")],
        ),
        ("photo.json", '["an iPhone.", "Elves"]', ["an iPhone.", "Elves"]),
        ("test.json", '[{"prompt": "an iPhone."}, {"prompt": "Elves"}]', ["an iPhone.", "Elves"]),
        ("key.json", '{"version": 2, "prompts": ["bond", "Elves"]}', ["bond", "Elves"]),
        (
            "MJHQ.json",
            '{"a1": {"category": "people", "prompt": "Elves"}, "b2": {"prompt": "bond"}}',
            [("Elves", "people"), "bond"],
        ),
        ("lines.json", '{"caption": "bond"}\n\n{"text": "Elves"}\n', ["bond", "Elves"]),
        ("one.csv", 'caption\n"a cat, a dog"\n\nbond, too\n', ["a cat, a dog", "bond, too"]),
        (
            "DrawBench.csv",
            'Prompts,Category\r\n"say ""hi"", now",Text\r\nbond,\r\n',
            [('say "hi", now', "Text"), "bond"],
        ),
        ("excel.csv", "\ufeffid;Prompt;tag\n1;a cat;one\n", [("a cat", "one")]),
    ],
)
def test_benchmarks_are_read_as_they_are_published(tmp_path, name, content, expected):
    prompts = []
    for k, entry in enumerate(expected):
        text, category = (entry, "") if isinstance(entry, str) else entry
        prompts.append(FilePrompt(k, text, category))
    assert read_prompts(write(tmp_path, name, content)) == prompts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"a cat\nan \xff owl\n", ["line 2", "UTF-8"]),
        ("p.doc", "a cat", ["unknown kind", ".jsonl"]),
        ("p.csv", "a cat\na dog\n", ["line 1", "0 columns `Prompt`"]),
        ("p.csv", 'prompt\n"a cat\nbond\n', ["line 3", "quotation marks"]),
        ("p.jsonl", '{"prompt": "a cat"}\n\n{"prompt": "a d\n', ["line 3", "not JSON"]),
        ("p.jsonl", '"a cat"\n17\n', ["line 2", "no prompt"]),
        ("p.tsv", "a cat\tAnimals\n", ["line 1", "`Prompt`"]),
        ("p.tsv", "Prompt\tCategory\na cat\tAnimals\tBasic\n", ["line 2", "3 columns"]),
        ("p.json", '{"prompt": 17}', ["item 1", "no prompt"]),
        ("p.txt", b"a cat\ran \xff owl\r", ["line 2", "UTF-8"]),
        ("p.txt", "a cat".encode("utf-16-le"), ["line 1", "NUL"]),
        ("p.jsonl", '"a cat"\n{"prompt": "a \\u0000 dog"}', ["line 2", "NUL"]),
        ("p.tsv", "Prompt\tCategory\tprompt \na\tb\tc\n", ["line 1", "2 columns `Prompt`"]),
    ],
)
def test_a_damaged_prompt_file_is_refused_with_the_line(tmp_path, name, content, words):
    with refused(name, *words):
        read_prompts(write(tmp_path, name, content))


def test_a_part_of_a_file_is_drawn_by_the_seed_and_keeps_its_order_and_numbers(tmp_path):
    path = write(tmp_path, "p.txt", "\n".join(f"prompt {k}" for k in range(100)))
    some = read_prompts(path, 10, seed=1)
    assert len(some) == 10 and some == read_prompts(path, 10, seed=1) != read_prompts(path, 10)
    assert some == [prompt for prompt in read_prompts(path) if prompt in some]
    assert max(p.index for p in some) > 50, "not the first ones, which have one category"
    assert read_prompts(path, 1000) == read_prompts(path)
