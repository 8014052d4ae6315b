"""Training in each type, on a few rows: what a run measures, that the probe changes nothing, that runs are kept."""

import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efla_jax.layers import MixerConfig
from efla_jax.models import LanguageModelConfig, LastStateConfig, graph_of
from efla_jax.training.config import Config, OptimizerConfig, TrainConfig
from efla_jax.training.objectives import objective_of
from efla_jax.training.step import initial_state, make_optimizer
from experiments.numerics import runs, tasks
from experiments.numerics.probe import BINS, value_gradients

ROOT = Path(__file__).parents[2]
PIXELS = Config(model=LastStateConfig(pixels=16, features=8), train=TrainConfig(steps=4, batch_size=4))
TEXT = Config(
    model=LanguageModelConfig(17, 8, 2, 8, mixer=MixerConfig(heads=2, key_dim=4, value_dim=4, conv_width=2)),
    optimizer=OptimizerConfig(),
    train=TrainConfig(steps=4, batch_size=4),
)


def batch_of(config, rows=4) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    if config is PIXELS:
        images = rng.integers(0, 256, (rows, 4, 4)).astype(np.uint8)
        return {"image": images, "label": rng.integers(0, 10, rows).astype(np.int32)}
    tokens = rng.integers(0, 17, (rows, 33)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.zeros((rows, 32), np.int32)}


def state_of(config):
    return jax.jit(lambda key: initial_state(config, key, make_optimizer(config.optimizer, 1e-3)))(jax.random.key(0))


@pytest.mark.parametrize("config", [PIXELS, TEXT], ids=["pixels", "text"])
def test_value_gradients(config):
    """One norm a layer and bin, of the mean loss: of every row twice, each has half the weight."""
    params, batch = state_of(config)["params"], batch_of(config)
    graph, objective = graph_of(config.model), objective_of(config)
    found = jax.jit(value_gradients(graph, objective))(params, batch)
    layers = 1 if config is PIXELS else 2
    assert found["norm"].shape == found["zeros"].shape == (layers, BINS)
    assert np.all(found["norm"] > 0)
    assert np.all(found["zeros"] < 0.1)
    again = jax.jit(value_gradients(graph, objective))(params, jax.tree.map(lambda x: np.concatenate([x, x]), batch))
    np.testing.assert_allclose(again["norm"], found["norm"] / np.sqrt(2), rtol=1e-4)


def test_a_value_gradient_by_hand():
    """Of the classifier's last bin, of one pixel: a shift of that pixel's value is differentiated instead."""
    params, batch = state_of(PIXELS)["params"], batch_of(PIXELS, rows=1)
    graph, objective = graph_of(PIXELS.model), objective_of(PIXELS)
    found = jax.jit(value_gradients(graph, objective))(params, batch)

    def loss(shift):
        model = nnx.merge(graph, params, copy=True)
        model.value.__class__ = type(
            "Shifted", (nnx.Linear,), {"__call__": lambda self, x: nnx.Linear.__call__(self, x) + shift}
        )
        images = jnp.asarray(batch["image"])
        logits = model(images)
        return -jax.nn.log_softmax(logits)[0, batch["label"][0]]

    gradient = jax.jit(jax.grad(loss))(jnp.zeros((1, 16, 8)))
    np.testing.assert_allclose(found["norm"][0], np.linalg.norm(gradient[0], axis=-1), rtol=1e-4)


def test_order_is_passes_over_all_records():
    rows = tasks.order(10, 7, 3, seed=0)
    assert rows.shape == (7, 3)
    assert sorted(rows.reshape(-1)[:10]) == sorted(rows.reshape(-1)[10:20]) == list(range(10))


def test_layers():
    names = ["blocks/0/mixer/key/kernel", "blocks/0/mixer/value/kernel", "blocks/1/mlp/up/kernel", "embed/embedding"]
    norms = runs.by_layer(names, np.array([[9.0, 16.0, 1.0, 4.0], [0, 0, np.nan, 1]]))
    assert norms == {"blocks/0/mixer": [5, 0], "blocks/1/mlp": [1, None], "embed": [2, 1]}


def test_a_run_stops_where_it_is_not_finite():
    config = Config(
        model=PIXELS.model, optimizer=OptimizerConfig(peak_lr=float("1e30")), train=TrainConfig(steps=8, batch_size=4)
    )
    data = (jax.device_put(batch_of(PIXELS, 8)), jax.device_put(batch_of(PIXELS, 8)))
    programs = runs.compile_run(config, data, 2, 0)
    result = runs.run(programs, config, data, 2, 0, "a run")
    assert result["steps"] < 8
    assert result["nonfinite_steps"] > 0
    assert result["first_nonfinite_step"] is not None
    json.dumps(result, allow_nan=False)


@pytest.mark.slow
def test_the_program(tmp_path):
    text = "the same words again and again, \n" * 40
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt.xz").write_bytes(lzma.compress(text.encode()))
    command = [
        sys.executable, "-m", "experiments.numerics.training", f"--output={tmp_path}", f"--text={tmp_path}",
        "--tasks=wikitext2", "--types=float16", "--rules=efla", "--steps=20", "--every=10", "--batch=2",
        "--layers=1", "--features=16", "--length=32", "--commit=abc",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert list(rows) == ["wikitext2/efla/float16/20"]
    for row in rows.values():
        assert row["steps"] == 20
        assert row["nonfinite_steps"] == 0
        assert row["loss_every_10"][1] < row["loss_every_10"][0]
        assert np.shape(row["value_gradient_norms"]) == (2, 1, BINS)
        assert {len(norms) for norms in row["layer_norms"].values()} == {2}
        assert row["evaluation"]["loss"] < 6
        assert row["at_least_a_step"]["flops"] > 0
