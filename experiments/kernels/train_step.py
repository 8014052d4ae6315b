"""Time of a training step of DeltaNet 374M: this library, jax-linear-attention, flash-linear-attention.

python -m experiments.kernels.train_step [--shapes=8x2048,1x16384] [--implementations=ours:efla,ours:deltanet,jla,fla]
    [--steps=10] [--repeats=7] [--timeout=420] [--output=DIR] [--commit=HASH] [--sizes=layers=2,features=32,…]

The model: 24 blocks of width 1024, 8 heads of 128, convolutions of 4, SwiGLU of 2816, a vocabulary of 32,000, untied;
float32 parameters, bfloat16 products, AdamW with clipping; the same random tokens for all. An implementation is of
`train_models.build`: ours:RULE, ours:RULE:xla, jla, jla:tuned, fla, fla:bfloat16. Each is measured in a process of its
own; its row is printed and written to DIR/train_step.json at once.

Milliseconds a step: host clock around `steps` steps that are started one after the other, until the loss of the last is
on the host; the spread is over `repeats`. MFU: tokens a second × FLOPs a token / 989 TFLOP/s, the dense bfloat16 peak
of an H100 or H200, with FLOPs a token = 6 × parameters in matrix products (no embedding) + 18 × layers × heads × K × V.
"""

import math
import re
import time
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.kernels.isolated import Row, card, facts, measure_to, measured, spread, spread_text, write
from experiments.kernels.train_models import Sizes, build, draw_batches

_SHAPES = flags.DEFINE_list("shapes", ["8x2048", "1x16384"], "BxT: rows a batch, tokens a row")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["ours:efla", "ours:deltanet", "jla", "fla"], "see above")
_STEPS = flags.DEFINE_integer("steps", 10, "steps of a repeat", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 7, "timed repeats", lower_bound=1)
_TIMEOUT = flags.DEFINE_integer("timeout", 420, "seconds that a row may take", lower_bound=1)
_SIZES = flags.DEFINE_list("sizes", [], "NAME=NUMBER of other sizes of the model: layers, features, heads, …")
_OUTPUT = flags.DEFINE_string("output", None, "folder of train_step.json and train_step.md")
_COMMIT = flags.DEFINE_string("commit", None, "the commit that is measured, where there is no git to ask")
_ROW = flags.DEFINE_string("row", None, "IMPLEMENTATION@BxT: measure this one here")
_ROW_FILE = flags.DEFINE_string("row_file", None, "the file that its row goes to")

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # dense bfloat16, SXM
HEADING = "| B×T | implementation | ms a step, median (quartiles) | tokens/s | MFU | peak memory | ready in | loss |\n" + (
    "|---|---|---|---|---|---|---|---|"
)


def sizes_of(changes: list[str]) -> Sizes:
    """Sizes with NAME=NUMBER changed.

    Raises:
        app.UsageError: no such size, or no number.
    """
    try:
        return Sizes(**{name: int(number) for name, _, number in (text.partition("=") for text in changes)})
    except (TypeError, ValueError) as error:
        raise app.UsageError(f"--sizes is {','.join(changes)!r}: {error}") from error


def shape_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise app.UsageError(f"shape is {text!r}; it must be BxT")
    return int(match[1]), int(match[2])


def measure(name: str, sizes: Sizes, shape: tuple[int, int], steps: int, repeats: int) -> Row:
    """Times, memory and losses of one implementation."""
    begun = time.perf_counter()
    step = build(name, sizes, draw_batches(sizes, *shape))
    losses = [step.wait(step.run(number)) for number in range(3)]
    ready = time.perf_counter() - begun
    seconds, number = [], len(losses)
    for _ in range(repeats):
        begun = time.perf_counter()
        for _ in range(steps):
            last = step.run(number)
            number += 1
        losses.append(step.wait(last))
        seconds.append((time.perf_counter() - begun) / steps)
    return dict(
        milliseconds=spread(seconds), parameters=step.parameters, peak_bytes=step.peak_bytes(), losses=losses,
        compile_seconds=step.compile_seconds, ready_seconds=ready,
    )  # fmt: skip


def completed(row: Row, name: str, sizes: Sizes, shape: tuple[int, int]) -> Row:
    """row with its name and what follows from the times."""
    row = {"implementation": name, "shape": "×".join(map(str, shape)), "flops_per_token": sizes.flops_per_token()} | row
    if "milliseconds" in row:
        row["tokens_per_second"] = 1e3 * math.prod(shape) / row["milliseconds"]["median"]
        peak = next((flops for kind, flops in PEAK_FLOPS.items() if kind in (card() or "")), None)
        row["mfu"] = peak and row["tokens_per_second"] * row["flops_per_token"] / peak
        if not all(map(math.isfinite, row["losses"])):
            row["suspect"] = "a loss is not finite"
    return row


def line(row: Row) -> str:
    """A line of the table."""
    begin = f"| {row['shape']} | {row['implementation']} | "
    if "reason" in row:
        return f"{begin}{row['reason']} | | | | | |"
    mfu = f"{100 * row['mfu']:.1f} %" if row["mfu"] else ""
    peak = f"{row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
    losses = f"{row['losses'][0]:.3f} … {row['losses'][-1]:.3f}{' SUSPECT' if 'suspect' in row else ''}"
    cells = (spread_text(row["milliseconds"]), f"{row['tokens_per_second']:,.0f}", mfu, peak)
    return begin + " | ".join((*cells, f"{row['ready_seconds']:.0f} s", losses)) + " |"


def _command() -> str:
    parts = dict(shapes=_SHAPES, implementations=_IMPLEMENTATIONS, steps=_STEPS, repeats=_REPEATS)
    if _SIZES.value:
        parts["sizes"] = _SIZES
    text = lambda value: ",".join(value) if isinstance(value, list) else value
    return "python -m experiments.kernels.train_step " + " ".join(f"--{n}={text(f.value)}" for n, f in parts.items())


def _measure_all(sizes: Sizes, shapes: list[str], folder: Path | None) -> None:
    found: dict[str, Any] = facts(_command(), _COMMIT.value) | {"matrix parameters": sizes.matrix_parameters()}
    header = "\n".join(f"- {name}: {value}" for name, value in found.items())
    print(f"{header}\n\n{HEADING}", flush=True)
    rows: list[Row] = []
    options = [f"--steps={_STEPS.value}", f"--repeats={_REPEATS.value}", f"--sizes={','.join(_SIZES.value)}"]
    for text in shapes:
        for name in _IMPLEMENTATIONS.value:
            row = measured("experiments.kernels.train_step", [f"--row={name}@{text}", *options], _TIMEOUT.value)
            rows.append(completed(row, name, sizes, shape_of(text)))
            print(line(rows[-1]), flush=True)
            write(folder, "train_step", found, rows)
    if folder:
        table = "\n".join([HEADING, *map(line, rows)])
        (folder / "train_step.md").write_text(f"# Time of a training step\n\n{header}\n\n{table}\n")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    sizes = sizes_of([text for text in _SIZES.value if text])
    if _ROW.value:
        name, _, text = _ROW.value.partition("@")
        measure_to(_ROW_FILE.value, lambda: measure(name, sizes, shape_of(text), _STEPS.value, _REPEATS.value))
        return
    for text in _SHAPES.value:
        shape_of(text)
    _measure_all(sizes, _SHAPES.value, Path(_OUTPUT.value) if _OUTPUT.value else None)


if __name__ == "__main__":
    app.run(main)
