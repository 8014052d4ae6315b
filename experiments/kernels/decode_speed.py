"""Time of one decoding step, beside another library's kernel and the time to read and write the states once.

python -m experiments.kernels.decode_speed [--shapes=1x16x128,64x16x128,256x16x128]
    [--implementations=pallas_gpu,xla,fla] [--steps=100] [--repeats=15] [--output=DIR] [--commit=HASH]

Shapes are BxHxD; query, key and value are bfloat16, the state is float32. Steps depend on each other through the state
and run in one loop on the device: `lax.fori_loop`, UNROLLED steps a body, with the state donated, or a CUDA graph.
Error: of output and state after one step, relative, against float64 on the same numbers. A row is printed as soon as
it is measured.
"""

import importlib
import json
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from efla_jax import efla_step
from efla_jax.evaluation.op_speed import ceilings, spread
from efla_jax.ops.coefficients import erase_and_write
from experiments.provenance import provenance

UNROLLED = 20

_SHAPES = flags.DEFINE_list("shapes", ["1x16x128", "64x16x128", "256x16x128"], "BxHxD")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["pallas_gpu", "xla", "fla"], "of this library, or fla")
_STEPS = flags.DEFINE_integer("steps", 100, "steps of a loop", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 15, "loops that are timed", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "folder of decode.json and decode.md")
_COMMIT = flags.DEFINE_string("commit", None, "the commit that is measured, where there is no git to ask")

Shape = tuple[int, int, int]


class Inputs(NamedTuple):
    """query, key, value [B, H, D] bfloat16, beta [B, H] and state [B, H, D, D] float32."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    beta: jax.Array
    state: jax.Array


class Candidate(NamedTuple):
    """loop() runs all steps and waits; first() gives output and state after one, as float64 arrays."""

    loop: Callable[[], None]
    first: Callable[[], tuple[np.ndarray, np.ndarray]]


def draw(shape: Shape) -> Inputs:
    batch, heads, dim = shape
    keys = jax.random.split(jax.random.key(0), 5)
    normal = lambda key, *size: jax.random.normal(key, (batch, heads, *size))
    low = lambda x: x.astype(jnp.bfloat16)
    unit = normal(keys[1], dim)
    unit = unit / jnp.linalg.norm(unit, axis=-1, keepdims=True)
    beta = jax.nn.sigmoid(normal(keys[3]))
    return Inputs(
        low(normal(keys[0], dim)), low(unit), low(normal(keys[2], dim)), beta, normal(keys[4], dim, dim) / dim**0.5
    )


def exact(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Output [B, H, D] and state after one step, in float64."""
    query, key, value, beta, state = (np.asarray(x, np.float64) for x in inputs)
    square = (key**2).sum(-1)
    alpha = -np.expm1(-beta * square) / square
    rest = value - np.einsum("bhk,bhkv->bhv", key, state)
    state = state + (alpha[..., None] * key)[..., None] * rest[:, :, None]
    return np.einsum("bhk,bhkv->bhv", query, state), state


def ours(name: Any, inputs: Inputs, steps: int) -> Candidate:
    step = jax.jit(partial(efla_step, implementation=name))  # lowered once

    def body(_, carry):
        # the output is the next value: no step can be left out or moved
        output, state = step(inputs.query, inputs.key, carry[0], inputs.beta, carry[1])
        return output, state

    # Several in a row XLA makes a command buffer, a CUDA graph; bodies of one or two kernels it starts one by one.
    run = jax.jit(lambda *carry: jax.lax.fori_loop(0, steps, body, carry, unroll=UNROLLED), donate_argnums=(0, 1))
    carry = [jnp.copy(inputs.value), jnp.copy(inputs.state)]

    def loop():
        carry[:] = jax.block_until_ready(run(*carry))

    def first():
        output, state = step(*inputs)
        return np.asarray(output, np.float64), np.asarray(state, np.float64)

    return Candidate(loop, first)


