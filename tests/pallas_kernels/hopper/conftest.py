"""Kernels interpreted on the CPU, every one watched for races; on a GPU (`make test-gpu`) they just run."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest
from jax._src import callback, effects  # private: nothing public lets jax.checkpoint hold an interpreted kernel
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory  # private: the races that were found

from tests.ops.helpers import on_gpu
from tests.optimization import unoptimized

effects.remat_allowed_effects.add_type(type(callback._OrderedIOEffect))


@contextlib.contextmanager
def _interpreting(monkeypatch, detect_races: bool) -> Iterator[list]:
    """An interpret context; the list gets the race detection state of each kernel that runs in it.

    JAX itself keeps only the last kernel's. What interprets a kernel is compiled without optimization, which takes
    half the time.
    """
    states = []
    original = gpu_callbacks.GPURaceDetectionState

    def watched(**options):
        states.append(original(**options))
        return states[-1]

    monkeypatch.setattr(gpu_callbacks, "GPURaceDetectionState", watched)
    options: dict[str, Any] = dict(detect_races=detect_races)
    if "on_race" in [field.name for field in dataclasses.fields(plgpu.InterpretGPUParams)]:
        options["on_race"] = "warn"  # JAX 0.12 else raises
    params = plgpu.InterpretGPUParams(**options)
    gpu_callbacks.reset_gpu_interpret_mode_state()
    try:
        with unoptimized(), plgpu.force_gpu_interpret_mode(params):
            yield states
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()  # an exception leaves it behind


@pytest.fixture
def races(monkeypatch) -> Iterator[list]:
    """An interpret context, and the race detection state of each kernel that ran in it."""
    with _interpreting(monkeypatch, detect_races=True) as states:
        yield states


@pytest.fixture
def interpreted(request) -> Iterator[None]:
    """An interpret context in which kernels ran, none with a race. On a GPU none: they run there."""
    if on_gpu():
        yield
        return
    races = request.getfixturevalue("races")
    yield
    assert races, "no kernel was interpreted"
    assert not any(state.races_found for state in races)


@pytest.fixture
def on_devices(monkeypatch) -> Iterator[None]:
    """An interpret context for kernels on several devices, in which they ran.

    There the interpreter (JAX 0.11.2) sees races of a warpgroup with itself, and at a kernel's end it asserts that no
    barrier is left on any device while others are still running: neither is looked at.
    """
    monkeypatch.setattr(shared_memory.GPUSharedMemory, "assert_no_barriers_allocated", lambda self: None)
    with _interpreting(monkeypatch, detect_races=False) as states:
        yield
    assert states, "no kernel was interpreted"
