"""Finetuning an MLLM: answers alone count, LoRA merges, and a stopped run goes on to the bit."""

import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from feature_sets import interrupt
from mllm_kinds import KINDS
from PIL import Image
from refusals import assert_refused
from transformers import AutoModelForImageTextToText, AutoProcessor

from img_minimal.data.features import StreamedData
from img_minimal.data.load import load_encoder
from img_minimal.data.pairs import START, Triplet, pair_stream, triplet_stream
from img_minimal.detector import IGNORE, Detector, Rows, detector_data, train_detector
from img_minimal.devices import Precision
from img_minimal.hub.mllms import CHAT, without_videos
from img_minimal.hub.questions import NOTHING
from img_minimal.mllm import MLLM, ask
from img_minimal.plots import read_rows
from img_minimal.presets import find_preset
from img_minimal.run import Run
from train import train as train_aligner

TWIN = find_preset("tiny-sdxl")
SMALL = {"steps": 20, "batch_size": 8, "micro_batch": 8, "warmup": 2, "save_every": 10}
SETTINGS = replace(TWIN.finetuning, optimizer="adamw", lr=1.5e-3, constant_share=0.5, **SMALL)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("triplets") / "some.parquet"
    pq.write_table(pq.read_table(TWIN.data.triplets).slice(0, 90), path)
    return path


def new_detector(folder: str | Path = TWIN.models.stock_mllm, lora_rank: int = 0) -> Detector:
    return Detector(MLLM.from_pretrained(folder), lora_rank)


def pictures() -> list[Triplet]:
    """Make triplets with images of several sizes."""
    triplets = []
    for k, words in enumerate(("remove the cat", NOTHING, "add a dog and remove the cat")):
        image = Image.effect_noise((56 + 28 * k, 84), 50 + k).convert("RGB")
        triplets.append(Triplet(image, f"a dog number {k}", words))
    return triplets


def data_of(source: Path, chunk: int = 0) -> StreamedData:
    return detector_data(triplet_stream(source, chunk))


def train(
    folder: Path, source: Path, detector: Detector, stop: int = -1, **changed: int
) -> list[dict]:
    """Train in a folder, or go on there; a signal comes in step `stop`. Returns the log."""
    settings = replace(SETTINGS, **changed)
    run = Run(folder, {}, resume=(folder / "checkpoint.pt").exists())
    interrupt(run, stop)
    train_detector(run, detector, data_of(source, settings.chunk), settings)
    run.lock.close()
    return read_rows(folder / "metrics.jsonl")


@pytest.mark.parametrize("kind", ["original", "hf", "qwen", "twin"])
def test_rows_are_what_the_mllm_is_asked_followed_by_the_answer_and_an_end(kind, mllms):
    detector, triplets = new_detector(mllms[kind]), pictures()
    tokenizer, rng = detector.mllm.processor.tokenizer, random.Random(3)
    rows = detector.rows(triplets, random.Random(3))
    ids, mask = rows.inputs["input_ids"], rows.inputs["attention_mask"].bool()
    for k, triplet in enumerate(triplets):
        question = ask(triplet.prompt, rng)
        asked = detector.mllm.inputs([triplet.image], [question])["input_ids"][0].tolist()
        row = ids[k][mask[k]].tolist()
        answer = row[len(asked) :]
        assert row[: len(asked)] == asked and answer[-1] == tokenizer.eos_token_id
        # The twin does not know these words.
        assert tokenizer.decode(answer[:-1]).strip() == triplet.instruction or kind == "twin"
        assert rows.labels[k][: len(row)].tolist() == [IGNORE] * len(asked) + answer


@pytest.mark.parametrize("kind", ["hf", "qwen", "twin", *KINDS])
def test_the_loss_is_what_transformers_has_of_images_and_answers(kind, mllm_of):
    detector = new_detector(mllm_of(kind))
    rows = detector.rows(pictures(), random.Random(3))
    with torch.no_grad():
        whole = detector.model(**rows.inputs, labels=rows.labels)
        scores, tokens = detector.scores(rows)
        loss = detector.loss(rows)
    answers = rows.labels[:, 1:] != IGNORE
    assert torch.equal(tokens, rows.labels[:, 1:][answers])
    assert (scores - whole.logits[:, :-1][answers]).abs().max() < 1e-4
    assert loss.item() / rows.answer_tokens == pytest.approx(whole.loss.item(), rel=1e-5)


