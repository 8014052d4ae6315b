"""The table and the figure of the study."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from efla_jax.evaluation.corruptions import LABELS, LEVELS


def table(arms: dict[str, Any], levels: dict[str, tuple[float, ...]] | None = None) -> str:
    """Markdown: accuracy in %, mean ± standard deviation over seeds, at each level (all of them by default)."""
    lines = []
    for name, all_levels in LEVELS.items():
        chosen = (levels or LEVELS)[name]
        lines += [f"| {LABELS[name]} | " + " | ".join(f"{level:g}" for level in chosen) + " |"]
        lines += ["|---" * (len(chosen) + 1) + "|"]
        for arm, result in arms.items():
            rows = [np.asarray(result["accuracy"][name][all_levels.index(level)]) for level in chosen]
            lines += [f"| {arm} | " + " | ".join(_cell(row) for row in rows) + " |"]
        lines += [""]
    return "\n".join(lines)


def _cell(accuracies: np.ndarray) -> str:
    mean = f"{100 * accuracies.mean():.1f}"
    return f"{mean} ± {100 * accuracies.std(ddof=1):.1f}" if len(accuracies) > 1 else mean


def figure(arms: dict[str, Any], path: Path, title: str) -> None:
    """Accuracy against level, one panel per corruption: mean over seeds, and a band of one standard deviation."""
    fig, axes = plt.subplots(1, len(LEVELS), figsize=(12, 3.6), sharey=True, constrained_layout=True)
    for axis, (name, levels) in zip(axes, LEVELS.items(), strict=True):
        for number, (arm, result) in enumerate(arms.items()):
            color = f"C{number % 10}"
            accuracy = 100 * np.asarray(result["accuracy"][name])
            mean, spread = accuracy.mean(axis=1), accuracy.std(axis=1, ddof=min(1, accuracy.shape[1] - 1))
            axis.plot(levels, mean, marker="o", markersize=3, color=color, label=arm)
            axis.fill_between(levels, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
        axis.set_xlabel(LABELS[name])
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(fontsize=8, frameon=False, loc="lower left")
    fig.suptitle(title, fontsize=10)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def write(results: dict[str, Any], folder: Path, title: str) -> tuple[Path, Path]:
    """Writes results.json, results.md and figure.png; returns the paths of the JSON file and of the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    facts = "\n".join(f"- {key}: {value}" for key, value in results.items() if key != "arms")
    times = "\n".join(
        f"- {arm}: training {r['training_seconds']} s, evaluation {r['evaluation_seconds']} s, final training loss "
        f"{np.mean(r['final_training_loss']):.4f}, non-finite steps {sum(r['nonfinite_steps'])}"
        for arm, r in results["arms"].items()
    )
    body = f"# {title}\n\n{facts}\n\nTest accuracy in %, mean ± standard deviation over seeds.\n\n"
    (folder / "results.md").write_text(f"{body}{table(results['arms'])}\n{times}\n")
    figure(results["arms"], folder / "figure.png", title)
    return folder / "results.json", folder / "figure.png"
