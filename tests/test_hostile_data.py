"""Damaged and malicious data sets are read, or refused with one line."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from advmoe.data.batch_pickle import load_batch
from advmoe.data.cifar import CIFAR10
from advmoe.data.folders import image_folder, list_images
from advmoe.data.loader import BatchLoader
from advmoe.data.locate import read_bytes
from advmoe.data.parquet import class_names, count_rows, read_image_set
from advmoe.errors import DataError

HUB, INFO = CIFAR10.hub, CIFAR10.info
rng = np.random.default_rng(0)


def png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def mutants(seed: bytes, count: int, *, ends: int) -> list[bytes]:
    """Copies with one to four bytes changed, most of them in the first or last `ends` bytes."""
    found = []
    for _ in range(count):
        content = bytearray(seed)
        for _ in range(rng.integers(1, 5)):
            place = int(rng.integers(0, len(content) if rng.random() < 0.2 else ends))
            content[place if rng.random() < 0.2 else -1 - place] = int(rng.integers(0, 256))
        found.append(bytes(content))
    return found


def test_mutated_parquet_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    names = b'{"info":{"features":{"label":{"names":["a","b"]}}}}'
    table = pa.table({"img": [{"bytes": png(), "path": ""} for _ in range(4)], "label": [0, 1, 2, 3]})
    pq.write_table(table.replace_schema_metadata({b"huggingface": names}), path, row_group_size=2)
    assert class_names(path, HUB) == ("a", "b")
    refused: list[str] = []
    for content in mutants(path.read_bytes(), 300, ends=1500):
        path.write_bytes(content)
        try:
            assert len(read_image_set((path,), HUB, INFO)) == 4
            class_names(path, HUB)
        except DataError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 300
    assert not any("\n" in message for message in refused)


def test_parquet_cannot_claim_more_images_than_the_set_has(tmp_path: Path) -> None:
    # 60,001 times the same image and label: a file of some kB that would be 184 MB of pixels, or
    # any number more.
    path = tmp_path / "train-00000-of-00001.parquet"
    rows = pa.array([0] * 60_001, pa.int64())
    images = pa.StructArray.from_arrays([pa.array([b"x"] * 60_001), pa.array([""] * 60_001)], ["bytes", "path"])
    pq.write_table(pa.table({"img": images, "label": rows}), path)
    with pytest.raises(DataError, match=r"claim 60,001 images; cifar10 has 50,000 at most"):
        count_rows((path,), INFO)


def test_a_column_that_holds_no_bytes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"img": [{"bytes": "text", "path": ""}], "label": [0]}), path)
    with pytest.raises(DataError, match=r"column 'img' holds struct<bytes: string, .*not images"):
        read_image_set((path,), HUB, INFO)


def test_class_names_that_are_no_list_are_none(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    for names in (b"5", b'"text"', b"null"):
        metadata = {b"huggingface": b'{"info":{"features":{"label":{"names":' + names + b"}}}}"}
        pq.write_table(pa.table({"label": [0]}).replace_schema_metadata(metadata), path)
        assert class_names(path, HUB) == ()


def test_parquet_with_more_images_than_it_claims_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"img": [{"bytes": png(), "path": ""}] * 70, "label": [0] * 70}), path)
    # In Thrift's compact form a number is a varint of twice its value: 70 is 8c 01. The footer's
    # number of rows comes first in the file's metadata, the row group's comes last.
    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    place = content.index(b"\x16\x8c\x01\x19", start)
    path.write_bytes(content[:place] + b"\x16\x80\x01" + content[place + 3 :])
    assert count_rows((path,), INFO) == 64
    with pytest.raises(DataError, match=r"is damaged: it holds more than the 64 images it claims; download it again"):
        read_image_set((path,), HUB, INFO)


def test_names_nested_too_deep_to_read_are_none(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    metadata = {b"huggingface": b"[" * 100_000}
    pq.write_table(pa.table({"label": [0]}).replace_schema_metadata(metadata), path)
    assert class_names(path, HUB) == ()


def test_mutated_batches_are_read_or_refused() -> None:
    batch = {b"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8), b"labels": [0, 1], b"filenames": [b"a", b"b"]}
    refused: list[str] = []
    for protocol in (2, 4, 5):
        for content in mutants(pickle.dumps(batch, protocol=protocol), 300, ends=200):
            try:
                load_batch(content, where="batch")
            except DataError as error:
                refused.append(str(error))
    assert 0 < len(refused) < 900
    assert all(message.startswith("batch is not a readable CIFAR batch") for message in refused)


def test_a_batch_of_nested_lists_is_refused_before_it_unfolds() -> None:
    laughs: list[object] = [b"ha"] * 10
    for _ in range(30):
        laughs = [laughs] * 10  # 10^31 items in a kB
    with pytest.raises(DataError, match="it holds a list of lists, which no CIFAR batch needs"):
        load_batch(pickle.dumps({b"labels": laughs}, protocol=2), where="batch")


LONG = b"x" * 4000
NUMBERS = [7] * 4000


@pytest.mark.parametrize(
    "batch",
    [
        {b"data": 0, b"labels": [LONG] * 2000},
        {bytes((first, second)): LONG for first in range(64) for second in range(64)},
        {bytes((first, second)): NUMBERS for first in range(64) for second in range(64)},
    ],
    ids=["list of one text", "entries of one text", "entries of one list"],
)
def test_a_batch_that_repeats_itself_is_refused_before_it_unfolds(batch: dict[bytes, object]) -> None:
    # 2,000 or 4,096 copies of 4,000 bytes or items are 8 or 16 million.
    for protocol in (2, 4):
        raw = pickle.dumps(batch, protocol=protocol)
        assert len(raw) < 140_000
        with pytest.raises(DataError, match="it unfolds to a multiple of its size"):
            load_batch(raw, where="batch")


def test_bytes_that_are_encoded_again_and_again_are_refused() -> None:
    # 2,000 times the bytes of one text, 9 bytes each time.
    codes = pickle.BINUNICODE + (4000).to_bytes(4, "little") + LONG + pickle.BINPUT + b"\x00" + pickle.POP
    latin1 = pickle.SHORT_BINSTRING + b"\x06latin1" + pickle.BINPUT + b"\x01" + pickle.POP
    encode = b"c_codecs\nencode\n" + pickle.BINPUT + b"\x02" + pickle.POP
    copy = pickle.BINGET + b"\x02" + pickle.BINGET + b"\x00" + pickle.BINGET + b"\x01" + pickle.TUPLE2 + pickle.REDUCE
    raw = pickle.PROTO + b"\x02" + codes + latin1 + encode + pickle.MARK + copy * 2000 + pickle.LIST + pickle.STOP
    with pytest.raises(DataError, match="it unfolds to a multiple of its size"):
        load_batch(raw, where="batch")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({((b"a", b"b"), 1): 1}, "it has a key of type tuple, and not text"),
        ({b"data": {1: 2}}, "it has a key of type int, and not text"),
        ({b"labels": frozenset((1,))}, "it holds a set, which no CIFAR batch needs"),
        ({b"labels": {1}}, "it holds a set, which no CIFAR batch needs"),
        ({b"labels": ((1,), 2)}, "it holds a list of lists, which no CIFAR batch needs"),
        ({b"labels": [np.zeros(9)]}, "it holds a list of lists, which no CIFAR batch needs"),
    ],
)
def test_only_text_names_the_entries_of_a_batch(batch: object, message: str) -> None:
    for protocol in (4, 5):
        with pytest.raises(DataError, match=message):
            load_batch(pickle.dumps(batch, protocol=protocol), where="batch")


TEXT = pickle.SHORT_BINSTRING + b"\x01a"
LIST_AS_KEY = pickle.EMPTY_LIST + TEXT


@pytest.mark.parametrize(
    "entries",
    [
        pickle.EMPTY_DICT + LIST_AS_KEY + pickle.SETITEM,
        pickle.EMPTY_DICT + pickle.MARK + TEXT + TEXT + LIST_AS_KEY + pickle.SETITEMS,
        pickle.MARK + TEXT + TEXT + LIST_AS_KEY + pickle.DICT,
    ],
)
def test_a_key_is_refused_before_it_is_hashed(entries: bytes) -> None:
    # Hashing a list would be another error. Hashing nested tuples takes twice as
    # long with each level.
    with pytest.raises(DataError, match="it has a key of type list, and not text"):
        load_batch(pickle.PROTO + b"\x02" + entries + pickle.STOP, where="batch")


def array_of(raw: bytes, code: bytes = pickle.SHORT_BINSTRING + b"\x02u1", order: bytes = TEXT) -> bytes:
    """A batch with one array, as NumPy writes it in protocol 5, from the pickles of its parts."""
    dtype = b"cnumpy\ndtype\n" + code + pickle.TUPLE1 + pickle.REDUCE
    shape = pickle.BININT1 + b"\x04" + pickle.TUPLE1
    array = b"cnumpy.core.numeric\n_frombuffer\n" + pickle.MARK + raw + dtype + shape + order + pickle.TUPLE
    return pickle.PROTO + b"\x05" + pickle.EMPTY_DICT + TEXT + array + pickle.REDUCE + pickle.SETITEM + pickle.STOP


def test_the_numbers_of_an_array_are_bytes_and_its_words_are_text() -> None:
    four, pair = pickle.BININT1 + b"\x04", pickle.NONE + pickle.NONE + pickle.TUPLE2
    written = load_batch(array_of(pickle.SHORT_BINBYTES + b"\x04abcd"), where="batch")
    assert written["a"].tolist() == [97, 98, 99, 100]
    with pytest.raises(DataError, match="the numbers of an array are of type int, and not bytes"):
        load_batch(array_of(four), where="batch")
    for words in ({"code": pair}, {"order": pair}):
        with pytest.raises(DataError, match="it holds a value of type tuple in the place of text"):
            load_batch(array_of(pickle.SHORT_BINBYTES + b"\x04abcd", **words), where="batch")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_no_image_and_nothing_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    os.mkfifo(tmp_path / "class" / "pipe.png")
    with pytest.raises(DataError, match=r"image 0 \(.*pipe.png at byte 0\): it is not a regular file"):
        next(BatchLoader(image_folder(tmp_path), batch_size=1).epoch(0))


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "class" / "locked").mkdir(parents=True)
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"the folder .*locked cannot be read: Permission denied"):
        list_images(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        read_bytes(tmp_path)
