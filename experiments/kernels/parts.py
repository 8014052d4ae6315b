"""What the warpgroups of the forward kernels take alone: which of them bounds it.

python -m experiments.kernels.parts [--shapes=8x2048x16x128,…] [--calls=60]

Times the kernel as it is; without the inverse and the scores that helpers make ("state": the state warpgroups are given
zeros, and take as long); with state and output warpgroups that only hand back what they were given ("helpers"); without
either ("copies"); and with all but the copies ("no copies": they multiply what lies in shared memory). Where helpers
are ahead, scores are the state warpgroups'. Microseconds a call, the least of five rounds, and for each chunk of a row.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from unittest import mock

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from efla_jax import efla_attention
from pallas_kernels.hopper import few_heads, forward_helper, forward_state, op
from pallas_kernels.hopper.mosaic import CHUNK, F32, ROWS, TILE, set_registers

FORWARD = sys.modules[op.forward_kernel.__module__]  # the package's name `forward` is the function


def _idle(config, r, rings, freed, send=None):
    """Waits for what each chunk's place in the rings holds, and gives back those that are given back one by one.

    send(n): for what of chunk n comes by it.
    """

    def step(n, carry):
        for ring in rings:
            plgpu.barrier_wait(ring.full(r, n))
        if send is not None:
            send(n + 1)
        plgpu.commit_smem()  # in a cluster one thread gives back, for all that have waited
        for ring in freed:
            plgpu.barrier_arrive(ring.free(r, n))
        return carry

    jax.lax.fori_loop(0, config.chunks, step, 0)


def idle_state(config, r, w):
    set_registers(config.state_registers, config.warpgroups)
    send = lambda n: forward_state.send_for_values(config, r, n, w, n < config.chunks)
    rings = config.keys, config.values, config.products, config.queries
    _idle(config, r, rings, (config.keys,), send if config.ahead else None)


def idle_few_state(config, r, w):
    set_registers(few_heads.REGISTERS["state"], config.warpgroups)
    _idle(config, r, *2 * ((config.keys, config.values, config.products),))


def idle_few_output(config, r, w):
    set_registers(few_heads.REGISTERS["output"], config.warpgroups)
    _idle(config, r, *2 * ((config.keys, config.queries),))


def _zeros(config):
    return plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), config.dtype), TILE)


def no_inverse(config, r, slot, gain, put, midway):
    midway()
    if not config.folded:
        put("erase_s", plgpu.layout_cast(jnp.zeros((CHUNK,), F32), ROWS))
    put("solve_s", _zeros(config))


def no_scores(config, r, n):
    plgpu.barrier_wait(config.queries.full(r, n))
    return _zeros(config)


def no_values(config, r, n, w, wanted=None):
    pl.when(True if wanted is None else wanted)(lambda: plgpu.barrier_arrive(config.values.full(r, n)))


def no_loads(config, r):
    """As `_loads`, of a call without decay and documents; what would be sent for is said to be there."""
    arrivals = dict(keys=1, queries=1, values=config.writers)

    def there(ring):
        def load(n):
            for _ in range(arrivals[ring.name]):
                plgpu.barrier_arrive(ring.full(r, n))

        return load

    return tuple((ring, there(ring)) for ring in (config.values, config.queries, config.keys))


Replaced = dict[tuple[ModuleType, str], Callable]
NO_INVERSE: Replaced = {
    (forward_helper, "write_inverse"): no_inverse,
    (forward_helper, "_scores"): no_scores,
}
IDLE: Replaced = {
    (FORWARD, "state"): idle_state,
    (few_heads, "_state"): idle_few_state,
    (few_heads, "_output"): idle_few_output,
}
PARTS: dict[str, Replaced] = {
    "whole": {},
    "state": NO_INVERSE,
    "helpers": IDLE,
    "copies": NO_INVERSE | IDLE,
    "no copies": {(forward_helper, "_loads"): no_loads, (forward_state, "send_for_values"): no_values},
}


@contextlib.contextmanager
def only(part: str) -> Iterator[None]:
    """Kernels that are traced here have this part alone."""
    with contextlib.ExitStack() as stack:
        for (module, function), replacement in PARTS[part].items():
            stack.enter_context(mock.patch.object(module, function, replacement))
        jax.clear_caches()  # the kernel is traced anew
        yield


def microseconds(shape: tuple[int, ...], calls: int) -> float:
    """Of a forward call, on two sets of inputs in turn."""
    batch, length, heads, dim = shape
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (batch, length, heads, dim), jnp.bfloat16)
    beta = jax.random.uniform(jax.random.key(9), (batch, length, heads))
    sets = [(draw(3 * i), draw(3 * i + 1), draw(3 * i + 2), beta) for i in range(2)]
    run = jax.jit(lambda *inputs: efla_attention(*inputs, implementation="pallas_gpu")[0])
    jax.block_until_ready([run(*inputs) for inputs in sets])
    rounds = []
    for _ in range(5):
        begun, output = time.perf_counter(), None
        for i in range(calls):
            output = run(*sets[i % 2])
        jax.block_until_ready(output)
        rounds.append((time.perf_counter() - begun) / calls * 1e6)
    return min(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the parts of the forward kernels.")
    parser.add_argument("--shapes", default="8x2048x16x128,4x4096x16x128,16x2048x16x64", help="BxTxHxD, …")
    parser.add_argument("--calls", type=int, default=60, help="calls of a round")
    given = parser.parse_args()
    if getattr(jax.devices()[0], "compute_capability", None) != "9.0":
        parser.error(f"this is {jax.devices()[0].device_kind}; the kernels need a Hopper GPU")
    print(jax.devices()[0].device_kind)
    for name in PARTS:
        with only(name):
            for text in given.shapes.split(","):
                shape = tuple(map(int, text.split("x")))
                took = microseconds(shape, given.calls)
                print(f"{name:9} {text:16} {took:8.1f} us  {took * CHUNK / shape[1]:.3f} us a chunk", flush=True)


if __name__ == "__main__":
    main()
