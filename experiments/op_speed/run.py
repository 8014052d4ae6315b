"""Times the implementations of the op against each other.

python -m experiments.op_speed.run [--shape=B,T,H,K,V ...] [--implementations=scan,xla,xla:64] [--repeats=15]
                                   [--output=DIR]

`xla:64` is `xla` with chunks of 64. In every repeat all implementations run in turn, forward, then forward + backward,
so that they see the same machine and a ratio is taken pair by pair. Float32; the loss of the backward is
sum(output * c1) + sum(state * c2), its gradients those of query, key, value, beta and the initial state.
"""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from efla_jax import efla_attention
from experiments.provenance import provenance

_SHAPES = flags.DEFINE_multi_string("shape", ["1,4096,4,64,64", "128,784,1,64,64"], "B,T,H,K,V; may be repeated")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["scan", "xla"], "names, NAME:CHUNK_SIZE too; the first is 1x")
_REPEATS = flags.DEFINE_integer("repeats", 15, "timed runs of each", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", str(Path(__file__).parent), "folder of results.json and results.md")

# Floating-point operations per token, head and element of the state that the recurrence itself needs: recall, update
# and read-out forward, twice that backward. The same for all; a chunkwise form does more, as matrix products.
_FLOPS = {"forward": 6, "forward + backward": 18}


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int


def _shapes(shape: Shape) -> tuple[dict[str, Any], tuple[Any, Any]]:
    """Shapes of (inputs, cotangents of output and state)."""
    tokens = (shape.batch, shape.length, shape.heads)
    array = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    key, value = array(*tokens, shape.key_dim), array(*tokens, shape.value_dim)
    state = array(shape.batch, shape.heads, shape.key_dim, shape.value_dim)
    return dict(query=key, key=key, value=value, beta=array(*tokens), initial_state=state), (value, state)


def _draw(shape: Shape):
    """Random (inputs, cotangents), keys of norm about 1, beta in [0, 1]."""
    rng = np.random.default_rng(0)
    inputs, cotangents = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), _shapes(shape))
    inputs["key"] /= np.sqrt(shape.key_dim, dtype=np.float32)
    inputs["beta"] = rng.uniform(size=inputs["beta"].shape).astype(np.float32)
    return inputs, cotangents


def _programs(variant: str) -> dict[str, Any]:
    """The jitted forward and forward + backward of `name` or `name:chunk_size`, on (inputs, cotangents)."""
    name, _, chunk = variant.partition(":")
    options: dict[str, Any] = {"implementation": name, "chunk_size": int(chunk) if chunk else None}

    def forward(inputs, cotangents):
        return efla_attention(**inputs, **options)

    def backward(inputs, cotangents):
        results, pullback = jax.vjp(lambda inputs: forward(inputs, cotangents), inputs)
        return results, pullback(cotangents)[0]

    return {"forward": jax.jit(forward), "forward + backward": jax.jit(backward)}


def _memory(program, shape: Shape) -> int:
    """Temporary bytes of the compiled program, beside its arguments and results."""
    return program.lower(*_shapes(shape)).compile().memory_analysis().temp_size_in_bytes


def _errors(result, inputs, cotangents) -> dict[str, float]:
    """Relative error of (results, gradients) against the token loop in float64, on the first row of the batch."""
    first = lambda tree: jax.tree.map(lambda x: np.asarray(x[:1], np.float64), tree)
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, _programs("scan")["forward + backward"](first(inputs), first(cotangents)))
    distance = lambda x, y: float(np.linalg.norm(x - y) / np.linalg.norm(y))
    errors = jax.tree.map(distance, first(result), exact)
    return {part: max(jax.tree.leaves(e)) for part, e in zip(("forward", "gradients"), errors, strict=True)}


