"""The table and the figure of the study."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def _cell(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def table(results: dict[str, Any]) -> str:
    """Markdown: word perplexity of each arm, mean ± standard deviation over seeds, and paired with the first arm."""
    arms = results["arms"]
    reference = np.asarray(next(iter(arms.values()))["test_word_perplexity"]["sliding"])
    lines = [
        "| arm | parameters | rate | test, sliding | test, packed | valid, packed | sliding, less the first arm's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        test = arm["test_word_perplexity"]
        valid = arm["valid_word_perplexity"][results["rates"].index(arm["rate"])]
        paired = _cell(list(np.asarray(test["sliding"]) - reference)) if name != next(iter(arms)) else "–"
        lines.append(
            f"| {name} | {arm['parameters']:,} | {arm['rate']:g} | {_cell(test['sliding'])} | {_cell(test['packed'])} "
            f"| {_cell(valid)} | {paired} |"
        )
    lines += ["", "Validation word perplexity at each learning rate:", ""]
    lines += ["| arm | " + " | ".join(f"{rate:g}" for rate in results["rates"]) + " |"]
    lines += ["|---" * (len(results["rates"]) + 1) + "|"]
    for name, arm in arms.items():
        lines.append(f"| {name} | " + " | ".join(_cell(values) for values in arm["valid_word_perplexity"]) + " |")
    return "\n".join(lines)


def figure(results: dict[str, Any], path: Path, title: str) -> None:
    """Training loss at the chosen rate, and validation perplexity against the rate, one point a seed."""
    fig, (curve, sweep) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for number, (name, arm) in enumerate(results["arms"].items()):
        loss, every = np.asarray(arm["training_loss"]["loss"]), arm["training_loss"]["every"]
        width = max(1, len(loss) // 40)
        smooth = np.convolve(loss, np.ones(width) / width, "valid")
        curve.plot((np.arange(len(smooth)) + width // 2) * every, smooth, color=f"C{number}", label=name)
        valid = np.asarray(arm["valid_word_perplexity"])
        sweep.plot(results["rates"], valid.mean(axis=1), color=f"C{number}", label=name)
        sweep.plot(results["rates"], valid, ".", color=f"C{number}", markersize=4)
    curve.set_xlabel("step")
    curve.set_ylabel("training loss, nats a token")
    curve.set_ylim(top=min(curve.get_ylim()[1], 6.5))
    sweep.set_xlabel("peak learning rate")
    sweep.set_ylabel("validation perplexity a word")
    sweep.set_xscale("log")
    sweep.set_yscale("log")
    for axis in (curve, sweep):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    fig.suptitle(title, fontsize=10)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def write(results: dict[str, Any], folder: Path, title: str) -> None:
    """Writes results.json, results.md and figure.png."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    facts = "\n".join(f"- {key}: {value}" for key, value in results.items() if key != "arms")
    times = "\n".join(
        f"- {name}: training {arm['training_seconds']} s for all rates and seeds, "
        f"evaluation {arm['evaluation_seconds']} s, non-finite steps {int(np.sum(arm['nonfinite_steps']))}"
        for name, arm in results["arms"].items()
    )
    note = "Perplexity per word of the raw text, end of line counted as a word; mean ± standard deviation over seeds."
    (folder / "results.md").write_text(f"# {title}\n\n{facts}\n\n{note}\n\n{table(results)}\n\n{times}\n")
    figure(results, folder / "figure.png", title)
