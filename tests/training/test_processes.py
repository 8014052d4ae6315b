"""Training by several real processes: as by one; lost, stopped and refused together; restarted in other numbers."""

import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest

from efla_jax import cli
from efla_jax.training.config import ConfigError
from efla_jax.training.distributed import HEARTBEAT_SECONDS, initialize, share_of
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

STEPS = 60
PATIENCE = 200  # s for processes that should end; below pytest's own limit, which would leave them behind
Children = list[subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def pixels(monkeypatch):
    monkeypatch.setattr("efla_jax.data.mnist.arrays", small_run.random_pixels)


@contextmanager
def none_left(children: Children) -> Iterator[Children]:
    """None outlives the block."""
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.communicate()


def processes(workdirs: list[Path], address: str, *options: str, devices: int) -> AbstractContextManager[Children]:
    """One process for each workdir, which is one and the same but for one test."""
    cluster = (f"--coordinator_address={address}", f"--num_processes={len(workdirs)}")
    return none_left(
        [
            start(workdir, *cluster, f"--process_id={number}", *options, devices=devices)
            for number, workdir in enumerate(workdirs)
        ]
    )


def run(workdir: Path, address: str, *options: str, devices: int = 2) -> None:
    """Two processes from where the workdir is to the end."""
    with processes([workdir, workdir], address, *options, devices=devices) as children:
        for child in children:
            assert last_line(finished(child)).startswith("trained to step ")


def finished(child: subprocess.Popen[str]) -> str:
    """What the child, which must succeed, has written to stdout."""
    output, errors = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0, errors
    return output


def last_line(output: str) -> str:
    """gloo writes to stdout, too."""
    return output.splitlines()[-1]


def wait_for_checkpoint(workdir: Path, step: int, children: Children) -> None:
    deadline = time.monotonic() + PATIENCE
    while not (workdir / "checkpoints" / str(step)).exists():
        assert time.monotonic() < deadline
        for child in children:
            assert child.poll() is None, child.communicate()
        time.sleep(0.005)


def assert_losses_to_rounding(workdir: Path, expected: Path) -> None:
    steps = len(metric(workdir, "step"))
    assert metric(workdir, "step") == metric(expected, "step")[:steps]
    for name, rounding in (("loss", 5e-6), ("grad_norm", 5e-5)):  # as for other meshes in test_resume, over 12 steps
        np.testing.assert_allclose(metric(workdir, name), metric(expected, name)[:steps], rtol=rounding)
    assert metric(workdir, "accuracy") == metric(expected, "accuracy")[:steps]


# as by one process


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, address):
    """With dropout, whose masks must belong to the records. One: this process, with 8 devices against four."""
    config = small_config(steps=6)
    with processes([tmp_path / "two"] * 2, address, "--config.train.steps=6", devices=2) as children:
        train(config, tmp_path / "one")
        for child in children:
            finished(child)
    assert_losses_to_rounding(tmp_path / "two", tmp_path / "one")
    assert len(set(metric(tmp_path / "one", "loss"))) == 6
    assert checkpoint_names(tmp_path / "two") == ["3", "6"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "tensorboard",
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The workdir of a whole run of two processes."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run(workdir, f"127.0.0.1:{port}", f"--config.train.steps={STEPS}")
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "devices"),
    [
        (("fsdp=2", "tensor=2"), 2),  # parameters split between the processes
        (("data=1", "tensor=2"), 1),  # heads split between them: each row is needed by both
    ],
)
def test_meshes_that_cross_the_border_of_processes(mesh, devices, tmp_path, address, uninterrupted):
    options = [f"--config.mesh.{axis}" for axis in mesh]
    run(tmp_path / "run", address, *options, devices=devices)
    assert_losses_to_rounding(tmp_path / "run", uninterrupted)