def measure(shape: Shape, variants: list[str], repeats: int) -> dict[str, Any]:
    """Per variant: seconds of every repeat, compile seconds, errors, and memory at T/2, T, 2T and 4T."""
    inputs, cotangents = _draw(shape)
    arguments = jax.device_put((inputs, cotangents))
    report, compiled = {}, {}
    for variant in variants:
        report[variant] = {"compile": {}, "seconds": {part: [] for part in _FLOPS}}
        for part, program in _programs(variant).items():
            begun = time.perf_counter()
            compiled[variant, part] = program.lower(*arguments).compile()
            report[variant]["compile"][part] = time.perf_counter() - begun
        result = compiled[variant, "forward + backward"](*arguments)
        report[variant]["error"] = _errors(result, inputs, cotangents)
        report[variant]["temporary bytes"] = {
            length: _memory(_programs(variant)["forward + backward"], shape._replace(length=length))
            for length in (shape.length // 2, shape.length, 2 * shape.length, 4 * shape.length)
        }
    for _ in range(repeats):
        for part in _FLOPS:
            for variant in variants:
                # once untimed: else a program pays for the caches and the pages that the one before it gave back
                jax.block_until_ready(compiled[variant, part](*arguments))
                begun = time.perf_counter()
                jax.block_until_ready(compiled[variant, part](*arguments))
                report[variant]["seconds"][part].append(time.perf_counter() - begun)
    return report


def _table(shape: Shape, report: dict[str, Any]) -> str:
    """Markdown of one shape."""
    base = next(iter(report))
    work = shape.batch * shape.length * shape.heads * shape.key_dim * shape.value_dim / 1e9
    lines = [
        f"B={shape.batch} T={shape.length} H={shape.heads} K={shape.key_dim} V={shape.value_dim}: "
        + ", ".join(f"{part} {1e3 * flops * work:.0f} MFLOP" for part, flops in _FLOPS.items()),
        "",
        f"| | median, ms | GFLOP/s | times faster than {base}: median (least … most) | compile, s | error |",
        "|---|---|---|---|---|---|",
    ]
    for part, flops in _FLOPS.items():
        for variant, result in report.items():
            seconds = np.array(result["seconds"][part])
            ratios = np.array(report[base]["seconds"][part]) / seconds
            median = float(np.median(seconds))
            error = result["error"]["forward" if part == "forward" else "gradients"]
            lines.append(
                f"| {variant}, {part} | {1e3 * median:.1f} | {flops * work / median:.1f} "
                f"| {np.median(ratios):.2f} ({ratios.min():.2f} … {ratios.max():.2f}) "
                f"| {result['compile'][part]:.1f} | {error:.1e} |"
            )
    lengths = list(report[base]["temporary bytes"])
    lines += ["", "| temporary memory of forward + backward, MiB | " + " | ".join(f"T={t}" for t in lengths) + " |"]
    lines += ["|---" * (len(lengths) + 1) + "|"]
    for variant, result in report.items():
        cells = (f"{bytes_ / 2**20:.0f}" for bytes_ in result["temporary bytes"].values())
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    shapes = [Shape(*map(int, text.split(","))) for text in _SHAPES.value]
    options = [f"--shape={text}" for text in _SHAPES.value]
    options += [f"--implementations={','.join(_IMPLEMENTATIONS.value)}", f"--repeats={_REPEATS.value}"]
    facts = provenance(f"python -m experiments.op_speed.run {' '.join(options)}")
    reports = {shape: measure(shape, _IMPLEMENTATIONS.value, _REPEATS.value) for shape in shapes}
    tables = "\n\n".join(_table(shape, report) for shape, report in reports.items())
    folder = Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    shown = [{"shape": shape._asdict(), "implementations": report} for shape, report in reports.items()]
    (folder / "results.json").write_text(json.dumps(facts | {"shapes": shown}, indent=1) + "\n")
    header = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    (folder / "results.md").write_text(f"# Speed of the op\n\n{header}\n\n{tables}\n")
    print(tables)


if __name__ == "__main__":
    app.run(main)
