"""Tables and plots of the study, from error*.json and training*.json in one folder, whichever of them are there.

python -m experiments.numerics.report DIR

Writes DIR/results.md, error.png, norms.png, training.png, gradients.png.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.numerics.results import Row, read

RESULTS = ("output", "state", "d_query", "d_key", "d_value", "d_beta")
SHOWN = ("output", "state", "d_key", "d_beta")  # in the plots
LABELS = {
    ("exact", 0.1, 10.0): "EFLA, ‖k‖² 0.1 … 10",
    ("exact", 1e-4, 1e-4): "EFLA, ‖k‖² 1e-4",
    ("euler", 1.0, 1.0): "DeltaNet, unit keys",
}


def _number(x: float | None) -> str:
    return "–" if x is None else f"{x:.2e}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _provenance(runs: list[dict[str, Any]]) -> str:
    return "\n\n".join("\n".join(f"- {name}: {value}" for name, value in run.items()) for run in runs) + "\n"


def _series(row: Row) -> str:
    return f"{row['type']}, {row['implementation']}"


def _keys(row: Row) -> str:
    low, high = row["keys"]
    return f"{low:g}" if low == high else f"{low:g} … {high:g}"


def _measured(rows: dict[str, Row], part: str) -> list[Row]:
    return [row for row in rows.values() if row["part"] == part and not row.get("reason")]


# ---- errors ----


def error_tables(rows: dict[str, Row]) -> str:
    """Markdown of every part that was measured."""
    sections = []
    cells = lambda row: [_number(row["errors"].get(name, {}).get("error")) for name in RESULTS]
    floor = lambda row: _number(row["errors"]["output"]["floor"])
    head = ("floor of output", *RESULTS)
    if found := _measured(rows, "lengths"):
        table = _table(
            ("rule", "type, implementation", "tokens", *head),
            ([LABELS.get((row["rule"], *row["keys"]), f"{row['rule']}, {_keys(row)}"), _series(row),
              f"{row['length']:,}", floor(row), *cells(row)] for row in found),
        )  # fmt: skip
        sections.append(f"## By length\n\n{table}")
    if found := _measured(rows, "norms"):
        table = _table(
            ("‖k‖²", "type, implementation", *head),
            ([_keys(row), _series(row), floor(row), *cells(row)] for row in found),
        )
        sections.append(f"## EFLA by the norm of the keys, {found[0]['length']:,} tokens\n\n{table}")
    if found := _measured(rows, "rules"):
        where = lambda row, name: "all finite" if row[name] is None else f"token {row[name]:,}"
        table = _table(
            ("‖k‖²", "rule", "type, implementation", "not finite from", "float64 not finite from", *head),
            ([_keys(row), row["rule"], _series(row), where(row, "first_nonfinite"),
              where(row, "oracle_first_nonfinite"),
              floor(row), *cells(row)] for row in found),
        )  # fmt: skip
        note = "A chunk of 64 tokens is one product: where one of its tokens overflows, all of them do.\n"
        sections.append(f"## Raw keys, EFLA and euler, {found[0]['length']:,} tokens\n\n{note}\n{table}")
    loops = [row for row in rows.values() if row["part"] == "oracle"]
    if loops:
        table = _table(
            ("rule", "tokens", *RESULTS),
            ([row["rule"], f"{row['length']:,}", *(_number(row["loop_errors"].get(name)) for name in RESULTS)]
             for row in loops),
        )  # fmt: skip
        sections.append(f"## The oracle against the float64 token loop\n\n{table}")
    declined = sorted({row["reason"] for row in rows.values() if row.get("reason")})
    sections += ["Not measured: " + "; ".join(declined) + "\n"] if declined else []
    return "\n".join(sections)


def _lines(axis: Any, rows: list[Row], name: str, place: Callable[[Row], float]) -> None:
    """One line a type and implementation, and dotted the floor of each type."""
    for number, series in enumerate(dict.fromkeys(map(_series, rows))):
        mine = sorted((row for row in rows if _series(row) == series and name in row["errors"]), key=place)
        values = lambda key, mine=mine: [
            np.nan if row["errors"][name][key] is None else row["errors"][name][key] for row in mine
        ]
        x = [place(row) for row in mine]
        axis.plot(x, values("error"), marker="o", markersize=3, color=f"C{number}", label=series)
        axis.plot(x, values("floor"), linestyle=":", linewidth=1, color=f"C{number}")
    axis.set(xscale="log", yscale="log", title=name)
    axis.title.set_fontsize(9)
    axis.grid(alpha=0.3)


def _save(fig: Any, title: str, path: Path) -> None:
    fig.suptitle(title, fontsize=10)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def plot_lengths(rows: list[Row], path: Path) -> None:
    rules = list(dict.fromkeys((row["rule"], *row["keys"]) for row in rows))
    size = (3.2 * len(SHOWN), 2.7 * len(rules))
    fig, axes = plt.subplots(len(rules), len(SHOWN), figsize=size, squeeze=False, sharex=True, constrained_layout=True)
    for line, rule in zip(axes, rules, strict=True):
        mine = [row for row in rows if (row["rule"], *row["keys"]) == rule]
        for axis, name in zip(line, SHOWN, strict=True):
            _lines(axis, mine, name, lambda row: row["length"])
        line[0].set_ylabel(LABELS.get(rule, str(rule)), fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    axes[0][0].legend(fontsize=7, frameon=False)
    _save(fig, "relative error against float64 (dotted: rounding of float64's result to the type)", path)


def plot_norms(rows: list[Row], path: Path) -> None:
    rows = [row for row in rows if row["keys"][0] == row["keys"][1]]
    fig, axes = plt.subplots(1, len(SHOWN), figsize=(3.2 * len(SHOWN), 3), constrained_layout=True)
    for axis, name in zip(axes, SHOWN, strict=True):
        _lines(axis, rows, name, lambda row: row["keys"][0])
        axis.set_xlabel("‖k‖²")
    axes[0].legend(fontsize=7, frameon=False)
    _save(fig, "EFLA on raw keys: relative error against float64 by ‖k‖²", path)


# ---- training ----


def training_table(rows: dict[str, Row]) -> str:
    """Markdown: a line a run."""

    def cells(row):
        measured = ", ".join(f"{name} {_plain(x)}" for name, x in row["evaluation"].items())
        needs, first = row["at_least_a_step"], row["first_nonfinite_step"]
        bad = f"{row['nonfinite_steps']}" + ("" if first is None else f", first {first}")
        zeros = np.asarray(row["value_gradient_zeros"], float)
        op = "kernels" if row["kernels"] else "xla"
        return [
            row["task"], row["rule"], row["type"], op, f"{row['steps']:,}", bad, _plain(row["final_loss"]), measured,
            f"{100 * zeros[-1].mean():.2g} %", f"{1e3 * row['seconds_a_step']:.2f}",
            f"{needs['flops'] / 1e9:.3g} / {needs['bytes'] / 1e6:.3g}",
        ]  # fmt: skip

    head = ("task", "rule", "type", "op by", "steps", "not finite", "training loss, last 500", "held out",
            "∂L/∂v exactly 0, last probe", "ms a step", "GFLOP / MB a step, at least")  # fmt: skip
    return _table(head, map(cells, rows.values()))


def _plain(x: float | None) -> str:
    return "–" if x is None else f"{x:.4f}"


def _smooth(values: list[float | None], width: int = 10) -> np.ndarray:
    """Means of so many in a row, what is not finite left out as NaN."""
    x = np.array([np.nan if v is None else v for v in values])
    whole = len(x) // width * width
    return x[:whole].reshape(-1, width).mean(1) if whole else x


def _by_task(rows: dict[str, Row]) -> dict[str, list[Row]]:
    return {
        task: [row for row in rows.values() if row["task"] == task] for task in {r["task"]: 0 for r in rows.values()}
    }


STYLES = {"float32": "-", "bfloat16": "--", "float16": ":"}


def plot_training(rows: dict[str, Row], path: Path) -> None:
    """Loss, and the gradient's norm, of every run."""
    groups = _by_task(rows)
    fig, axes = plt.subplots(len(groups), 2, figsize=(10, 3.2 * len(groups)), squeeze=False, constrained_layout=True)
    for line, (task, mine) in zip(axes, groups.items(), strict=True):
        for row in mine:
            style = dict(color="C0" if row["rule"] == "efla" else "C1", linestyle=STYLES[row["type"]], linewidth=1)
            for axis, name in zip(line, ("loss_every_10", "grad_norm_every_10"), strict=True):
                y = _smooth(row[name])
                axis.plot(np.linspace(0, row["steps"], len(y)), y, label=f"{row['rule']}, {row['type']}", **style)
        line[0].set(ylabel=f"{task}: loss", yscale="log")
        line[1].set(ylabel="gradient norm", yscale="log")
        line[0].legend(fontsize=7, frameon=False)
        for axis in line:
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
    _save(fig, "training in each type (means of 10 points, one every 10 steps)", path)


