"""Several processes that train together: joining them, stopping them at one step, what all of them must agree on.

What a lost process does to the others: they cannot go on. Their next collective fails or hangs, and JAX ends
them about HEARTBEAT_SECONDS later. Start all of them again: they go on from the newest checkpoint.
"""

import hashlib
import logging
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from efla_jax.errors import UserError
from efla_jax.training.config import ConfigError

# A process that is silent for so long is taken for dead, and the others end. JAX's own 100 s waste a cluster's time.
HEARTBEAT_SECONDS = 10

logger = logging.getLogger(__name__)


class LostProcessError(UserError, RuntimeError):
    """JAX failed while several processes worked together, as it does where one of them has ended."""


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_seconds: int = 120,
) -> None:
    """Joins the cluster; returns when all of its processes have. Nothing may have asked for devices before.

    All three arguments, or none where JAX finds the cluster by itself: SLURM, Open MPI, Kubernetes, TPU.
    coordinator_address is HOST:PORT, a free port on the host of process 0.

    Raises:
        ConfigError: the arguments do not fit, there is no such cluster, or its coordinator does not answer in
            timeout_seconds. Where it answers, but another process does not come in time, JAX aborts this one.
    """
    given = dict(coordinator_address=coordinator_address, num_processes=num_processes, process_id=process_id)
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ConfigError(f"{' and '.join(missing)} missing; give {', '.join(f'--{name}' for name in given)}, or none")
    if coordinator_address is not None and num_processes is not None and process_id is not None:
        _check(coordinator_address, num_processes, process_id, timeout_seconds)
        logger.info("process %d of %d waits for the others at %s", process_id, num_processes, coordinator_address)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        what = f"at {coordinator_address}" if coordinator_address else "that JAX finds by itself"
        raise ConfigError(f"there is no cluster {what}: {error}") from error


def _check(address: str, num_processes: int, process_id: int, timeout_seconds: int) -> None:
    """JAX dies in C++, without an exception, of what this refuses."""
    if num_processes < 1:
        raise ConfigError(f"--num_processes is {num_processes}; it must be at least 1")
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"--process_id is {process_id}; it must be in [0, {num_processes})")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator_address is {address!r}; it must be HOST:PORT")
    if process_id == 0:
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as JAX does: a restart may take it again
                probe.bind(("", int(port)))
        except OSError as error:
            raise ConfigError(f"--coordinator_address is {address!r}, whose port is not free: {error}") from error
    else:
        _wait_for(host.strip("[]"), int(port), timeout_seconds)


def _wait_for(host: str, port: int, timeout_seconds: int) -> None:
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"--coordinator_address is '{host}:{port}', where no process 0 answers for {timeout_seconds} s: "
                    f"{error}"
                ) from error
            time.sleep(0.1)


@contextmanager
def name_lost_processes() -> Iterator[None]:
    """Turns an error of JAX's runtime, with several processes, into LostProcessError, and logs it at once.

    What is left of the run may still wait for the lost process, until JAX aborts it.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        message = (
            f"process {jax.process_index()} cannot go on: {error}. If another process has ended, its own log says why; "
            "start all of them again by the same commands, and they go on from the newest checkpoint"
        )
        logger.error(message)
        raise LostProcessError(message) from error


class Interrupt:
    """Whether a SIGTERM has come while its block ran, to any of the processes; nobody dies by it."""

    _received = False

    def __enter__(self) -> Self:
        # Several processes: jax.distributed has a handler of its own, which tells the others; one of Python's would
        # replace it. Its answer costs a microsecond, as only a signal makes the processes talk: no collective a step.
        self._alone = jax.process_count() == 1
        if self._alone:
            self._previous = signal.signal(signal.SIGTERM, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def requested(self, step: int) -> bool:
        """Whether to stop after this step, the same for all processes. To be asked at every step, in order."""
        return self._received if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_: object) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._previous)


def check_agreement(what: str, value: str) -> None:
    """Raises ConfigError, in every process, unless all of them give the same value."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    others = np.flatnonzero((digests != digests[0]).any(axis=1)).tolist()
    if others:
        raise ConfigError(f"{what} differs: processes {others} have another one than process 0; give all the same")


def check_shared(directory: Path) -> None:
    """Raises ConfigError, in every process, unless all of them see the directory of process 0 under this path."""
    if jax.process_count() == 1:
        return
    first = jax.process_index() == 0
    # A name of 8 letters that nobody has looked for before, so that no file system answers from a cache.
    with tempfile.NamedTemporaryFile(dir=directory, prefix="shared-") if first else nullcontext() as file:
        letters = Path(file.name).name.removeprefix("shared-").encode() if file else bytes(8)
        name = multihost_utils.broadcast_one_to_all(np.frombuffer(letters, np.uint8)).tobytes().decode()
        seen = multihost_utils.process_allgather(np.array((directory / f"shared-{name}").exists()))
    blind = np.flatnonzero(~seen).tolist()
    if blind:
        raise ConfigError(
            f"--workdir is {str(directory)!r}, which is another directory for processes {blind} than for process 0; "
            "it must be on a file system that all of them share"
        )


def barrier(name: str) -> None:
    """Returns when all processes have come here. The name is for the error message."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def batch_share(sharding: NamedSharding, batch_size: int) -> tuple[int, int]:
    """(index, count): this process's devices need piece `index` of the `count` that a batch's rows are cut into.

    Fewer pieces than processes where the mesh holds a row in several of them.

    Raises:
        ConfigError: processes share some of their rows, but not all.
    """
    rows: dict[int, set[int]] = {}
    for device, (piece,) in sharding.devices_indices_map((batch_size,)).items():
        rows.setdefault(device.process_index, set()).update(range(*piece.indices(batch_size)))
    share = share_of(rows, jax.process_index())
    if share is None:
        raise ConfigError(
            f"config.mesh is {dict(sharding.mesh.shape)}, by which processes share some of a batch's rows, not all or "
            f"none; data times fsdp must be a multiple or a divisor of the {len(rows)} processes"
        )
    return share


def share_of(rows: dict[int, set[int]], process: int) -> tuple[int, int] | None:
    """`batch_share` from each process's rows; pieces are numbered by their first row. None: they are no pieces."""
    pieces = sorted({tuple(sorted(held)) for held in rows.values()})
    every_row = sorted(row for piece in pieces for row in piece)
    if every_row != list(range(len(every_row))) or len({len(piece) for piece in pieces}) > 1:
        return None
    return pieces.index(tuple(sorted(rows[process]))), len(pieces)
