"""Training in each type: losses, gradients by layer and by position, steps that are not finite.

python -m experiments.numerics.training --output=DIR --digits=FILE.npz --text=DIR [--tasks=smnist,wikitext2]
    [--rules=efla,deltanet] [--types=float32,bfloat16,float16] [--steps=10000] [--every=100] [--batch=16] [--layers=2]
    [--features=256] [--length=512] [--seed=0] [--threads=8] [--commit=HASH]

smnist is the paper's model in its setting (configs/smnist_paper.py) for more steps, wikitext2 a language model of
bytes (configs/lm_wikitext2.py, fewer blocks). FILE.npz is made by `python -m experiments.numerics.digits FILE.npz`; the
text's folder holds train.txt.xz and valid.txt.xz. Products of layers take JAX's default precision, TF32 for float32 on
a GPU; those of float32 inside the op are in full. float16 has float32 parameters, and its loss is not scaled.

The train step is the library's own, `every` of them in one program, after each of which the gradients by the values are
measured on the next batch. The library's loop stops at the first step that is not finite; here the steps run on without
skipping, to the end of the program, and then the run stops. A run is written to DIR/training.json when it is done, and
is skipped when it is there; several processes at a time need a --file of their own each. Tables and plots:
experiments.numerics.report.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from efla_jax.models import graph_of
from efla_jax.training.config import Config, to_json
from efla_jax.training.objectives import objective_of
from efla_jax.training.step import initial_state, make_optimizer, make_train_step, parameter_names, schedule
from experiments.numerics.probe import value_gradients
from experiments.numerics.results import Rows
from experiments.numerics.tasks import CONFIGS, RULES, TYPES, Columns, Sizes, digits, estimate, order, text_rows
from experiments.provenance import provenance

_OUTPUT = flags.DEFINE_string("output", None, "folder of the rows", required=True)
_FILE = flags.DEFINE_string("file", "training.json", "file of the rows; report reads training*.json")
_DIGITS = flags.DEFINE_string("digits", None, "MNIST as one file")
_TEXT = flags.DEFINE_string("text", None, "folder of train.txt.xz and valid.txt.xz")
_TASKS = flags.DEFINE_list("tasks", list(CONFIGS), "tasks")
_RULES = flags.DEFINE_list("rules", list(RULES), "rules")
_TYPES = flags.DEFINE_list("types", list(TYPES), "types that the models compute in")
_STEPS = flags.DEFINE_integer("steps", 10_000, "training steps, a multiple of --every", lower_bound=1)
_EVERY = flags.DEFINE_integer("every", 100, "steps of one program", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 16, "rows of text a step")
_LAYERS = flags.DEFINE_integer("layers", 2, "blocks of the language model")
_FEATURES = flags.DEFINE_integer("features", 256, "width of the language model")
_LENGTH = flags.DEFINE_integer("length", 512, "bytes of a row of text, a multiple of 16")
_SEED = flags.DEFINE_integer("seed", 0, "of the parameters and the order of the data")
_THREADS = flags.DEFINE_integer("threads", 8, "runs compiled at a time", lower_bound=1)
_COMMIT = flags.DEFINE_string("commit", None, "the commit that is run, where there is no git to ask")


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


def _data(task: str, sizes: Sizes) -> tuple[Columns, Columns]:
    path = _DIGITS.value if task == "smnist" else _TEXT.value
    if path is None:
        raise app.UsageError(f"{task} needs --{'digits' if task == 'smnist' else 'text'}")
    return digits(path) if task == "smnist" else text_rows(path, sizes.length)


def _compile_all(wanted: dict[str, tuple[str, Config]], data: dict[str, Any]) -> dict[str, Programs]:
    with ThreadPoolExecutor(_THREADS.value) as pool:
        made = lambda task, config: compile_run(config, data[task], _EVERY.value, _SEED.value)
        futures = {name: pool.submit(made, task, config) for name, (task, config) in wanted.items()}
        return {name: future.result() for name, future in futures.items()}


def _facts(sizes: Sizes) -> dict[str, Any]:
    options = {"tasks": _TASKS, "rules": _RULES, "types": _TYPES, "every": _EVERY, "seed": _SEED}
    text = [
        f"--{name}={','.join(flag.value) if isinstance(flag.value, list) else flag.value}"
        for name, flag in options.items()
    ]
    text += [f"--{name}={value}" for name, value in vars(sizes).items()]
    command = f"python -m experiments.numerics.training --output=DIR --digits=FILE --text=DIR {' '.join(text)}"
    return dict(provenance(command, _COMMIT.value))


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    sizes = Sizes(_STEPS.value, _BATCH.value, _LAYERS.value, _FEATURES.value, _LENGTH.value)
    chosen = {"tasks": (_TASKS.value, tuple(CONFIGS)), "rules": (_RULES.value, RULES), "types": (_TYPES.value, TYPES)}
    for name, (values, known) in chosen.items():
        if not set(values) <= set(known):
            raise app.UsageError(f"--{name} is {','.join(values)}; it must be of {', '.join(known)}")
    if argv[1:] or sizes.steps % _EVERY.value or sizes.length % 16:
        raise app.UsageError(f"unknown arguments {argv[1:]}, or steps no multiple of every, or length none of 16")
    facts = _facts(sizes)
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()), flush=True)
    rows = Rows(Path(_OUTPUT.value) / _FILE.value, facts)
    names = [(task, rule, dtype) for task in _TASKS.value for rule in _RULES.value for dtype in _TYPES.value]
    wanted = {
        key: (task, CONFIGS[task](rule, dtype, sizes))
        for task, rule, dtype in names
        if not rows.has(key := f"{task}/{rule}/{dtype}/{sizes.steps}")
    }
    data = {task: jax.device_put(_data(task, sizes)) for task in dict.fromkeys(task for task, _ in wanted.values())}
    begun = time.monotonic()
    programs = _compile_all(wanted, data)
    print(f"{len(programs)} runs compiled in {time.monotonic() - begun:.0f} s", flush=True)
    for key, (task, config) in wanted.items():
        result = run(programs.pop(key), config, data[task], _EVERY.value, _SEED.value, key)
        _, rule, dtype, _ = key.split("/")
        rows.add(key, {"task": task, "rule": rule, "type": dtype} | result)
        print(
            f"{key}: final loss {result['final_loss']}, {result['nonfinite_steps']} steps not finite, evaluation "
            f"{result['evaluation']}, {result['seconds']:.0f} s, kernels {result['kernels']}",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