# lost


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])  # the coordinator, and another
def test_kill_minus_nine_ends_the_others_and_all_go_on_bit_for_bit(victim, tmp_path, address, uninterrupted):
    workdir, steps = tmp_path / "run", f"--config.train.steps={STEPS}"
    with processes([workdir] * 2, address, steps, devices=2) as children:
        wait_for_checkpoint(workdir, 6, children)
        children[victim].kill()
        _, errors = children[1 - victim].communicate(timeout=HEARTBEAT_SECONDS + 10)
        assert children[1 - victim].returncode != 0
        assert re.search(r"If another process has ended, its own log|indicates that another task died", errors)
    assert str(STEPS) not in checkpoint_names(workdir)
    run(workdir, address, steps)
    assert metric_lines(workdir) == metric_lines(uninterrupted)
    config = small_config(steps=STEPS)
    assert checkpoint_digests(workdir, config) == checkpoint_digests(uninterrupted, config)


@pytest.mark.slow
def test_a_process_that_hangs_is_taken_for_dead(tmp_path, address):
    """Its sockets stay open: it is the heartbeats that are missed."""
    workdir = tmp_path / "run"
    with processes([workdir] * 2, address, "--config.train.steps=3000", devices=2) as children:
        wait_for_checkpoint(workdir, 3, children)
        children[1].send_signal(signal.SIGSTOP)
        _, errors = children[0].communicate(timeout=2 * HEARTBEAT_SECONDS + 10)
        assert children[0].returncode != 0
        assert "heartbeat timeout" in errors or "stopped sending heartbeats" in errors


@pytest.mark.slow
def test_a_full_disk_ends_all_and_leaves_the_checkpoint_before(small_disk, tmp_path, address, uninterrupted):
    workdir, steps = tmp_path / "run", f"--config.train.steps={STEPS}"
    disk = small_disk(workdir / "checkpoints", mebibytes=4)
    ballast = disk / "ballast"
    with processes([workdir] * 2, address, steps, devices=2) as children:
        wait_for_checkpoint(workdir, 3, children)
        with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:  # noqa: PT012
            while True:
                file.write(bytes(4096))
        errors = [child.communicate(timeout=3 * HEARTBEAT_SECONDS)[1] for child in children]
        assert all(child.returncode != 0 for child in children)
    message = f"saving checkpoint \\d+ to {disk} failed: .*No space left"
    assert any(re.search(message, text) for text in errors), errors
    kept = [name for name in checkpoint_names(workdir) if name.isdecimal()]
    assert "3" in kept
    assert str(STEPS) not in kept
    ballast.unlink()
    run(workdir, address, steps)
    assert metric_lines(workdir) == metric_lines(uninterrupted)


# told to end; other numbers of processes


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_stops_all_at_one_step_and_another_number_of_processes_goes_on(
    told, tmp_path, address, uninterrupted
):
    workdir = tmp_path / "run"
    # JAX looks for the signal once a second; saving every step keeps the run from going far meanwhile
    options = ("--config.train.steps=3000", "--config.train.checkpoint_every=1")
    with processes([workdir] * 2, address, *options, devices=2) as children:
        wait_for_checkpoint(workdir, 3, children)
        children[told].terminate()
        lines = [last_line(finished(child)) for child in children]
    match = re.fullmatch(r"stopped at step (\d+) of 3000, saved; the same command goes on from there", lines[0])
    assert match, lines
    assert lines[1] == lines[0]
    step = int(match[1])
    assert metric(workdir, "step") == list(range(1, step + 1))
    assert str(step) in checkpoint_names(workdir)
    assert metric_lines(workdir) == metric_lines(uninterrupted)[:step]

    last = step + 3  # few steps: rounding grows from step to step
    assert last <= STEPS, "stopped too late to be compared"
    finish(start(workdir, f"--config.train.steps={last}", devices=4))
    assert metric(workdir, "step")[-1] == last
    assert_losses_to_rounding(workdir, uninterrupted)
    assert checkpoint_digests(workdir, small_config(steps=last))["data"] == f'{{"next_record": {8 * last}}}'


@pytest.mark.slow
def test_two_processes_go_on_from_one(tmp_path, address, uninterrupted):
    assert train(small_config(steps=7), tmp_path / "run") == 7
    run(tmp_path / "run", address)
    assert metric(tmp_path / "run", "step") == list(range(1, 13))
    assert_losses_to_rounding(tmp_path / "run", uninterrupted)


