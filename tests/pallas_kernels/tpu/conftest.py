"""TPU kernels interpreted on the CPU, every one watched for races."""

from collections.abc import Iterator

import jax.experimental.pallas.tpu as pltpu
import pytest
from jax._src import callback, effects  # private: nothing public lets jax.checkpoint hold an interpreted kernel
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # private: the races that were found

from tests.optimization import unoptimized

for effect in (callback._IOEffect, callback._OrderedIOEffect):
    effects.remat_allowed_effects.add_type(type(effect))


def _interpreting(detect_races: bool) -> Iterator[None]:
    pltpu.reset_tpu_interpret_mode_state()
    try:
        with unoptimized(), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=detect_races)):
            yield
    finally:
        pltpu.reset_tpu_interpret_mode_state()  # an exception leaves it behind


@pytest.fixture
def interpreted() -> Iterator[None]:
    """An interpret context in which kernels ran, the last of them without a race."""
    yield from _interpreting(detect_races=True)


@pytest.fixture
def on_devices() -> Iterator[None]:
    """An interpret context for kernels on several devices."""
    yield from _interpreting(detect_races=False)


@pytest.fixture(autouse=True)
def no_race(request) -> Iterator[None]:
    yield
    if "interpreted" in request.fixturenames:
        races = interpreter.races
        assert races is None or not races.races_found
