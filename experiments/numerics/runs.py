"""One training run: its programs, its steps, and what is measured of them; `training` says what for."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efla_jax.models import graph_of
from efla_jax.training.config import Config, to_json
from efla_jax.training.objectives import objective_of
from efla_jax.training.step import initial_state, make_optimizer, make_train_step, parameter_names, schedule
from experiments.numerics.probe import value_gradients
from experiments.numerics.tasks import estimate, order


@dataclass(frozen=True)
class Programs:
    """Compiled for one run. advance(state, data, indices [steps, batch]) -> (state, metrics by step);
    probe(params, data, indices [batch]) -> gradients by the values; evaluate(params, data) -> mean metrics."""

    state: Any
    advance: Callable
    probe: Callable
    evaluate: Callable
    kernels: bool  # whether the op's hardware kernels are in it


def _functions(config: Config) -> tuple[Callable, Callable, Callable, Callable]:
    """(start, advance, probe, evaluate) of `Programs`, to be compiled; start(key) gives the first state."""
    rate = schedule(config.optimizer, config.train.steps)
    optimizer, objective, graph = make_optimizer(config.optimizer, rate), objective_of(config), graph_of(config.model)
    step = make_train_step(graph, optimizer, rate, objective=objective)
    gradients = value_gradients(graph, objective)
    take = lambda data, indices: jax.tree.map(lambda x: x[indices], data)

    def advance(state, data, indices):
        return jax.lax.scan(lambda state, rows: step(state, take(data, rows)), state, indices)

    def evaluate(params, data):
        records, batch = jax.tree.leaves(data)[0].shape[0], config.train.batch_size
        blocks = jax.tree.map(lambda x: x[: records // batch * batch].reshape(-1, batch, *x.shape[1:]), data)

        def add(total, block):
            _, sums = objective.sums(graph, params, block)
            wanted = {name: sums[name] for name in ("loss", "accuracy") if name in sums}
            return jax.tree.map(jnp.add, total, wanted | {"count": objective.count(block)}), None

        names = ("loss", "accuracy", "count") if "label" in data else ("loss", "count")
        total, _ = jax.lax.scan(add, dict.fromkeys(names, jnp.float32(0)), blocks)
        return {name: total[name] / total["count"] for name in names if name != "count"}

    start = lambda key: initial_state(config, key, optimizer)
    return start, advance, lambda params, data, indices: gradients(params, take(data, indices)), evaluate


def compile_run(config: Config, data: tuple[Any, Any], every: int, seed: int) -> Programs:
    train, test = data
    start, advance, probe, evaluate = _functions(config)
    state = jax.jit(start)(jax.random.key(seed))
    indices = jax.ShapeDtypeStruct((every, config.train.batch_size), jnp.int32)
    one = jax.ShapeDtypeStruct(indices.shape[1:], jnp.int32)
    lowered = jax.jit(advance, donate_argnums=0).lower(state, train, indices)
    return Programs(
        state,
        lowered.compile(),
        jax.jit(probe).lower(state["params"], train, one).compile(),
        jax.jit(evaluate).lower(state["params"], test).compile(),
        "efla_forward" in lowered.as_text(),
    )


def layer_of(name: str) -> str:
    """blocks/0/mixer/key/kernel -> blocks/0/mixer; what is in no block goes by its first name."""
    parts = name.split("/")
    return "/".join(parts[:3]) if parts[0] == "blocks" else parts[0]


def by_layer(names: list[str], squares: np.ndarray) -> dict[str, list[float | None]]:
    """Gradient norms [steps] of each layer from the squared norms [steps, parameters]."""
    layers = list(dict.fromkeys(map(layer_of, names)))
    members = {layer: [i for i, name in enumerate(names) if layer_of(name) == layer] for layer in layers}
    return {layer: numbers(np.sqrt(squares[:, which].sum(1))) for layer, which in members.items()}


def numbers(x: Any) -> Any:
    """Nested lists of the array's numbers; None where it is none, which JSON has no word for."""
    x = np.asarray(x, np.float64)
    return [numbers(row) for row in x] if x.ndim else (float(x) if np.isfinite(x) else None)


def run(programs: Programs, config: Config, data: tuple[Any, Any], every: int, seed: int, name: str) -> dict[str, Any]:
    """Trains to the end, or to the end of the program in which a step was not finite."""
    train, test = data
    batches = order(jax.tree.leaves(train)[0].shape[0], config.train.steps, config.train.batch_size, seed)
    parameters = parameter_names(programs.state["params"])
    needs = estimate(config, programs.state["params"])
    state, metrics, probes, begun = programs.state, [], [], time.monotonic()
    for first in range(0, config.train.steps, every):
        probes.append(jax.device_get(programs.probe(state["params"], train, batches[first])))
        state, found = programs.advance(state, train, batches[first : first + every])
        metrics.append(jax.device_get({key: found[key] for key in ("loss", "grad_norm", "leaf_norms")}))
        bad = ~(np.isfinite(metrics[-1]["loss"]) & np.isfinite(metrics[-1]["grad_norm"]))
        if first // every % 10 == 9 or bad.any():
            done, seconds = first + every, time.monotonic() - begun
            loss = metrics[-1]["loss"].mean()
            print(f"{name}: step {done}, loss {loss:.4f}, {1e3 * seconds / done:.2f} ms a step", flush=True)
        if bad.any():
            break
    seconds = time.monotonic() - begun
    joined = {key: np.concatenate([part[key] for part in metrics]) for key in metrics[0]}
    finite = np.isfinite(joined["loss"]) & np.isfinite(joined["grad_norm"])
    taken = len(finite)
    return {
        "steps": taken, "nonfinite_steps": int((~finite).sum()),
        "first_nonfinite_step": None if finite.all() else int(np.argmin(finite)),
        "loss_every_10": numbers(joined["loss"][::10]), "grad_norm_every_10": numbers(joined["grad_norm"][::10]),
        "final_loss": numbers(joined["loss"][-min(500, taken) :].mean()),
        "layer_norms": by_layer(parameters, joined["leaf_norms"][::every]), "every": every,
        "value_gradient_norms": numbers([probe["norm"] for probe in probes]),
        "value_gradient_zeros": numbers([probe["zeros"] for probe in probes]),
        "evaluation": {key: numbers(x) for key, x in programs.evaluate(state["params"], test).items()},
        "seconds": seconds, "seconds_a_step": seconds / taken, "at_least_a_step": needs,
        "kernels": programs.kernels, "config": json.loads(to_json(config)),
    }  # fmt: skip
