"""Checkpoints under real faults: flipped bits, lost and cut files."""

import gc
import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efla_jax.training import manifest
from efla_jax.training.checkpoint import (
    CheckpointError,
    CheckpointMismatchError,
    Checkpoints,
    load_newest,
)
from tests.training.small_checkpoints import (
    assert_restores,
    assert_same_bits,
    batches,
    build_state,
    load,
    names,
    restore,
    save_steps,
)


def place(state, mesh_shape=(4, 2)):
    """Shards matrices over both axes of a mesh, and replicates the other leaves."""
    mesh = jax.make_mesh(mesh_shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    return jax.tree.map(
        lambda leaf: jax.device_put(
            leaf,
            NamedSharding(mesh, PartitionSpec("data", "fsdp") if leaf.ndim == 2 else PartitionSpec()),
        ),
        state,
    )


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("three_steps")
    save_steps(directory, [1, 2, 3])
    return directory


@pytest.fixture
def workdir(three_steps, tmp_path):
    """A fresh copy of a directory with the good checkpoints 1, 2 and 3."""
    return Path(shutil.copytree(three_steps, tmp_path / "workdir"))


def test_restore_on_other_meshes_gives_the_same_bits(tmp_path):
    saved = place(build_state(5))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, saved, batches())
    for mesh_shape in [(4, 2), (2, 4), (8, 1), (1, 1)]:
        wanted = place(build_state(0), mesh_shape)
        state, step = restore(tmp_path, wanted, batches())
        assert step == 5
        assert_same_bits(state, saved)
        for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding == other.sharding
        form = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            wanted,
        )
        state, _ = load(tmp_path, form)
        assert_same_bits(state, saved)


