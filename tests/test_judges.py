"""Judges compute what their papers say, and prompt files are read as their benchmarks publish them."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from img_minimal.evaluate.judges import JUDGES, ClipJudge, JudgeFiles
from img_minimal.evaluate.prompts import FilePrompt, read_prompts
from img_minimal.presets import find_preset
from img_minimal.cli import UserError

PROMPTS = [
    "a red circle",
    "three green squares and a blue triangle",
    "a red circle",
    "a purple cross above a yellow circle",
]
LENGTH = 12


def make_clip(folder: Path) -> Path:
    """A CLIPModel folder with everything in it, as on the hub: untrained, and small."""
    tokenizer = CLIPTokenizer.from_pretrained(Path(find_preset("tiny-sdxl").base) / "tokenizer")
    torch.manual_seed(5)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = CLIPModel(
        CLIPConfig(
            text_config=sizes
            | dict(
                vocab_size=len(tokenizer), max_position_embeddings=LENGTH, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            ),
            vision_config=sizes | dict(image_size=32, patch_size=8),
            projection_dim=16,
            logit_scale_init_value=3.1,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # the default start is so small that all scores are equal
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


def open_judge(name: str, clip: Path) -> ClipJudge:
    return ClipJudge.open(JudgeFiles.find(name, str(clip)))


def pictures(n: int = 4) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 40, 48, 3), dtype=np.uint8)
    return [Image.fromarray(p).resize((96, 80)) for p in pixels]


@torch.no_grad()
def cosines(clip: Path) -> np.ndarray:
    """In float64 from the model's own embeddings, one image and one unpadded prompt at a time."""
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    processor, found = CLIPImageProcessorPil.from_pretrained(clip), []
    for image, prompt in zip(pictures(), PROMPTS):
        inputs = tokenizer([prompt], return_tensors="pt")
        pixels = processor([image], return_tensors="pt").pixel_values
        out = model(**inputs, pixel_values=pixels)
        a, b = (e[0].double().numpy() for e in (out.image_embeds, out.text_embeds))
        found.append((a @ b) / np.sqrt((a @ a) * (b @ b)))
    return np.array(found)


@torch.no_grad()
def test_pickscore_is_the_diagonal_of_logits_per_image_of_the_whole_model(clip):
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(pictures(), return_tensors="pt").pixel_values
    inputs = tokenizer(PROMPTS, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    expected = model(**inputs, pixel_values=pixels).logits_per_image.diagonal().numpy()
    scores = open_judge("pickscore", clip).score(pictures(), PROMPTS)
    assert scores.std() > 0.1, "the scores should differ, or this test shows nothing"
    assert np.abs(scores - expected).max() < 1e-4


def test_every_score_is_its_formula_of_the_cosine_in_float64(clip):
    cosine = cosines(clip)
    assert cosine.min() < -0.01 and cosine.max() > 0.01, "clipscore's floor should matter for some and not for others"
    expected = {"pickscore": np.exp(3.1) * cosine, "hpsv2": 100 * cosine, "clipscore": 100 * np.maximum(cosine, 0)}
    assert expected.keys() == JUDGES.keys()
    for name, values in expected.items():
        assert np.abs(open_judge(name, clip).score(pictures(), PROMPTS) - values).max() < 1e-4


def test_a_score_does_not_depend_on_the_other_images_and_prompts(clip):
    judge = open_judge("hpsv2", clip)
    together = judge.score(pictures(), PROMPTS)
    alone = [judge.score([image], [prompt])[0] for image, prompt in zip(pictures(), PROMPTS)]
    assert np.abs(together - alone).max() < 1e-4


def test_a_prompt_too_long_for_the_judge_is_judged_by_its_beginning_and_counted(clip):
    judge = open_judge("hpsv2", clip)
    words = "red circle blue square green triangle and four orange crosses".split()
    exact, long = " ".join(words), " ".join([*words, "purple", "triangle", "yellow"])
    assert judge.cut([exact, long, "a red circle"]) == [0, 3, 0]
    image = pictures(1)
    assert judge.score(image, [exact]) == judge.score(image, [long])
    assert judge.score(image, [exact]) != judge.score(image, [" ".join(words[:-1])])


def test_without_files_of_its_own_a_judge_takes_the_published_processor(clip, tmp_path):
    weights_only = tmp_path / "weights"
    shutil.copytree(clip, weights_only, ignore=shutil.ignore_patterns("tokenizer*", "preprocessor*"))
    with pytest.raises(UserError, match="laion/CLIP-ViT-H-14-laion2B-s32B-b79K.*--judge-processor") as error:
        ClipJudge.open(JudgeFiles.find("pickscore", str(weights_only)))
    one_line(error)
    elsewhere = ClipJudge.open(JudgeFiles.find("pickscore", str(weights_only), str(clip)))
    assert elsewhere.score(pictures(1), PROMPTS[:1]) == open_judge("pickscore", clip).score(pictures(1), PROMPTS[:1])


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unknown_judge_is_one_line_that_names_the_known_ones():
    with pytest.raises(UserError, match="'taste'.*pickscore, hpsv2, clipscore"):
        JudgeFiles.find("taste")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("/nowhere/PickScore", ["/nowhere/PickScore: no such file or folder", "--pickscore-model"]),
        (None, ["yuvalkirstain/PickScore_v1", "cannot be reached", "--pickscore-model"]),
    ],
)
def test_a_missing_judge_is_one_line_that_says_which_option_to_give(model, words):
    with pytest.raises(UserError) as error:
        ClipJudge.open(JudgeFiles.find("pickscore", model))
    assert all(word in one_line(error) for word in words)


