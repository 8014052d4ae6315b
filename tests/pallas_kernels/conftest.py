"""Kernels interpreted on the CPU, every one watched for races; those for GPUs just run on one (`make test-gpu`)."""

from collections.abc import Iterator

import pytest
from jax._src.pallas.mosaic_gpu.interpret import shared_memory  # private: see on_devices

from tests.ops.helpers import on_gpu
from tests.pallas_kernels.hopper import interpreting as hopper
from tests.pallas_kernels.tpu import interpreting as tpu

CONTEXTS = {"pallas_gpu": hopper.interpreting, "pallas_tpu": tpu.interpreting}


@pytest.fixture(params=["pallas_gpu", pytest.param("pallas_tpu", marks=pytest.mark.cpu("interpreted as TPU kernels"))])
def implementation(request) -> str:
    """Whose kernels; a folder of tests of one implementation has a fixture of its own."""
    return request.param


@pytest.fixture
def races(implementation, monkeypatch) -> Iterator[list]:
    """An interpret context, and the race detection state of each kernel that ran in it."""
    with CONTEXTS[implementation](monkeypatch, detect_races=True) as states:
        yield states


@pytest.fixture
def interpreted(implementation, request) -> Iterator[None]:
    """An interpret context in which kernels ran, none with a race. On a GPU none for its own: they run there."""
    if implementation == "pallas_gpu" and on_gpu():
        yield
        return
    races = request.getfixturevalue("races")
    yield
    assert races, "no kernel was interpreted"
    assert not any(state.races_found for state in races)


@pytest.fixture
def on_devices(implementation, monkeypatch) -> Iterator[None]:
    """An interpret context for kernels on several devices.

    There the GPU interpreter (JAX 0.11.2) sees races of a warpgroup with itself, and at a kernel's end it asserts that
    no barrier is left on any device while others are still running: neither is looked at.
    """
    monkeypatch.setattr(shared_memory.GPUSharedMemory, "assert_no_barriers_allocated", lambda self: None)
    with CONTEXTS[implementation](monkeypatch, detect_races=False) as states:
        yield
    assert states or implementation == "pallas_tpu", "no kernel was interpreted"  # the latter keeps none unwatched