def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(source, tmp_path):
    rows = []
    for size in (8, 3):
        settings = {"steps": 1, "micro_batch": size}
        rows += train(tmp_path / str(size), source, new_detector(), **settings)
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-3)
    assert rows[0]["gradient_norm"] == pytest.approx(rows[1]["gradient_norm"], rel=1e-2)


def test_twenty_steps_lower_the_loss_and_leave_the_vision_encoder_as_it_was(source, tmp_path):
    detector = new_detector()
    rows = train(tmp_path, source, detector)
    losses = [row["loss"] for row in rows]
    assert len(losses) == 20 and sum(losses[-4:]) < 0.6 * sum(losses[:4])
    assert "exact" in rows[9] and "exact" not in rows[8], "measured with every checkpoint"
    before = new_detector().model.model.vision_tower.state_dict()
    for key, value in detector.model.model.vision_tower.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("chunk", [0, 40])
def test_a_stopped_run_goes_on_to_the_same_weights_bit_for_bit(source, tmp_path, chunk):
    settings = {"steps": 9, "save_every": 100, "chunk": chunk}
    whole, stopped, resumed = new_detector(), new_detector(), new_detector()
    rows = train(tmp_path / "whole", source, whole, **settings)
    assert len(train(tmp_path / "parts", source, stopped, stop=3, **settings)) == 4
    again = train(tmp_path / "parts", source, resumed, **settings)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    for name, weight in whole.trained.items():
        assert torch.equal(weight, resumed.trained[name]), name


def test_the_last_tenth_of_the_first_chunk_is_held_out_and_never_trained_on(source):
    data = data_of(source, chunk=50)
    parts = list(data.parts(START))
    assert [len(part.samples) for part in parts] == [45, 40] and len(data.unseen) == 5
    held_out = {id(example) for example in data.unseen}
    for part in parts:
        assert not held_out & {id(example) for example in part.data[part.samples]}


def test_accuracy_counts_exact_instructions_and_decisions(source, monkeypatch):
    # A model that always says "nothing" is right exactly where nothing is wrong.
    [chunk] = triplet_stream(source).chunks()
    detector = new_detector()
    tokenizer, nothing = detector.mllm.processor.tokenizer, detector.mllm.nothing

    def scores(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        answers = rows.labels[:, 1:] != IGNORE
        previous = rows.inputs["input_ids"][:, :-1][answers]
        guess = torch.where(previous == nothing, tokenizer.eos_token_id, nothing)
        return torch.eye(len(tokenizer))[guess], rows.labels[:, 1:][answers]

    monkeypatch.setattr(detector, "scores", scores)
    found = detector.accuracy(chunk.items, seed=0, batch_size=7)
    share = sum(t.instruction == NOTHING for t in chunk.items) / len(chunk.items)
    assert 0.2 < share < 0.6
    expected = {"exact": share, "decided": share, "always_edit": 1 - share}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["hf", "original", "qwen", "idefics3"])
