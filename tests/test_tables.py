"""Tables as people have them: layouts, splits, column types and names of files."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_files import FORMATS, jpeg, number, pairs_of, rows, write
from refusals import refused

from img_minimal.data.pairs import pair_stream, triplet_stream

TWO = ["prompt 0", "prompt 1"]


def prompts(source: Path) -> list[str]:
    return sorted(pair.prompt for pair in pairs_of(pair_stream(source)))


@pytest.mark.parametrize(
    "evaluation",
    [
        *("validation_unique-0.parquet", "data/test-00000-of-00001.parquet", "dev.parquet"),
        *("default/validation/0000.parquet", "eval/part-0.parquet", "split=test/x.parquet"),
        *("Testing.parquet", "my-val/train.parquet"),
    ],
)
@pytest.mark.parametrize(
    "training", ["train-00000.parquet", "data/part-0.parquet", "default/training/0000.parquet"]
)
def test_only_training_rows_are_read_whatever_the_splits_are_called(tmp_path, training, evaluation):
    for name, table in ((training, rows(2)), (evaluation, rows(3, 50))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(table), tmp_path / name)
    assert prompts(tmp_path) == TWO


def test_a_test_split_is_read_only_if_its_file_is_named(tmp_path):
    write(tmp_path, rows(2), name="test")
    with refused("no training table"):
        pair_stream(tmp_path)
    assert prompts(tmp_path / "test-00000.parquet") == TWO


@pytest.mark.parametrize(
    "name", ["a[1]b", "what*", "who?", "x::y", "{a,b}", "100%", "~tilde", "file://z", " space "]
)
def test_a_path_is_taken_literally_whatever_characters_it_holds(tmp_path, name):
    assert prompts(write(tmp_path / name, rows(2))) == TWO


@pytest.mark.parametrize(
    "text", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
@pytest.mark.parametrize("label", [pa.float16(), pa.int8(), pa.bool_(), pa.float64()])
def test_a_column_of_any_type_is_read(tmp_path, text, label):
    schema = {"caption": text, "label_0": label, "label_1": label, "jpg_0": pa.large_binary()}
    table = pa.Table.from_pylist(rows(4))
    for name in ("jpg_1", "ranking_id"):
        schema[name] = table.schema.field(name).type
    table = table.select(list(schema)).cast(pa.schema(schema))
    pq.write_table(table, tmp_path / "train.parquet")
    assert prompts(tmp_path) == [f"prompt {k}" for k in range(4)]


IMAGE = {1: {"bytes": jpeg(1), "path": "1.jpg"}, 2: {"bytes": jpeg(2), "path": "2.jpg"}}


@pytest.mark.parametrize(
    "row",
    [
        {"caption": "a cat", "jpg_0": IMAGE[2], "jpg_1": IMAGE[1], "label_0": 0, "label_1": 1},
        {"prompt": "a cat", "chosen": IMAGE[1], "rejected": IMAGE[2], "source": "x"},
        {"prompt": "a cat", "path1": "1.jpg", "path2": "sub/2.jpg", "model1": "m"},
        {"prompt": "a cat", "image_path": ["sub/2.jpg", "1.jpg"], "human_preference": [0, 1]},
    ],
    ids=["Pick-a-Pic", "Open Image Preferences", "HPDv3", "HPDv2"],
)
def test_pairs_of_every_data_set_are_read_winner_first(tmp_path, row):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "images" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "images" / "sub" / "2.jpg").write_bytes(jpeg(2))
    [pair] = pairs_of(pair_stream(write(tmp_path, [row])))
    assert (pair.prompt, number(pair.winner), number(pair.loser)) == ("a cat", 1, 2)


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"{", b"[1, 2]", b"[" * 100_000, b"\xff\xfe", b"null", b"hello"]
)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("read", [pair_stream, triplet_stream])
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path, content, kind, read):
    path = tmp_path / f"train.{kind}"
    path.write_bytes(content)
    with refused(str(path)):
        read(str(path))


@pytest.mark.parametrize(
    "source, words",
    [
        ("none.parquet", ["no such file or folder"]),
        ("empty", ["holds no training table"]),
        ("other.parquet", ["has no column 'jpg_1'"]),
        ("mixed", ["has no column 'label_1'", "which train-0.parquet has"]),
        ("notes.txt", ["is no table", ".parquet"]),
        ("somebody/pairs", ["hub cannot be reached", "name a local parquet file"]),
        ("yuvalkirstain/pickapic_v2", ["removed from the hub", "--pairs"]),
    ],
)
def test_a_source_without_such_a_table_is_refused_with_what_to_do(tmp_path, source, words):
    for name in ("empty", "mixed"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for k, columns in enumerate((5, 4)):
        table = pa.Table.from_pylist(rows(1))
        pq.write_table(table.select(range(columns)), tmp_path / "mixed" / f"train-{k}.parquet")
    pq.write_table(table.select(range(2)), tmp_path / "other.parquet")
    with refused(source, *words):
        pair_stream(source if "/" in source else tmp_path / source)
