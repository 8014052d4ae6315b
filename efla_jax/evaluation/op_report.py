"""Rows of `comparison.measure` as lines, a table of Markdown and a plot."""

import os
import textwrap
from collections.abc import Sequence

import jax

from efla_jax.evaluation import EvaluationError
from efla_jax.evaluation.comparison import Bench, Row
from efla_jax.evaluation.op_speed import floor_seconds, work

COLUMNS = ("ms a call (quartiles)", "ms in kernels", "× floor", "error of output", "worst error", "MiB", "compile, s")
_WIDTHS = (28, 13, 7, 15, 23, 7, 10)


def _aligned(implementation: str, direction: str, columns: Sequence[str]) -> str:
    shown = "  ".join(f"{cell:<{width}}" for cell, width in zip(columns, _WIDTHS, strict=True))
    return f"{implementation:<16}  {direction:<18}  {shown}".rstrip()


HEADING = _aligned("", "", COLUMNS)


def describe(bench: Bench, directions: Sequence[str], best: dict[str, float]) -> dict[str, str]:
    """Facts that stand above the rows: what is run, where, what it needs and what its errors are of."""
    case, device = bench.case, jax.devices()[0]
    facts = {
        "device": f"{device.device_kind} ({device.platform}), jax {jax.__version__}",
        "case": f"{case} (B×T×H×K×V, one size if K = V), {case.dtype}",
        "measured ceilings": ceilings_text(best),
    }
    for direction in directions:
        need, floor = work(case, direction), floor_seconds(case, direction, best)
        facts[direction] = (
            f"moves {need['bytes'] / 1e6:.4g} MB, multiplies for {need['flops'] / 1e9:.4g} GFLOP: "
            f"floor {1e3 * floor:.4g} ms"
        )
    rows, heads = bench.sample.rows, bench.sample.key_heads
    facts["errors"] = (
        f"relative, against the token loop in float64 on the same inputs, "
        f"for {len(rows)} of {case.batch} rows and {len(heads)} of {case.groups} key heads"
    )
    return facts


def ceilings_text(best: dict[str, float]) -> str:
    return (
        f"copy {best['bytes_per_second'] / 1e9:.4g} GB/s (read + written), "
        f"matrix product {best['flops_per_second'] / 1e12:.3g} TFLOP/s"
    )


def peak_memory() -> list[str]:
    """A line with the most that the device has held in this process, where it keeps count."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return [] if peak is None else [f"peak of the device's memory, all of the above: {peak / 2**20:.0f} MiB"]


def kernel_total(row: Row) -> float | None:
    """Seconds of all kernels of a call."""
    return sum(kernel["seconds"] for kernel in row["kernels"].values()) if row["kernels"] else None


def cells(row: Row) -> list[str]:
    """The columns of a row; a row without measurement has its reason in the first."""
    if row["reason"]:
        return [row["reason"], *[""] * (len(COLUMNS) - 1)]
    ms = lambda seconds: f"{1e3 * seconds:.4g}"
    call, kernels, memory = row["seconds"], kernel_total(row), row["peak_bytes"]
    errors = {name: result["error"] for name, result in row["errors"].items()}
    worst = max(errors, key=lambda name: errors[name], default=None)
    warning = f" **wrong norm: {', '.join(row['suspects'])}**" if row["suspects"] else ""
    return [
        f"{ms(call['median'])} ({ms(call['first_quartile'])} … {ms(call['third_quartile'])})",
        "–" if kernels is None else ms(kernels),
        f"{call['median'] / row['floor_seconds']:.2f}",
        f"{errors['output']:.1e}" if worst else "other function",
        f"{errors[worst]:.1e} {worst}{warning}" if worst else "–",
        "–" if memory is None else f"{memory / 2**20:.0f}",
        f"{row['compile_seconds']:.1f}",
    ]


def line(row: Row) -> str:
    """One row for the terminal, below HEADING."""
    return _aligned(row["implementation"], row["direction"], cells(row))


def table(rows: Sequence[Row]) -> str:
    """Markdown: for every shape and direction a table, whose first implementation with a time is 1×."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["direction"]), []).append(row)
    parts = []
    for (shape, direction), group in groups.items():
        base = next((row["seconds"]["median"] for row in group if not row["reason"]), None)
        lines = [f"**{shape}, {direction}**; floor {1e3 * group[0]['floor_seconds']:.4g} ms", ""]
        lines += [f"| | time | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
        for row in group:
            relative = "" if row["reason"] or base is None else f"{row['seconds']['median'] / base:.2f}×"
            lines.append(f"| {row['implementation']} | {relative} | {' | '.join(cells(row))} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def error_table(rows: Sequence[Row]) -> str:
    """Markdown: the error of every result of every implementation; nothing if there is none."""
    merged: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, result in row.get("errors", {}).items():
            merged.setdefault(row["implementation"], {})[name] = result["error"]
    if not merged:
        return ""
    names = list(dict.fromkeys(name for errors in merged.values() for name in errors))
    lines = [f"| error | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for implementation, errors in merged.items():
        shown = (f"{errors[name]:.1e}" if name in errors else "–" for name in names)
        lines.append(f"| {implementation} | {' | '.join(shown)} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Medians with quartiles by shape, a panel for each direction, the floor as a line. At least one row has a time.

    Raises:
        EvaluationError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = [row for row in rows if not row["reason"]]
    unique = lambda key: list(dict.fromkeys(row[key] for row in measured))
    directions, names, shapes = unique("direction"), unique("implementation"), unique("shape")
    size = (4 + 1.4 * len(shapes), 3.6 * len(directions))
    fig, axes = plt.subplots(len(directions), 1, figsize=size, constrained_layout=True, squeeze=False)
    for axis, direction in zip(axes[:, 0], directions, strict=True):
        _points(axis, [row for row in measured if row["direction"] == direction], names, shapes)
        axis.set_ylabel(f"{direction}, ms")
    try:
        fig.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"output is {str(path)!r}, which cannot be written: {error}") from error
    finally:
        plt.close(fig)


def _points(axis, group: list[Row], names: list[str], shapes: list[str]) -> None:
    for number, name in enumerate(names):
        own = [row for row in group if row["implementation"] == name]
        places = [shapes.index(row["shape"]) + (number + 0.5 - len(names) / 2) * 0.8 / len(names) for row in own]
        calls = [row["seconds"] for row in own]
        medians = [1e3 * call["median"] for call in calls]
        below = [1e3 * (call["median"] - call["first_quartile"]) for call in calls]
        above = [1e3 * (call["third_quartile"] - call["median"]) for call in calls]
        axis.errorbar(places, medians, (below, above), fmt="o", markersize=5, label=name, color=f"C{number}")
    floors = {shapes.index(row["shape"]): 1e3 * row["floor_seconds"] for row in group}
    axis.hlines(list(floors.values()), [x - 0.45 for x in floors], [x + 0.45 for x in floors], "black", label="floor")
    axis.set_yscale("log")
    axis.grid(axis="y", which="both", alpha=0.3)
    labels = ["\n".join(textwrap.wrap(shape, 20)) for shape in shapes]
    axis.set_xticks(range(len(shapes)), labels, fontsize=7)
    axis.set_xlim(-0.5, len(shapes) - 0.5)
    axis.legend(fontsize=7, ncols=4)
