"""Measures the block sizes of the Hopper kernels on this card and writes them to pallas_kernels/hopper/blocks.json.

python -m experiments.kernels.tune [--direction=decode|forward|both] [--shapes=1x1x16x128x128,…] [--rounds=9]
    [--commit=HASH]

Shapes are BxTxHxKxV. For decode the columns of a block are chosen; for forward, and both (forward and backward), into
how many pieces rows are cut. The candidates for a shape are timed in turns, round after round, so that a change of
clocks meets them all. The fastest median is written, or the kernel's own choice where that is as good to within MARGIN.
A run replaces all that the table has of this kind of device and this direction.
"""

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.provenance import provenance
from pallas_kernels.hopper import blocks, few_heads, op, pieces
from pallas_kernels.hopper.decode import COLUMNS, ELEMENTS, decode, default_columns
from pallas_kernels.hopper.mosaic import CHUNK

_DIRECTION = flags.DEFINE_enum("direction", "decode", ["decode", "forward", "both"], "which kernel's blocks")
_SHAPES = flags.DEFINE_list("shapes", None, "BxTxHxKxV; by default those of the direction")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "timed rounds of every candidate", lower_bound=3)
_COMMIT = flags.DEFINE_string("commit", None, "the commit that is measured, where there is no git to ask")

MARGIN = 0.02
STEPS = 50  # steps, dependent for decode, of a timed call
Shape = tuple[int, int, int, int, int]
LONG = [
    "4x4096x16x128x128",
    "1x16384x16x128x128",
    "1x65536x16x128x128",
    "2x8192x16x128x128",
    "1x8192x8x128x128",
    "1x4096x16x128x128",
]
DECODE = [f"{batch}x{t}x16x{dim}x{dim}" for dim in (64, 128, 256) for batch in (1, 16, 64, 256) for t in (1, 8)]


