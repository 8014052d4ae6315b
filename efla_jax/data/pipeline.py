"""Batches from a random-access source, resumable at a global record index.

Record n of the stream is the same for every process count, and batch i of all processes together is
records [i * batch_size, (i + 1) * batch_size) in order: a run may restart on another process count.
"""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

_POSITION_FILE = "position.json"
# "Forever", in records. grain computes the number of batches in floating point, exact up to here.
_ENDLESS = 2**53
# The sources hold their records in memory: a reading thread would only compete for the interpreter.
_READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class BatchIterator(grain.DatasetIterator):
    """Yields dicts of arrays; its state, {"next_record": int}, counts the records of all processes.

    As an orbax checkpointable it is one file that every process reads, whatever their number.
    """

    def __init__(self, local_batches: grain.DatasetIterator, batch_size: int, process_index: int):
        super().__init__(local_batches)
        self._batch_size = batch_size
        self._process_index = process_index

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._parent)

    def get_state(self) -> dict[str, int]:
        return {"next_record": grain.experimental.get_next_index(self._parent) * self._batch_size}

    def set_state(self, state: Mapping[str, int]) -> None:
        batch, rest = divmod(state["next_record"], self._batch_size)
        if rest:
            raise ValueError(
                f"next_record is {state['next_record']}; it must be a multiple of batch_size, {self._batch_size}"
            )
        grain.experimental.set_next_index(self._parent, batch)

    async def save(self, directory):
        text = json.dumps(self.get_state())  # taken now: training goes on while the file is written

        async def write() -> None:
            folder = await directory.await_creation()
            if self._process_index == 0:
                await asyncio.to_thread((folder / _POSITION_FILE).write_text, text)

        return write()

    async def load(self, directory):
        async def read() -> None:
            self.set_state(json.loads(await asyncio.to_thread(Path(directory, _POSITION_FILE).read_text)))

        return read()


def batches(
    source: grain.sources.RandomAccessDataSource[Mapping[str, Any]],
    *,
    batch_size: int,
    seed: int | None = None,
    shuffle: bool = True,
    repeat: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Iterates over this process's rows, batch_size / process_count of them, of each global batch.

    `source` holds records, dicts of arrays or scalars of one shape and dtype per key. `shuffle`
    draws a new order of all of them for every epoch, a function of `seed` alone. `repeat` makes the
    stream endless, with batches that run across the border of two epochs; without it the last batch
    may be short, which several processes cannot share. Evaluation: shuffle=False, repeat=False.
    """
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size is {batch_size}; it must be a positive multiple of process_count, {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}; it must be in [0, {process_count})")
    if len(source) == 0:
        raise ValueError("source is empty; it must hold at least one record")
    if not repeat and process_count > 1 and len(source) % batch_size:
        raise ValueError(
            f"batch_size is {batch_size}; with repeat=False and {process_count} processes"
            f" it must divide the {len(source)} records of the source"
        )
    records = grain.MapDataset.source(source)
    if shuffle:
        if seed is None:
            raise ValueError("seed is None; shuffle=True needs an integer")
        records = records.seed(seed).shuffle()
    if repeat:
        records = records.repeat(_ENDLESS // len(source))
    # Batch i of process p is piece i * process_count + p of the stream cut into local batches.
    local_batches = records.batch(batch_size // process_count)[process_index::process_count]
    return BatchIterator(iter(local_batches.to_iter_dataset(_READ)), batch_size, process_index)
