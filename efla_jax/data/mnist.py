"""MNIST: 60,000 + 10,000 real digits in IDX order, prepared on first use, kept as TFDS keeps data.

A TFDS builder writes the digits as ArrayRecord, without TensorFlow. Decoding a shuffled batch of
128 record by record costs 8-25 ms, more than a training step may have to spare, so a split is read
once (2-3 s for train), held in memory (47 MB) and checked against the digest of the original file:
no damage goes unnoticed.
"""

import functools
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efla_jax.data import mnist_download
from efla_jax.data.mnist_download import MnistError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Digits:
    """A random-access source: [i] -> {"image": uint8 [28, 28], "label": int32}."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}


def load(split: str, data_dir: str | os.PathLike[str] | None = None) -> Digits:
    """`arrays` as a source that grain reads."""
    return Digits(*arrays(split, data_dir))


def arrays(split: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [N, 28, 28], and labels, int32 [N], of `split`, "train" or "test".

    `data_dir` overrides TFDS's data directory. Raises MnistError if the digits are not in the cache
    and no source has them, if a source's digits are not MNIST, or if the cache is damaged.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'test'")
    builder = _prepared(data_dir)
    try:
        source = builder.as_data_source(split)
        records = source.__getitems__(range(len(source)))
        images = np.stack([record["image"] for record in records])
        labels = np.array([record["label"] for record in records], np.uint8)
        mnist_download.verify(f"{split}_images", images)
        mnist_download.verify(f"{split}_labels", labels)
    except Exception as error:  # whatever a damaged file makes the readers raise
        files = sorted(builder.data_path.glob(f"*-{split}.array_record*")) or [f"the {split} split"]
        raise MnistError(
            f"the MNIST cache is damaged: {', '.join(map(str, files))}: {error}\n"
            f"Delete the folder {builder.data_path}; the next run prepares it afresh."
        ) from error
    return images, labels.astype(np.int32)


def _prepared(data_dir: str | os.PathLike[str] | None) -> "tfds.core.DatasetBuilder":
    """The builder, its folder complete: TFDS fills another and renames it as the last step."""
    import tensorflow_datasets as tfds

    if data_dir is not None:
        data_dir = Path(data_dir).expanduser()
    builder = _builder_class()(data_dir=data_dir)
    if builder.data_path.exists():
        return builder
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except OSError:  # the rename fails if another process finished first; its folder serves as well
        if not builder.data_path.exists():
            raise
    return _builder_class()(data_dir=data_dir)


@functools.cache
def _builder_class() -> "type[tfds.core.GeneratorBasedBuilder]":
    """The builder, made on first use: importing TFDS takes a second."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.checksums import UrlInfo
    from tensorflow_datasets.core.utils import Size

    class EflaMnist(tfds.core.GeneratorBasedBuilder):
        """MNIST without TensorFlow."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            image = tfds.features.Tensor(shape=(28, 28), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
            return tfds.core.DatasetInfo(
                builder=self,
                description="The MNIST database of handwritten digits, in IDX order.",
                features=tfds.features.FeaturesDict({"image": image, "label": tfds.features.Scalar(np.int32)}),
                homepage="http://yann.lecun.com/exdb/mnist/",
                disable_shuffling=True,
            )

        @property
        def url_infos(self) -> dict[str, UrlInfo]:
            return {
                mnist_download.MIRROR + file.filename: UrlInfo(Size(file.gzip_size), file.gzip_sha256, file.filename)
                for file in mnist_download.FILES.values()
            }

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
            digits = mnist_download.fetch(functools.partial(_download, dl_manager))
            return {
                split: self._generate_examples(digits[f"{split}_images"], digits[f"{split}_labels"])
                for split in ("train", "test")
            }

        def _generate_examples(self, images, labels) -> Iterator[tuple[int, dict[str, Any]]]:
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield index, {"image": image, "label": label}

        # TFDS prints these two to standard output, where a program's own results go.
        def _log_download_bytes(self) -> None:
            logger.info("MNIST: preparing %s", self.data_path)

        def _log_download_done(self) -> None:
            logger.info("MNIST: prepared %s", self.data_path)

    return EflaMnist


def _download(dl_manager: Any, urls: Mapping[str, str]) -> Mapping[str, os.PathLike[str]]:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    try:
        return dl_manager.download(urls)
    except (tfds.download.DownloadError, NonMatchingChecksumError) as error:
        raise MnistError(str(error)) from error
