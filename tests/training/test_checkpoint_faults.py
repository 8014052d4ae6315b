"""What a full disk and kills while a checkpoint is saved leave: the last good one."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax.training.checkpoint import CheckpointError, Checkpoints
from tests.training.small_checkpoints import assert_restores, batches, build_state, load, names, restore


# orbax lets its thread end with the exception that it also hands on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk_surfaces_on_the_next_call_and_leaves_the_last_good_one(small_disk, tmp_path, caplog):
    disk = small_disk(tmp_path / "disk", mebibytes=2)
    big = {"params": jax.random.normal(jax.random.key(0), (1 << 20,))}  # 4 MiB
    with Checkpoints(disk) as checkpoints:
        checkpoints.save(1, {"params": jnp.arange(3)}, batches())
        checkpoints.save(2, big, batches())
        with pytest.raises(CheckpointError, match=f"saving checkpoint 2 to {disk} failed"):
            checkpoints.save(3, big, batches())
        assert f"saving checkpoint 2 to {disk} failed" in caplog.text
        assert names(disk) == ["1"]  # no debris that keeps the disk full
        checkpoints.save(3, {"params": jnp.arange(4)}, batches())
    assert names(disk) == ["1", "3"]

    def save_then(end):
        with Checkpoints(disk) as checkpoints:
            checkpoints.save(4, big, batches())
            end()

    with pytest.raises(CheckpointError, match="saving checkpoint 4"):
        save_then(lambda: None)
    with pytest.raises(StopIteration):  # what ended the block is not hidden
        save_then(lambda: next(iter(())))
    state, step = load(disk, {"params": jnp.zeros(4, jnp.int32)})
    assert step == 3
    assert state["params"].tolist() == [0, 1, 2, 3]


def test_kill_between_any_two_file_operations_loses_no_checkpoint(tmp_path, monkeypatch):
    """Copies the directory before each rename and sync of a save: what a kill there leaves."""
    workdir, copies = tmp_path / "workdir", tmp_path / "copies"
    lock = threading.Lock()

    def copy_first(function):
        def call(*arguments, **options):
            with lock:
                shutil.copytree(workdir, copies / f"{len(list(copies.iterdir())):03d}")
            return function(*arguments, **options)

        return call

    data = batches()
    with Checkpoints(workdir, keep=1) as checkpoints:
        next(data)
        checkpoints.save(1, build_state(1), data)
        checkpoints.wait()
        copies.mkdir()
        with monkeypatch.context() as patched:
            for name in ("rename", "fsync"):
                patched.setattr(os, name, copy_first(getattr(os, name)))
            patched.setattr(shutil, "rmtree", copy_first(shutil.rmtree))
            next(data)
            checkpoints.save(2, build_state(2), data)
            checkpoints.wait()
    found = [load(copy, build_state(0))[1] for copy in sorted(copies.iterdir())]
    assert len(found) > 10
    assert found == sorted(found)
    assert set(found) == {1, 2}
    for copy in sorted(copies.iterdir())[:: len(found) // 5]:
        _, step = restore(copy, build_state(0), batches())
        assert not [name for name in names(copy) if not name.isdecimal()]
        assert_restores(copy, step)


CHILD = """
import sys
import grain, jax, jax.numpy as jnp, numpy as np
from efla_jax.training.checkpoint import Checkpoints

train = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
state = {str(i): jnp.zeros(1 << 18) for i in range(8)}
data, first = iter(grain.MapDataset.range(10**6).to_iter_dataset()), 0
with Checkpoints(sys.argv[1]) as checkpoints:
    restored = checkpoints.restore(state, data)
    if restored is not None:
        state, first = restored
        assert all((np.asarray(leaf) == first).all() for leaf in state.values())
    print("restored", first, flush=True)
    for step in range(first + 1, 10**6):
        assert next(data) == step - 1
        state = train(state)
        checkpoints.save(step, state, data)
        print("saving", step, flush=True)
"""


def test_kill_minus_nine_during_saves_then_resume(tmp_path):
    """Each run restores what the killed one before it left, checks it, and is killed later on."""
    workdir, published = tmp_path / "workdir", 0
    for saves, delay in [(2, 0.0), (4, 0.03)]:
        child = subprocess.Popen([sys.executable, "-c", CHILD, workdir], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        restored = int(child.stdout.readline().split()[1])
        assert restored >= published
        for step in range(restored + 1, restored + 1 + saves):
            assert child.stdout.readline() == f"saving {step}\n"
        time.sleep(delay)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        published = restored + saves - 1  # a save waits until the one before it is published
    state = {str(i): jnp.zeros(1 << 18) for i in range(8)}
    data = iter(grain.MapDataset.range(10**6).to_iter_dataset())
    state, step = restore(workdir, state, data)
    assert step >= published >= 4
    assert next(data) == step
    assert all((np.asarray(leaf) == step).all() for leaf in state.values())
