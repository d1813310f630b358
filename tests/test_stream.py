"""Streams of pairs: what is skipped, what is decoded, and where a stopped stream continues."""

import io
import time
from collections.abc import Iterator
from threading import Event

import numpy as np
import pytest
from pair_files import FORMATS, jpeg, number, pairs_of, rows, tie, write, write_as
from PIL import Image
from refusals import refused

from img_minimal.data.features import prefetch
from img_minimal.data.pairs import ImageDecoder, Skipped, pair_stream, parse_pair, triplet_stream
from img_minimal.files import decode


def test_every_pair_comes_once_winner_first_in_an_order_of_the_seed_and_ties_are_dropped(tmp_path):
    tables = [rows(10), rows(10, 10), rows(10, 20)]
    tie(tables[0][2])
    tie(tables[0][5])
    folder, orders = write(tmp_path, *tables), []
    for seed in (0, 0, 1):
        stream = pair_stream(folder, size=4, seed=seed)
        pairs = pairs_of(stream)
        orders.append([int(pair.prompt.split()[1]) for pair in pairs])
        assert [number(pair.winner) for pair in pairs] == [2 * k for k in orders[-1]]
        assert [number(pair.loser) for pair in pairs] == [2 * k + 1 for k in orders[-1]]
        assert stream.skips() == "rows skipped: 2 ties"
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == [k for k in range(30) if k not in (2, 5)]
    second = [k for k in orders[2] if 10 <= k < 20]
    assert second == sorted(second), "rows of a file keep their order"


@pytest.mark.parametrize(
    "changes, reason",
    [
        *[({"caption": text}, "without text") for text in (b"\xff\xfe", "  ", None, 7)],
        ({"caption": "a" * 20_000}, "more than 2000 characters"),
        *[({"label_0": x, "label_1": x}, "ties") for x in (0.5, 0, True)],
        *[
            ({"label_0": label}, "labels are no preference")
            for label in (None, 2.0, "yes", float("nan"), [1])
        ],
        ({"label_0": 0.7, "label_1": 0.3}, "labels are no preference"),
    ],
)
def test_rows_with_odd_cells_are_skipped_under_their_reason(changes, reason):
    with pytest.raises(Skipped, match=reason):
        parse_pair([*(rows(1)[0] | changes).values()][:5], lambda cell: None)


def test_text_and_numbers_are_also_read_from_bytes():
    row = rows(1)[0] | {"caption": b"caf\xc3\xa9", "label_0": "1", "label_1": b"0"}
    assert parse_pair([*row.values()][:5], lambda cell: None).prompt == "café"


@pytest.mark.parametrize("cell", [7, "nowhere.jpg", ["a"], {"path": "x"}, {"bytes": None}])
def test_a_cell_without_an_image_raises_an_error_that_streams_skip(tmp_path, cell):
    with pytest.raises(OSError):
        ImageDecoder(tmp_path)(cell)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def strip(*values: object, dtype: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=dtype))


def test_decoded_images_look_as_in_a_viewer():
    red, white, blue = [255, 0, 0], [255, 255, 255], [0, 0, 255]
    quarter_turn = Image.Exif()
    quarter_turn[0x0112] = 6  # clockwise
    clear = strip([*red, 255], [*red, 0])
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    for data, expected in (
        (encoded(strip(blue, red), exif=quarter_turn), [[blue], [red]]),
        (encoded(clear), [[red, white]]),
        (encoded(clear, "WEBP", lossless=True), [[red, white]]),
        (encoded(palette, transparency=0), [[white]]),
        (encoded(Image.new("LA", (1, 1), (0, 0))), [[white]]),
        (encoded(strip(0, 32768, 65535, dtype=np.uint16)), [[[0] * 3, [128] * 3, [255] * 3]]),
    ):
        assert np.asarray(decode(data)).tolist() == expected
    assert decode(encoded(Image.new("CMYK", (2, 2)), "JPEG")).mode == "RGB"


@pytest.mark.parametrize("size, kind", [((4, 4), "EPS"), ((1, 60_000), "PNG")])
def test_formats_that_start_programs_and_images_that_fill_the_memory_are_not_opened(size, kind):
    with pytest.raises(OSError):
        decode(encoded(Image.new("RGB", size), kind))


@pytest.mark.parametrize("limit, sizes", [(0, [4, 4, 4, 4, 4]), (11, [4, 4, 3])])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_stream_of_any_format_continues_at_any_chunk(tmp_path, kind, limit, sizes):
    stream = pair_stream(write_as(kind, tmp_path / "pairs", rows(20)), 4, limit, seed=1)
    chunks = list(stream.chunks())
    assert [len(chunk.items) for chunk in chunks] == sizes
    expected = [(c.position, p.prompt) for c in chunks for p in c.items]
    assert len({prompt for _, prompt in expected}) == sum(sizes)
    for k, chunk in enumerate(chunks):
        again = stream.chunks(chunk.position)
        assert [(c.position, p.prompt) for c in again for p in c.items] == expected[4 * k :]
    assert list(stream.chunks(chunks[-1].next_position)) == []


def test_triplets_are_read_and_those_with_damaged_images_or_without_words_skipped(tmp_path):
    table = []
    for k in range(4):
        image = {"bytes": jpeg(k), "path": None}
        edit = f" remove {k} "
        table.append({"original_image": image, "edit_prompt": edit, "edited_prompt": "x"})
    table[1]["original_image"]["bytes"] = b"no image"
    table[2]["edit_prompt"] = None
    stream = triplet_stream(write(tmp_path, table))
    [chunk] = stream.chunks()
    triplets = [(number(t.image), t.prompt, t.instruction) for t in chunk.items]
    assert triplets == [(0, "x", "remove 0"), (3, "x", "remove 3")]
    assert stream.skips() == "rows skipped: 1 with damaged images, 1 without edit_prompt"


def test_a_damaged_file_stops_the_stream_and_names_what_to_repair(tmp_path):
    folder = write(tmp_path, rows(40))
    [file] = folder.glob("*.parquet")
    data = bytearray(file.read_bytes())
    data[300:2000] = bytes(1700)  # the footer stays whole, so that only reading shows it
    file.write_bytes(data)
    with refused(str(file), "file 0 of 1", "--resume"):
        list(prefetch(pair_stream(folder).chunks()))


def test_a_closed_stream_does_not_wait_for_the_chunk_that_is_being_read():
    finished = Event()

    def chunks() -> Iterator[int]:
        yield 0
        finished.wait(60)

    stream = prefetch(chunks())
    assert next(stream) == 0
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 10
    finished.set()