@pytest.mark.parametrize("devices", [1, 8])
def test_save_holds_the_state_of_its_call_though_its_buffers_are_donated(tmp_path, devices):
    """The steps after a save overwrite what they can while orbax still writes."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    sharded, copied = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    state = {
        "sharded": jax.device_put(jnp.zeros((8, 1 << 17)), sharded),
        "copied": jax.device_put(jnp.zeros((5, 1 << 15)), copied),
        "half": jax.device_put(jnp.zeros((8, 3, 1 << 15), jnp.bfloat16), sharded),
        "scalar": jax.device_put(jnp.zeros(()), copied),
    }
    train = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    data, last = batches(), 12
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for step in range(1, last + 1):
            next(data)
            state = train(state)
            if step % 3 == 0:
                checkpoints.save(step, state, data)
    for saved in range(last, 0, -3):
        data, untouched = batches(), batches()
        restored, step = restore(tmp_path, state, data)
        assert step == saved
        for name, leaf in restored.items():
            assert np.unique(np.asarray(leaf, np.float32)).tolist() == [saved], name
        for _ in range(saved):
            next(untouched)
        np.testing.assert_array_equal(next(data), next(untouched))
        shutil.rmtree(tmp_path / str(saved))


def test_no_save_is_skipped_while_another_is_under_way(tmp_path):
    save_steps(tmp_path, range(1, 7), keep=None)
    assert names(tmp_path) == ["1", "2", "3", "4", "5", "6"]


def test_checkpoint_is_published_without_a_further_call(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, build_state(1), batches())
        deadline = time.monotonic() + 20
        while not (tmp_path / "1" / manifest.NAME).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert names(tmp_path) == ["1"]


def test_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_steps("here", [1])
    assert_restores("here", 1)


def test_empty_directory_holds_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "new" / "deep") as checkpoints:
        assert checkpoints.restore(build_state(0), batches()) is None
        assert checkpoints.latest is None
    assert load_newest(tmp_path / "absent", build_state(0)) is None
    assert names(tmp_path) == ["new"]


def test_unfinished_save_alone_is_no_checkpoint(tmp_path, caplog):
    (tmp_path / "saving-1.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(build_state(0), batches()) is None
    assert names(tmp_path) == []
    assert "saving-1.orbax-checkpoint-tmp skipped" in caplog.text


def test_one_flipped_bit_in_any_file_is_named_and_skipped(workdir, caplog):
    files = [file for file in (workdir / "3").rglob("*") if file.is_file() and file.stat().st_size]
    kinds = {file.relative_to(workdir / "3").parts[0] for file in files}
    assert kinds >= {"state", "data", manifest.NAME, "_CHECKPOINT_METADATA"}
    for file in files:
        content = file.read_bytes()
        flip_bit(file)
        caplog.clear()
        _, step = load(workdir, build_state(0))
        assert step == 2
        name = file.relative_to(workdir / "3")
        assert f"{workdir / '3'} skipped: {name} is corrupt" in caplog.text
        file.write_bytes(content)
    assert_restores(workdir, 3)


def test_one_flipped_bit_anywhere_in_the_manifest_is_damage(workdir):
    path = workdir / "3"
    raw = (path / manifest.NAME).read_bytes()
    for i in range(0, len(raw), 7):
        damaged = bytearray(raw)
        damaged[i] ^= 1 << i % 8
        (path / manifest.NAME).write_bytes(damaged)
        with pytest.raises(manifest.DamagedError, match=r"manifest\.json is corrupt"):
            manifest.read(path)
    (path / manifest.NAME).write_bytes(raw)
    manifest.verify(path, manifest.read(path))


def cut(file):
    os.truncate(file, file.stat().st_size - 1)


def grow(file):
    file.write_bytes(file.read_bytes() + b"\0")


def add(file):
    (file.parent / "stray").touch()


@pytest.mark.parametrize(
    ("fault", "file", "reason"),
    [
        (Path.unlink, manifest.NAME, r"half-written, manifest.json is missing"),
        (cut, manifest.NAME, r"manifest.json is corrupt"),
        (Path.unlink, "state/_METADATA", r"half-written, state/_METADATA is missing"),
        (Path.unlink, "data/process_0-of-1.json", r"half-written, data/process_0\S* is missing"),
        (cut, "state/manifest.ocdbt", r"half-written, state/manifest.ocdbt has \d+ of \d+ bytes"),
        (grow, "data/process_0-of-1.json", r"half-written, data/process_0\S* has \d+ of \d+ bytes"),
        (add, "state/_METADATA", r"state/stray is not one of its files"),
    ],
)
def test_half_written_checkpoint_is_skipped(workdir, caplog, fault, file, reason):
    fault(workdir / "3" / file)
    assert_restores(workdir, 2)
    [record] = [record for record in caplog.records if "skipped" in record.message]
    assert record.levelno == logging.WARNING
    assert re.search(f"{workdir}/3 skipped: {reason}", record.message)


def test_every_checkpoint_damaged_names_each_and_touches_none(workdir):
    (workdir / "1" / manifest.NAME).unlink()
    flip_bit(workdir / "2" / "data" / "process_0-of-1.json")
    cut(workdir / "3" / "state" / "_METADATA")
    for _ in range(2):  # a second attempt must not find an empty directory
        with Checkpoints(workdir) as checkpoints, pytest.raises(CheckpointError) as caught:
            checkpoints.restore(build_state(0), batches())
        message = str(caught.value)
        assert f"{workdir}/1: half-written, manifest.json is missing" in message
        assert f"{workdir}/2: data/process_0-of-1.json is corrupt" in message
        assert f"{workdir}/3: half-written, state/_METADATA has" in message
        assert names(workdir) == ["1", "2", "3"]


def test_damaged_step_is_set_aside_and_saved_again(workdir, caplog):
    flip_bit(workdir / "3" / "state" / "_METADATA")
    for _ in range(2):
        data = batches()
        with Checkpoints(workdir) as checkpoints:
            checkpoints.restore(build_state(0), data)
            assert checkpoints.latest == 2
            assert names(workdir) == ["1", "2", "corrupt-3"]
            assert f"moved to {workdir / 'corrupt-3'}" in caplog.text
            next(data)
            checkpoints.save(3, build_state(3), data)
            assert checkpoints.latest == 3
        assert names(workdir) == ["1", "2", "3", "corrupt-3"]
        assert_restores(workdir, 3)
        cut(workdir / "3" / "state" / "_METADATA")  # once more, with a corrupt-3 in the way


def test_evaluation_reads_some_parts_and_changes_nothing(workdir, caplog):
    flip_bit(workdir / "3" / "state" / "_METADATA")
    (workdir / "saving-4").mkdir()
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    wanted: dict[str, Any] = {name: build_state(0)[name] for name in ("params", "rest")}
    state, step = load(workdir, wanted)
    assert step == 2
    assert_same_bits(state, {name: build_state(2)[name] for name in ("params", "rest")})
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    assert "3 skipped" in caplog.text

    wanted["params"] = {"kernel": wanted["params"]["kernel"]}
    with pytest.raises(CheckpointMismatchError, match=r"params/bias/value: the checkpoint holds"):
        load_newest(workdir, wanted)


def test_another_models_checkpoint_is_refused_leaf_by_leaf(workdir):
    wanted = build_state(0, width=32)
    del wanted["params"]["half"]
    wanted["params"]["bias"] = nnx.Param(wanted["params"]["bias"].astype(jnp.bfloat16))
    wanted["extra"] = jnp.zeros(3)
    wanted["key"] = jax.random.key(0, impl="rbg")
    flip_bit(workdir / "3" / "state" / "_METADATA")  # damaged or not, 3 is of the other model
    with Checkpoints(workdir) as checkpoints, pytest.raises(CheckpointMismatchError) as caught:
        checkpoints.restore(wanted, batches())
    lines = str(caught.value).splitlines()
    assert str(workdir / "3") in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "extra: the checkpoint holds nothing, the model needs float32[3]",
        "key: the checkpoint holds key<fry>[], the model needs key<rbg>[]",
        *(
            f"opt_state/0/{moment}/{leaf}"
            for moment in ("mu", "nu")
            for leaf in (
                "bias/value: the checkpoint holds float32[16], the model needs float32[32]",
                "kernel/value: the checkpoint holds float32[8, 16], the model needs float32[8, 32]",
            )
        ),
        "params/bias/value: the checkpoint holds float32[16], the model needs bfloat16[32]",
        "params/half/value: the checkpoint holds bfloat16[8, 4], the model needs nothing",
        "params/kernel/value: the checkpoint holds float32[8, 16], the model needs float32[8, 32]",
    ]
    assert names(workdir) == ["1", "2", "3"]


def test_keep_counts_good_checkpoints_only(workdir):
    """Bit flips in checkpoints of an earlier run come to light when they are to be counted."""
    flip_bit(workdir / "2" / "state" / "_METADATA")
    data = batches()
    with Checkpoints(workdir, keep=3) as checkpoints:
        checkpoints.restore(build_state(0), data)
        checkpoints.save(4, build_state(4), data)
        checkpoints.wait()
        assert names(workdir) == ["1", "3", "4", "corrupt-2"]
        for step in (5, 6):
            checkpoints.save(step, build_state(step), data)
    assert names(workdir) == ["4", "5", "6", "corrupt-2"]


def test_keep_one_leaves_the_newest(tmp_path):
    save_steps(tmp_path, [1, 2, 3], keep=1)
    assert names(tmp_path) == ["3"]
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_bad_arguments_are_named(workdir):
    data = batches()
    with Checkpoints(workdir) as checkpoints:
        with pytest.raises(CheckpointError, match=r"cannot save step 3 .* step 3 is there"):
            checkpoints.save(3, build_state(3), data)
        with pytest.raises(TypeError, match=r"params/w is a ndarray; must be jax\.Array"):
            checkpoints.save(4, {"params": {"w": np.zeros(3)}}, data)
        with pytest.raises(ValueError, match="state leaf key has no sharding"):
            checkpoints.restore(jax.eval_shape(lambda: build_state(0)), data)
    assert names(workdir) == ["1", "2", "3"]


def test_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"cannot write checkpoints to {tmp_path}/file/below"):
        Checkpoints(tmp_path / "file" / "below")
    with pytest.raises(CheckpointError, match="cannot write checkpoints to /proc/self"):
        Checkpoints("/proc/self")


# orbax leaves the load of the state behind when that of the iterator fails.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_iterator_of_another_process_count_is_an_error_not_damage(workdir):
    path = workdir / "3"
    os.rename(path / "data" / "process_0-of-1.json", path / "data" / "process_0-of-2.json")
    content = manifest.read(workdir / "2") | {"step": 3}
    (path / manifest.NAME).unlink()
    manifest.write(path, content)
    with (
        Checkpoints(workdir) as checkpoints,
        pytest.raises(CheckpointError, match=r"undamaged but does not load: .*process_0-of-1.json"),
    ):
        checkpoints.restore(build_state(0), batches())
    assert names(workdir) == ["1", "2", "3"]
    gc.collect()  # while the filter holds
