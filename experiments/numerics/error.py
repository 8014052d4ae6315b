"""Error of the op against float64, by length, by the norm of the keys, by rule, in every type.

python -m experiments.numerics.error --output=DIR [--parts=oracle,lengths,norms,rules] [--lengths=1024,…,1048576]
    [--types=float32,bfloat16,float16,float8] [--middle=16384] [--threads=16] [--commit=HASH]

oracle   the float64 chunkwise form against the float64 token loop, at up to 4,096 tokens (the loop is on the CPU)
lengths  EFLA (‖k‖² from 0.1 to 10, and 1e-4 throughout: a state that hardly forgets) and DeltaNet (euler, unit keys)
norms    EFLA at `middle` tokens, ‖k‖² from 1e-6 to 1e3
rules    EFLA and euler at `middle` tokens with the same raw keys: where euler's results cease to be numbers

Types are what inputs are rounded to; float8 is held in bfloat16 (draws.py). Errors are relative and root mean square,
against float64 on the same rounded numbers; "floor" is what rounding float64's result to the output's type makes.
A row is printed as soon as it is measured and DIR/error.json written again; rows that are there are skipped. The plots
and tables are made by experiments.numerics.report. On a GPU, XLA_FLAGS=--xla_gpu_autotune_level=0 compiles sooner, and
as kernels are lowered one by one, so do several processes with parts or lengths and a --file of their own each.
"""

import itertools
import os
import time
from pathlib import Path

import jax
from absl import app, flags

from experiments.numerics.draws import TYPES, Sizes, draw
from experiments.numerics.measure import (
    ORACLE,
    compile_ahead,
    errors,
    evaluate,
    first_nonfinite,
    oracle_error,
    program,
)
from experiments.numerics.plan import EFLA, SLOW, UNIT, Point, implementations_for, points
from experiments.numerics.results import Rows
from experiments.provenance import provenance

