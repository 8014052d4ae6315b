"""Times the parts of a train step: data, forward + backward, optimizer.

python -m experiments.step_time.run [--config=configs/smnist.py] [--repeats=30] [--output=DIR] [--commit=HASH]
                                    [--config.SECTION.FIELD=VALUE ...]

The parts are timed in turn in every repeat, so that they see the same machine. The optimizer's time is what a whole
step takes beyond the value and gradient of the loss, pair by pair.
"""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from efla_jax.data.pipeline import batches
from efla_jax.models import graph_of
from efla_jax.training.config import Config, load_config, override
from efla_jax.training.objectives import objective_of
from efla_jax.training.records import open_records
from efla_jax.training.step import initial_state, make_optimizer, make_train_step, schedule
from experiments.provenance import provenance


def _seconds(call) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begun


def measure(config: Config, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each part in each repeat."""
    graph, objective = graph_of(config.model), objective_of(config)
    learning_rate = schedule(config.optimizer, config.train.steps)
    optimizer = make_optimizer(config.optimizer, learning_rate)
    loss_of = lambda params, batch: objective.sums(graph, params, batch)
    forward = jax.jit(loss_of)
    gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    step = jax.jit(make_train_step(graph, optimizer, learning_rate, objective=objective))
    state = jax.jit(lambda key: initial_state(config, key, optimizer))(jax.random.key(config.train.seed))
    source = open_records(config).source
    data = batches(source, batch_size=config.train.batch_size, seed=config.train.seed)
    times: dict[str, list[float]] = {"data": [], "forward": [], "forward + backward": [], "optimizer": [], "step": []}
    for repeat in range(repeats + 2):
        begun = time.perf_counter()
        batch = jax.block_until_ready(jax.device_put(next(data)))
        parts = {"data": time.perf_counter() - begun}
        parts["forward"] = _seconds(lambda batch=batch: forward(state["params"], batch))
        parts["forward + backward"] = _seconds(lambda batch=batch: gradient(state["params"], batch))
        parts["step"] = _seconds(lambda batch=batch: step(state, batch))
        parts["optimizer"] = parts["step"] - parts["forward + backward"]
        if repeat >= 2:  # the first two compile and warm up
            for name, seconds in parts.items():
                times[name].append(1e3 * seconds)
    return times


def main(argv: list[str]) -> None:
    options = {"config": "configs/smnist.py", "repeats": "30", "output": str(Path(__file__).parent), "commit": ""}
    overrides = []
    for argument in argv:
        name, _, value = argument.removeprefix("--").partition("=")
        if name in options:
            options[name] = value
        else:
            overrides.append(argument)
    config = override(load_config(options["config"]), overrides)
    times = measure(config, int(options["repeats"]))
    shown = " ".join([f"--config={options['config']}", f"--repeats={options['repeats']}", *overrides])
    facts = provenance(f"python -m experiments.step_time.run {shown}", options["commit"] or None)
    lines = ["| part | median, ms | 10 % … 90 % |", "|---|---|---|"]
    for name, values in times.items():
        low, median, high = np.percentile(values, [10, 50, 90])
        lines.append(f"| {name} | {median:.1f} | {low:.1f} … {high:.1f} |")
    tokens = config.train.batch_size * config.record_tokens
    lines += ["", f"{tokens} tokens a step: {1e3 * tokens / float(np.median(times['step'])):,.0f} a second"]
    table = "\n".join(lines)
    folder = Path(options["output"])
    folder.mkdir(parents=True, exist_ok=True)
    path, _, argument = options["config"].partition(":")
    stem = "_".join(filter(None, [Path(path).stem, argument.replace("/", "-")]))
    (folder / f"{stem}.json").write_text(json.dumps(facts | {"milliseconds": times}, indent=1) + "\n")
    header = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    (folder / f"{stem}.md").write_text(f"# Time of a train step of {options['config']}\n\n{header}\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