# refused


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused_by_all(tmp_path, address):
    with processes([tmp_path / "a", tmp_path / "b"], address, devices=2) as children:
        for child, name in zip(children, "ab", strict=True):
            _, errors = child.communicate(timeout=PATIENCE)
            assert child.returncode == 2
            message = "which is another directory for processes [1] than for process 0; it must be on a file system"
            assert f"efla train: --workdir is '{tmp_path / name}', {message}" in errors


@pytest.mark.slow
def test_configs_that_differ_are_refused_by_all(tmp_path, monkeypatch):
    """Of processes that find each other by what SLURM tells them."""
    job = random.randrange(2**20)  # from which JAX makes the port
    monkeypatch.setenv("SLURM_JOB_ID", str(job))
    monkeypatch.setenv("SLURM_STEP_NODELIST", "localhost")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    children = []
    for number in range(2):
        monkeypatch.setenv("SLURM_PROCID", str(number))
        monkeypatch.setenv("SLURM_LOCALID", str(number))
        options = ("--distributed", f"--config.train.checkpoint_every={3 + number}")
        children.append(start(tmp_path / "run", *options, devices=2))
    with none_left(children):
        for child in children:
            _, errors = child.communicate(timeout=PATIENCE)
            assert child.returncode == 2
            assert "efla train: the config differs: processes [1] have another one than process 0" in errors
    assert not (tmp_path / "run").exists()


def test_share_of_a_batch():
    rows = {0: {0, 1, 4, 5}, 1: {2, 3, 6, 7}}  # as a mesh may interleave devices
    assert [share_of(rows, process) for process in rows] == [(0, 2), (1, 2)]
    rows = {0: {2, 3}, 1: {0, 1}, 2: {2, 3}, 3: {0, 1}}
    assert [share_of(rows, process) for process in rows] == [(1, 2), (0, 2), (1, 2), (0, 2)]
    assert [share_of({0: {0, 1}, 1: {0, 1}}, process) for process in (0, 1)] == [(0, 1)] * 2
    assert share_of({0: {0, 1}, 1: {1, 2}, 2: {2, 0}}, 0) is None
    assert share_of({0: {0, 1}, 1: {2}}, 0) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("127.0.0.1:8476", 2, None),
            "--process_id missing; give --coordinator_address, --num_processes, --process_id",
        ),
        ((None, None, 0), "--coordinator_address and --num_processes missing"),
        (("127.0.0.1:8476", 2, 2), r"--process_id is 2; it must be in \[0, 2\)"),
        (("127.0.0.1:8476", 2, -1), r"--process_id is -1; it must be in \[0, 2\)"),
        (("127.0.0.1:8476", 0, 0), "--num_processes is 0; it must be at least 1"),
        (("127.0.0.1", 2, 0), "--coordinator_address is '127.0.0.1'; it must be HOST:PORT"),
        (("127.0.0.1:http", 2, 0), "'127.0.0.1:http'; it must be HOST:PORT"),
        ((":8476", 2, 0), "':8476'; it must be HOST:PORT"),
        (("127.0.0.1:99999", 2, 0), "'127.0.0.1:99999'; it must be HOST:PORT"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        initialize(*arguments)


def test_a_coordinator_that_does_not_answer(address):
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=f"'{address}', where no process 0 answers for 1 s: .*refused"):
        initialize(address, 2, 1, timeout_seconds=1)
    assert 1 <= time.monotonic() - begin < 5


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"'{address}', whose port is not free: .*in use"):
            initialize(address, 2, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_processes=2"], "--coordinator_address and --process_id missing"),
        (["--num_processes=two"], "--num_processes is 'two'; it must be an integer"),
        (
            ["--distributed", "--process_id=1"],
            "--distributed finds the cluster by itself; it cannot go with --process_id",
        ),
    ],
)
def test_the_command_refuses_in_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", f"--config={small_run.__file__}", "--workdir=unused", *options])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("efla train: ")
    assert message in line
    assert not os.path.exists("unused")


def test_no_cluster_to_be_found(tmp_path):
    """In a process of its own, since JAX must not have looked for devices yet."""
    child = start(tmp_path / "run", "--distributed", devices=2)
    _, errors = child.communicate()
    assert child.returncode == 2
    assert "efla train: there is no cluster that JAX finds by itself: " in errors
    assert not (tmp_path / "run").exists()
