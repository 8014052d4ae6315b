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

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from efla_jax.training.config import Config
from experiments.numerics.results import Rows
from experiments.numerics.runs import Programs, compile_run, run
from experiments.numerics.tasks import CONFIGS, RULES, TYPES, Columns, Sizes, digits, text_rows
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