def plot_gradients(rows: dict[str, Row], path: Path) -> None:
    """At the last probe: norm of the gradient by the values along T, and what part of it is exactly 0; and the norms
    of the parameters' gradients by layer, the median over the run."""
    groups = _by_task(rows)
    fig, axes = plt.subplots(len(groups), 3, figsize=(14, 3.4 * len(groups)), squeeze=False, constrained_layout=True)
    for line, (task, mine) in zip(axes, groups.items(), strict=True):
        for row in mine:
            color, label = "C0" if row["rule"] == "efla" else "C1", f"{row['rule']}, {row['type']}"
            for axis, name in zip(line, ("value_gradient_norms", "value_gradient_zeros"), strict=False):
                for number, bins in enumerate(np.asarray(row[name][-1], float)):
                    place = (np.arange(len(bins)) + 0.5) / len(bins)
                    mark = dict(linestyle=STYLES[row["type"]], color=color, alpha=1 / (1 + 0.5 * number))
                    axis.plot(place, bins, label=None if number else label, **mark)
            norms = {layer: np.nanmedian(np.asarray(x, float)) for layer, x in row["layer_norms"].items()}
            line[2].plot(list(norms), list(norms.values()), marker="o", linestyle=STYLES[row["type"]], color=color)
        line[0].set(ylabel=f"{task}: ‖∂L/∂v‖", xlabel="place in the sequence (paler: later layers)", yscale="log")
        line[1].set(ylabel="part of ∂L/∂v exactly 0", xlabel="place in the sequence")
        line[2].set(ylabel="gradient norm, median", yscale="log")
        line[2].tick_params(axis="x", rotation=60, labelsize=7)
        line[0].legend(fontsize=7, frameon=False)
    _save(fig, "gradients by place at the end of training, and by layer", path)


def write(folder: Path) -> list[Path]:
    """Everything that the folder's measurements give; returns what was written."""
    text, written = ["# Numerical study\n"], []
    if files := sorted(folder.glob("error*.json")):
        runs, rows = read(files)
        text += ["# Error against float64\n", _provenance(runs), error_tables(rows)]
        for part, plot, name in (("lengths", plot_lengths, "error.png"), ("norms", plot_norms, "norms.png")):
            if found := _measured(rows, part):
                plot(found, folder / name)
                written.append(folder / name)
    if files := sorted(folder.glob("training*.json")):
        runs, rows = read(files)
        text += ["# Training in each type\n", _provenance(runs), training_table(rows)]
        plot_training(rows, folder / "training.png")
        plot_gradients(rows, folder / "gradients.png")
        written += [folder / "training.png", folder / "gradients.png"]
    (folder / "results.md").write_text("\n".join(text))
    return [folder / "results.md", *written]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(*write(Path(sys.argv[1])), sep="\n")
