"""The study of Figure 1: seeds trained side by side, its table and its figure."""

import dataclasses
import json

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

from efla_jax.data import mnist
from efla_jax.evaluation.corruptions import LEVELS
from efla_jax.models import LastStateConfig
from efla_jax.training.config import Config, OptimizerConfig, TrainConfig
from experiments.smnist_robustness import study
from experiments.smnist_robustness.report import figure, table, write
from experiments.smnist_robustness.study import Arm, run_arms, train_seeds

MODEL = LastStateConfig(pixels=16, pixels_per_token=4, features=8)
CONFIG = Config(model=MODEL, optimizer=OptimizerConfig(peak_lr=1e-2), train=TrainConfig(steps=4, batch_size=6))
ARM = Arm("EFLA", CONFIG)
DELTANET = Arm("DeltaNet", dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, normalize_keys=True)))


def digits(count=20, size=4):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, size, size)).astype(np.uint8), rng.integers(0, 10, count).astype(np.int32)


# ---- training ----


@pytest.mark.slow
def test_a_seed_trained_beside_others_is_a_seed_trained_alone(monkeypatch):
    orders, original = [], study.batches
    monkeypatch.setattr(study, "batches", lambda *args, **options: orders.append(options) or original(*args, **options))
    params, losses = train_seeds(ARM, [0, 1, 5], *digits())
    assert orders == [dict(batch_size=6, seed=seed) for seed in (0, 1, 5)]  # a data order of its own
    alone, alone_losses = train_seeds(ARM, [5], *digits())
    assert losses.shape == (4, 3)
    np.testing.assert_allclose(losses[:, 2:], alone_losses, rtol=1e-5)
    for leaf, other in zip(*(jax.tree.leaves(tree) for tree in (params, alone)), strict=True):
        np.testing.assert_allclose(leaf[2:], other, rtol=1e-3, atol=1e-4)
    assert len(np.unique(losses[0])) == 3  # seeds differ, from the first step on


def test_a_study_of_two_arms(monkeypatch, capsys):
    train, test = digits(20), digits(11)
    monkeypatch.setattr(mnist, "arrays", lambda split, data_dir: {"train": train, "test": test}[split])
    results = run_arms([ARM, DELTANET], [0, 1])
    assert list(results) == ["EFLA", "DeltaNet"]
    for result in results.values():
        shapes = {name: np.shape(rows) for name, rows in result["accuracy"].items()}
        assert shapes == {name: (len(levels), 2) for name, levels in LEVELS.items()}
        counts = np.concatenate([np.ravel(rows) for rows in result["accuracy"].values()]) * 11
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-9)  # of the 11 test digits
        assert len(result["final_training_loss"]) == 2
        assert result["nonfinite_steps"] == [0, 0]
    _, losses = train_seeds(ARM, [0, 1], *train)
    np.testing.assert_allclose(results["EFLA"]["final_training_loss"], losses.mean(axis=0), rtol=1e-5)
    clean = np.mean(results["EFLA"]["accuracy"]["intensity"][0])
    assert f"EFLA: clean accuracy {100 * clean:.2f}" in capsys.readouterr().out
    json.dumps(results)


# ---- the report ----


def arm(accuracy, seeds):
    """A result of this accuracy, a percent less at each level, seeds 10 % apart."""
    rows = lambda levels: [[accuracy - 0.01 * i + 0.1 * seed for seed in range(seeds)] for i in range(len(levels))]
    return {
        "accuracy": {name: rows(levels) for name, levels in LEVELS.items()},
        "training_seconds": 12.5,
        "evaluation_seconds": 3.0,
        "final_training_loss": [0.25, 0.75][:seeds],
        "nonfinite_steps": [0, 2][:seeds],
    }


def test_table_of_every_level():
    lines = table({"EFLA": arm(0.8, 2), "DeltaNet": arm(0.5, 1)}).splitlines()
    rows = [line for line in lines if line]
    assert len(rows) == 3 * 4  # head, rule, two arms
    assert rows[0] == "| intensity scale | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 |"
    assert rows[1] == "|---" * 11 + "|"
    assert rows[4].startswith("| Gaussian noise σ | 0 | 0.1 |")
    assert rows[8].startswith("| pixel dropout p | 0 | 0.1 |")
    assert rows[2].startswith("| EFLA | 85.0 ± 7.1 | 84.0 ± 7.1 |")  # standard deviation of a sample of two
    assert rows[3].startswith("| DeltaNet | 50.0 | 49.0 |")
    assert all(row.count("|") == rows[i - i % 4].count("|") for i, row in enumerate(rows))


def test_table_of_chosen_levels():
    rows = table({"EFLA": arm(0.8, 1)}, {"intensity": (1.0, 10.0), "noise": (0.3,), "dropout": (1.0,)}).splitlines()
    assert rows[0] == "| intensity scale | 1 | 10 |"
    assert rows[2] == "| EFLA | 80.0 | 71.0 |"
    assert rows[6] == "| EFLA | 77.0 |"
    assert rows[10] == "| EFLA | 70.0 |"


def test_figure_draws_mean_and_spread_of_every_arm(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    figure({"EFLA": arm(0.8, 2), "DeltaNet": arm(0.5, 1)}, tmp_path / "figure.png", "a title")
    monkeypatch.undo()
    (fig,) = drawn
    assert [axis.get_xlabel() for axis in fig.axes] == ["intensity scale", "Gaussian noise σ", "pixel dropout p"]
    for axis, levels in zip(fig.axes, LEVELS.values(), strict=True):
        efla, deltanet = axis.lines
        np.testing.assert_allclose(efla.get_xdata(), levels)
        np.testing.assert_allclose(efla.get_ydata(), 85 - np.arange(len(levels)))
        np.testing.assert_allclose(deltanet.get_ydata(), 50 - np.arange(len(levels)))
        band, none = (area.get_paths()[0].vertices[:, 1] for area in axis.collections)
        assert band.max() == pytest.approx(85 + 10 / 2**0.5)
        assert none.max() == pytest.approx(50)
    assert [text.get_text() for text in fig.axes[0].get_legend().get_texts()] == ["EFLA", "DeltaNet"]
    plt.close(fig)


def test_write(tmp_path):
    results = {"command": "make it", "seeds": 2, "arms": {"EFLA": arm(0.8, 2)}}
    file, picture = write(results, tmp_path / "new" / "folder", "a title")
    assert json.loads(file.read_text()) == results
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = plt.imread(picture)
    assert image.shape[1] > 2 * image.shape[0] > 200
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 10  # not blank
    text = (file.parent / "results.md").read_text()
    assert text.startswith("# a title\n")
    assert table(results["arms"]) in text
    for fact in ("- command: make it", "- seeds: 2", "final training loss 0.5000", "non-finite steps 2"):
        assert fact in text
