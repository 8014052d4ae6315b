"""What the warpgroups of the forward kernel take alone: which of them bounds it.

python -m experiments.kernels.parts [--shapes=8x2048x16x128,…] [--calls=60]

Times the kernel as it is; without the inverse and the scores ("state": what the state warpgroups are given is not
initialised, they take as long); with state warpgroups that only hand back what they were given ("helpers"); and
without either ("copies"). Microseconds a call, the least of five rounds, and for each chunk of a row.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from absl import app, flags

from efla_jax import efla_attention
from pallas_kernels.hopper import forward_helper, op
from pallas_kernels.hopper.mosaic import CHUNK, set_registers

_SHAPES = flags.DEFINE_list("shapes", ["8x2048x16x128", "4x4096x16x128", "16x2048x16x64"], "BxTxHxD")
_CALLS = flags.DEFINE_integer("calls", 60, "calls of a round", lower_bound=1)

FORWARD = sys.modules[op.forward_kernel.__module__]  # the package's name `forward` is the function


def idle_state(config, r, w):
    """A state warpgroup that waits for what it needs and gives it back."""
    set_registers(config.state_registers, config.writers + config.helpers + config.clustered)
    rings = config.keys, config.values, config.products, config.queries

    def step(n, carry):
        for ring in rings:
            plgpu.barrier_wait(ring.full(r, n))
        for ring in rings:
            plgpu.barrier_arrive(ring.free(r, n))
        return carry

    jax.lax.fori_loop(0, config.chunks, step, 0)


NO_INVERSE: dict[str, Callable] = dict(
    write_inverse=lambda config, r, slot, made, decay, midway: midway(),
    _write_scores=lambda config, r, n: plgpu.barrier_wait(config.queries.full(r, n)),
)
PARTS: dict[str, dict[str, Callable]] = {
    "whole": {},
    "state": NO_INVERSE,
    "helpers": dict(_state=idle_state),
    "copies": NO_INVERSE | dict(_state=idle_state),
}


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


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    if getattr(jax.devices()[0], "compute_capability", None) != "9.0":
        raise app.UsageError(f"this is {jax.devices()[0].device_kind}; the kernels need a Hopper GPU")
    print(jax.devices()[0].device_kind)
    for name, replaced in PARTS.items():
        with contextlib.ExitStack() as stack:
            for function, replacement in replaced.items():
                module = FORWARD if function == "_state" else forward_helper
                stack.enter_context(mock.patch.object(module, function, replacement))
            jax.clear_caches()  # the kernel is traced anew
            for text in _SHAPES.value:
                shape = tuple(map(int, text.split("x")))
                took = microseconds(shape, _CALLS.value)
                print(f"{name:8} {text:16} {took:8.1f} us  {took * CHUNK / shape[1]:.3f} us a chunk", flush=True)


if __name__ == "__main__":
    app.run(main)
