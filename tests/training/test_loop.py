"""One uninterrupted run: what it computes, logs and saves; what it refuses; how it stops at a non-finite loss."""

import dataclasses
import json
import logging
import math
import os
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from efla_jax import cli
from efla_jax.data import mnist
from efla_jax.data.pipeline import BatchIterator, batches
from efla_jax.training import loop
from efla_jax.training.checkpoint import CheckpointError, CheckpointMismatchError
from efla_jax.training.config import ConfigError, DataConfig, MeshConfig, from_json, to_json
from efla_jax.training.loop import NonFiniteError, load_run, make_program, open_workdir, train
from efla_jax.training.sharding import BATCH, make_mesh
from tests.training import small_run
from tests.training.small_run import (
    checkpoint_digests,
    checkpoint_names,
    file_digests,
    metric,
    metric_lines,
    small_config,
    state_digests,
)


@pytest.fixture(autouse=True)
def pixels(monkeypatch):
    monkeypatch.setattr("efla_jax.data.mnist.arrays", small_run.random_pixels)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a whole run of `small_config()`."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efla_jax.data.mnist.arrays", small_run.random_pixels)
        assert train(small_config(), workdir) == 12
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of it, to change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def by_hand():
    """The same steps without the loop: the metrics of each, the state after the last, and the position in the data."""
    config = small_config()
    mesh = make_mesh(config.mesh)
    source = mnist.Digits(*small_run.random_pixels("train"))
    data = batches(source, batch_size=config.train.batch_size, seed=config.train.seed)
    with jax.set_mesh(mesh):
        program = make_program(config, mesh)
        state, metrics = program.start(), []
        for _ in range(config.train.steps):
            batch = jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), next(data))
            state, values = program.step(state, batch)
            metrics.append({name: np.asarray(value) for name, value in values.items() if name != "leaf_norms"})
    return metrics, state, data.get_state()


def poison(monkeypatch, number):
    """Puts one NaN among the pixels of the batch of this number, counted from 1 in the order they are read."""
    real, seen = BatchIterator.__next__, []

    def patched(self):
        batch = real(self)
        seen.append(batch)
        if len(seen) == number:
            image = batch["image"].astype(np.float32) / 255
            image[3, 14, 14] = math.nan
            batch = batch | {"image": image}
        return batch

    monkeypatch.setattr(BatchIterator, "__next__", patched)


# what a run computes and writes


def test_metrics_and_final_state_are_those_of_the_same_steps_taken_by_hand(finished, by_hand):
    expected, state, position = by_hand
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line, values in zip(lines, expected, strict=True):
        assert line.keys() == {"step", "loss", "accuracy", "learning_rate", "grad_norm", "tokens_per_second"}
        assert 0 < line["tokens_per_second"] < math.inf
        for name, value in values.items():
            assert line[name] == float(value), name  # float32 in, the same float32 out
    assert checkpoint_digests(finished, small_config()) == {
        **state_digests(state),
        "number of the checkpoint": "12",
        "data": json.dumps(position),
    }
    assert position == {"next_record": 12 * 8}


def test_the_fixture_can_tell_steps_apart(finished):
    """Were two steps alike, the tests of exact resume could not see a step that is repeated or left out."""
    for name in ("loss", "grad_norm", "learning_rate"):
        assert len(set(metric(finished, name))) == 12


def test_same_config_same_bits(finished, tmp_path):
    train(small_config(), tmp_path / "again")
    assert metric_lines(tmp_path / "again") == metric_lines(finished)
    assert checkpoint_digests(tmp_path / "again", small_config()) == checkpoint_digests(finished, small_config())


def test_another_seed_draws_other_parameters_another_key_and_other_data(tmp_path, monkeypatch):
    real, images = BatchIterator.__next__, []

    def patched(self):
        images.append((batch := real(self))["image"])
        return batch

    monkeypatch.setattr(BatchIterator, "__next__", patched)
    states = []
    for seed in (5, 6):
        config = small_config(seed=seed, steps=1)  # at a learning rate of 0, so that the parameters are the first ones
        train(config, tmp_path / str(seed))
        states.append(checkpoint_digests(tmp_path / str(seed), config))
    for name in ("params/embed/kernel", "params/head/kernel", "key"):
        assert states[0][name] != states[1][name], name
    assert not np.array_equal(*images)


