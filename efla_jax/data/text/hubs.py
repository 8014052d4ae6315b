"""Data sets of two hubs: those that TFDS has prepared, and those that the package `datasets` loads.

Both fail at once when the data are not to be had; neither retries a host that does not answer.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from efla_jax.choices import nearest
from efla_jax.data.mnist_download import await_answer
from efla_jax.data.text import TextError

type Records = Callable[[], Iterator[Mapping[str, Any]]]

# Records that are read at a time: one by one, each costs a call into the reader.
_READ = 1024


def tfds_records(name: str, split: str) -> Records:
    """The records of a data set that TFDS has prepared as ArrayRecord, read without TensorFlow."""
    import tensorflow_datasets as tfds

    spec = f"tfds:{name}"
    try:
        builder = tfds.builder(name)
        splits: Any = builder.info.splits  # none: not prepared
        source: Any = builder.as_data_source(cast(Any, split)) if splits else None
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)  # those need TensorFlow
        raise TextError(f"{spec}: TFDS knows no such data set{nearest(name, known)}") from error
    except Exception as error:  # whatever a data set's own code and the readers raise
        raise TextError(f"{spec}, split {split!r}: {_first_line(error)}") from error
    if source is None:
        raise TextError(
            f"{spec} is not prepared: {builder.data_path} does not hold it."
            f' tfds.builder({name!r}, file_format="array_record").download_and_prepare() makes it'
        )

    def records() -> Iterator[Mapping[str, Any]]:
        for indices in itertools.batched(range(len(source)), _READ):
            yield from source.__getitems__(indices)

    return records


def hugging_face_records(name: str, split: str) -> Records:
    """The records of OWNER/NAME, OWNER/NAME/CONFIG or a folder, loaded by `datasets`."""
    spec = f"hf:{name}"
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError as error:
        raise TextError(f"{spec} needs the package datasets: pip install 'efla-jax[hf]' ({error})") from error
    path, config = name, None
    if not Path(name).is_dir():
        owner, _, rest = name.partition("/")
        dataset, _, config = rest.partition("/")
        path = f"{owner}/{dataset}" if dataset else owner
        _await_hub(spec, constants.ENDPOINT)
    try:
        loaded: Any = datasets.load_dataset(path, config or None, split=split)
    except Exception as error:  # whatever the loader of a data set raises
        raise TextError(f"{spec}, split {split!r}: {_first_line(error)}") from error
    return lambda: iter(loaded)


HUBS: dict[str, Callable[[str, str], Records]] = {"tfds": tfds_records, "hf": hugging_face_records}


def _await_hub(spec: str, address: str) -> None:
    """`datasets` asks a hub that does not answer for half a minute and more; this asks it once."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return
    try:
        await_answer(address)
    except OSError as error:
        raise TextError(
            f"{spec}: {address} does not answer: {error}. With HF_HUB_OFFLINE=1 what was loaded before is used"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
