"""Runs that are cut short and started again end as if nothing had happened: the same losses, the same bits."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from efla_jax.data.pipeline import BatchIterator
from efla_jax.training.checkpoint import Checkpoints
from efla_jax.training.config import MeshConfig
from efla_jax.training.loop import train
from tests.training import small_run
from tests.training.small_run import (
    checkpoint_digests,
    checkpoint_names,
    finish,
    metric,
    metric_lines,
    small_config,
    start,
)


@pytest.fixture(autouse=True)
def pixels(monkeypatch):
    monkeypatch.setattr("efla_jax.data.mnist.arrays", small_run.random_pixels)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The workdir of a whole run of `small_config()`."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efla_jax.data.mnist.arrays", small_run.random_pixels)
        assert train(small_config(), workdir) == 12
    return workdir


def assert_same_run(workdir, expected, config):
    assert metric_lines(workdir) == metric_lines(expected)
    assert checkpoint_digests(workdir, config) == checkpoint_digests(expected, config)


# killed


def wait_for_step(child: subprocess.Popen[str], step: int) -> int:
    """Returns when the child has logged this many steps of its own, with the number of the last."""
    assert child.stderr is not None
    seen: list[int] = []
    while len(seen) < step:
        line = child.stderr.readline()
        assert line, f"the run ended before it was to be killed; it had logged the steps {seen}"
        seen += [int(number) for number in re.findall(r"^step (\d+)/", line)]
    return seen[-1]


def kill(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def kill_during_a_save(child: subprocess.Popen[str], checkpoints: Path) -> None:
    """Kills it while a save is under way: looks at it while it is stopped, so that the save cannot end meanwhile."""
    debris = []
    while not debris:
        time.sleep(0.002)
        if next(checkpoints.glob("saving-*"), None):
            child.send_signal(signal.SIGSTOP)
            _, status = os.waitpid(child.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), f"the run ended with {status} before it was to be killed"
            debris = list(checkpoints.glob("saving-*"))
            if not debris:
                child.send_signal(signal.SIGCONT)
    kill(child)
    assert list(checkpoints.glob("saving-*")) == debris


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(devices, tmp_path):
    steps, moments = 30, random.Random()
    workdir, checkpoints = tmp_path / "killed", tmp_path / "killed" / "checkpoints"
    options = (f"--config.train.steps={steps}",)
    finish(start(tmp_path / "uninterrupted", *options, devices=devices))

    child = start(workdir, *options, devices=devices)
    wait_for_step(child, moments.randint(1, 2))  # there is no checkpoint yet, or hardly
    kill(child)
    child = start(workdir, *options, devices=devices)
    wait_for_step(child, moments.randint(8, 12))  # a save begins when the one before is there: that of step 3
    time.sleep(moments.uniform(0, 0.05))
    kill(child)
    child = start(workdir, *options, devices=devices)
    wait_for_step(child, 1)  # what the last kill left is deleted by now
    kill_during_a_save(child, checkpoints)
    assert metric(workdir, "step")[-1] < steps

    _, log = finish(start(workdir, *options, devices=devices))
    assert f"resuming {workdir} at step" in log
    assert re.search(r"checkpoint \S+/saving-\S+ skipped and deleted: its save was cut off", log)
    assert metric(workdir, "step") == list(range(1, steps + 1))
    assert_same_run(workdir, tmp_path / "uninterrupted", small_config(steps=steps))
    assert not list(checkpoints.glob("saving-*"))


# told to end


def on_batch(monkeypatch, number, action):
    """Runs the action when the batch of this number is read, counted from 1."""
    real, count = BatchIterator.__next__, iter(range(1, 1000))

    def patched(self):
        if next(count) == number:
            action()
        return real(self)

    monkeypatch.setattr(BatchIterator, "__next__", patched)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def outer_handler():
    """Stands in for the end of this process by SIGTERM: the list of the signals that came through."""
    received = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize("step", [1, 5, 6])  # the first; between two checkpoints; where one is due
def test_sigterm_saves_the_step_at_hand(step, tmp_path, monkeypatch, uninterrupted, outer_handler):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        on_batch(patch, step, terminate)
        assert train(small_config(), workdir) == step
    assert checkpoint_names(workdir)[-1] == str(step)
    assert metric(workdir, "step") == list(range(1, step + 1))
    assert outer_handler == []
    terminate()  # the handler of before is back
    assert outer_handler == [signal.SIGTERM]
    assert train(small_config(), workdir) == 12
    assert_same_run(workdir, uninterrupted, small_config())


def test_a_second_sigterm_does_not_cut_off_the_last_save(tmp_path, monkeypatch, outer_handler):
    wait = Checkpoints.close

    def terminate_first(self):
        terminate()
        wait(self)

    on_batch(monkeypatch, 2, terminate)
    monkeypatch.setattr(Checkpoints, "close", terminate_first)
    assert train(small_config(), tmp_path / "run") == 2
    assert outer_handler == []
    assert checkpoint_names(tmp_path / "run") == ["2"]


def test_the_command_ends_with_status_0_on_sigterm(tmp_path):
    workdir = tmp_path / "run"
    child = start(workdir, "--config.train.steps=300", devices=8)
    wait_for_step(child, 2)
    child.terminate()
    output, errors = finish(child)
    match = re.fullmatch(r"stopped at step (\d+) of 300, saved; the same command goes on from there\n", output)
    assert match, output + errors
    step = int(match[1])
    assert metric(workdir, "step") == list(range(1, step + 1))
    assert str(step) in checkpoint_names(workdir)

    config = small_config(steps=step + 2)
    assert train(config, workdir) == step + 2
    train(config, tmp_path / "uninterrupted")
    assert_same_run(workdir, tmp_path / "uninterrupted", config)


# restarted under other circumstances


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(uninterrupted, tmp_path, caplog):
    workdir = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    checkpoints = workdir / "checkpoints"
    assert checkpoint_names(workdir) == ["12", "6", "9"]
    largest = max((checkpoints / "12" / "state").rglob("*"), key=lambda file: file.stat().st_size * file.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    os.truncate(checkpoints / "9" / "data" / "position.json", 5)
    shutil.copytree(checkpoints / "6", checkpoints / "saving-15")

    assert train(small_config(), workdir) == 12
    name = largest.relative_to(checkpoints / "12")
    assert f"checkpoint {checkpoints / '12'} skipped: {name} is corrupt" in caplog.text
    assert f"checkpoint {checkpoints / '9'} skipped: half-written, data/position.json has 5 of" in caplog.text
    assert f"checkpoint {checkpoints / 'saving-15'} skipped" in caplog.text
    assert checkpoint_names(workdir) == ["12", "6", "9", "corrupt-12", "corrupt-9"]
    assert_same_run(workdir, uninterrupted, small_config())


def test_a_longer_run_goes_on_from_a_shorter_one(uninterrupted, tmp_path):
    """And how often it logs and saves may change on the way."""
    workdir = tmp_path / "run"
    assert train(small_config(steps=5), workdir) == 5
    config = small_config(steps=12, log_every=2, checkpoint_every=4, keep=1)
    assert train(config, workdir) == 12
    assert checkpoint_names(workdir) == ["12"]
    logged = [1, 2, 3, 4, 5, 6, 8, 10, 12]
    assert metric(workdir, "step") == logged
    assert metric_lines(workdir) == [metric_lines(uninterrupted)[step - 1] for step in logged]
    assert checkpoint_digests(workdir, config) == checkpoint_digests(uninterrupted, config)


def test_other_meshes_give_the_same_losses_to_rounding(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    assert train(small_config(steps=4, mesh=MeshConfig(8, 1, 1)), workdir) == 4
    assert metric_lines(workdir) == metric_lines(uninterrupted)[:4]
    assert train(small_config(steps=8, mesh=MeshConfig(2, 2, 2)), workdir) == 8
    finish(start(workdir, "--config.mesh.data=1", devices=1))
    assert metric(workdir, "step") == list(range(1, 13))
    for name, rounding in (("loss", 5e-6), ("grad_norm", 5e-5)):  # ten times what is seen
        np.testing.assert_allclose(metric(workdir, name), metric(uninterrupted, name), rtol=rounding)
    assert metric(workdir, "accuracy") == metric(uninterrupted, "accuracy")
    assert checkpoint_digests(workdir, small_config())["data"] == '{"next_record": 96}'