def test_lora_trains_adapters_only_and_merges_into_an_ordinary_model(
    kind, mllm_of, source, tmp_path
):
    torch.manual_seed(0)
    detector, triplets = new_detector(mllm_of(kind), lora_rank=4), pictures()
    frozen = {}
    for name, p in detector.model.named_parameters():
        if name in detector.trained:
            assert "lora_" in name and ("language_model" in name or "text_model" in name)
        else:
            frozen[name] = p.clone()

    def states() -> torch.Tensor:
        detector.model.eval()
        images, prompts = [t.image for t in triplets], [t.prompt for t in triplets]
        return detector.mllm.guidance(images, prompts, [0, 1, 2])[0]

    untrained = states()
    settings = {"steps": 5, "batch_size": 3, "micro_batch": 2, "warmup": 1, "lr": 1e-2}
    losses = [row["loss"] for row in train(tmp_path, source, detector, **settings)]
    assert losses[-1] < losses[0]
    for name, p in detector.model.named_parameters():
        assert name in detector.trained or torch.equal(p, frozen[name]), name

    adapted = states()
    assert (adapted - untrained).abs().max() > 0.01
    detector.save(tmp_path / "mllm")
    opened = MLLM.from_pretrained(tmp_path / "mllm", torch.bfloat16)
    assert opened.stop is None and (opened.processor.chat_template == CHAT) == (
        kind in ("hf", "original")
    )
    with nullcontext() if kind != "qwen" else without_videos():  # as where torchvision is
        plain = AutoProcessor.from_pretrained(tmp_path / "mllm")
    assert type(plain) is type(detector.mllm.processor)
    assert plain.chat_template == detector.mllm.processor.chat_template
    AutoModelForImageTextToText.from_pretrained(tmp_path / "mllm")
    saved = opened.model.state_dict()
    assert not any("lora_" in name for name in saved)
    for name, value in detector.model.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert (states() - adapted).norm() < 0.1 * adapted.norm()  # as rounding to bf16 moves .03


def test_the_command_prints_plan_and_accuracy_and_saves_a_folder_that_opens(source, tmp_path, call):
    words = ["train.py", "--stage", "mllm", "--triplets", source, "--batch-size", 16]
    words += ["--output-dir", tmp_path / "run", "--save-every", 2, "--steps", 3]
    done = call(*words)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("plan: a detector from ") and "3 steps of 16" in lines[0]
    assert "all but the vision encoder" in done.stdout
    [before], [after] = (
        [line for line in lines if line.startswith(name)] for name in ("before: ", "after: ")
    )
    assert "worded exactly 0.0%" in before and "decided rightly" in after
    files = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert files == {"config.json", "metrics.jsonl", "curves.png", "checkpoint.pt", "mllm"}
    opened = MLLM.from_pretrained(tmp_path / "run" / "mllm")
    blank = [Image.new("RGB", (64, 64))]
    assert isinstance(opened.explain(blank, ["a red circle"], [0])[0], str)

    assert_refused(call(*words), "--resume")
    assert_refused(call(*words, "--resume", "--lr", 0.5), "cannot resume with lr")
    other = call("train.py", "--output-dir", tmp_path / "run", "--resume")
    assert_refused(other, "cannot resume with stage")


@pytest.mark.parametrize(
    ("flag", "name", "words"),
    [
        ("--triplets", "no.parquet", "no such file or folder; expected the columns original_image"),
        ("--triplets", "empty.parquet", "holds no triplet"),
        ("--mllm", "nothing", "nothing"),
    ],
)
def test_triplets_or_an_mllm_that_cannot_be_read_are_refused(tmp_path, call, flag, name, words):
    damaged = {"original_image": [b"no"], "edit_prompt": ["x"], "edited_prompt": ["y"]}
    pq.write_table(pa.table(damaged), tmp_path / "empty.parquet")
    command = ("train.py", "--stage", "mllm", "--output-dir", tmp_path / "run")
    assert_refused(call(*command, flag, tmp_path / name), words)


def test_an_aligner_is_trained_on_the_features_of_a_new_kind(mllm_of, tmp_path):
    preset = TWIN.changed(mllm=str(mllm_of("idefics3")))
    encoder = load_encoder(preset, "mllm", 0)
    data = StreamedData(pair_stream(TWIN.data.pairs, 24, 24), encoder)
    settings = replace(TWIN.training, steps=3, batch_size=8, depth=1, heads=1, warmup=1)
    run = Run(tmp_path / "run", {})
    aligner = train_aligner(run, data, settings, Precision.named("fp32", torch.device("cpu")))
    run.lock.close()
    assert aligner.guidance_width == 32 and aligner.zero_linear.weight.abs().max() > 0
