"""TPU kernels interpreted on the CPU."""

import contextlib
from collections.abc import Iterator

import jax.experimental.pallas.tpu as pltpu
from jax._src import callback, effects  # private: nothing public lets jax.checkpoint hold an interpreted kernel
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # private: the races that were found

from tests.optimization import unoptimized

for effect in (callback._IOEffect, callback._OrderedIOEffect):
    effects.remat_allowed_effects.add_type(type(effect))


@contextlib.contextmanager
def interpreting(monkeypatch, detect_races: bool) -> Iterator[list]:
    """An interpret context; the list gets the race detection state of each kernel that runs in it. JAX itself keeps
    only the last kernel's."""
    states = []
    original = interpreter.RaceDetectionState

    def watched(**options):
        states.append(original(**options))
        return states[-1]

    monkeypatch.setattr(interpreter, "RaceDetectionState", watched)
    pltpu.reset_tpu_interpret_mode_state()
    try:
        with unoptimized(), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=detect_races)):
            yield states
    finally:
        pltpu.reset_tpu_interpret_mode_state()  # an exception leaves it behind
