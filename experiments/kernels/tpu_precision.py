"""Error of the TPU kernels' precisions against the float64 token loop, and the passes they take on the matrix units.

python -m experiments.kernels.tpu_precision [--length=512]

Interpreted on the CPU: a float32 operand is split into bfloat16 pieces by the kernels themselves, so the products are
those of a TPU, but for the order of sums. Prints a row for each type of the inputs and precision: relative Frobenius
error of the output, the last state and the worst and the median gradient, and that of `xla`.
"""

import argparse
from typing import Any

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np

from efla_jax import efla_attention

PASSES = {"default": "1", "high": "3, 2, 1", "highest": "6, 3, 1"}
DIM = 64


def draw(length: int, norm2: float, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Inputs with ‖k‖² up to norm2, rounded to bfloat16, and cotangents."""
    rng = np.random.default_rng(seed)
    key = rng.normal(size=(1, length, 2, DIM))
    key *= np.sqrt(norm2 * rng.uniform(0.5, 1, key.shape[:3]) / np.sum(key**2, -1))[..., None]
    tokens = [rng.normal(size=key.shape), key, rng.normal(size=key.shape)]
    state = rng.normal(size=(1, 2, DIM, DIM))
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (*tokens, rng.normal(size=key.shape))]
    return [*rounded[:3], rng.uniform(size=key.shape[:3]), state], [rounded[3], rng.normal(size=state.shape)]


def results(inputs, cotangents, dtype, **options: Any) -> list[np.ndarray]:
    """Output, state, gradients; query, key, value and the output of this type."""

    def run(*inputs):
        out, pullback = jax.vjp(lambda *x: efla_attention(*x[:4], initial_state=x[4], **options), *inputs)
        return *out, *pullback(tuple(c.astype(x.dtype) for c, x in zip(cotangents, out, strict=True)))

    wide = np.float64 if dtype == np.float64 else np.float32
    with jax.enable_x64(dtype == np.float64):
        arrays = [jnp.asarray(x, dtype if place < 3 else wide) for place, x in enumerate(inputs)]
        return [np.asarray(x, np.float64) for x in jax.jit(run)(*arrays)]


def errors(got: list[np.ndarray], want: list[np.ndarray]) -> str:
    found = [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(got, want, strict=True)]
    output, state, *gradients = found
    return " | ".join(f"{e:.1e}" for e in (output, state, float(np.median(gradients)), max(gradients)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--length", type=int, default=512, help="tokens")
    given = parser.parse_args()
    print(f"1×{given.length}×2×{DIM}, chunks of 128, the exact rule.\n")
    print("| ‖k‖² | inputs | precision | passes | output | state | median gradient | worst gradient |")
    print("|---|---|---|---|---|---|---|---|")
    for norm2 in (1.0, 30.0):
        inputs, cotangents = draw(given.length, norm2)
        want = results(inputs, cotangents, np.float64, implementation="scan")
        for dtype in (jnp.bfloat16, jnp.float32):
            name = jnp.dtype(dtype).name
            for precision, passes in PASSES.items():
                options = dict(implementation="pallas_tpu", precision=precision, chunk_size=128)
                with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
                    got = results(inputs, cotangents, dtype, **options)
                print(f"| {norm2:g} | {name} | {precision} | {passes} | {errors(got, want)} |", flush=True)
            got = results(inputs, cotangents, dtype, implementation="xla", chunk_size=64)
            print(f"| {norm2:g} | {name} | `xla` | | {errors(got, want)} |", flush=True)


if __name__ == "__main__":
    main()