def test_intervals_of_logging_and_saving(tmp_path, monkeypatch, finished):
    ticks = iter(range(1000))
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: float(next(ticks))))
    config = small_config(steps=10, log_every=3, checkpoint_every=4, keep=2)
    assert train(config, tmp_path / "run") == 10
    assert metric(tmp_path / "run", "step") == [1, 3, 6, 9]  # the first step is logged always
    of_all = metric_lines(finished)
    assert metric_lines(tmp_path / "run") == [of_all[step - 1] for step in (1, 3, 6, 9)]
    assert checkpoint_names(tmp_path / "run") == ["10", "8"]  # 4 is gone; the last step is saved always
    # steps of 8 records of 7 tokens, by a clock that goes on by a second each time it is read
    assert metric(tmp_path / "run", "tokens_per_second") == [steps * 8 * 7.0 for steps in (1, 2, 3, 3)]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert from_json((tmp_path / "run" / "config.json").read_text()) == config


def test_a_finished_run_started_again_does_nothing_and_says_where_it_is(workdir, caplog):
    caplog.set_level(logging.INFO)
    record = (workdir / "metrics.jsonl").read_bytes()
    checkpoints = file_digests(workdir / "checkpoints")
    assert train(small_config(), workdir) == 12
    assert f"resuming {workdir} at step 12" in caplog.text
    assert (workdir / "metrics.jsonl").read_bytes() == record
    assert file_digests(workdir / "checkpoints") == checkpoints


# non-finite numbers


@pytest.mark.parametrize("bad_step", [5, 6])  # between two checkpoints, and where one is due
def test_non_finite_loss_stops_with_step_and_culprits_named(bad_step, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    train(small_config(steps=4, checkpoint_every=2), workdir)
    before = file_digests(workdir / "checkpoints")
    assert {name.split("/")[0] for name in before} == {"2", "4"}
    poison(monkeypatch, bad_step - 4)
    with pytest.raises(NonFiniteError) as caught:
        train(small_config(steps=12, checkpoint_every=2), workdir)
    message = str(caught.value)
    assert message.startswith(f"step {bad_step}: the loss is nan")
    assert "embed/kernel" in message
    assert "blocks/0/mixer/key/kernel" in message
    assert file_digests(workdir / "checkpoints") == before
    assert metric(workdir, "step") == list(range(1, bad_step))


def test_only_parameters_whose_gradient_is_not_finite_are_named():
    report = loop.Report(writer=None, config=small_config(), names=["a/x", "b/y", "c/z"], last_step=0, last_time=0.0)  # pyrefly: ignore[bad-argument-type]
    metrics = dict(loss=np.float32(1.5), grad_norm=np.float32(math.inf), leaf_norms=np.array([1, math.inf, 2]))
    with pytest.raises(NonFiniteError, match=r"^step 7: the loss is 1\.5, the gradient not finite in b/y;"):
        report(7, metrics)


def test_a_learning_rate_that_explodes_ends_the_command_in_one_line(tmp_path, capsys):
    options = [f"--config={small_run.__file__}", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *options, "--config.optimizer.peak_lr=1e38", "--config.optimizer.warmup_steps=0"])
    assert caught.value.code == 2
    *progress, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"efla train: step {len(progress) + 1}: the loss is ")
    assert "head/kernel" in last
    assert all(line.startswith("step ") for line in progress)
    assert not any(name.isdecimal() for name in checkpoint_names(tmp_path / "run"))


# workdirs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (small_config(batch_size=12), r"train\.batch_size is 12; it must be a multiple of 8"),
        (small_config(batch_size=6, mesh=MeshConfig(2, 2, 2)), r"train\.batch_size is 6; it must be a multiple of 4"),
        (small_config(mesh=MeshConfig(1, 1, 8)), r"mesh\.tensor is 8; it must divide the model's key heads, 2"),
        (small_config(mesh=MeshConfig(3, 1, 1)), r"mesh is \[3, 1, 1\] .* must multiply to the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_there_is_a_workdir(config, message, tmp_path):
    """Once there is one, it takes no other batch size."""
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (small_config(model=dict(features=24)), ["model.features: 16 there, 24 here"]),
        (small_config(batch_size=16, seed=7), ["train.batch_size: 8 there, 16 here", "train.seed: 5 there, 7 here"]),
        (small_config(optimizer=dict(peak_lr=0.02)), ["optimizer.peak_lr: 0.01 there, 0.02 here"]),
        (
            small_config(optimizer=dict(schedule="cosine"), steps=13),
            ["optimizer.schedule: 'constant' there, 'cosine' here", "train.steps: 12 there, 13 here"],
        ),
    ],
)
def test_a_workdir_of_another_config_is_refused_field_by_field(config, named, workdir):
    before = file_digests(workdir)
    with pytest.raises(ConfigError) as caught:
        train(config, workdir)
    message = str(caught.value)
    assert repr(str(workdir)) in message
    for line in named:
        assert line in message
    assert message.count(" there, ") == len(named)
    assert file_digests(workdir) == before


