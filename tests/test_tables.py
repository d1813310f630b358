"""Tables as people have them: layouts, splits and file formats; what a path says is a name."""

import io
import json
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_files import jpeg, number, pairs_of, rows, write

from img_minimal.data.pairs import pair_stream, triplet_stream
from img_minimal.data.tables import Table, open_table
from img_minimal.presets import PRESETS
from img_minimal.cli import UserError

TWO = ["prompt 0", "prompt 1"]


def prompts(source) -> list[str]:
    return sorted(p.prompt for p in pairs_of(pair_stream(source)))


@pytest.mark.parametrize(
    "other", ["validation_unique-0.parquet", "data/test-00000-of-00001.parquet", "default/validation/0000.parquet",
              "dev.parquet", "eval/part-0.parquet", "split=test/x.parquet", "Testing.parquet", "my-val/train.parquet"],
)  # fmt: skip
@pytest.mark.parametrize("own", ["train-00000.parquet", "data/part-0.parquet", "default/training/0000.parquet"])
def test_only_training_rows_are_read_whatever_names_the_layout_gives_its_splits(tmp_path, own, other):
    for name, table in ((own, rows(2)), (other, rows(3, 50))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(table), tmp_path / name)
    assert prompts(tmp_path) == TWO


def test_a_folder_of_evaluation_rows_alone_holds_no_training_table(tmp_path):
    with pytest.raises(UserError, match="no training table"):
        pair_stream(write(tmp_path, rows(2), name="test"))
    assert prompts(tmp_path / "test-00000.parquet") == TWO  # who names the file means it


@pytest.mark.parametrize("name", ["a[1]b", "what*", "who?", "x::y", "{a,b}", "100%", "~tilde", "file://z", " space "])
def test_a_folder_s_name_is_a_name_whatever_characters_it_holds(tmp_path, name):
    assert prompts(write(tmp_path / name, rows(2))) == TWO


def test_a_table_that_datasets_saved_to_disk_is_read_with_its_images_in_structs(tmp_path):
    table = [row | {"jpg_0": {"bytes": row["jpg_0"], "path": None}} for row in rows(5)]
    datasets.Dataset.from_list(table).save_to_disk(tmp_path / "saved", num_shards=2)
    assert prompts(tmp_path / "saved") == [f"prompt {k}" for k in range(5)]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("labels", [pa.float16(), pa.int8(), pa.bool_(), pa.float64()])
def test_every_type_that_a_column_can_be_written_in_is_read(tmp_path, kind, labels):
    table = pa.Table.from_pylist(rows(4))
    for name, wanted in (("caption", kind), ("label_0", labels), ("jpg_1", pa.large_binary())):
        column = table[name].cast(pa.float32()).cast(wanted) if name == "label_0" else table[name].cast(wanted)
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, tmp_path / "train.parquet")
    assert prompts(tmp_path) == [f"prompt {k}" for k in range(4)]


@pytest.mark.parametrize("extension", [("", "", ""), (".jpg", ".txt", ".txt"), (".png", ".cls", ".text")])
def test_webdataset_tars_of_pick_a_pic_are_read(tmp_path, extension):
    picture, label, text = extension
    with tarfile.open(tmp_path / "00000.tar", "w") as file:
        for k, row in enumerate(rows(3)):
            for name, value in row.items():
                end = picture if name.startswith("jpg") else text if name == "caption" else label
                content = value if isinstance(value, bytes) else str(value).encode()
                info = tarfile.TarInfo(f"{k:06d}.{name}{end}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    assert prompts(tmp_path) == [f"prompt {k}" for k in range(3)]


def test_pairs_of_open_image_preferences_hpdv2_and_hpdv3_are_read_winner_first(tmp_path):
    image = lambda k: {"bytes": jpeg(k), "path": f"{k}.jpg"}  # noqa: E731
    (tmp_path / "open").mkdir()
    table = [{"prompt": "a cat", "chosen": image(1), "rejected": image(2), "source": "x"}]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "open" / "train-00000-of-00001.parquet")
    for folder, row in (
        ("three", {"prompt": "a cat", "path1": "1.jpg", "path2": "sub/2.jpg", "model1": "m"}),
        ("two", {"prompt": "a cat", "image_path": ["sub/2.jpg", "1.jpg"], "human_preference": [0, 1]}),
    ):
        (tmp_path / folder / "images" / "sub").mkdir(parents=True)
        (tmp_path / folder / "images" / "1.jpg").write_bytes(jpeg(1))
        (tmp_path / folder / "images" / "sub" / "2.jpg").write_bytes(jpeg(2))
        more = [row | {"prompt": ""}, row | {list(row)[1]: "nowhere.jpg"}]
        (tmp_path / folder / "train.json").write_text(json.dumps([row, *more]))
        (tmp_path / folder / "test.json").write_text(json.dumps([row | {"prompt": "not to be trained on"}]))
    for folder in ("open", "two", "three"):
        [pair] = pairs_of(pair_stream(tmp_path / folder))
        assert (pair.prompt, number(pair.winner), number(pair.loser)) == ("a cat", 1, 2)


def test_rows_are_given_from_any_one_on_in_every_format(tmp_path):
    table = rows(9)
    plain = [{"prompt": r["caption"], "path1": "a", "path2": "b"} for r in table]
    write(tmp_path / "parquet", table)
    datasets.Dataset.from_list(table).save_to_disk(tmp_path / "arrow")
    (tmp_path / "a.json").write_text(json.dumps(plain))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in plain))
    for name in ("parquet", "arrow", "a.json", "b.jsonl"):
        opened = open_table(str(tmp_path / name), [("caption",), ("prompt", "path1", "path2")])
        assert isinstance(opened, Table) and len(opened.files) == 1
        whole = [next(iter(row.values())) for row in opened.read(0, 0)]
        assert whole == [f"prompt {k}" for k in range(9)]
        assert [[next(iter(row.values())) for row in opened.read(0, k)] for k in (1, 4, 9)] == [
            whole[1:], whole[4:], []
        ]  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"PAR1", b"{", b"[1, 2]", b"[" * 100_000, b"\xff\xfe", b"null"])
@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar", "json", "jsonl"])
def test_a_file_that_is_no_table_is_one_line_that_names_it(tmp_path, content, kind):
    path = tmp_path / f"train.{kind}"
    path.write_bytes(content)
    for opened in (pair_stream, triplet_stream):
        with pytest.raises(UserError) as caught:
            opened(str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_data_set_that_was_removed_from_the_hub_is_named_with_what_to_use_and_no_preset_names_it():
    with pytest.raises(UserError, match="removed from the hub.*--pairs") as caught:
        pair_stream("yuvalkirstain/pickapic_v2")
    assert "\n" not in str(caught.value)
    assert not any("pickapic" in preset.pairs for preset in PRESETS.values())
