"""CIFAR-10 in all published layouts, as small copies in the exact form of the originals."""

import hashlib
import http.server
import io
import os
import pickle
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from advmoe.data import archives
from advmoe.data.archives import Archive
from advmoe.data.cifar import CIFAR10, CIFAR100, BatchFiles, Cifar, load_cifar
from advmoe.data.sets import Dataset
from advmoe.data.sources import dataset_names, load_dataset
from advmoe.errors import DataError

PER_BATCH = 4
TRAIN, TEST = 5 * PER_BATCH, PER_BATCH
SMALL = replace(CIFAR10, info=replace(CIFAR10.info, train_size=TRAIN, test_size=TEST))

rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (TRAIN + TEST, 32, 32, 3), dtype=np.uint8)
LABELS = rng.integers(0, 10, TRAIN + TEST)
PLANES = IMAGES.transpose(0, 3, 1, 2).reshape(-1, 3072)  # as in the batches: red plane, green plane, blue plane


def pickled_batch(rows: slice) -> bytes:
    # Python 2 wrote protocol 2 with byte-string keys; so does this.
    return pickle.dumps(
        {b"batch_label": b"", b"data": PLANES[rows], b"labels": LABELS[rows].tolist(), b"filenames": []}, protocol=2
    )


def binary_batch(rows: slice) -> bytes:
    return np.concatenate([LABELS[rows, None].astype(np.uint8), PLANES[rows]], axis=1).tobytes()


def batch_rows() -> list[slice]:
    return [slice(start, start + PER_BATCH) for start in range(0, TRAIN + TEST, PER_BATCH)]


def contents(files: BatchFiles) -> dict[str, bytes]:
    encode = pickled_batch if files.folder == CIFAR10.python.folder else binary_batch
    return {name: encode(rows) for name, rows in zip(files.names, batch_rows(), strict=True)}


def write_folder(data_dir: Path, files: BatchFiles) -> Path:
    for name, raw in contents(files).items():
        (data_dir / name).parent.mkdir(exist_ok=True)
        (data_dir / name).write_bytes(raw)
    return data_dir / files.folder


def write_archive(data_dir: Path, files: BatchFiles, *, without: str = "") -> tuple[Path, str]:
    path = data_dir / files.archive.file_name
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in contents(files).items():
            if name != without:
                member = tarfile.TarInfo(name)
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
    return path, hashlib.md5(path.read_bytes()).hexdigest()


def with_archive(files: BatchFiles, md5: str, url: str = "unused") -> BatchFiles:
    return replace(files, archive=replace(files.archive, md5=md5, url=url))


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder: Path, name: str, rows: slice, **changed: object) -> Path:
    columns = {
        "img": [{"bytes": png(image), "path": f"{number}.png"} for number, image in enumerate(IMAGES[rows])],
        "label": LABELS[rows].tolist(),
    }
    columns.update(changed)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({key: value for key, value in columns.items() if value is not None}), folder / name)
    return folder / name


def write_hub(folder: Path) -> tuple[Path, Path]:
    return (
        write_parquet(folder, "train-00000-of-00001.parquet", slice(0, TRAIN)),
        write_parquet(folder, "test-00000-of-00001.parquet", slice(TRAIN, None)),
    )


def load(data_dir: Path, cifar: Cifar = SMALL) -> Dataset:
    return load_cifar(cifar, data_dir, download=False)


def assert_is_small_cifar(dataset: Dataset) -> None:
    np.testing.assert_array_equal(dataset.train.images, IMAGES[:TRAIN])
    np.testing.assert_array_equal(dataset.test.images, IMAGES[TRAIN:])
    np.testing.assert_array_equal(dataset.train.labels, LABELS[:TRAIN])
    np.testing.assert_array_equal(dataset.test.labels, LABELS[TRAIN:])
    assert dataset.train.class_names == CIFAR10.info.class_names