def test_fields_that_change_nothing_computed_may_differ(workdir):
    free = dict(log_every=7, checkpoint_every=5, keep=1, steps=99)
    config = dataclasses.replace(small_config(**free), data=DataConfig(data_dir="elsewhere"), mesh=MeshConfig(2, 2, 2))
    assert open_workdir(workdir, config) == workdir


def test_steps_may_not_change_where_the_learning_rate_depends_on_them(tmp_path):
    cosine = dict(schedule="cosine")
    open_workdir(tmp_path, small_config(optimizer=cosine))
    open_workdir(tmp_path, small_config(optimizer=cosine))
    with pytest.raises(ConfigError, match=r"train\.steps: 12 there, 13 here"):
        open_workdir(tmp_path, small_config(optimizer=cosine, steps=13))


def test_an_unwritable_workdir_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    below = tmp_path / "file" / "below"
    with pytest.raises(ConfigError, match=f"--workdir is '{below}', which cannot be written: "):
        train(small_config(), below)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", f"--config={small_run.__file__}", f"--workdir={tmp_path / 'file'}"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"efla train: --workdir is '{tmp_path / 'file'}', which cannot be written: ")
    assert (tmp_path / "file").read_text() == "kept"


def _without_train(text):
    return json.dumps({name: value for name, value in json.loads(text).items() if name != "train"}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2].encode(),
        lambda text: b"",
        lambda text: b"null",
        lambda text: b"\xff\xfe" + text.encode(),
        lambda text: text.replace("ClassifierConfig", "Unheard").encode(),
        lambda text: text.replace('"steps"', '"stepz"').encode(),
        _without_train,
    ],
)
def test_a_corrupt_config_file_is_named(damage, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(damage(to_json(small_config())))
    before = file.read_bytes()
    for opened in (lambda: open_workdir(tmp_path, small_config()), lambda: load_run(tmp_path)):
        with pytest.raises(ConfigError) as caught:
            opened()
        assert str(file) in str(caught.value)
    assert file.read_bytes() == before


def test_a_config_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=str(tmp_path)):
        open_workdir(tmp_path, small_config())


def test_a_checkpoint_of_another_model_is_refused_leaf_by_leaf(workdir, caplog):
    other = small_config(model=dict(hidden=24))
    (workdir / "config.json").write_text(to_json(other))
    before = file_digests(workdir / "checkpoints")
    for call in (lambda: train(other, workdir), lambda: load_run(workdir)):
        with pytest.raises(CheckpointMismatchError) as caught:
            call()
        message = str(caught.value)
        assert str(workdir / "checkpoints" / "12") in message
        for name, held, needed in (("up", [16, 16], [16, 24]), ("down", [16, 16], [24, 16])):
            leaf = f"params/blocks/0/mlp/{name}/kernel"
            assert f"{leaf}/value: the checkpoint holds float32{held}, the model needs float32{needed}" in message
        assert "mixer" not in message
    assert file_digests(workdir / "checkpoints") == before
    assert "skipped" not in caplog.text  # it is no damaged one


# load_run


def test_load_run_gives_what_was_trained(workdir, by_hand):
    _, state, _ = by_hand
    run = load_run(workdir)
    assert (run.config, run.step) == (small_config(), 12)
    assert state_digests(run.params) == state_digests(state["params"])
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(run.params))

    manifest = workdir / "checkpoints" / "12" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"step", b"stop", 1))
    older = load_run(workdir)
    assert older.step == 9
    assert state_digests(older.params) != state_digests(run.params)


def test_load_run_without_a_run_or_a_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=f"--workdir is '{tmp_path / 'none'}', which holds no run"):
        load_run(tmp_path / "none")
    with pytest.raises(ConfigError, match="holds no run"):
        load_run(tmp_path)
    assert os.listdir(tmp_path) == []
    open_workdir(tmp_path, small_config())
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'checkpoints'} holds no checkpoint"):
        load_run(tmp_path)
