"""efla compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efla_jax.commands.options import UsageError, integer, parse, refuse, require

_SWITCHES = ("backward", "log_decay")
_NAMES = ("implementations", "shape", "dtype", "packed", "key_heads", "repeats", "output")


def compare(arguments: Sequence[str]) -> None:
    """Times implementations of the op on this device and measures their errors, each row printed as it is there."""
    from efla_jax.evaluation.comparison import Bench, measure, split_name
    from efla_jax.evaluation.op_report import HEADING, describe, error_table, line, peak_memory
    from efla_jax.evaluation.op_speed import DIRECTIONS, FORWARD, ceilings
    from efla_jax.ops.registry import NAMES

    options, rest = parse(arguments, _NAMES)
    switches = {argument.removeprefix("--") for argument in rest} & set(_SWITCHES)
    refuse([argument for argument in rest if argument not in {f"--{name}" for name in switches}], _NAMES + _SWITCHES)
    names = options.get("implementations", ",".join(NAMES)).split(",")
    for name in names:
        split_name(name)
    directions = DIRECTIONS if "backward" in switches else (FORWARD,)
    case = _case(options, "log_decay" in switches)
    repeats = integer("repeats", options.get("repeats", "15"))
    if repeats < 1:
        raise UsageError(f"--repeats is {repeats}; it must be at least 1")
    folder = _folder(options)

    best = ceilings(case.dtype)
    bench = Bench(case, gradients="backward" in switches)
    facts = describe(bench, directions, best)
    print(*(f"{key}: {value}" for key, value in facts.items()), "", HEADING, sep="\n", flush=True)
    rows = []
    for direction in directions:
        for name in names:
            rows.append(measure(bench, name, direction, best, repeats=repeats))
            print(line(rows[-1]), flush=True)
    print("", error_table(rows), *peak_memory(), sep="\n")
    if folder:
        _write(folder, facts | {"ceilings": best, "rows": rows})


def _case(options: dict[str, str], log_decay: bool) -> Any:
    from efla_jax.evaluation.op_accuracy import Case

    (shape,) = require(options, "shape")
    sizes = shape.split(",")
    if len(sizes) != 5 or not all(size.isdecimal() and int(size) for size in sizes):
        raise UsageError(f"--shape is {shape!r}; it must be five positive sizes B,T,H,K,V")
    counts = {name: integer(name, options[name]) for name in ("packed", "key_heads") if name in options}
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"--{name} is {count}; it must be at least 1")
    return Case(
        *map(int, sizes), key_heads=counts.get("key_heads", 0), documents=counts.get("packed", 1), log_decay=log_decay,
        state=True, dtype=options.get("dtype", "bfloat16"),
    )  # fmt: skip


def _folder(options: dict[str, str]) -> Path | None:
    """The folder of --output, made before anything is measured."""
    if "output" not in options:
        return None
    folder = Path(options["output"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output is {str(folder)!r}, which cannot be made a folder: {error}") from error
    return folder


def _write(folder: Path, results: dict[str, Any]) -> None:
    from efla_jax.evaluation.op_report import plot
    from efla_jax.evaluation.report import write_json

    write_json(folder / "compare.json", results)
    print(folder / "compare.json")
    if any(not row["reason"] for row in results["rows"]):
        plot(results["rows"], folder / "compare.png")
        print(folder / "compare.png")
