"""Pairs from tables of any size: what is skipped, what is given once, where a stopped run goes on."""

import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_files import jpeg, number, pairs_of, read_pairs, rows, write
from PIL import Image

from img_minimal.data.features import ahead, distinct
from img_minimal.data.pairs import PAIRS, Pictures, Skipped, pair_stream, triplet_stream
from img_minimal.cli import UserError
from img_minimal.files import decode

PICK = next(iter(PAIRS.values()))


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


def encoded(image: Image.Image, kind: str, **more: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def test_what_is_decoded_is_what_a_viewer_shows():
    sideways = Image.new("RGB", (8, 4), "red")
    sideways.paste("blue", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    turned = decode(encoded(sideways, "PNG", exif=exif))
    assert turned.size == (4, 8) and turned.getpixel((0, 0)) == (0, 0, 255)
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    for kind in ("PNG", "WEBP"):
        seen = decode(encoded(clear, kind, **({"lossless": True} if kind == "WEBP" else {})))
        assert [seen.getpixel(p) for p in ((0, 0), (1, 1))] == [(255, 0, 0), (255, 255, 255)]
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    assert decode(encoded(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert [decode(encoded(deep, "PNG")).getpixel((k, 0))[0] for k in range(3)] == [0, 128, 255]
    assert decode(encoded(Image.new("CMYK", (2, 2)), "JPEG")).mode == "RGB"
    assert decode(encoded(Image.new("LA", (2, 2), (0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_formats_that_start_programs_and_pictures_that_would_fill_the_memory_are_not_opened():
    for data in (encoded(Image.new("RGB", (4, 4)), "EPS"), encoded(Image.new("RGB", (1, 60_000)), "PNG")):
        with pytest.raises(OSError):
            decode(data)


def test_odd_cells_cost_their_row_and_are_counted_under_their_reason():
    odd = {
        "without a prompt": [{"caption": b"\xff\xfe"}, {"caption": "  "}, {"caption": None}, {"caption": 7}],
        "more than 2000 characters": [{"caption": "a" * 20_000}],
        "ties": [{"label_0": 0.5, "label_1": 0.5}, {"label_0": 0, "label_1": 0}, {"label_0": True, "label_1": True}],
        "labels are no preference": [
            {"label_0": None},
            {"label_0": 2.0},
            {"label_1": "yes"},
            {"label_0": float("nan")},
            {"label_0": [1]},
            {"label_0": 0.7, "label_1": 0.3},
        ],
    }
    for reason, row in ((reason, row) for reason, changes in odd.items() for row in changes):
        with pytest.raises(Skipped, match=reason):
            PICK(rows(1)[0] | row, lambda data: None)
    assert PICK(rows(1)[0] | {"caption": b"caf\xc3\xa9", "label_0": "1", "label_1": b"0"}, str).prompt == "café"
    for cell in (7, "text", ["a"], {"path": "x"}, {"bytes": None}):
        with pytest.raises(OSError):
            Pictures()(cell)


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
        tmp_path / "empty": "holds no training table",
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
    def failing() -> Iterator[int]:
        yield 1
        raise UserError("lost")

    prepared = ahead(failing())
    assert next(prepared) == 1
    with pytest.raises(UserError, match="lost"):
        next(prepared)
