"""Finetuning an MLLM as a detector of misalignment: what counts in the loss, what learns, what is saved and resumed."""

import copy
import dataclasses
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mllm_folders import write_llava_hf, write_original_llava, write_qwen
from PIL import Image

import train as script
from img_minimal.bench.plan import mllm_plan
from img_minimal.data.features import Batches, Part, StreamedData
from img_minimal.data.pairs import Place, Triplet, triplet_stream
from img_minimal.hub.mllms import FAMILIES
from img_minimal.detector import IGNORE, Detector, Example
from img_minimal.detector import DetectorState, Examples, detector_data, train_detector
from img_minimal.mllm import MLLM, NOTHING
from img_minimal.presets import Finetuning, find_preset
from img_minimal.mllm import ask
from img_minimal.cli import UserError
from img_minimal.run import Stop

TWIN = find_preset("tiny-sdxl")
SETTINGS = Finetuning(
    steps=20, batch_size=16, micro_batch=16, lr=1.5e-3, warmup=2, constant_share=0.5, weight_decay=0.02, lora_rank=0,
    chunk=0, save_every=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def triplets() -> list[Triplet]:
    return next(triplet_stream(TWIN.triplets, 90).chunks()).items


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("triplets") / "some.parquet"
    pq.write_table(pq.read_table(TWIN.triplets).slice(0, 90), path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny random MLLMs, as the public ones are stored."""
    folder = tmp_path_factory.mktemp("mllms")
    state = write_original_llava(folder / "original")
    write_llava_hf(folder / "hf", state, folder / "original")
    write_qwen(folder / "qwen")
    return {kind: folder / kind for kind in ("original", "hf", "qwen")}


def pictures(count: int = 3) -> list[Triplet]:
    generator = random.Random(0)
    words = ["remove the cat", NOTHING, "add a dog and remove the cat"]
    images = [Image.effect_noise((56 + 28 * k, 84), generator.uniform(30, 90)).convert("RGB") for k in range(count)]
    return [Triplet(image, f"a dog number {k}", words[k % 3]) for k, image in enumerate(images)]


def stock() -> Detector:
    return Detector(MLLM.from_pretrained(TWIN.stock_mllm))


def state_of(
    source: Path, settings: Finetuning = SETTINGS, chunk: int = 0
) -> tuple[DetectorState, StreamedData, Batches]:
    detector = stock()
    data = detector_data(triplet_stream(source, chunk), detector, settings.micro_batch)
    return DetectorState(detector, settings), data, Batches(data.parts, settings.batch_size, 0)


def numbers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# The loss


@pytest.mark.parametrize("kind", ["original", "hf", "qwen", "twin"])
def test_rows_are_what_the_mllm_is_asked_followed_by_the_answer_and_an_end(kind, folders):
    mllm = MLLM.from_pretrained(folders.get(kind, TWIN.stock_mllm))
    detector, some = Detector(mllm), pictures()
    examples = detector.encode(some, batch_size=2)
    rows, rng = detector.rows(examples, random.Random(3)), random.Random(3)
    for k, t in enumerate(some):
        asked = mllm.inputs([t.image], [ask(t.prompt, rng)])["input_ids"][0].tolist()
        row = rows.ids[k][rows.mask[k].bool()].tolist()
        assert row[: len(asked)] == asked
        tokenizer = mllm.processor.tokenizer
        assert tokenizer.decode(row[len(asked) : -1]).replace(" ,", ",").strip() == t.instruction or kind == "twin"
        assert row[-1] == tokenizer.eos_token_id and rows.labels[k].tolist()[: len(asked)] == [IGNORE] * len(asked)
        assert rows.labels[k][: len(row)].tolist()[len(asked) :] == row[len(asked) :]


def test_only_the_tokens_of_the_answer_count_and_another_question_leaves_them_alone(triplets):
    detector = stock()
    examples = detector.encode(triplets[:6], 6)
    a, b = (detector.rows(examples, random.Random(seed)) for seed in (1, 2))
    assert not torch.equal(a.ids, b.ids), "two phrasings"
    answers = [[row[row != IGNORE].tolist() for row in rows.labels] for rows in (a, b)]
    assert answers[0] == answers[1] and a.count == sum(map(len, answers[0]))
    scores, tokens = detector.scores(examples, a)
    assert tokens.tolist() == sum(answers[0], []) and len(scores) == a.count
    # What transformers makes of labels that are -100 outside of the answer.
    inner, features = detector.model, torch.stack([x.features for x in examples]).float()
    with detector.precision.training(torch.device("cpu")), torch.no_grad():
        projected = inner.model.multi_modal_projector(features)
        embeds = inner.get_input_embeddings()(a.ids)
        where = (a.ids == inner.config.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(where, projected.to(embeds.dtype))
        expected = inner(inputs_embeds=embeds, attention_mask=a.mask, labels=a.labels).loss
    assert detector.loss(examples, a).item() / a.count == pytest.approx(expected.item(), rel=2e-3)


@pytest.mark.parametrize("kind", ["hf", "qwen", "twin"])
def test_features_seen_once_give_the_scores_of_looking_at_every_step(kind, folders):
    mllm = MLLM.from_pretrained(folders.get(kind, TWIN.stock_mllm))
    detector, some = Detector(mllm), pictures()
    examples = detector.encode(some, batch_size=3)
    rows = detector.rows(examples, random.Random(3))
    inputs = mllm.inputs([t.image for t in some], [t.prompt for t in some])
    inputs |= {"input_ids": rows.ids, "attention_mask": rows.mask}
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (rows.ids == mllm.model.config.image_token_id).int()
    with detector.precision.training(torch.device("cpu")), torch.no_grad():
        whole = mllm.model(**inputs).logits[:, :-1][rows.labels[:, 1:] != IGNORE].float()
        scores, _ = detector.scores(examples, rows)
    assert (scores - whole).abs().max() < 0.05 * whole.abs().max()
    assert (scores.argmax(-1) == whole.argmax(-1)).float().mean() > 0.9


def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(source, tmp_path):
    runs = []
    for micro_batch in (16, 5):
        settings = dataclasses.replace(SETTINGS, steps=1, micro_batch=micro_batch)
        state, data, batches = state_of(source)  # the images are seen in the same batches
        (tmp_path / str(micro_batch)).mkdir()
        train_detector(state, batches, data.unseen, settings, tmp_path / str(micro_batch))
        runs.append(numbers(tmp_path / str(micro_batch))[0])
    assert runs[0]["loss"] == pytest.approx(runs[1]["loss"], rel=1e-3)
    assert runs[0]["gradient_norm"] == pytest.approx(runs[1]["gradient_norm"], rel=1e-2)


# The loop


def test_twenty_steps_lower_the_loss_and_leave_the_vision_encoder_as_it_was(source, tmp_path):
    state, data, batches = state_of(source)
    tower = copy.deepcopy(state.detector.model.model.vision_tower.state_dict())
    assert train_detector(state, batches, data.unseen, SETTINGS, tmp_path) is True
    losses = [row["loss"] for row in numbers(tmp_path)]
    assert len(losses) == 20 and sum(losses[-4:]) < 0.6 * sum(losses[:4])
    after = state.detector.model.model.vision_tower.state_dict()
    assert all(torch.equal(tower[key], after[key]) for key in tower)
    assert not any("vision_tower" in name for name in state.detector.trained)
    assert "exact" in numbers(tmp_path)[9] and "exact" not in numbers(tmp_path)[8]


@pytest.mark.parametrize("chunk", [0, 40])
def test_a_stopped_run_goes_on_to_the_same_weights_bit_for_bit(source, tmp_path, chunk):
    settings = dataclasses.replace(SETTINGS, steps=9, save_every=100)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, data, batches = state_of(source, settings, chunk)
    train_detector(whole, batches, data.unseen, settings, tmp_path / "whole")

    first, data, batches = state_of(source, settings, chunk)
    stop = Stop()

    class AfterFour(Batches):
        def __iter__(self):
            for k, batch in enumerate(super().__iter__()):
                stop.asked = k == 3
                yield batch

    again = AfterFour(data.parts, settings.batch_size, 0)
    assert train_detector(first, again, data.unseen, settings, tmp_path / "parts", stop=stop) is False
    assert first.step == 4
    second, data, batches = state_of(source, settings, chunk)
    saved = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    second.load_state_dict(saved)
    batches.resume(saved["data"])
    train_detector(second, batches, data.unseen, settings, tmp_path / "parts")
    ours, theirs = whole.detector.trained, second.detector.trained
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [r["loss"] for r in numbers(tmp_path / "whole")] == [r["loss"] for r in numbers(tmp_path / "parts")]


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_checkpoint(source, tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=2, save_every=2)
    state, data, batches = state_of(source, settings)
    train_detector(state, batches, data.unseen, settings, tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with torch.no_grad():
        state.detector.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"step 2 is nan \(samples \[.*last checkpoint is kept") as caught:
        train_detector(state, batches, data.unseen, dataclasses.replace(settings, steps=4), tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and "\n" not in str(caught.value)


def test_the_last_tenth_of_the_first_chunk_is_held_out_and_never_trained_on(source):
    _, data, _ = state_of(source, chunk=50)
    assert len(data.unseen) == 5
    parts = list(data.parts(Place()))
    assert len(parts[0].data) == 50
    assert [len(part.samples) for part in parts] == [45, 40]
    trained = [example for part in parts for example in part.data[part.samples]]
    assert not {id(x) for x in trained} & {id(x) for x in data.unseen}


def test_accuracy_counts_exact_instructions_and_decisions(triplets):
    """A model that says "nothing" whatever it sees is right exactly where nothing is wrong."""
    detector, examples = stock(), stock().encode(triplets, 30)
    tokenizer = detector.mllm.processor.tokenizer
    nothing, end = tokenizer(NOTHING, add_special_tokens=False).input_ids[0], tokenizer.eos_token_id

    def scores(part: list[Example], rows) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = rows.labels[rows.labels != IGNORE]
        previous = rows.ids[:, :-1][rows.labels[:, 1:] != IGNORE]
        guess = torch.where(previous == nothing, end, nothing)
        return torch.nn.functional.one_hot(guess, len(tokenizer)).float(), tokens

    detector.scores = scores
    found = detector.accuracy(examples, seed=0, batch_size=7)
    share = sum(t.instruction == NOTHING for t in triplets) / len(triplets)
    assert 0.2 < share < 0.6
    assert found["exact"] == found["decided"] == pytest.approx(share) == pytest.approx(1 - found["always_edit"])


# LoRA


@pytest.mark.parametrize("kind", ["hf", "original", "qwen"])
def test_lora_trains_adapters_only_and_merges_into_an_ordinary_model(kind, folders, tmp_path):
    torch.manual_seed(0)
    detector, some = Detector(MLLM.from_pretrained(folders[kind]), lora_rank=4), pictures()
    assert detector.trained and all("lora_" in name and "language_model" in name for name in detector.trained)
    frozen = {n: p.clone() for n, p in detector.model.named_parameters() if n not in detector.trained}

    def states() -> torch.Tensor:
        images, prompts = [t.image for t in some], [t.prompt for t in some]
        return detector.mllm.guidance(images, prompts, range(len(images)))[0]

    untrained, examples = states(), detector.encode(some, 3)
    settings = dataclasses.replace(SETTINGS, steps=5, batch_size=3, micro_batch=2, lr=1e-2, warmup=1)
    batches = Batches(lambda _: iter([part_of(examples)]), 3, 0)
    train_detector(DetectorState(detector, settings), batches, examples, settings, tmp_path)
    losses = [row["loss"] for row in numbers(tmp_path)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in detector.model.named_parameters() if n in frozen)

    detector.model.eval()
    with_adapters = states()
    assert (with_adapters - untrained).abs().max() > 0.01
    detector.merge()
    assert not any("lora_" in n or "base_layer" in n for n, _ in detector.model.named_parameters())
    assert (states() - with_adapters).abs().max() < 1e-4
    detector.save(tmp_path / "mllm")
    opened = MLLM.from_pretrained(tmp_path / "mllm", torch.bfloat16)
    assert opened.family is (FAMILIES["qwen2_5_vl"] if kind == "qwen" else FAMILIES["llava"])
    same = opened.model.state_dict()
    assert all(torch.equal(value, same[key]) for key, value in detector.model.state_dict().items())


def test_merged_weights_are_the_stock_weights_plus_the_product_of_the_adapters(folders):
    torch.manual_seed(0)
    detector = Detector(MLLM.from_pretrained(folders["hf"]), lora_rank=4)
    with torch.no_grad():
        for p in detector.trained.values():
            p.normal_(std=0.1)
    name = "model.language_model.layers.1.mlp.up_proj"
    layer = detector.model.get_submodule(name)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight + 2 * up @ down  # lora_alpha / rank = 2
    detector.merge()
    assert (detector.model.get_submodule(name).weight - expected).abs().max() < 1e-6


def part_of(examples: list[Example]) -> Part:
    return Part(Examples(examples, torch.zeros(len(examples), dtype=torch.bool)), torch.arange(len(examples)))


# The command


def call(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["train.py", "--stage", "mllm", *map(str, arguments)])
    return script.main()


def test_the_command_prints_plan_and_accuracy_and_saves_a_folder_that_opens(source, tmp_path, monkeypatch, capsys):
    run = ["--triplets", source, "--output-dir", tmp_path / "run", "--batch-size", 16, "--save-every", 2]
    assert call(monkeypatch, *run, "--steps", 3) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("plan: a detector from ") and "3 steps of 16" in said[0]
    assert any("all but the vision encoder" in line for line in said)
    [before], [after] = ([line for line in said if line.startswith(w)] for w in ("before: ", "after: "))
    assert "worded exactly 0.0%" in before and "decided rightly" in after
    files = {p.name for p in (tmp_path / "run").iterdir() if p.name != ".lock"}
    assert files == {"config.json", "metrics.jsonl", "curves.png", "checkpoint.pt", "mllm"}
    opened = MLLM.from_pretrained(tmp_path / "run" / "mllm")
    assert opened.guidance([Image.new("RGB", (64, 64))], ["a red circle"], [0])[0].shape[-1] == 160
    assert isinstance(opened.explain([Image.new("RGB", (64, 64))], ["a red circle"], [0])[0], str)
    with pytest.raises(UserError, match="--resume"):
        call(monkeypatch, *run, "--steps", 3)
    with pytest.raises(UserError, match="cannot resume with lr"):
        call(monkeypatch, *run, "--steps", 3, "--resume", "--lr", 0.5)
    with pytest.raises(UserError, match="cannot resume with stage"):
        monkeypatch.setattr("sys.argv", ["train.py", "--output-dir", str(tmp_path / "run"), "--resume"])
        script.main()


def test_triplets_that_are_none_and_an_mllm_that_is_none_are_one_clear_line(tmp_path, monkeypatch):
    run = ["--output-dir", tmp_path / "run"]
    with pytest.raises(UserError, match="no such file or folder; expected the columns original_image"):
        call(monkeypatch, *run, "--triplets", tmp_path / "no.parquet")
    empty = {"original_image": [b"no"], "edit_prompt": ["x"], "edited_prompt": ["y"]}
    pq.write_table(pa.table(empty), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="holds no triplet"):
        call(monkeypatch, *run, "--triplets", tmp_path / "empty.parquet")
    with pytest.raises(UserError, match=str(tmp_path / "nothing")):
        call(monkeypatch, *run, "--mllm", tmp_path / "nothing")


def test_the_plan_of_lora_counts_what_learns(folders, tmp_path):
    settings = dataclasses.replace(find_preset("sdxl").finetuning, lora_rank=4)
    preset = dataclasses.replace(find_preset("sdxl"), stock_mllm=str(folders["hf"]), finetuning=settings)
    plan = mllm_plan(preset, tmp_path)
    detector = Detector(MLLM.from_pretrained(folders["hf"]), lora_rank=4)
    learned = sum(p.numel() for p in detector.trained.values())
    assert f"{learned / 1e3:.3g} K parameters" in plan and "LoRA of rank 4" in plan
    assert "2048 triplets at a time" in plan
