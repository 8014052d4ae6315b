"""Zero-shot benchmarks by the harness `lm-eval`, from local files alone.

tasks/NAME.yaml says how a task's rows become requests and how they are scored; its file of rows, JSON lines in the
fields of github.com/mosaicml/llm-foundry (scripts/eval/local_data), lies in a folder of the user's.
"""

import gzip
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from efla_jax.choices import nearest
from efla_jax.evaluation import EvaluationError

_TASKS = Path(__file__).parent / "tasks"


def task_names() -> list[str]:
    """The benchmarks that ship."""
    return sorted(file.stem for file in _TASKS.glob("*.yaml"))


def run_tasks(
    lm: LM, names: Sequence[str], folder: str | os.PathLike[str], *, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Scores a model on benchmarks whose files lie in `folder`; on the first `limit` rows of each, if given.

    Returns {task: {"rows": number of rows, metric: value, metric_stderr: its standard error, …}}; one row has no
    standard error, but None. That of a mean is s/√n; that of a perplexity, exp of a mean, is perplexity · s/√n.

    Raises:
        EvaluationError: there is no such task, or its file is missing, damaged or has other fields.
    """
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit is {limit}; it must be at least 1")
    with tempfile.TemporaryDirectory(prefix="efla-tasks-") as cache:
        tasks = TaskManager(include_defaults=False).load([_config(name, Path(folder), cache) for name in names])
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(0)  # it must be set, though no examples are drawn
        # 0: the harness's standard errors of perplexities come from forked processes, which JAX does not survive.
        result = evaluate(lm, tasks, limit=limit, bootstrap_iters=0)
    if result is None:
        raise RuntimeError("the harness gave no result; it must run in the process of rank 0")
    return {name: _summary(result["results"][name], result["samples"][name]) for name in names}


def _config(name: str, folder: Path, cache: str) -> dict[str, Any]:
    """The task's YAML with the path of its rows filled in."""
    names = task_names()
    if name not in names:
        raise EvaluationError(f"task is {name!r}, which is none{nearest(name, names)}; there are {', '.join(names)}")
    config = yaml.safe_load((_TASKS / f"{name}.yaml").read_text())
    file = _find(name, folder, config["dataset_kwargs"]["data_files"]["test"])
    _check_rows(file, set(config["metadata"]["fields"]))
    return config | {"dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": cache}}


def _find(name: str, folder: Path, filename: str) -> Path:
    """The task's file, compressed or not."""
    wanted = (filename, filename.removesuffix(".gz"))
    for file in (folder / each for each in wanted):
        if file.is_file():
            return file
    raise EvaluationError(f"task {name}: {str(folder)!r} has no file {' or '.join(wanted)}")


def _check_rows(file: Path, fields: set[str]) -> None:
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    except (OSError, EOFError, ValueError) as error:
        raise EvaluationError(f"{file} is damaged: {error}") from error
    if not rows:
        raise EvaluationError(f"{file} has no rows")
    for number, row in enumerate(rows):
        missing = sorted(fields - set(row)) if isinstance(row, dict) else sorted(fields)
        if missing:
            raise EvaluationError(
                f"{file}: row {number} has no field {missing[0]!r}; it must have {', '.join(sorted(fields))}"
            )


def _summary(found: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The harness's values, which it names "METRIC,FILTER", and their standard errors."""
    summary: dict[str, Any] = {"rows": len(samples)}
    for key, value in found.items():
        metric, _, _ = key.partition(",")
        if metric not in samples[0]["metrics"]:
            continue
        spread = np.std([sample[metric] for sample in samples], ddof=1) if len(samples) > 1 else None
        scale = value if metric == "perplexity" else 1.0
        summary[metric] = float(value)
        summary[f"{metric}_stderr"] = None if spread is None else float(scale * spread / np.sqrt(len(samples)))
    return summary
