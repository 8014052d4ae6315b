"""Batches: every record once an epoch, the same rows whatever the process count, exact resume."""

import itertools

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from efla_jax.data.pipeline import batches

RECORDS = 37


class Numbers:
    """Record i holds i, and i in every pixel."""

    def __init__(self, size=RECORDS):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"image": np.full((2, 2), index, np.uint8), "label": np.int32(index)}


def processes(count, source=None, **options):
    """The iterators of `count` processes over one stream."""
    source = source or Numbers()
    return [batches(source, process_index=i, process_count=count, **options) for i in range(count)]


def labels(iterators, count=None):
    """The labels of `count` global batches: the rows of all processes, in their order."""
    rounds = itertools.islice(zip(*iterators, strict=True), count)
    return [np.concatenate([part["label"] for part in parts]).tolist() for parts in rounds]


def stream(count, **options):
    """The first `count` records of the stream, all of whose batches are full."""
    numbers = []
    for batch in batches(Numbers(), **options):
        assert len(batch["label"]) == options["batch_size"]
        numbers += batch["label"].tolist()
        if len(numbers) >= count:
            return np.array(numbers[:count])
    raise AssertionError("the stream ends")


def test_batch_arrays():
    batch = next(batches(Numbers(), batch_size=8, seed=0))
    assert (batch["image"].shape, batch["image"].dtype) == ((8, 2, 2), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((8,), np.int32)
    assert (batch["image"] == batch["label"][:, None, None]).all()


@pytest.mark.parametrize("batch_size", [1, 5, 8, 37, 50])
def test_each_record_once_an_epoch(batch_size):
    epochs = stream(3 * RECORDS, batch_size=batch_size, seed=0).reshape(3, RECORDS)
    for epoch in epochs:
        assert sorted(epoch) == list(range(RECORDS))
    assert len(np.unique(epochs, axis=0)) == 3, "an epoch repeats the order of another"


def test_the_seed_alone_decides_the_order():
    first = stream(2 * RECORDS, batch_size=8, seed=3)
    np.testing.assert_array_equal(first, stream(2 * RECORDS, batch_size=5, seed=3))
    other = stream(2 * RECORDS, batch_size=8, seed=4)
    assert (first[:RECORDS] != other[:RECORDS]).any()
    assert (first[RECORDS:] != other[:RECORDS]).any(), "seeds are epochs of one another"


def test_in_order():
    order = stream(2 * RECORDS, batch_size=8, shuffle=False)
    assert order.tolist() == 2 * list(range(RECORDS))


@pytest.mark.parametrize("shuffle", [False, True])
def test_one_pass_keeps_the_last_batch(shuffle):
    one_pass = batches(Numbers(), batch_size=8, seed=0, shuffle=shuffle, repeat=False)
    passed = labels([one_pass])
    assert [len(batch) for batch in passed] == [8, 8, 8, 8, 5]
    seen = [label for batch in passed for label in batch]
    assert (sorted(seen) if shuffle else seen) == list(range(RECORDS))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_each_global_batch(count):
    parts = processes(count, batch_size=8, seed=0)
    assert [len(next(part)["label"]) for part in parts] == [8 // count] * count
    whole = batches(Numbers(), batch_size=8, seed=0)
    next(whole)
    assert labels(parts, 12) == labels([whole], 12)


def test_processes_share_a_single_pass():
    parts = processes(2, Numbers(16), batch_size=8, shuffle=False, repeat=False)
    assert labels(parts) == [list(range(8)), list(range(8, 16))]


@pytest.mark.parametrize("steps", [0, 3, 4, 5, 9])  # an epoch ends within the fifth batch
def test_resume_by_state(steps):
    uninterrupted = processes(1, batch_size=8, seed=0)
    labels(uninterrupted, steps)
    state = uninterrupted[0].get_state()
    assert state == {"next_record": 8 * steps}
    expected = labels(uninterrupted, 12)

    resumed = processes(1, batch_size=8, seed=0)
    labels(resumed, 2)
    resumed[0].set_state(state)
    assert labels(resumed, 12) == expected
    assert resumed[0].get_state() == uninterrupted[0].get_state()


def test_resume_on_another_process_count():
    whole, parts = (processes(count, batch_size=8, seed=0) for count in (1, 2))
    labels(whole, 7)
    for part in parts:
        part.set_state(whole[0].get_state())
    assert labels(parts, 6) == labels(whole, 6)


def test_resume_after_the_last_batch():
    done, resumed = (processes(1, batch_size=8, shuffle=False, repeat=False) for _ in range(2))
    assert len(labels(done)) == 5
    resumed[0].set_state(done[0].get_state())
    assert labels(resumed) == []


def test_resume_between_two_batches():
    iterator = batches(Numbers(), batch_size=8, seed=0)
    with pytest.raises(ValueError, match="next_record is 12; it must be a multiple of batch_size"):
        iterator.set_state({"next_record": 12})


@pytest.mark.parametrize("count", [1, 2])
def test_orbax_checkpoint(tmp_path, count):
    whole = processes(1, batch_size=8, seed=0)
    labels(whole, 7)
    saving = ocp.save_checkpointables_async(tmp_path / "checkpoint", {"data": whole[0]})
    expected = labels(whole, 6)  # the position saved is that of the call
    saving.result()

    parts = processes(count, batch_size=8, seed=0)
    for part in parts:
        ocp.load_checkpointables(tmp_path / "checkpoint", {"data": part})
    assert labels(parts, 6) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be a positive multiple of process_count, 1"),
        ({"batch_size": -8}, "batch_size is -8; it must be a positive"),
        (
            {"batch_size": 7, "process_count": 2},
            "batch_size is 7; it must be a positive multiple of process_count, 2",
        ),
        ({"process_count": 0}, "multiple of process_count, 0"),
        (
            {"process_index": 2, "process_count": 2},
            r"process_index is 2; it must be in \[0, 2\)",
        ),
        ({"process_index": -1}, r"process_index is -1; it must be in \[0, 1\)"),
        ({"source": Numbers(0)}, "source is empty"),
        ({"seed": None}, "seed is None; shuffle=True needs an integer"),
        (
            {"repeat": False, "process_count": 2},
            "batch_size is 8; with repeat=False and 2 processes it must divide the 37 records",
        ),
    ],
)
def test_bad_arguments(options, message):
    arguments = {"source": Numbers(), "batch_size": 8, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        batches(**arguments)
