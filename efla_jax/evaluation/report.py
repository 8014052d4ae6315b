"""What is measured as lines of text, and as a file."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efla_jax.evaluation import EvaluationError


def figure_lines(figures: dict[str, Any]) -> Iterator[str]:
    """A line for each figure; lists are left to the file."""
    for name, value in figures.items():
        if not isinstance(value, list):
            yield f"{name:<16}{value if isinstance(value, int | str) else format(value, '.6g')}"


def task_lines(scores: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each benchmark that `run_tasks` gives: rows, and each metric ± its standard error."""
    for task, found in scores.items():
        errors = {name.removesuffix("_stderr"): value for name, value in found.items() if name.endswith("_stderr")}
        shown = {name: "-" if error is None else f"{error:.4g}" for name, error in errors.items()}
        metrics = "   ".join(f"{name} {found[name]:.4g} ± {error}" for name, error in shown.items())
        yield f"{task:<16}{found['rows']:>6} rows   {metrics}"


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Raises EvaluationError if the file cannot be written."""
    try:
        Path(path).write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise EvaluationError(f"output is {str(path)!r}, which cannot be written: {error}") from error
