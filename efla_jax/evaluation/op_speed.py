"""How long a program takes, what it needs, and what the device could do at best."""

import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efla_jax.evaluation import EvaluationError
from efla_jax.evaluation.op_accuracy import Case

FORWARD, BOTH = "forward", "forward + backward"
DIRECTIONS = (FORWARD, BOTH)
CHUNK = 64  # of the chunkwise form whose products are counted
_NAME = 160  # characters of a kernel's name; a template's can be thousands
_LONG = 0.5  # seconds of a call from which on three repeats must do
_AT_LEAST = 0.02  # seconds that queued calls last: under load a card may hold its clock back


class DoesNotFit(EvaluationError):
    """The program needs more memory than the device has."""


@dataclass(frozen=True)
class Program:
    """run(n) queues the call on the n-th of `sets` sets of inputs and returns its results; wait(results) is over when
    they are there."""

    run: Callable[[int], Any]
    wait: Callable[[Any], Any]
    sets: int
    compile_seconds: float
    peak_bytes: int | None = None


def compile_jax(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Program:
    """function compiled for arguments like those of sets[0].

    Raises:
        DoesNotFit: its arguments, results and temporary arrays are more than the device holds.
    """
    begun = time.perf_counter()
    compiled = jax.jit(function).lower(*sets[0]).compile()
    seconds = time.perf_counter() - begun
    use = compiled.memory_analysis()
    peak = None
    if use is not None:
        peak = use.argument_size_in_bytes + use.output_size_in_bytes + use.temp_size_in_bytes - use.alias_size_in_bytes
        held = device_memory()
        if peak > held:
            raise DoesNotFit(f"it needs {peak / 2**30:.1f} GiB, the device has {held / 2**30:.1f}")
    return Program(lambda n: compiled(*sets[n % len(sets)]), jax.block_until_ready, len(sets), seconds, peak)


def device_memory() -> int:
    """Bytes that programs may use on the default device."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---- time ----


def spread(samples: Sequence[float]) -> dict[str, float]:
    quarter, median, three_quarters = np.percentile(samples, (25, 50, 75)).tolist()
    return {"median": median, "first_quartile": quarter, "third_quartile": three_quarters}


def call_seconds(program: Program, repeats: int) -> list[float]:
    """Seconds of one call, `repeats` times (at most 3 times if it is long): of as many as `_queue` says, queued one
    behind the other, on the sets of inputs in turn, timed by the host until the last is done."""
    one, calls = _queue(program)
    samples = []
    for _ in range(repeats if one < _LONG else min(repeats, 3)):
        begun = time.perf_counter()
        program.wait(_run(program, calls))
        samples.append((time.perf_counter() - begun) / calls)
    return samples


def _queue(program: Program) -> tuple[float, int]:
    """Seconds of one call, and how many last `_AT_LEAST`, or 50."""
    one = 0.0
    for _ in range(3):  # what is loaded, tuned or cached at first is not timed
        begun = time.perf_counter()
        program.wait(program.run(0))
        one = time.perf_counter() - begun
    return one, min(50, math.ceil(_AT_LEAST / one))


def _run(program: Program, calls: int) -> Any:
    """The results of the last of some calls, those of the others let go of at once."""
    results = None
    for n in range(calls):
        results = program.run(n)
    return results


def kernel_seconds(program: Program) -> dict[str, dict[str, float]] | None:
    """What a GPU runs for one call, by the profiler's trace of queued ones: {kernel: {"launches", "seconds"}}, longest
    first.

    None where there is no GPU, or its trace is empty.
    """
    if jax.default_backend() != "gpu":
        return None
    _, calls = _queue(program)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    with tempfile.TemporaryDirectory(prefix="efla-trace-") as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            program.wait(_run(program, calls))
        finally:
            jax.profiler.stop_trace()
        files = list(Path(folder).rglob("*.xplane.pb"))
        planes = [plane for file in files for plane in jax.profiler.ProfileData.from_file(str(file)).planes]
        return _sum_events(planes, calls) or None


def _sum_events(planes: Iterable[Any], calls: int) -> dict[str, dict[str, float]]:
    """Events on the streams of GPUs, a call's share of each kind."""
    launches, nanoseconds = Counter(), Counter()
    for plane in planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):  # other lines say the same again, by module and by operation
                for event in line.events:
                    name = event.name[:_NAME]
                    launches[name] += 1
                    nanoseconds[name] += event.duration_ns
    return {
        name: {"launches": launches[name] / calls, "seconds": total * 1e-9 / calls}
        for name, total in nanoseconds.most_common()
    }


# ---- what the device could do ----


def work(case: Case, direction: str) -> dict[str, float]:
    """Bytes that must be moved and floating-point operations of one call, for a roofline.

    Bytes: every input read and every result written once: q, k, v, o and β; backward again q, k, v, β, and dO read,
    their gradients written; the final state, and what else the case has. FLOPs: the products of the chunkwise form
    in chunks of 64, whole squares, without inverse and decay: forward K·S, Q·S, Kᵀ·U of the state's size and K·Kᵀ,
    Q·Kᵀ, T·R, P·U of the chunk's; the backward, with S and T kept, 7 and 10 more.
    """
    width = jnp.dtype(case.dtype).itemsize
    tokens, chunk = case.batch * case.length, min(CHUNK, case.length)
    key_side = 2 * tokens * case.groups * case.key_dim * width
    value_side = 2 * tokens * case.heads * case.value_dim * width
    scalars = 4 * tokens * case.heads * (1 + case.log_decay)
    state = 4 * case.batch * case.heads * case.key_dim * case.value_dim
    moved = key_side + value_side + scalars + state * (1 + case.state)
    of_state, of_chunk_key, of_chunk_value = case.key_dim * case.value_dim, chunk * case.key_dim, chunk * case.value_dim
    macs = 3 * of_state + 2 * of_chunk_key + 2 * of_chunk_value
    if direction == BOTH:
        moved += 2 * key_side + 3 * value_side // 2 + 2 * scalars + 2 * state * case.state
        macs += 7 * of_state + 5 * of_chunk_key + 5 * of_chunk_value
    return {"bytes": moved, "flops": 2.0 * macs * tokens * case.heads}


def ceilings(dtype: str) -> dict[str, float]:
    """Measured on the default device: bytes a second of a large copy (read and written), and FLOPs a second of a
    large matrix product, in dtype (on a CPU, whose programs widen it, in float32)."""
    on_cpu = jax.default_backend() == "cpu"
    array = jnp.arange(1 << 24 if on_cpu else 1 << 28, dtype=jnp.float32)
    copy = compile_jax(lambda x: x + 1, [(array,)])
    size = 1024 if on_cpu else 8192
    square = jax.random.normal(jax.random.key(0), (size, size)).astype(jnp.float32 if on_cpu else dtype)
    exactly = jax.lax.Precision.HIGHEST if square.dtype == jnp.float32 else None  # not in TF32
    product = compile_jax(lambda x: jnp.matmul(x, x, precision=exactly), [(square,)])
    return {
        "bytes_per_second": 2 * array.nbytes / float(np.median(call_seconds(copy, 5))),
        "flops_per_second": 2 * size**3 / float(np.median(call_seconds(product, 5))),
    }


def floor_seconds(case: Case, direction: str, best: dict[str, float]) -> float:
    """What the slower of the two, moving the bytes or the products, takes at the device's measured best."""
    need = work(case, direction)
    return max(need["bytes"] / best["bytes_per_second"], need["flops"] / best["flops_per_second"])