def test_damaged_and_foreign_judge_files_are_each_one_line(clip, tmp_path):
    cut, empty, blind = (tmp_path / name for name in ("cut", "empty", "blind"))
    for folder in (cut, empty):
        shutil.copytree(clip, folder)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20_000])
    for path in empty.glob("tokenizer*"):
        path.unlink()
    config = CLIPModel.from_pretrained(clip).config.vision_config
    CLIPVisionModelWithProjection(config).save_pretrained(blind)
    logging.disable()  # transformers explains at length that it makes up what is missing
    try:
        for folder, word in {cut: "cut short", blind: "weights of a CLIPModel are wanting"}.items():
            with pytest.raises(UserError, match=word) as error:
                ClipJudge.open(JudgeFiles.find("clipscore", str(folder), str(clip)))
            assert str(folder) in one_line(error)
        with pytest.raises(UserError, match="2 words.*--judge-processor"):
            ClipJudge.open(JudgeFiles.find("clipscore", str(clip), str(empty)))
    finally:
        logging.disable(logging.NOTSET)


def test_a_processor_of_another_image_size_is_refused(clip, tmp_path):
    shutil.copytree(clip, tmp_path / "p")
    CLIPImageProcessorPil().save_pretrained(tmp_path / "p")
    with pytest.raises(UserError, match="224 x 224 pixels.*32 x 32"):
        ClipJudge.open(JudgeFiles.find("hpsv2", str(clip), str(tmp_path / "p")))


def test_a_score_that_is_not_finite_is_an_error_and_not_a_number(clip):
    judge = open_judge("hpsv2", clip)
    judge.model.visual_projection.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="'a red circle' is not finite"):
        judge.score(pictures(1), PROMPTS[:1])


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_text_file_has_one_prompt_a_line(tmp_path):
    path = write(tmp_path, "p.txt", "\ufeffa cat\r\n\n  a dog, \u2028 twice \n")
    assert read_prompts(path) == [FilePrompt(0, "a cat"), FilePrompt(1, "a dog, \u2028 twice")]