@pytest.mark.parametrize("files", [CIFAR10.python, CIFAR10.binary], ids=["python", "binary"])
def test_reads_batch_folders(tmp_path: Path, files: BatchFiles) -> None:
    write_folder(tmp_path, files)
    assert_is_small_cifar(load(tmp_path))


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_reads_archives_without_extracting_them(tmp_path: Path, kind: str) -> None:
    files = getattr(CIFAR10, kind)
    path, md5 = write_archive(tmp_path, files)
    assert_is_small_cifar(load(tmp_path, replace(SMALL, **{kind: with_archive(files, md5)})))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("sub_folder", ["", "plain_text", "cifar10/plain_text", "uoft-cs/cifar10/plain_text"])
def test_reads_hub_parquet_from_the_repository_folder_or_its_parents(tmp_path: Path, sub_folder: str) -> None:
    write_hub(tmp_path / sub_folder)
    assert_is_small_cifar(load(tmp_path))


def test_reads_hub_parquet_from_the_hub_cache(tmp_path: Path) -> None:
    write_hub(tmp_path / "datasets--uoft-cs--cifar10" / "snapshots" / "0b2714987fa478" / "plain_text")
    assert_is_small_cifar(load(tmp_path))


def test_the_current_snapshot_of_the_hub_cache_is_read(tmp_path: Path) -> None:
    cache = tmp_path / "datasets--uoft-cs--cifar10"
    outdated = LABELS[:TRAIN][::-1].tolist()
    for name in ("0ld", "5new", "9ld"):
        write_hub(cache / "snapshots" / name / "plain_text")
        if name != "5new":
            folder = cache / "snapshots" / name / "plain_text"
            write_parquet(folder, "train-00000-of-00001.parquet", slice(0, TRAIN), label=outdated)
    assert load(tmp_path).train.labels.tolist() == outdated  # by name, as long as nothing names the current one
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("5new")
    assert_is_small_cifar(load(tmp_path))
    (cache / "refs" / "main").write_bytes(b"\xff")
    assert load(tmp_path).train.labels.tolist() == outdated


def test_reads_several_shards_in_order(tmp_path: Path) -> None:
    write_parquet(tmp_path, "train-00000-of-00002.parquet", slice(0, 3))
    write_parquet(tmp_path, "train-00001-of-00002.parquet", slice(3, TRAIN))
    write_parquet(tmp_path, "test-00000-of-00001.parquet", slice(TRAIN, None))
    assert_is_small_cifar(load(tmp_path))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_reads_batches_pickled_by_python_3(tmp_path: Path, protocol: int) -> None:
    folder = write_folder(tmp_path, CIFAR10.python)
    batch = {"data": PLANES[:PER_BATCH], "labels": list(LABELS[:PER_BATCH])}  # labels as NumPy scalars
    (folder / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=protocol))
    assert_is_small_cifar(load(tmp_path))


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


class SilentServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        pass  # torchvision hangs up on the first of its two connections


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which this machine serves it."""
    folder = tmp_path / "site"
    folder.mkdir()
    with SilentServer(("127.0.0.1", 0), partial(Silent, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_downloads_the_archive_and_keeps_it(
    tmp_path: Path, site: tuple[Path, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, md5 = write_archive(site[0], CIFAR10.python)
    cifar = replace(SMALL, python=with_archive(CIFAR10.python, md5, f"{site[1]}/{source.name}"))
    data_dir = tmp_path / "new" / "data"
    monkeypatch.setenv("ADVMOE_DATA_DIR", str(data_dir))  # the default folder is made when it is needed
    assert_is_small_cifar(load_cifar(cifar, data_dir, download=True))
    source.unlink()  # the second time nothing is downloaded
    assert_is_small_cifar(load_cifar(cifar, data_dir, download=True))
    assert [path.name for path in data_dir.iterdir()] == ["cifar-10-python.tar.gz"]
    assert capfd.readouterr() == ("", "")


def test_a_download_is_announced_and_reports_its_beginning_and_end(tmp_path: Path, site: tuple[Path, str]) -> None:
    (tmp_path / "data").mkdir()
    source, md5 = write_archive(site[0], CIFAR10.python)
    url = f"{site[1]}/{source.name}"
    calls: list[tuple[str, int, int]] = []
    cifar = replace(SMALL, python=with_archive(CIFAR10.python, md5, url))
    told: list[str] = []
    load_cifar(cifar, tmp_path / "data", progress=lambda *call: calls.append(call), announce=told.append)
    (sentence,) = told
    assert sentence.endswith(f"; downloading {url} (170 MB) to {tmp_path / 'data'}")
    load_cifar(cifar, tmp_path / "data", announce=told.append)
    assert len(told) == 1  # the second time it is there
    assert calls == [(f"downloading {url}", 0, 1), (f"downloading {url}", 1, 1)]


def test_a_download_with_the_wrong_checksum_leaves_nothing_behind(tmp_path: Path, site: tuple[Path, str]) -> None:
    (tmp_path / "data").mkdir()
    source, _ = write_archive(site[0], CIFAR10.python)
    cifar = replace(SMALL, python=with_archive(CIFAR10.python, "0" * 32, f"{site[1]}/{source.name}"))
    with pytest.raises(DataError, match=r"not found in .*, and downloading http://.* failed: .*corrupted"):
        load_cifar(cifar, tmp_path / "data", download=True)
    assert list((tmp_path / "data").iterdir()) == []


class Stalling(Silent):
    """Sends a part of a file, or nothing, and then waits."""

    ended = threading.Event()

    def do_GET(self) -> None:
        if self.path.endswith("part.tar.gz"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(bytes(10))
            self.wfile.flush()
        self.ended.wait(10)


@pytest.mark.parametrize("name", ["part.tar.gz", "nothing.tar.gz"])
@pytest.mark.parametrize("before", [None, 7.0])
def test_a_download_that_stalls_ends_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: float | None
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(archives, "STALLED", 0.2)
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(before)
    with SilentServer(("127.0.0.1", 0), Stalling) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/{name}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            message = r"stalled: the server sent nothing for 0\.2 s; try again later, or put the file there yourself"
            with pytest.raises(DataError, match=rf"downloading {url} into .*data {message}"):
                archives.download_archive(Archive(name, "0" * 32, url, 1000), tmp_path / "data")
            assert socket.getdefaulttimeout() == before
        finally:
            socket.setdefaulttimeout(default)
            Stalling.ended.set()
            server.shutdown()
    Stalling.ended.clear()
    assert list((tmp_path / "data").iterdir()) == []


def test_a_download_that_is_not_there_is_named(tmp_path: Path, site: tuple[Path, str]) -> None:
    cifar = replace(SMALL, python=with_archive(CIFAR10.python, "0" * 32, f"{site[1]}/nowhere.tar.gz"))
    with pytest.raises(DataError, match=r"downloading http://.*nowhere\.tar\.gz into .* failed: .*404"):
        load_cifar(cifar, tmp_path)


def test_a_download_that_fails_is_told_once_with_the_way_to_do_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object) -> None:
        raise URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(archives, "download_url", no_network)
    said: list[str] = []
    with pytest.raises(DataError) as caught:
        load_cifar(CIFAR10, tmp_path, announce=said.append)
    assert "cifar10 was not found in" in said[0]
    assert str(caught.value) == (
        f"downloading {CIFAR10.python.archive.url} into {tmp_path} failed: [Errno -2] Name or service not known; "
        "if you have the data set, name the folder that holds it"
    )
    assert caught.value.options == ("data_dir",)


def test_a_folder_that_does_not_exist_is_refused_and_not_made(tmp_path: Path) -> None:
    for name in dataset_names():
        if name != "digits":  # they come with the package
            with pytest.raises(DataError, match=r"the data folder .*/typo does not exist; correct its name"):
                load_dataset(name, tmp_path / "typo")
    assert list(tmp_path.iterdir()) == []


def test_says_what_was_looked_for_when_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar10 was not found in .*plain_text.*-batches-py.*allow the download"):
        load(tmp_path)


def test_refuses_a_file_as_data_folder(tmp_path: Path) -> None:
    path, _ = write_archive(tmp_path, CIFAR10.python)
    with pytest.raises(DataError, match="is a file; give the folder it lies in"):
        load(path)


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_refuses_a_half_downloaded_archive_and_leaves_it_alone(tmp_path: Path, keep: float) -> None:
    path, md5 = write_archive(tmp_path, CIFAR10.python)
    half = path.read_bytes()[: int(path.stat().st_size * keep)]
    path.write_bytes(half)
    with pytest.raises(DataError, match=r"half-downloaded or damaged.*expected " + md5):
        load_cifar(replace(SMALL, python=with_archive(CIFAR10.python, md5)), tmp_path, download=True)
    assert path.read_bytes() == half
    assert list(tmp_path.iterdir()) == [path]


def test_refuses_an_archive_without_a_batch(tmp_path: Path) -> None:
    _, md5 = write_archive(tmp_path, CIFAR10.python, without="cifar-10-batches-py/data_batch_3")
    with pytest.raises(DataError, match="lacks cifar-10-batches-py/data_batch_3"):
        load(tmp_path, replace(SMALL, python=with_archive(CIFAR10.python, md5)))


def test_refuses_an_incomplete_folder(tmp_path: Path) -> None:
    (write_folder(tmp_path, CIFAR10.python) / "data_batch_4").unlink()
    with pytest.raises(DataError, match=r"cifar10 is incomplete: .*cifar-10-batches-py lacks data_batch_4"):
        load(tmp_path)


def test_passes_over_an_incomplete_folder_when_another_layout_is_complete(tmp_path: Path) -> None:
    (write_folder(tmp_path, CIFAR10.python) / "data_batch_4").unlink()
    write_folder(tmp_path, CIFAR10.binary)
    assert_is_small_cifar(load(tmp_path))


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, CIFAR10.python)
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": Hostile(tmp_path / "pwned"), "labels": []}))
    with pytest.raises(DataError, match=r"data_batch_2 .*asks for posix\.mkdir, which no CIFAR batch needs"):
        load(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "holds a list, not a dictionary"),
        ({"labels": [0] * PER_BATCH}, "expected the keys 'data' and 'labels', found labels"),
        ({"data": PLANES[:PER_BATCH], "fine_labels": [0] * PER_BATCH}, "expected the keys 'data' and 'labels'"),
        ({"data": PLANES[:PER_BATCH], "labels": [0]}, "4 images, but labels are int64 \\[1\\]"),
        ({"data": PLANES[:PER_BATCH], "labels": [0.5] * PER_BATCH}, "labels are float64"),
        ({"data": PLANES[:PER_BATCH, :-1], "labels": [0] * PER_BATCH}, "expected pixels as uint8 \\[n, 3072\\]"),
        ({"data": np.array(["a"]), "labels": [0]}, "'U1', and not of numbers"),
        ({"data": PLANES[:PER_BATCH], "labels": [0, 1, 10, 2]}, "label 10 of image 2 is out of range"),
        ({"data": PLANES[:PER_BATCH], "labels": [0, -1, 1, 2]}, "label -1 of image 1 is out of range.*0\\.\\.9"),
        ({"data": PLANES[:2], "labels": [0, 1]}, "equally long, and hold \\[2, 4, 4, 4, 4\\]"),
        ({"data": PLANES[:0], "labels": np.zeros(0, int)}, "holds no images"),
    ],
)
def test_refuses_malformed_pickled_batches(tmp_path: Path, batch: object, message: str) -> None:
    folder = write_folder(tmp_path, CIFAR10.python)
    (folder / "data_batch_1").write_bytes(pickle.dumps(batch))
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_a_pickle_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, CIFAR10.python)
    put = pickle.LONG_BINPUT + b"\xff\xff\xff\xff"  # makes Python's unpickler reserve 2^32 slots of 8 bytes
    (folder / "data_batch_2").write_bytes(pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + put + pickle.STOP)
    with pytest.raises(DataError, match=r"data_batch_2 .* numbers an object 4294967295, and has only 9 bytes"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_refuses_truncated_pickled_batches(tmp_path: Path, keep: float) -> None:
    path = write_folder(tmp_path, CIFAR10.python) / "test_batch"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(DataError, match="test_batch is not a readable CIFAR batch"):
        load(tmp_path)


def test_refuses_a_binary_batch_cut_within_a_record(tmp_path: Path) -> None:
    path = write_folder(tmp_path, CIFAR10.binary) / "data_batch_1.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_1\.bin is truncated: 12,291 bytes"):  # 4 x 3,073 - 1
        load(tmp_path)


def test_refuses_a_binary_batch_cut_between_records(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, CIFAR10.binary)
    whole = (folder / "data_batch_1.bin").read_bytes()
    (folder / "data_batch_1.bin").write_bytes(whole[:3073])
    with pytest.raises(DataError, match=r"truncated: .*\[1, 4, 4, 4, 4\]"):
        load(tmp_path)
    (folder / "data_batch_1.bin").write_bytes(whole)
    (folder / "test_batch.bin").write_bytes(whole[:3073])
    with pytest.raises(DataError, match="and 1 test images, where cifar10 has 20 and 4: a file is truncated"):
        load(tmp_path)


def test_refuses_a_binary_label_out_of_range(tmp_path: Path) -> None:
    path = write_folder(tmp_path, CIFAR10.binary) / "data_batch_5.bin"
    raw = bytearray(path.read_bytes())
    raw[3073] = 200  # label of the second record
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"data_batch_5\.bin: label 200 of image 1 is out of range"):
        load(tmp_path)


def test_warns_of_a_reduced_set(tmp_path: Path) -> None:
    write_folder(tmp_path, CIFAR10.binary)
    with pytest.warns(UserWarning, match="20 training and 4 test images, where cifar10 has 50,000 and 10,000"):
        dataset = load(tmp_path, CIFAR10)
    assert_is_small_cifar(dataset)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_refuses_truncated_parquet(tmp_path: Path, keep: float) -> None:
    path, _ = write_hub(tmp_path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet is truncated or not a parquet file"):
        load(tmp_path)


def test_refuses_damaged_parquet_pages(tmp_path: Path) -> None:
    path, _ = write_hub(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[4:2000] = bytes(1996)  # the first page, after the magic bytes
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("00001-of-00003", r"lacks shard 00000 of 3 of the train split \(2 missing\)"),
        # a list of all missing numbers would not fit in memory
        (f"00000-of-{10**30}", rf"lacks shard 00001 of {10**30} of the train split \({10**30 - 1} missing\)"),
    ],
)
def test_refuses_missing_shards(tmp_path: Path, name: str, message: str) -> None:
    write_hub(tmp_path)
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / f"train-{name}.parquet")
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_refuses_parquet_of_one_split_only(tmp_path: Path) -> None:
    write_hub(tmp_path / "plain_text")[1].unlink()
    with pytest.raises(DataError, match="plain_text has parquet files of the train split only"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": [*range(9), 10, *range(10)]}, "label 10 of image 9 is out of range"),
        ({"label": [None, *[0] * 19]}, r"1 labels are missing among rows 0\.\.19"),
        ({"label": ["cat"] * TRAIN}, "'label' holds string, not integers"),
        ({"label": None, "fine_label": [0] * TRAIN}, "has no column 'label': it has img, fine_label; is this really"),
        ({"img": None, "image": [b"x"] * TRAIN}, "has no column 'img'"),
        ({"img": [b"x"] * TRAIN}, "not images as struct<bytes, path>"),
        ({"img": [{"bytes": b"not an image at all", "path": ""}] * TRAIN}, "row 0: the image cannot be decoded"),
        ({"img": [{"bytes": None, "path": "3.png"}] * TRAIN}, "row 0: the image is missing"),
        ({"img": [{"bytes": png(IMAGES[0])[:-30], "path": ""}] * TRAIN}, "row 0: the image cannot be decoded"),
        ({"img": [{"bytes": png(IMAGES[0, :8]), "path": ""}] * TRAIN}, r"the image has 32x8 pixels, expected 32x32"),
    ],
)
def test_refuses_malformed_parquet_content(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    write_hub(tmp_path)
    write_parquet(tmp_path, "train-00000-of-00001.parquet", slice(0, TRAIN), **changed)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


FINE, COARSE = rng.integers(0, 100, TRAIN + TEST), rng.integers(0, 20, TRAIN + TEST)


def write_cifar100_pickles(data_dir: Path) -> None:
    (data_dir / "cifar-100-python").mkdir()
    for name, rows in (("train", slice(0, TRAIN)), ("test", slice(TRAIN, None))):
        batch = {b"data": PLANES[rows], b"coarse_labels": COARSE[rows].tolist(), b"fine_labels": FINE[rows].tolist()}
        (data_dir / "cifar-100-python" / name).write_bytes(pickle.dumps(batch, protocol=2))


def write_cifar100_records(data_dir: Path) -> None:
    (data_dir / "cifar-100-binary").mkdir()
    records = np.concatenate([COARSE[:, None], FINE[:, None], PLANES], axis=1).astype(np.uint8)
    (data_dir / "cifar-100-binary" / "train.bin").write_bytes(records[:TRAIN].tobytes())
    (data_dir / "cifar-100-binary" / "test.bin").write_bytes(records[TRAIN:].tobytes())


def write_cifar100_parquet(data_dir: Path) -> None:
    for name, rows in (("train", slice(0, TRAIN)), ("test", slice(TRAIN, None))):
        columns = {"label": None, "fine_label": FINE[rows].tolist(), "coarse_label": COARSE[rows].tolist()}
        write_parquet(data_dir / "cifar100", f"{name}-00000-of-00001.parquet", rows, **columns)


@pytest.mark.parametrize("write", [write_cifar100_pickles, write_cifar100_records, write_cifar100_parquet])
def test_reads_cifar100_with_its_fine_labels(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    dataset = load(tmp_path, replace(CIFAR100, info=replace(CIFAR100.info, train_size=TRAIN, test_size=TEST)))
    np.testing.assert_array_equal(dataset.train.images, IMAGES[:TRAIN])
    np.testing.assert_array_equal(dataset.test.images, IMAGES[TRAIN:])
    np.testing.assert_array_equal(dataset.train.labels, FINE[:TRAIN])
    np.testing.assert_array_equal(dataset.test.labels, FINE[TRAIN:])


def test_cifar100_is_not_taken_for_cifar10(tmp_path: Path) -> None:
    write_cifar100_parquet(tmp_path / "cifar100")
    with pytest.raises(DataError, match="cifar10 was not found"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"has no column 'label': .* is this really cifar10"):
        load(tmp_path / "cifar100" / "cifar100")


def test_reports_progress_to_the_end(tmp_path: Path) -> None:
    write_hub(tmp_path)
    calls: list[tuple[str, int, int]] = []
    load_cifar(SMALL, tmp_path, progress=lambda *call: calls.append(call))
    assert calls == [("decoding cifar10", TRAIN, TRAIN), ("decoding cifar10", TEST, TEST)]
