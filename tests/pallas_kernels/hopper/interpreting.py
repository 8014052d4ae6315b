"""Hopper kernels interpreted on the CPU."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax._src import callback, effects  # private: nothing public lets jax.checkpoint hold an interpreted kernel
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # private: the races that were found

from tests.optimization import unoptimized
from tests.pallas_kernels.races import keep_states

effects.remat_allowed_effects.add_type(type(callback._OrderedIOEffect))


@contextlib.contextmanager
def interpreting(monkeypatch, detect_races: bool) -> Iterator[list]:
    """An interpret context; the list gets the race detection state of each kernel that runs in it.

    What interprets a kernel is compiled without optimization, which takes half the time.
    """
    states = keep_states(monkeypatch, gpu_callbacks, "GPURaceDetectionState")
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
