"""Curves of training runs, from their metrics.jsonl."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from efla_jax.choices import nearest
from efla_jax.training.config import ConfigError


def read_metric(workdir: str | os.PathLike[str], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric of a run; steps that did not log it are left out.

    Raises:
        ConfigError: there is no run, or it has no such metric; the nearest is named.
    """
    file = Path(workdir) / "metrics.jsonl"
    try:
        entries = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--workdir is {str(workdir)!r}, which holds no metrics: {error}") from error
    points = [(entry["step"], float(entry[name])) for entry in entries if name in entry]
    if not points:
        known = sorted({key for entry in entries for key in entry} - {"step"})
        raise ConfigError(f"--metric is {name!r}, which {file} lacks{nearest(name, known)}; it has {', '.join(known)}")
    steps, values = np.array(points).T
    return steps, values


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a fiftieth of the points; near the ends over those that are there."""
    width = max(1, len(values) // 50)
    window = np.ones(2 * (width // 2) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def plot(workdirs: Sequence[str], name: str, output: str | os.PathLike[str]) -> None:
    """Draws a metric of one or more runs against the step: each point faint, the running mean in full colour.

    Raises:
        ConfigError: see `read_metric`; or the file cannot be written, or is of a kind that matplotlib does not know.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {str(workdir): read_metric(workdir, name) for workdir in workdirs}
    fig, axis = plt.subplots(figsize=(6.4, 4), constrained_layout=True)
    for number, (workdir, (steps, values)) in enumerate(curves.items()):
        axis.plot(steps, values, color=f"C{number}", alpha=0.25, linewidth=1)
        axis.plot(steps, smooth(values), color=f"C{number}", label=workdir)
    axis.set_xlabel("step")
    axis.set_ylabel(name)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    try:
        fig.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output is {str(output)!r}, which cannot be written: {error}") from error
    finally:
        plt.close(fig)
