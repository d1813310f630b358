"""Tables as people have them: layouts, splits, column types and names of files."""

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_files import FORMATS, jpeg, number, pairs_of, rows, write, write_tar
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
        *(".ipynb_checkpoints/train.parquet", "._train.parquet", "__MACOSX/sub/train.parquet"),
        *("_temporary/0/train.parquet", "data/.cache/train.parquet", "$RECYCLE.BIN/train.parquet"),
    ],
)
@pytest.mark.parametrize(
    "training", ["train-00000.parquet", "data/part-0.parquet", "default/training/0000.parquet"]
)
def test_only_training_rows_are_read_whatever_the_splits_are_called_and_nothing_that_is_hidden(
    tmp_path, training, evaluation
):
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


def test_a_linked_folder_is_named_in_a_warning_and_not_read(tmp_path, capsys):
    folder = write(tmp_path / "pairs", rows(2))
    for name, target in (("more", write(tmp_path / "elsewhere", rows(3, 50))), ("loop", folder)):
        (folder / name).symlink_to(target, target_is_directory=True)
    assert prompts(folder) == TWO
    warned = capsys.readouterr().err
    for words in (f"{folder}/more: a linked folder", str(tmp_path / "elsewhere"), f"{folder}/loop"):
        assert words in warned


def test_text_in_a_tar_stays_as_it_stands_and_what_a_mac_adds_is_no_row(tmp_path):
    table, captions = rows(7), ["1984", "nan", "007", "1e5", "-inf", "true", " 3.0 "]
    for row, caption in zip(table, captions):
        row["caption"] = caption
    write_tar(tmp_path / "train.tar", table)
    with tarfile.open(tmp_path / "train.tar", "a") as file:
        for name in ("._000003.caption", "__MACOSX/000004.caption", "sub/.DS_Store"):
            file.addfile(tarfile.TarInfo(name))
    stream = pair_stream(tmp_path)
    assert [pair.prompt for pair in pairs_of(stream)] == captions and not stream.skips()


@pytest.mark.parametrize("column", ["caption", "jpg_1", "label_0"])
@pytest.mark.parametrize("kind", ["tar", "parquet", "json"])
def test_a_row_without_a_cell_is_counted_as_that_even_if_it_is_the_first(tmp_path, kind, column):
    table = rows(3)
    if kind == "json":
        column = {"caption": "prompt", "jpg_1": "path2", "label_0": "human_preference"}[column]
        (tmp_path / "1.png").write_bytes(jpeg(1))
        table = [{"prompt": f"prompt {k}", "path1": "1.png", "path2": "1.png"} for k in range(3)]
        if column == "human_preference":
            table = [{"prompt": "a", "image_path": ["1.png"] * 2, column: [1, 0]} for _ in range(3)]
    if kind == "parquet":
        table[0][column] = None
        write(tmp_path, table)
    else:
        del table[0][column]
        path = tmp_path / f"train.{kind}"
        write_tar(path, table) if kind == "tar" else path.write_text(json.dumps(table))
    stream = pair_stream(tmp_path)
    assert len(pairs_of(stream)) == 2
    assert stream.skips() == f"rows skipped: 1 without {column}"


@pytest.mark.parametrize("kind", FORMATS)
def test_two_columns_of_one_name_are_refused(tmp_path, kind):
    path, table = tmp_path / f"train.{kind}", pa.Table.from_pylist(rows(2))
    table = table.append_column("caption", table["caption"])
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.ipc.new_stream(path, table.schema) as file:
            file.write_table(table)
    elif kind == "tar":
        with tarfile.open(path, "w") as file:
            for name in ("0.caption", "0.caption.txt"):
                file.addfile(tarfile.TarInfo(name))
    elif kind == "csv":
        path.write_text("prompt,path1,path2,prompt\na,1,2,b\n")
    else:
        row = '{"prompt": "a", "path1": "1", "path2": "2", "prompt": "b"}'
        path.write_text(f"[{row}]" if kind == "json" else row)
    with refused(str(path), "one name"):
        pair_stream(path)


@pytest.mark.parametrize(
    "cell",
    [
        *("{outside}/secret.png", "../secret.png", "images/../../secret.png", "link.png"),
        *("linked/secret.png", {"bytes": None, "path": "../secret.png"}, "../absent.png"),
    ],
)
def test_image_files_outside_of_the_data_set_are_not_opened_and_their_rows_counted(
    tmp_path, cell, monkeypatch, capsys
):
    folder = tmp_path / "pairs"
    (folder / "images").mkdir(parents=True)
    for path in (folder / "1.png", folder / "images" / "2.png", tmp_path / "secret.png"):
        path.write_bytes(jpeg(1))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path, target_is_directory=True)
    if isinstance(cell, str):
        cell = cell.format(outside=tmp_path)
    inside = [str(folder / "1.png"), "images/../1.png", "2.png"]
    lines = []
    for path in [*inside, cell]:
        lines.append(json.dumps({"prompt": "a", "path1": path, "path2": "1.png"}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    stream, opened = pair_stream(folder), []
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: opened.append(path.resolve()) or read(path)
    )
    assert len(pairs_of(stream)) == 3
    assert stream.skips() == "rows skipped: 1 with files outside of the data set"
    assert "files outside" in capsys.readouterr().err and tmp_path / "secret.png" not in opened


def test_members_of_a_tar_in_any_folder_and_files_of_the_hubs_cache_are_read(tmp_path):
    write_tar(tmp_path / "train.tar", rows(3), folders=["", "../..", "/abs"])
    assert len(pairs_of(pair_stream(tmp_path / "train.tar"))) == 3

    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "0"
    for folder in (snapshot, tmp_path / "datasets--a--b" / "blobs"):
        folder.mkdir(parents=True)
    (tmp_path / "datasets--a--b" / "blobs" / "1").write_bytes(jpeg(1))
    (snapshot / "1.png").symlink_to("../../blobs/1")
    row = {"prompt": "a", "path1": "1.png", "path2": "1.png"}
    (snapshot / "train.json").write_text(json.dumps([row]))
    assert len(pairs_of(pair_stream(snapshot))) == 1


IMAGE = {1: {"bytes": jpeg(1), "path": "1.jpg"}, 2: {"bytes": jpeg(2), "path": "2.jpg"}}


@pytest.mark.parametrize(
    "row",
    [
        {"caption": "a cat", "jpg_0": IMAGE[2], "jpg_1": IMAGE[1], "label_0": 0, "label_1": 1},
        {"prompt": "a cat", "chosen": IMAGE[1], "rejected": IMAGE[2], "source": "x"},
        {"prompt": "a cat", "path1": "1.jpg", "path2": "sub/2.jpg", "model1": "m"},
        {"prompt": "a cat", "image_path": ["sub/2.jpg", "1.jpg"], "human_preference": [0, 1]},
        {"prompt": "a cat", "image_0": "sub/2.jpg", "image_1": "1.jpg", "label": 1, "who": "me"},
    ],
    ids=["Pick-a-Pic", "Open Image Preferences", "HPDv3", "HPDv2", "one's own"],
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