def fla(inputs: Inputs, steps: int) -> Candidate:
    """flash-linear-attention's recurrent kernel of the delta rule; on unit keys the exact rule is that with α given."""
    torch = importlib.import_module("torch")
    recurrent = importlib.import_module("fla.ops.delta_rule").fused_recurrent_delta_rule
    alpha, _ = erase_and_write(inputs.key, inputs.beta)
    tensors = jax.block_until_ready((inputs.query, inputs.key, inputs.value, alpha))
    query, key, value, gate = (torch.from_dlpack(x).unsqueeze(1) for x in tensors)
    state = torch.from_dlpack(inputs.state).clone()
    call = partial(recurrent, query, key, scale=1.0, output_final_state=True)

    def run(value, state, count):
        for _ in range(count):
            value, state = call(v=value, beta=gate, initial_state=state)
        return value, state

    run(value, state, 2)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(value, state, steps)

    def loop():
        graph.replay()
        torch.cuda.synchronize()

    def first():
        output, after = run(value, state, 1)
        return output[:, 0].double().cpu().numpy(), after.double().cpu().numpy()

    return Candidate(loop, first)


def relative(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def measure(name: str, shape: Shape, steps: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step with quartiles, and errors; or why there are none."""
    inputs = draw(shape)
    try:
        candidate = fla(inputs, steps) if name == "fla" else ours(name, inputs, steps)
        errors = [relative(*pair) for pair in zip(candidate.first(), exact(inputs), strict=True)]
        candidate.loop()
        samples = []
        for _ in range(repeats):
            begun = time.perf_counter()
            candidate.loop()
            samples.append((time.perf_counter() - begun) / steps)
    except (ImportError, NotImplementedError) as error:
        return {"reason": str(error)}
    except Exception as error:  # a row that fails does not cost the others
        traceback.print_exc()
        return {"reason": f"failed, {type(error).__name__}: {str(error)[:200]}"}
    return {"reason": None, "seconds": spread(samples), "error_output": errors[0], "error_state": errors[1]}


def floor(shape: Shape, bytes_per_second: float) -> float:
    """Seconds to read and write the states, and to move query, key, value and output once."""
    batch, heads, dim = shape
    return batch * heads * (2 * 4 * dim * dim + 4 * 2 * dim + 4) / bytes_per_second


HEADING = """\
| B×H×D | implementation | µs a step (quartiles) | floor, µs | × floor | error of output, state |
|---|---|---|---|---|---|"""


def line(row: dict[str, Any]) -> str:
    start = f"| {row['shape']} | {row['implementation']} |"
    least = row["floor_seconds"] * 1e6
    if row["reason"]:
        return f"{start} {row['reason']} | {least:.2f} | | |"
    median, low, high = (row["seconds"][name] * 1e6 for name in ("median", "first_quartile", "third_quartile"))
    errors = f"{row['error_output']:.1e}, {row['error_state']:.1e}"
    return f"{start} {median:.2f} ({low:.2f} … {high:.2f}) | {least:.2f} | {median / least:.2f} | {errors} |"


def _shape(text: str) -> Shape:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes):
        raise app.UsageError(f"shape is {text!r}; it must be BxHxD")
    batch, heads, dim = map(int, sizes)
    return batch, heads, dim


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    shapes = [_shape(text) for text in _SHAPES.value]
    command = f"python -m experiments.kernels.decode_speed --shapes={','.join(_SHAPES.value)} --steps={_STEPS.value}"
    facts: dict[str, Any] = dict(provenance(command, _COMMIT.value))
    best = ceilings("bfloat16")["bytes_per_second"]
    facts["copy"] = f"{best / 1e9:.0f} GB/s (read + written)"
    header = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    print(f"{header}\n\n{HEADING}", flush=True)
    rows = []
    for shape in shapes:
        for name in _IMPLEMENTATIONS.value:
            found = measure(name, shape, _STEPS.value, _REPEATS.value)
            label = "×".join(map(str, shape))
            rows.append({"shape": label, "implementation": name, "floor_seconds": floor(shape, best)} | found)
            print(line(rows[-1]), flush=True)
            if _OUTPUT.value:
                folder = Path(_OUTPUT.value)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "decode.json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
                table = "\n".join([HEADING, *map(line, rows)])
                (folder / "decode.md").write_text(f"# Decoding steps\n\n{header}\n\n{table}\n")


if __name__ == "__main__":
    app.run(main)
