"""TPU kernels interpreted on the CPU."""

import contextlib
from collections.abc import Iterator

import jax.experimental.pallas.tpu as pltpu
from jax._src import callback, effects  # private: nothing public lets jax.checkpoint hold an interpreted kernel
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # private: the races that were found

from tests.optimization import unoptimized
from tests.pallas_kernels.races import keep_states

for effect in (callback._IOEffect, callback._OrderedIOEffect):
    effects.remat_allowed_effects.add_type(type(effect))


@contextlib.contextmanager
def interpreting(monkeypatch, detect_races: bool) -> Iterator[list]:
    """An interpret context; the list gets the race detection state of each kernel that runs in it."""
    states = keep_states(monkeypatch, interpreter, "RaceDetectionState")
    pltpu.reset_tpu_interpret_mode_state()
    try:
        with unoptimized(), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=detect_races)):
            yield states
    finally:
        pltpu.reset_tpu_interpret_mode_state()  # an exception leaves it behind
