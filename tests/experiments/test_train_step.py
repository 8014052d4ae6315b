"""The tables of training steps and of generation, measured on a tiny model, and what they count."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import app

from efla_jax.models.presets import parameter_count, preset
from experiments.kernels import generation_models, isolated, train_models
from experiments.kernels.generation_models import floor_bytes, measure
from experiments.kernels.train_models import Sizes, build, draw_batches, model_config

ROOT = Path(__file__).parents[2]
TINY = Sizes(layers=1, features=16, heads=2, head_dim=8, hidden=24, vocabulary=32)
SIZES = "--sizes=layers=1,features=16,heads=2,head_dim=8,hidden=24,vocabulary=32"


def run(module, *options):
    command = [sys.executable, "-m", f"experiments.kernels.{module}", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_sizes_are_those_of_the_preset():
    config = model_config(Sizes(), "efla", None)
    assert config == preset("340m", mixers=("efla",))
    embedding_and_vectors = parameter_count(config) - Sizes().matrix_parameters()
    block = 2 * 1024 + 128 + 3 * 4 * 1024  # norms, the output's norm, convolutions
    assert embedding_and_vectors == 32_000 * 1024 + 24 * block + 1024
    assert Sizes().flops_per_token() == 6 * Sizes().matrix_parameters() + 3 * 24 * 8 * 6 * 128 * 128


def test_the_floor_counts_weights_once_and_states_twice():
    assert floor_bytes(TINY, 3) == 2 * (TINY.matrix_parameters() + 3 * 16) + 3 * 2 * 8 * 8 * 4 * 2


def test_other_sizes():
    assert train_models.sizes_of(["layers=2", "heads=4"]) == Sizes(layers=2, heads=4)
    with pytest.raises(app.UsageError, match="--sizes is 'layer=2'"):
        train_models.sizes_of(["layer=2"])


def test_rules_of_a_step():
    deltanet = model_config(TINY, "deltanet", "xla").mixer
    assert deltanet.normalize_queries
    assert deltanet.implementation == "xla"
    assert not model_config(TINY, "efla", None).mixer.normalize_queries


def test_a_step_trains():
    """The same batches again and again: the loss falls, and every step took the state of the one before."""
    step = build("ours:efla", TINY, draw_batches(TINY, 2, 16, count=1))
    losses = [step.wait(step.run(number)) for number in range(12)]
    assert step.parameters == parameter_count(model_config(TINY, "efla", None))
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_both_tables(tmp_path):
    """One row of this library, one of a library that is not here: the others are measured all the same."""
    done = run("train_step", "--shapes=1x8", "--implementations=fla,ours:deltanet", "--steps=1", "--repeats=2", SIZES,
               "--commit=abc", f"--output={tmp_path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "train_step.json").read_text())
    assert results["commit"] == "abc"
    missing, row = results["rows"]
    assert "not installed" in missing["reason"]
    assert row["milliseconds"]["median"] > 0
    assert row["tokens_per_second"] == pytest.approx(8e3 / row["milliseconds"]["median"])
    assert row["mfu"] is None  # of a CPU
    assert np.isfinite(row["losses"]).all()
    for text in (done.stdout, (tmp_path / "train_step.md").read_text()):
        assert "| 1×8 | fla | not installed: No module named 'torch' |" in text
        assert "| 1×8 | ours:deltanet | " in text


def test_generation_here():
    prompts = np.random.default_rng(0).integers(0, 32, (2, 5), dtype=np.int32)
    row = measure("ours:efla", TINY, prompts, tokens=9, repeats=1, burst=4, check=True)
    assert row["engine_agrees"]
    assert max(row["logit_errors"]) < 1e-2
    row = generation_models.completed(row, "ours:efla", TINY, 2, row["bandwidth"])
    assert row["floor_ms"] == pytest.approx(1e3 * floor_bytes(TINY, 2) / row["bandwidth"])
    assert "| 2 | ours:efla | " in generation_models.line(row)
    assert "SUSPECT" in generation_models.line(row | {"engine_agrees": False})


@pytest.mark.parametrize(
    ("module", "option", "message"),
    [
        ("train_step", "--shapes=8", "shape is '8'; it must be BxT"),
        ("generation", "--batches=0", "batch is '0'; it must be a number of at least 1"),
    ],
)
def test_refusals(module, option, message):
    done = run(module, option)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_a_process_that_dies_or_hangs_is_a_row(tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text("import os\nos.abort()\n")
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "ended with" in isolated.measured("dies", [], 30)["reason"]
    assert "not done in 1 s" in isolated.measured("hangs", [], 1)["reason"]


def test_a_failure_is_a_row(tmp_path, capsys):
    def fail():
        raise MemoryError("too large")

    isolated.measure_to(str(tmp_path / "row.json"), fail)
    assert json.loads((tmp_path / "row.json").read_text()) == {"reason": "failed, MemoryError: too large"}
    row = train_models.completed(json.loads((tmp_path / "row.json").read_text()), "jla", TINY, (1, 8))
    assert train_models.line(row).startswith("| 1×8 | jla | failed, MemoryError: too large |")