_PARTS = ("oracle", "lengths", "norms", "rules")
_OUTPUT = flags.DEFINE_string("output", None, "folder of the rows", required=True)
_FILE = flags.DEFINE_string("file", "error.json", "file of the rows; report reads error*.json")
_CHOSEN = flags.DEFINE_list("parts", list(_PARTS), "parts to run")
_LENGTHS = flags.DEFINE_list("lengths", [str(4**n) for n in range(5, 11)], "tokens; multiples of 16")
_MIDDLE = flags.DEFINE_integer("middle", 16384, "tokens of the parts norms and rules")
_TYPES = flags.DEFINE_multi_enum("types", list(TYPES), TYPES, "types of the inputs; repeat the flag for several")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["xla", "pallas_gpu"], "implementations")
_HEADS = flags.DEFINE_integer("heads", 2, "heads")
_DIM = flags.DEFINE_integer("dim", 128, "K = V")
_THREADS = flags.DEFINE_integer("threads", os.cpu_count() or 1, "programs compiled at a time", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the random numbers")
_COMMIT = flags.DEFINE_string("commit", None, "the commit that is measured, where there is no git to ask")

_LONGEST_LOOP = 4096


def measure(point: Point, names: list[str], rows: Rows) -> None:
    """Adds the rows of the point that are not there."""
    missing = [name for name in names if not rows.has(f"{point}/{name}")]
    if not missing:
        return
    inputs, cotangents = draw(point.sizes, point.keys, point.kind, _SEED.value)
    arguments = (point.kind, point.rule, point.sizes, inputs, cotangents)
    begun = time.monotonic()
    right = jax.block_until_ready(evaluate(ORACLE, *arguments))
    facts = {
        "part": point.part, "length": point.sizes.length, "keys": [point.keys.low, point.keys.high],
        "rule": point.rule, "type": point.kind, "heads": point.sizes.heads, "dim": point.sizes.dim,
        "oracle_first_nonfinite": first_nonfinite(right), "oracle_seconds": time.monotonic() - begun,
    }  # fmt: skip
    for name in missing:
        row = facts | {"implementation": name}
        begun = time.monotonic()
        try:
            found = jax.block_until_ready(evaluate(name, *arguments))
            row |= {"seconds": time.monotonic() - begun, "errors": errors(found, right), "reason": None}
            row |= {"first_nonfinite": first_nonfinite(found)}
        except NotImplementedError as error:
            row |= {"reason": str(error), "errors": {}}
        except jax.errors.JaxRuntimeError as error:  # of memory, say: the other rows are still to come
            row |= {"reason": f"failed: {str(error)[:300]}", "errors": {}}
        rows.add(f"{point}/{name}", row)
        print(line(f"{point}/{name}", row), flush=True)


def line(key: str, row: dict) -> str:
    if row["reason"]:
        return f"{key:<50} {row['reason'][:120]}"
    show = lambda x: "   -   " if x is None else f"{x:7.1e}"
    cells = [f"{name} {show(result['error'])}" for name, result in row["errors"].items()]
    where = "" if row["first_nonfinite"] is None else f"  not finite from token {row['first_nonfinite']}"
    return f"{key:<50} {'  '.join(cells)}  floor {show(row['errors']['output']['floor'])}{where}"


def check_oracle(lengths: list[int], heads: int, dim: int, rows: Rows) -> None:
    for length, (rule, keys) in itertools.product(lengths, (("exact", EFLA), ("exact", SLOW), ("euler", UNIT))):
        key = f"oracle/{rule}/{keys}/{length}"
        if length > _LONGEST_LOOP or rows.has(key):
            continue
        sizes = Sizes(length, heads, dim)
        inputs, cotangents = draw(sizes, keys, "float32", _SEED.value)
        found = oracle_error(rule, sizes, inputs, cotangents)
        rows.add(key, {"part": "oracle", "rule": rule, "length": length, "loop_errors": found})
        print(f"{key:<50} " + "  ".join(f"{name} {error:.1e}" for name, error in found.items()), flush=True)


def _facts() -> dict:
    options = [f"--parts={','.join(_CHOSEN.value)}", f"--lengths={','.join(_LENGTHS.value)}"]
    options += [f"--types={kind}" for kind in _TYPES.value] if _TYPES.value != list(TYPES) else []
    options += [f"--middle={_MIDDLE.value}", f"--heads={_HEADS.value}", f"--dim={_DIM.value}", f"--seed={_SEED.value}"]
    return dict(provenance(f"python -m experiments.numerics.error --output=DIR {' '.join(options)}", _COMMIT.value))


def main(argv: list[str]) -> None:
    if argv[1:] or not set(_CHOSEN.value) <= set(_PARTS):
        raise app.UsageError(f"unknown arguments {argv[1:]}, or parts other than {', '.join(_PARTS)}")
    lengths = [int(length) for length in _LENGTHS.value]
    if any(length % 16 for length in (*lengths, _MIDDLE.value)):
        raise app.UsageError("lengths must be multiples of 16")
    facts = _facts()
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()), flush=True)
    rows = Rows(Path(_OUTPUT.value) / _FILE.value, facts)
    todo = points(_CHOSEN.value, lengths, _MIDDLE.value, _TYPES.value, _HEADS.value, _DIM.value)
    wanted = [(point, implementations_for(point.kind, _IMPLEMENTATIONS.value)) for point in todo]
    wanted = [(point, names) for point, names in wanted if any(not rows.has(f"{point}/{name}") for name in names)]
    of = lambda point, name: program(name, point.kind, point.rule, point.sizes)
    programs = [of(point, name) for point, names in wanted for name in (ORACLE, *names)]
    begun = time.monotonic()
    compile_ahead(list(dict.fromkeys(programs)), _THREADS.value)
    print(f"{len(set(programs))} programs compiled in {time.monotonic() - begun:.0f} s", flush=True)
    for point, names in wanted:
        measure(point, names, rows)
    if "oracle" in _CHOSEN.value:
        check_oracle(lengths, _HEADS.value, _DIM.value, rows)


if __name__ == "__main__":
    app.run(main)
