"""Pairs from tables of any size: what is skipped, what is given once, where a stopped run goes on, what is cached."""

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pair_files import read_pairs
from PIL import Image

import train as script
from img_minimal.data import sources as data_module
from img_minimal.data.feature_cache import FeatureCache
from img_minimal.data.pairs import Pair, pair_stream
from img_minimal.data.sources import CachedData, StreamedData, making, training_data
from img_minimal.data.stream import Place, ahead, in_threads
from img_minimal.data.triplets import triplet_stream
from img_minimal.errors import UserError
from img_minimal.features import Features, compute_guidance, compute_tokens, distinct, self_targets
from img_minimal.mllm import MLLM
from img_minimal.models.plan import aligner_plan
from img_minimal.presets import find_preset
from img_minimal.training import Batches, Trainer

TWIN = find_preset("tiny-sdxl")
PRESET = dataclasses.replace(TWIN, train_steps=6, batch_size=4, depth=1, heads=1, keep_share=0.25)


def jpeg(value: int) -> bytes:
    """A one-coloured picture whose first pixel tells which one it is."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def number(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


def rows(count: int, first: int = 0) -> list[dict]:
    """Pair k shows pictures 2k (winner) and 2k + 1 modulo 256, winners on either side."""
    made = []
    for k in range(first, first + count):
        sides = [(jpeg(2 * k % 256), 1.0), (jpeg((2 * k + 1) % 256), 0.0)][:: 1 if k % 2 else -1]
        (a, x), (b, y) = sides
        made.append({"caption": f"prompt {k}", "jpg_0": a, "jpg_1": b, "label_0": x, "label_1": y, "ranking_id": k})
    return made


def write(folder: Path, *tables: list[dict], name: str = "train") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, table in enumerate(tables):
        pq.write_table(pa.Table.from_pylist(table), folder / f"{name}-{k:05d}.parquet", row_group_size=4)
    return folder


def pairs_of(stream, place: Place | None = None) -> list[Pair]:
    return [pair for chunk in stream.chunks(*[place] * (place is not None)) for pair in chunk.items]


# What a stream gives


def test_ties_are_dropped_winners_come_first_and_every_pair_comes_once(tmp_path):
    tables = [rows(10), rows(10, 10), rows(10, 20)]
    for k in (2, 5):
        tables[0][k] |= {"label_0": 0.5, "label_1": 0.5}
    stream = pair_stream(write(tmp_path / "pairs", *tables), size=4, seed=3)
    found = pairs_of(stream)
    assert sorted(p.prompt for p in found) == sorted(f"prompt {k}" for k in range(30) if k not in (2, 5))
    for pair in found:
        k = int(pair.prompt.split()[1])
        assert (number(pair.winner), number(pair.loser)) == (2 * k, 2 * k + 1)
    assert stream.skipped == {"ties": 2} and stream.skips() == "rows skipped: 2 ties"


def test_damaged_images_cost_their_row_and_are_counted_and_said(tmp_path, capsys):
    table = rows(12)
    table[1]["jpg_0"] = table[1]["jpg_0"][:40]  # cut short
    table[4]["jpg_1"] = b"<html>503</html>"
    table[7]["jpg_0"] = None
    table[9]["caption"] = ""
    found, skipped = read_pairs(write(tmp_path, table))
    assert [p.prompt for p in found] == [f"prompt {k}" for k in range(12) if k not in (1, 4, 7, 9)]
    assert skipped == 4
    said = capsys.readouterr().err
    assert "skipped 3 rows with damaged images" in said and "Traceback" not in said


def test_files_come_in_an_order_of_the_seed_and_rows_as_they_stand(tmp_path):
    folder = write(tmp_path, *(rows(3, 3 * k) for k in range(6)))
    orders = [[int(p.prompt.split()[1]) for p in pairs_of(pair_stream(folder, seed=seed))] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert all(order[k : k + 3] == list(range(order[k], order[k] + 3)) for order in orders for k in range(0, 18, 3))


@pytest.mark.parametrize("limit", [0, 11])
def test_a_stream_goes_on_at_any_chunk_as_if_it_had_never_stopped(tmp_path, limit):
    tables = [rows(7), rows(7, 7), rows(7, 14)]
    tables[1][3] |= {"label_0": 0.5, "label_1": 0.5}
    stream = pair_stream(write(tmp_path, *tables), size=4, limit=limit, seed=1)
    whole = list(stream.chunks())
    assert [len(c.items) for c in whole] == ([4, 4, 3] if limit else [4, 4, 4, 4, 4])
    for k, chunk in enumerate(whole):
        again = list(stream.chunks(chunk.place))
        assert [[p.prompt for p in c.items] for c in again] == [[p.prompt for p in c.items] for c in whole[k:]]
        assert [c.place for c in again] == [c.place for c in whole[k:]]
    assert list(stream.chunks(whole[-1].after)) == []


def test_images_of_the_same_bytes_are_one_object_so_that_they_are_encoded_once(tmp_path):
    table = rows(4)
    for row in table:
        row["jpg_0" if row["label_0"] == 0 else "jpg_1"] = jpeg(200)
    found, _ = read_pairs(write(tmp_path, table))
    objects, places = distinct([p.winner for p in found] + [p.loser for p in found])
    assert len(objects) == 5 and len(set(places[4:])) == 1
    assert [number(objects[k]) for k in places] == [0, 2, 4, 6, 200, 200, 200, 200]


def test_other_splits_beside_the_training_files_are_left_alone(tmp_path):
    write(tmp_path, rows(3, 50), name="validation_unique")
    assert [p.prompt for p in pairs_of(pair_stream(write(tmp_path, rows(2))))] == ["prompt 0", "prompt 1"]


def test_triplets_are_read_with_their_images_in_the_hubs_struct_and_the_damaged_skipped(tmp_path):
    table = [{"original_image": {"bytes": jpeg(k), "path": None}, "edit_prompt": f" remove {k} ", "edited_prompt": "x"}
             for k in range(4)]  # fmt: skip
    table[1]["original_image"]["bytes"] = b"no image"
    table[2]["edit_prompt"] = None
    stream = triplet_stream(write(tmp_path, table))
    found = [t for chunk in stream.chunks() for t in chunk.items]
    assert [(number(t.image), t.prompt, t.instruction) for t in found] == [(0, "x", "remove 0"), (3, "x", "remove 3")]
    assert stream.skips() == "rows skipped: 1 with damaged images, 1 without words"


def test_a_source_that_is_no_such_table_is_one_clear_line(tmp_path):
    (tmp_path / "text.parquet").write_text("hello")
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"caption": ["a"], "jpg_0": [b""]}), tmp_path / "other.parquet")
    cases = {
        tmp_path / "none.parquet": "no such file or folder",
        tmp_path / "text.parquet": "cannot be read as a table",
        tmp_path / "empty": "no parquet in it",
        tmp_path / "other.parquet": "has no column 'jpg_1'",
        "somebody/pairs": "hub cannot be reached; name a local",
    }
    for source, words in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            pair_stream(source)
        assert "\n" not in str(caught.value) and str(source) in str(caught.value)


def test_a_file_cut_short_stops_the_stream_with_its_number_and_how_to_go_on(tmp_path):
    folder = write(tmp_path, rows(40))
    [file] = folder.glob("*.parquet")
    whole = bytearray(file.read_bytes())
    whole[300:2000] = bytes(1700)  # the footer stays whole: only reading shows it
    file.write_bytes(whole)
    with pytest.raises(UserError, match="file 0 of 1.*--resume") as caught:
        pairs_of(pair_stream(folder))
    assert "\n" not in str(caught.value)


def test_threads_keep_the_order_stay_lazy_and_pass_errors_on():
    asked = []

    def values() -> Iterator[int]:
        for k in range(10_000):
            asked.append(k)
            yield k

    doubled = in_threads(lambda k: 2 * k, values())
    assert [next(doubled) for _ in range(5)] == [0, 2, 4, 6, 8]
    assert len(asked) < 200
    doubled.close()

    def failing() -> Iterator[int]:
        yield 1
        raise UserError("lost")

    prepared = ahead(failing())
    assert next(prepared) == 1
    with pytest.raises(UserError, match="lost"):
        next(prepared)


# What is trained on


class FakeEncoder:
    """Features that tell which image, which prompt and which chunk they are of."""

    widths = (6, 5)

    def __init__(self):
        self.seen: list[str] = []

    def __call__(self, pairs: list[Pair], chunk: int = 0) -> Features:
        self.seen += [p.prompt for p in pairs]

        def tokens(images: list[Image.Image]) -> torch.Tensor:
            return torch.stack([torch.full((3, 6), number(i) / 255) for i in images])

        length = 4 + chunk % 2  # chunks pad to their own longest
        guidance = torch.stack([torch.full((length, 5), float(p.prompt.split()[1]) / 100) for p in pairs])
        return Features(
            guidance.bfloat16(), torch.ones(len(pairs), length, dtype=torch.bool), tokens([p.loser for p in pairs]),
            tokens([p.winner for p in pairs]), torch.tensor([p.validation for p in pairs]),
            torch.zeros(len(pairs), dtype=torch.bool),
        )  # fmt: skip


def cached(folder: Path, source: Path, size: int = 0, limit: float = 1e9, encoder=None, **made) -> CachedData:
    kept = FeatureCache(folder, "features", {"the MLLM": "a", "seed": "0"} | made, limit)
    return CachedData(pair_stream(source, size), lambda: encoder or FakeEncoder(), kept)


def trained(data: CachedData | StreamedData, folder: Path, steps: int = 6, resume: bool = False) -> Trainer:
    folder.mkdir(exist_ok=True)
    trainer, batches = Trainer.new(PRESET, data.widths, 2, 0), Batches(data.parts, PRESET.batch_size, 0)
    if resume:
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        trainer.load_state_dict(saved)
        batches.resume(saved["data"], trainer.step)
    script.train(trainer, batches, data.unseen, PRESET, folder, steps=steps)
    return trainer


def numbers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_from_a_stream_gives_the_numbers_of_training_from_a_cache_on_the_same_pairs(tmp_path):
    source = write(tmp_path / "pairs", rows(20), rows(20, 20))
    trained(cached(tmp_path / "cache", source), tmp_path / "a", steps=20)
    trained(StreamedData(pair_stream(source), FakeEncoder()), tmp_path / "b", steps=20)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert len(numbers(tmp_path / "a")) == 20  # more than two epochs


def test_a_streamed_run_that_stopped_goes_on_to_the_same_weights_bit_for_bit(tmp_path):
    source = write(tmp_path / "pairs", *(rows(15, 15 * k) for k in range(3)))

    def stream() -> StreamedData:
        return StreamedData(pair_stream(source, size=12, seed=2), FakeEncoder())

    whole = trained(stream(), tmp_path / "a", steps=15)
    for stop in (1, 4, 8, 15):  # within the first chunk, at later ones, in the second epoch
        trained(stream(), tmp_path / f"b{stop}", steps=stop)
        again = trained(stream(), tmp_path / f"b{stop}", steps=15, resume=True)
        assert all(torch.equal(p, q) for p, q in zip(whole.aligner.parameters(), again.aligner.parameters()))
        assert numbers(tmp_path / "a")[stop:] == [r for r in numbers(tmp_path / f"b{stop}") if r["step"] > stop]


def test_only_the_first_chunk_of_a_stream_spends_the_mllm_on_validation_prompts(tmp_path):
    source, encoder = write(tmp_path, rows(60)), FakeEncoder()
    data = StreamedData(pair_stream(source, size=30), encoder)
    seen = list(data.parts(Place()))
    held = {p.prompt for p in read_pairs(source)[0] if p.validation}
    first = {f"prompt {k}" for k in range(30)}
    assert held - first and held & first, "or this test shows nothing"
    assert set(encoder.seen) == first | {f"prompt {k}" for k in range(30, 60)} - held
    assert len(encoder.seen) == len(set(encoder.seen)), "the first chunk was encoded once"
    assert len(data.unseen) == len(held & first) and sum(len(p.samples) for p in seen) == 60 - len(held)


def test_a_source_without_a_single_preference_is_one_clear_line(tmp_path):
    table = [row | {"label_0": 0.5, "label_1": 0.5} for row in rows(5)]
    source = write(tmp_path / "pairs", table)
    with pytest.raises(UserError, match="no pair with a preference"):
        StreamedData(pair_stream(source), FakeEncoder())
    with pytest.raises(UserError, match="no features"):
        cached(tmp_path / "cache", source)


# What is cached


def test_a_cache_is_filled_once_and_its_shards_are_one_sequence(tmp_path):
    source, encoder = write(tmp_path / "pairs", rows(22)), FakeEncoder()
    one = cached(tmp_path / "one", source).data
    several = cached(tmp_path / "several", source, size=5, encoder=encoder).data
    assert len(list((tmp_path / "several" / "features").glob("*.safetensors"))) == 5
    index = torch.tensor([21, 0, 7, 7, 4, 5])
    a, b = one[index], several[index]
    assert torch.equal(a.loser, b.loser) and torch.equal(a.winner, b.winner)
    assert b.guidance.shape[1] == 5 and torch.equal(a.guidance, b.guidance[:, :4])
    assert b.mask.sum(1).tolist() == [4, 4, 5, 5, 4, 5], "shorter shards are padded, and masked"
    count = len(encoder.seen)
    cached(tmp_path / "several", source, size=5, encoder=encoder)
    assert len(encoder.seen) == count == 22


def test_a_complete_cache_needs_no_model(tmp_path):
    source = write(tmp_path / "pairs", rows(8))
    cached(tmp_path / "cache", source)
    kept = FeatureCache(tmp_path / "cache", "features", {"the MLLM": "a", "seed": "0"}, 1e9)

    def load() -> None:
        raise AssertionError("loaded a model")

    assert len(CachedData(pair_stream(source), load, kept).data) == 8


def test_a_cache_whose_making_was_stopped_goes_on_with_the_next_chunk(tmp_path):
    source = write(tmp_path / "pairs", rows(20))

    class Stopped(FakeEncoder):
        def __call__(self, pairs: list[Pair], chunk: int = 0) -> Features:
            if chunk == 2:
                raise KeyboardInterrupt
            return super().__call__(pairs, chunk)

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "cache", source, size=5, encoder=Stopped())
    encoder = FakeEncoder()
    data = cached(tmp_path / "cache", source, size=5, encoder=encoder).data
    assert encoder.seen == [f"prompt {k}" for k in range(10, 20)] and len(data) == 20
    assert torch.equal(
        data[torch.arange(20)].loser, cached(tmp_path / "whole", source, size=5).data[torch.arange(20)].loser
    )


def test_a_cache_is_bounded_together_with_all_others_of_its_folder(tmp_path):
    source = write(tmp_path / "pairs", rows(40))
    whole = cached(tmp_path / "whole", source, size=5)
    shard = next((tmp_path / "whole").rglob("*.safetensors")).stat().st_size
    assert len(whole.data) == 40
    encoder, limit = FakeEncoder(), 3 * shard + 4096
    data = cached(tmp_path / "cache", source, size=5, limit=limit, encoder=encoder).data
    used = sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*.safetensors"))
    assert len(data) == 15 and used <= limit
    cached(tmp_path / "cache", source, size=5, limit=limit, encoder=(again := FakeEncoder()))
    assert again.seen == [], "a full cache is not tried again"
    other = FeatureCache(tmp_path / "cache", "other", {}, limit)
    with pytest.raises(UserError, match=r"raise --cache-gb, lower --max-pairs.*--cache-dir none") as caught:
        CachedData(pair_stream(source, 5), FakeEncoder, other)
    assert "\n" not in str(caught.value)
    assert len(cached(tmp_path / "cache", source, size=5, limit=1e9).data) == 40, "with more room it is completed"


@pytest.mark.parametrize("shards", ["damaged", "foreign"])
def test_a_damaged_shard_is_named(tmp_path, shards):
    source = write(tmp_path / "pairs", rows(6))
    cached(tmp_path / "cache", source)
    [file] = (tmp_path / "cache").rglob("*.safetensors")
    if shards == "damaged":
        file.write_bytes(file.read_bytes()[:200])
    else:
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="00000.safetensors: damaged.*delete it"):
        cached(tmp_path / "cache", source)


def test_a_full_disk_is_one_clear_line_and_keeps_what_was_cached(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from img_minimal.models import weights

    source, save, written = write(tmp_path / "pairs", rows(20)), weights.save_file, []

    def full(*arguments, **more) -> None:
        if len(written) == 2:
            raise SafetensorError("Error while serializing: No space left on device")
        written.append(save(*arguments, **more))

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(UserError, match="00002.safetensors: cannot be written.*No space left.*full") as caught:
        cached(tmp_path / "cache", source, size=5)
    assert "\n" not in str(caught.value)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2


def test_a_stale_cache_is_refused_and_the_reason_is_what_differs(tmp_path):
    source = write(tmp_path / "pairs", rows(6))
    cached(tmp_path / "cache", source)
    with pytest.raises(UserError, match="made with the MLLM a, this run has b; delete.*another --cache-dir") as caught:
        cached(tmp_path / "cache", source, **{"the MLLM": "b"})
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="made with image size None, this run has 64"):
        cached(tmp_path / "cache", source, **{"image size": "64"})
    (tmp_path / "cache" / "features" / "cache.json").write_text("{")
    with pytest.raises(UserError, match="cache.json: unreadable"):
        cached(tmp_path / "cache", source)


def test_everything_that_features_depend_on_makes_a_cache_stale(tmp_path, monkeypatch):
    source = write(tmp_path / "pairs", rows(3))
    preset = dataclasses.replace(TWIN, pairs=str(source))
    before = making(preset, "mllm", 0)

    def changed(preset=preset, guidance="mllm", seed=0) -> set[str]:
        now = making(preset, guidance, seed)
        return {key for key in now if before.get(key) != now[key]}

    assert changed() == set()
    assert changed(seed=1) == {"seed"}
    assert changed(guidance="stock") == {"the MLLM"}
    assert changed(dataclasses.replace(preset, dtype="bf16")) == {"dtype"}
    assert changed(dataclasses.replace(preset, keep_share=0.5)) == {"a share of winners kept"}
    write(source, rows(4))
    assert changed() == {"the pairs"}
    write(source, rows(3))
    monkeypatch.setattr(data_module, "QUESTIONS", ("What is wrong? {}",))
    assert changed() == {"the question bank"}
    monkeypatch.undo()
    settings = json.loads((Path(TWIN.image_encoder) / "config.json").read_text())
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(settings | {"image_size": 128}))
    assert "image size" in changed(dataclasses.replace(preset, image_encoder=str(tmp_path / "encoder")))


# The command


def small_twin_pairs(folder: Path, count: int = 60) -> Path:
    path = folder / "some.parquet"
    pq.write_table(pq.read_table(TWIN.pairs).slice(0, count), path)
    return path


def call(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
    return script.main()


@pytest.mark.parametrize("cache", ["none", "cache"])
def test_training_prints_its_plan_first_and_loads_neither_unet_nor_vae(tmp_path, monkeypatch, capsys, cache):
    import diffusers

    def refuse(*_, **__):
        raise AssertionError("a diffusion model was loaded for training")

    for name in ("StableDiffusionXLPipeline", "UNet2DConditionModel", "AutoencoderKL"):
        monkeypatch.setattr(getattr(diffusers, name), "from_pretrained", refuse)
    load, said = MLLM.from_pretrained, []

    def watched(*args, **more) -> MLLM:
        said.append(capsys.readouterr().out)
        return load(*args, **more)

    monkeypatch.setattr(MLLM, "from_pretrained", watched)
    kept = cache if cache == "none" else tmp_path / cache
    run = ["--pairs", small_twin_pairs(tmp_path), "--steps", 3, "--eval-prompts", 0, "--cache-dir", kept]
    assert call(monkeypatch, *run, "--output-dir", tmp_path / "run") == 0
    [plan] = said
    for words in ("plan: an aligner for tiny-sdxl, 3 steps of 64", "MLLM", "1.92 M parameters", "no UNet and no VAE",
                  "a sample: 41.1 KB guidance", "checkpoint.pt 13.5 MB"):  # fmt: skip
        assert words in plan
    assert ("streamed" in plan) == (cache == "none")
    assert (tmp_path / "run" / "aligner.safetensors").exists()
    if cache != "none":
        assert call(monkeypatch, *run, "--output-dir", tmp_path / "second") == 0
        assert len(said) == 1, "a complete cache needs no MLLM"
        assert numbers(tmp_path / "run") == numbers(tmp_path / "second")


def test_sdxl_trains_from_a_stream_with_nothing_but_flags_that_point_at_the_released_files(
    release, tmp_path, monkeypatch, capsys
):
    from mllm_folders import write_original_llava
    from release_folder import locations

    from img_minimal.aligner import ImplicitAligner

    write_original_llava(tmp_path / "llava")
    tables = [rows(12), rows(12, 12)]
    tables[0][3]["jpg_0"] = b"<html>"
    tables[1][5] |= {"label_0": 0.5, "label_1": 0.5}
    where = {name: locations(release)[name] for name in ("image_encoder", "ip_adapter", "resampler")}
    where |= {"mllm": tmp_path / "llava", "pairs": write(tmp_path / "pairs", *tables), "output-dir": tmp_path / "run"}
    flags = [f"--{name.replace('_', '-')}={path}" for name, path in where.items()]
    assert call(monkeypatch, "--model=sdxl", "--steps=4", "--batch-size=4", "--save-every=2", *flags) == 0
    said = capsys.readouterr()
    assert "streamed" in said.out and "no UNet and no VAE" in said.out
    assert "1 ties" in said.out and "1 with damaged images" in said.out and "skipped 1 rows" in said.err
    made = ImplicitAligner.from_file(tmp_path / "run" / "aligner.safetensors")
    assert (made.width, made.guidance_width, len(made.layers)) == (64, 48, 4)
    assert [row["step"] for row in numbers(tmp_path / "run")] == [1, 2, 3, 4]
    assert call(monkeypatch, "--model=sdxl", "--steps=6", "--batch-size=4", "--save-every=2", *flags, "--resume") == 0
    assert len(numbers(tmp_path / "run")) == 6


def test_the_plan_of_the_real_models_says_what_they_take(tmp_path):
    llama = {"model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
             "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32064}  # fmt: skip
    tower = {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
             "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}  # fmt: skip
    vit_h = {"model_type": "clip_vision_model", "hidden_size": 1280, "image_size": 224, "intermediate_size": 5120,
             "num_attention_heads": 16, "num_hidden_layers": 32, "patch_size": 14, "projection_dim": 1024}  # fmt: skip
    mllm = {"model_type": "llava", "text_config": llama, "vision_config": tower, "image_token_index": 32000}
    for name, settings in {"mllm": mllm, "encoder": vit_h}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    preset = dataclasses.replace(
        find_preset("sdxl"), mllm=str(tmp_path / "mllm"), image_encoder=str(tmp_path / "encoder"), dtype="bf16"
    )
    plan = aligner_plan(preset, "mllm", tmp_path, 70.0)
    for words in ("13.4 B parameters   26.7 GB", "632 M parameters", "195 M parameters    3.9 GB", "100,000 steps of 8",
                  "6.55 MB guidance (about 640 x 5120, bf16) + 262 KB tokens", "all pairs of yuvalkirstain/pickapic_v2",
                  "streamed", "none on disk", "checkpoint.pt 3.12 GB, aligner.safetensors 780 MB"):  # fmt: skip
        assert words in plan, plan
    kept = dataclasses.replace(preset, cache_dir=str(tmp_path), max_pairs=10_000)
    assert "at most 70 GB (10,269 pairs)" in aligner_plan(kept, "mllm", tmp_path, 70.0)


def test_a_disk_that_is_too_small_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch):
    import shutil

    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="1 KB are free there, the run writes"):
        aligner_plan(TWIN, "mllm", tmp_path, 70.0)


def test_the_papers_run_is_what_sdxl_means_by_default():
    preset = find_preset("sdxl")
    assert (preset.train_steps, preset.batch_size, preset.lr, preset.weight_decay) == (100_000, 8, 1e-4, 1e-4)
    assert (preset.weight, preset.constant_share, preset.keep_share) == (1.0, 1.0, 0.0)
    assert script.Config().refresh_after == 10
    assert preset.pairs == "yuvalkirstain/pickapic_v2" and preset.max_pairs == 0 and preset.cache_dir == "none"


def test_encoding_each_image_once_gives_the_numbers_of_encoding_every_one(monkeypatch):
    pairs, _ = read_pairs(TWIN.pairs, 24)
    from img_minimal.features import Encoder

    encoder = Encoder.from_preset(TWIN, "mllm", 0)
    features = encoder(pairs)
    assert len(distinct([p.loser for p in pairs])[0]) < len(pairs), "the twin's pairs share images"
    alone = torch.cat([encoder.image_prompt.tokens([p.loser]) for p in pairs])
    assert (features.loser[: len(pairs)] - alone).abs().max() < 1e-5
    kept = self_targets(pairs, 0.25)
    assert 0 < len(kept) <= 6 and len(features) == 24 + len(kept) and features.kept.sum() == len(kept)
    assert torch.equal(features.loser[24:], features.winner[24:])
    assert all(any(p.winner is other.loser for other in pairs) for p in kept), "kept winners lose elsewhere"
    assert encoder.widths == (features.loser.shape[-1], features.guidance.shape[-1])
    other = compute_guidance(pairs, encoder.guide, kept, 1)["guidance"]
    assert other.shape != features.guidance.shape or not torch.equal(other, features.guidance), "other questions"
    assert compute_tokens(pairs, encoder.image_prompt, self_targets(pairs, 0.0))["kept"].sum() == 0


def test_data_is_streamed_or_cached_as_the_preset_says(tmp_path, monkeypatch):
    source = small_twin_pairs(tmp_path, 12)
    preset = dataclasses.replace(PRESET, pairs=str(source), cache_dir="none", max_pairs=0)
    streamed = training_data(preset, "mllm", 0, 1.0)
    kept = training_data(dataclasses.replace(preset, cache_dir=str(tmp_path / "cache")), "mllm", 0, 1.0)
    assert isinstance(streamed, StreamedData) and isinstance(kept, CachedData)
    assert streamed.widths == kept.widths == (128, 160)
    [a], [b] = streamed.parts(Place()), kept.parts(Place())
    index = torch.arange(len(a.data))
    for x, y in zip(a.data[index].state_dict().values(), b.data[index].state_dict().values(), strict=True):
        assert torch.equal(x, y)