def test_geneval_metadata_gives_prompts_and_tags_as_categories(tmp_path):
    rows = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "counting", "include": [], "exclude": [], "prompt": "a photo of two clocks"},
    ]
    path = write(tmp_path, "evaluation_metadata.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_prompts(path) == [
        FilePrompt(0, "a photo of a bench", "single_object"),
        FilePrompt(1, "a photo of two clocks", "counting"),
    ]


def test_parti_prompts_are_read_as_tsv_and_as_jsonl_and_keep_their_quotation_marks(tmp_path):
    said = 'A robot. The words "Fly an airplane" are on the wall. '
    table = f"Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tBiology\n{said}\tOutdoor Scenes\tComplex\n"
    lines = [{"Prompt": "bond", "Category": "Abstract"}, {"Prompt": said, "Category": "Outdoor Scenes", "Note": ""}]
    expected = [FilePrompt(0, "bond", "Abstract"), FilePrompt(1, said.strip(), "Outdoor Scenes")]
    assert read_prompts(write(tmp_path, "PartiPrompts.tsv", table)) == expected
    assert read_prompts(write(tmp_path, "parti.jsonl", "\n".join(map(json.dumps, lines)))) == expected


def test_hpd_lists_are_read_as_strings_or_objects(tmp_path):
    prompts = ["Product still of an iPhone.", "Elves attacking New York City."]
    expected = [FilePrompt(k, prompt) for k, prompt in enumerate(prompts)]
    assert read_prompts(write(tmp_path, "photo.json", json.dumps(prompts))) == expected
    assert read_prompts(write(tmp_path, "test.json", json.dumps([{"prompt": p} for p in prompts]))) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"a cat\nan \xff owl\n", ["line 2", "UTF-8"]),
        ("p.txt", "\n \n", ["no prompt"]),
        ("p.csv", "a cat", ["unknown kind", ".jsonl"]),
        ("p.jsonl", '{"prompt": "a cat"}\n\n{"prompt": "a d\n', ["line 3", "not JSON"]),
        ("p.jsonl", '{"prompt": "a cat"}\n{"caption": "a dog"}\n', ["line 2", "no prompt"]),
        ("p.jsonl", '{"prompt": "a cat"}\n{"prompt": " "}\n', ["line 2", "no prompt"]),
        ("p.jsonl", '"a cat"\n17\n', ["line 2", "no prompt"]),
        ("p.tsv", "a cat\tAnimals\n", ["line 1", "`Prompt`"]),
        ("p.tsv", "Prompt\tCategory\na cat\tAnimals\n\tAnimals\n", ["line 3", "no prompt"]),
        ("p.tsv", "Prompt\tCategory\na cat\tAnimals\tBasic\n", ["line 2", "3 columns"]),
        ("p.json", '["a cat",\n "a dog"', ["line 2", "not JSON"]),
        ("p.json", '{"prompt": "a cat"}', ["list", "dict"]),
        ("p.json", '["a cat", null]', ["item 2", "no prompt"]),
    ],
)
def test_a_damaged_prompt_file_is_one_line_that_says_where(tmp_path, name, content, words):
    with pytest.raises(UserError) as error:
        read_prompts(write(tmp_path, name, content))
    assert all(word in one_line(error) for word in [name, *words])


def test_a_missing_prompt_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read.*--prompt-file"):
        read_prompts(tmp_path / "none.txt")


def test_a_part_of_a_file_is_drawn_by_the_seed_and_keeps_its_order_and_places(tmp_path):
    path = write(tmp_path, "p.txt", "\n".join(f"prompt {k}" for k in range(100)))
    some = read_prompts(path, 10, seed=1)
    assert len(some) == 10 and some == read_prompts(path, 10, seed=1) != read_prompts(path, 10, seed=2)
    assert [p.text for p in some] == [f"prompt {p.index}" for p in sorted(some, key=lambda p: p.index)]
    assert max(p.index for p in some) > 50, "not just the first ones, of which a benchmark has one category"
    assert read_prompts(path, 1000) == read_prompts(path)
