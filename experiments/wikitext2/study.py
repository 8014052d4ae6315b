"""Trains language models side by side: learning rates × seeds of one config in one program."""

import dataclasses
import sys
import time
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from efla_jax.data.pipeline import batches
from efla_jax.data.text.packing import PackedRows
from efla_jax.data.text.store import TokenStore
from efla_jax.evaluation.perplexity import Protocol, evaluation_rows, score
from efla_jax.models import graph_of
from efla_jax.training.config import Config
from efla_jax.training.objectives import objective_of
from efla_jax.training.step import initial_state, make_optimizer, make_train_step, schedule

EVALUATION_BATCH = 32


def train_grid(
    config: Config, store: TokenStore, separator: int, rates: list[float], seeds: list[int], name: str
) -> tuple[Any, dict[str, np.ndarray]]:
    """Trains one model per learning rate and seed -> (parameters [rates, seeds, ...], metrics [steps, rates, seeds]).

    A seed fixes the first parameters and the order of the data, the same for every config and rate.
    """
    unit = dataclasses.replace(config.optimizer, peak_lr=1.0, end_lr=config.optimizer.end_lr / config.optimizer.peak_lr)
    shape = schedule(unit, config.train.steps)
    graph, objective = graph_of(config.model), objective_of(config)

    def optimizer_of(rate):
        return make_optimizer(config.optimizer, lambda step: rate * shape(step))

    def step(rate, state, batch):
        run = make_train_step(graph, optimizer_of(rate), lambda step: rate * shape(step), objective=objective)
        return run(state, batch)

    over_seeds = jax.vmap(step, in_axes=(None, 0, 0))
    grid = jax.jit(jax.vmap(over_seeds, in_axes=(0, 0, None)), donate_argnums=1)
    start = lambda rate, key: initial_state(config, key, optimizer_of(rate))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    rate_R = jnp.asarray(rates, jnp.float32)
    state = jax.jit(jax.vmap(jax.vmap(start, in_axes=(None, 0)), in_axes=(0, None)))(rate_R, keys)
    orders = []
    for seed in seeds:
        rows = PackedRows(store, config.data.sequence_length, separator, seed)
        orders.append(batches(rows, batch_size=config.train.batch_size, seed=seed))
    history = []
    for _ in tqdm(range(config.train.steps), desc=name, mininterval=5, disable=not sys.stderr.isatty()):
        batch = jax.tree.map(lambda *x: np.stack(x), *(next(order) for order in orders))
        state, metrics = grid(rate_R, state, batch)
        history.append({key: value for key, value in metrics.items() if key != "leaf_norms"})
    history = jax.device_get(history)
    return state["params"], {key: np.stack([entry[key] for entry in history]) for key in history[0]}


def losses(
    config: Config, params: Any, store: TokenStore, separator: int, protocol: Protocol, length: int
) -> np.ndarray:
    """Total negative log-likelihood in nats of a text under each model [rates, seeds] of stacked parameters."""
    rows = evaluation_rows(store, separator, protocol, length, length if protocol == "packed" else length // 2)
    rate_count, seed_count = jax.tree.leaves(params)[0].shape[:2]
    totals = np.zeros((rate_count, seed_count))
    for rate in range(rate_count):
        for seed in range(seed_count):
            one = jax.tree.map(lambda x, rate=rate, seed=seed: x[rate, seed], params)
            totals[rate, seed] = score(graph_of(config.model), one, rows, batch_size=EVALUATION_BATCH).nll.sum()
    return totals


def run_arm(name: str, config: Config, stores: dict[str, TokenStore], separator: int, grid: dict[str, Any]) -> Any:
    """Trains the grid of one arm, picks its learning rate by validation, and measures the test text at that rate.

    stores: train, valid, test. grid: rates, seeds, words of the test text.
    """
    begun = time.monotonic()
    rates, seeds = grid["rates"], grid["seeds"]
    params, history = train_grid(config, stores["train"], separator, rates, seeds, name)
    trained = time.monotonic()
    length = config.data.sequence_length
    valid = losses(config, params, stores["valid"], separator, "packed", length) / grid["words"]["valid"]
    best = int(np.argmin(valid.mean(axis=1)))
    chosen = jax.tree.map(lambda x: x[best : best + 1], params)
    test = {
        protocol: losses(config, chosen, stores["test"], separator, protocol, length)[0] / grid["words"]["test"]
        for protocol in get_args(Protocol)
    }
    every = max(1, config.train.steps // 200)
    gates = {key: values[[0, -1], best].mean(axis=1).tolist() for key, values in history.items() if "gate" in key}
    return {
        "rate": rates[best],
        "valid_word_perplexity": np.exp(valid).tolist(),
        "test_word_perplexity": {protocol: np.exp(nats).tolist() for protocol, nats in test.items()},
        "training_loss": {"every": every, "loss": history["loss"][::every, best].mean(axis=1).tolist()},
        "nonfinite_steps": (~np.isfinite(history["loss"])).sum(axis=0).tolist(),
        "gate_first_and_last_step": gates,
        "parameters": sum(leaf[0, 0].size for leaf in jax.tree.leaves(params)),
        "training_seconds": round(trained - begun, 1),
        "evaluation_seconds": round(time.monotonic() - trained, 1),
        "config": repr(config),
    }
