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

import re
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.kernels.isolated import Row, facts, measure_to, measured, write
from experiments.kernels.train_models import HEADING, Sizes, completed, line, measure, sizes_of

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


def shape_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise app.UsageError(f"shape is {text!r}; it must be BxT")
    return int(match[1]), int(match[2])


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
    sizes = sizes_of(_SIZES.value)
    if _ROW.value and _ROW_FILE.value:
        name, _, text = _ROW.value.partition("@")
        measure_to(_ROW_FILE.value, lambda: measure(name, sizes, shape_of(text), _STEPS.value, _REPEATS.value))
        return
    for text in _SHAPES.value:
        shape_of(text)
    _measure_all(sizes, _SHAPES.value, Path(_OUTPUT.value) if _OUTPUT.value else None)


if __name__ == "__main__":
    app.run(main)