def pieces_candidates(direction: str, shape: Shape) -> tuple[dict[str, int], list[dict[str, int]]]:
    """The kernels' own choice of pieces for (B, T, H, K, V), one piece, as many as fill the card and what is next to
    that; forward, also one piece of the kernel of few heads, and as many as fill the card."""
    batch, length, heads, *_ = shape
    fill = pieces.fill(batch * heads, length)
    near = {1, fill, *(n for n in (fill // 2, fill * 2) if n > 1 and n * pieces.SHORTEST * CHUNK <= length)}
    choices = [dict(pieces=n) for n in sorted(near)]
    few = direction == "forward" and _few(shape)
    if few:
        choices += [dict(apart=n) for n in sorted({1, max(1, fill // 2)})]  # of which each takes twice the blocks
    return pieces.default(direction, batch * heads, length, few=few), choices


def _few(shape: Shape) -> bool:
    """Whether the kernel of few heads serves what is measured."""
    batch, _, heads, _, value_dim = shape
    return few_heads.serves(batch * heads, value_dim, ("gain",), tied=True, save=False)


def pieces_program(direction: str, shape: Shape, choice: dict[str, int]) -> Callable[[], Any]:
    """A call of the op, STEPS times; both: forward, saving, and backward."""
    batch, length, heads, key_dim, value_dim = shape
    draw = lambda seed, *size: jax.random.normal(jax.random.key(seed), (batch, length, heads, *size), jnp.bfloat16)
    inputs = draw(0, key_dim), draw(1, key_dim), draw(2, value_dim), jnp.full((batch, length, heads), 0.5, jnp.float32)
    cotangents = draw(3, value_dim), jnp.zeros((batch, heads, key_dim, value_dim), jnp.float32)
    plan = pieces.chosen(direction, batch * heads, length, value_dim, choice, few=_few(shape))
    options = dict(scale=1.0, exact=True, plan=plan)

    def step(query, key, value, beta, d_output, d_state):
        rest = query, key, value, beta, None, None, None, None
        output, _, residuals = op.forward(*rest, save=direction == "both", **options)
        return op.backward(*rest, residuals, d_output, d_state, **options)[:4] if residuals else output

    run = jax.jit(step)

    def call():
        result = None
        for _ in range(STEPS):
            result = run(*inputs, *cotangents)
        jax.block_until_ready(result)

    return call


def decode_candidates(shape: Shape) -> tuple[dict[str, int], list[dict[str, int]]]:
    """The kernel's own choice for (B, T, H, K, V), and all choices that it takes."""
    batch, _, heads, key_dim, value_dim = shape
    fit = [columns for columns in COLUMNS if value_dim % columns == 0 and key_dim * columns <= ELEMENTS]
    return dict(columns=default_columns(key_dim, value_dim, batch * heads)), [dict(columns=c) for c in fit]


def decode_program(shape: Shape, choice: dict[str, int]) -> Callable[[], Any]:
    """A call of STEPS dependent steps on a state that is updated in place."""
    batch, length, heads, key_dim, value_dim = shape
    draw = lambda seed, *size: jax.random.normal(jax.random.key(seed), (batch, length, heads, *size), jnp.bfloat16)
    query, key, value = draw(0, key_dim), draw(1, key_dim) * key_dim**-0.5, draw(2, value_dim)
    erase = jnp.full((batch, length, heads), 0.5, jnp.float32)
    one = partial(decode, query, key, erase=erase, write=None, log_decay=None, scale=1.0, **choice)
    step = lambda _, carry: one(value=carry[0], state=carry[1])
    run = jax.jit(lambda *carry: jax.lax.fori_loop(0, STEPS, step, carry), donate_argnums=(0, 1))
    carry = [value, jnp.zeros((batch, heads, key_dim, value_dim), jnp.float32)]

    def call():
        carry[:] = jax.block_until_ready(run(*carry))

    return call


def measure(programs: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of a step of each, timed in turns."""
    with ThreadPoolExecutor() as pool:  # they compile side by side
        list(pool.map(lambda program: program(), programs))
    samples: list[list[float]] = [[] for _ in programs]
    for _ in range(rounds):
        for program, times in zip(programs, samples, strict=True):
            begun = time.perf_counter()
            program()
            times.append((time.perf_counter() - begun) / STEPS)
    return [statistics.median(times) for times in samples]


def best(own: dict[str, int], choices: list[dict[str, int]], seconds: list[float]) -> dict[str, int]:
    """The fastest choice; the kernel's own where that is as good to within MARGIN."""
    fastest = min(range(len(choices)), key=seconds.__getitem__)
    return choices[fastest] if seconds[fastest] < (1 - MARGIN) * seconds[choices.index(own)] else own


def _shape(text: str) -> Shape:
    sizes = text.split("x")
    if len(sizes) != 5 or not all(size.isdigit() and int(size) for size in sizes):
        raise app.UsageError(f"shape is {text!r}; it must be BxTxHxKxV")
    batch, length, heads, key_dim, value_dim = map(int, sizes)
    return batch, length, heads, key_dim, value_dim


def _facts(shapes: list[str]) -> dict[str, str]:
    command = f"python -m experiments.kernels.tune --direction={_DIRECTION.value} --shapes={','.join(shapes)}"
    facts = provenance(command, _COMMIT.value)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return facts | {"driver": driver}


def label(choice: dict[str, int]) -> str:
    return " ".join(f"{value} {key}" for key, value in choice.items())


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    texts = _SHAPES.value or (DECODE if _DIRECTION.value == "decode" else LONG)
    shapes = [_shape(text) for text in texts]
    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) != "9.0":
        raise app.UsageError(f"this is {device.device_kind}; the kernels need a Hopper GPU")
    if _DIRECTION.value == "decode":
        candidates, program = decode_candidates, decode_program
    else:
        candidates = partial(pieces_candidates, _DIRECTION.value)
        program = partial(pieces_program, _DIRECTION.value)
    facts, rows = _facts(texts), []
    for text, shape in zip(texts, shapes, strict=True):
        batch, length, heads, key_dim, value_dim = shape
        own, choices = candidates(shape)
        seconds = measure([program(shape, choice) for choice in choices], _ROUNDS.value)
        choice = best(own, choices, seconds)
        times = ", ".join(f"{label(c)}: {s * 1e6:.2f} us" for c, s in zip(choices, seconds, strict=True))
        print(f"{text}  own {label(own)}  {times}  -> {label(choice)}", flush=True)
        rows.append(dict(K=key_dim, V=value_dim, BH=batch * heads, T=length, choice=choice))
    tables = dict(blocks.tables())
    kind = device.device_kind
    tables[kind] = tables.get(kind, {}) | {_DIRECTION.value: dict(provenance=facts, rows=rows)}
    blocks.PATH.write_text(json.dumps(tables, indent=1) + "\n")
    print(f"{len(rows)} rows in {blocks.PATH}")


if __name__ == "__main__":
    app.run(main)
