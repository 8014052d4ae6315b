"""Trains arms side by side, several seeds in one program, and measures their accuracy under corruption."""

import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from efla_jax.data import mnist
from efla_jax.data.pipeline import batches
from efla_jax.evaluation.accuracy import corruption_accuracy
from efla_jax.models import graph_of
from efla_jax.training.config import Config
from efla_jax.training.step import initial_state, make_optimizer, make_train_step, schedule


@dataclass(frozen=True)
class Arm:
    """One line of the figure: a config trained from each seed."""

    name: str
    config: Config


def train_seeds(arm: Arm, seeds: list[int], images: np.ndarray, labels: np.ndarray) -> tuple[Any, np.ndarray]:
    """Trains one model per seed, vmapped into one program -> (stacked parameters, losses [steps, seeds]).

    A seed fixes both the first parameters and the order of the data, the same for every arm.
    """
    config = arm.config
    learning_rate = schedule(config.optimizer, config.train.steps)
    optimizer = make_optimizer(config.optimizer, learning_rate)
    step = jax.jit(jax.vmap(make_train_step(graph_of(config.model), optimizer, learning_rate)), donate_argnums=0)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    state = jax.jit(jax.vmap(lambda key: initial_state(config, key, optimizer)))(keys)
    source = mnist.Digits(images, labels)
    orders = [batches(source, batch_size=config.train.batch_size, seed=seed) for seed in seeds]
    losses = []
    for _ in tqdm(range(config.train.steps), desc=arm.name, mininterval=5, disable=not sys.stderr.isatty()):
        rows = [next(order) for order in orders]
        state, metrics = step(state, jax.tree.map(lambda *x: np.stack(x), *rows))
        losses.append(metrics["loss"])
    return state["params"], np.asarray(jax.device_get(losses))


def run_arms(arms: list[Arm], seeds: list[int], data_dir: str | None = None) -> dict[str, Any]:
    """Results of every arm: final training loss, accuracy under each corruption, seconds."""
    train_images, train_labels = mnist.arrays("train", data_dir)
    test_images, test_labels = mnist.arrays("test", data_dir)
    results: dict[str, Any] = {}
    for arm in arms:
        begun = time.monotonic()
        params, losses = train_seeds(arm, seeds, train_images, train_labels)
        trained = time.monotonic()
        accuracy = corruption_accuracy(graph_of(arm.config.model), params, test_images, test_labels)
        tail = losses[-50:].mean(axis=0)
        results[arm.name] = {
            "config": repr(arm.config),
            "final_training_loss": [float(x) for x in tail],  # mean of the last 50 steps
            "nonfinite_steps": [int(x) for x in (~np.isfinite(losses)).sum(axis=0)],
            "accuracy": accuracy,
            "training_seconds": round(trained - begun, 1),
            "evaluation_seconds": round(time.monotonic() - trained, 1),
        }
        clean = np.asarray(accuracy["intensity"][0])
        spread = f" ± {100 * clean.std(ddof=1):.2f}" if len(seeds) > 1 else ""
        print(f"{arm.name}: clean accuracy {100 * clean.mean():.2f}{spread} %, trained in {trained - begun:.0f} s")
    return results
