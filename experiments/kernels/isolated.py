"""Rows that are measured each in a process of its own, so that memory comes back and a crash costs one row alone.

A script measures one row where it is called with `--row=NAME --row_file=FILE`, and else calls itself so for each row.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.provenance import provenance

Row = dict[str, Any]

# Of a process that measures: JAX may take what the card has, and leaves what other libraries need outside of its pool.
_ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
_PACKAGES = (
    "jaxlib", "jax-cuda13-plugin", "flax", "optax", "torch", "triton", "transformers", "jax-linear-attention",
    "flash-linear-attention", "fla-core",
)  # fmt: skip


def measured(module: str, arguments: Sequence[str], timeout: float) -> Row:
    """What `python -m module *arguments --row_file=…` leaves there; its failure is a row of a "reason"."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, "-m", module, *arguments, f"--row_file={file}"]
        begun = time.perf_counter()
        try:
            done = subprocess.run(command, timeout=timeout, env=_ENVIRONMENT | os.environ, check=False)
        except subprocess.TimeoutExpired:
            return {"reason": f"not done in {timeout:.0f} s"}
        if file.is_file():
            return json.loads(file.read_text()) | {"process_seconds": time.perf_counter() - begun}
        return {"reason": f"the process ended with {done.returncode}"}


def measure_to(file: str, measure: Callable[[], Row]) -> None:
    """The child's side: writes the row, or why there is none."""
    try:
        row = measure()
    except ImportError as error:
        row = {"reason": f"not installed: {error}"}
    except Exception as error:  # of a peer or of a kernel, of whatever kind: the other rows are still to come
        traceback.print_exc()
        row = {"reason": f"failed, {type(error).__name__}: {str(error)[:400]}"}
    Path(file).write_text(json.dumps(row))


def card() -> str | None:
    """Name and driver of the first GPU, asked without starting anything on it."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        name, driver = (
            subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(",")
        )
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None
    return f"{name.strip()}, driver {driver.strip()}"


def versions() -> str:
    """Packages that may take part, as installed."""
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Least, quartiles and most, in milliseconds."""
    marks = dict(zip(("min", "q1", "median", "q3", "max"), (0, 25, 50, 75, 100), strict=True))
    return {name: 1e3 * float(np.percentile(np.asarray(seconds), mark)) for name, mark in marks.items()}


def spread_text(ms: dict[str, float]) -> str:
    """Median (quartiles)."""
    return f"{ms['median']:.3f} ({ms['q1']:.3f} … {ms['q3']:.3f})"


def facts(command: str, commit: str | None) -> Row:
    """Provenance of a table, without JAX starting in this process."""
    found = dict(provenance(command, commit, card() or "CPU"))
    found["versions"] += f", {versions()}"
    if flags := os.environ.get("XLA_FLAGS"):
        found["XLA_FLAGS"] = flags
    return found


def write(folder: Path | None, name: str, facts: Row, rows: Sequence[Row]) -> None:
    """folder/NAME.json, whole or not at all; nothing without a folder."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.json.partial"
    partial.write_text(json.dumps(facts | {"rows": list(rows)}, indent=1) + "\n")
    partial.replace(folder / f"{name}.json")
