"""The `efla` command: a thin layer over the library.

efla train --config=FILE[:ARGUMENT] --workdir=DIR [--config.SECTION.FIELD=VALUE ...]
efla evaluate --workdir=DIR [--data_dir=DIR] [--split=test|train]
"""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from efla_jax.choices import nearest


class UsageError(ValueError):
    """The command line is not right."""


def _options(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Splits --NAME=VALUE or --NAME VALUE for the given names from everything else, in order."""
    found, rest = {}, []
    iterator = iter(arguments)
    for argument in iterator:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in names:
            if not equals:
                value = next(iterator, "")
            if not value:
                raise UsageError(f"--{name} needs a value")
            found[name] = value
        else:
            rest.append(argument)
    return found, rest


def _require(options: dict[str, str], *names: str) -> list[str]:
    for name in names:
        if name not in options:
            raise UsageError(f"--{name}=… is missing")
    return [options[name] for name in names]


def _refuse(rest: Sequence[str], names: Sequence[str]) -> None:
    for argument in rest:
        raise UsageError(f"unknown option {argument!r}{nearest(argument, [f'--{name}' for name in names])}")


def train(arguments: Sequence[str]) -> None:
    """Trains, or goes on training, in a workdir, then prints the accuracy on the test set."""
    from efla_jax.training.config import load_config, override
    from efla_jax.training.loop import train as run

    options, rest = _options(arguments, ("config", "workdir"))
    spec, workdir = _require(options, "config", "workdir")
    config = override(load_config(spec), rest)
    step = run(config, workdir)
    if step < config.train.steps:
        print(f"stopped at step {step} of {config.train.steps}, saved; the same command goes on from there")
        return
    evaluate([f"--workdir={workdir}"] + ([f"--data_dir={config.data.data_dir}"] if config.data.data_dir else []))


def evaluate(arguments: Sequence[str]) -> None:
    """Prints loss and accuracy of a workdir's newest good checkpoint."""
    from efla_jax.data import mnist
    from efla_jax.evaluation.accuracy import evaluate as measure
    from efla_jax.training.loop import load_run

    names = ("workdir", "data_dir", "split")
    options, rest = _options(arguments, names)
    _refuse(rest, names)
    (workdir,) = _require(options, "workdir")
    split = options.get("split", "test")
    if split not in ("train", "test"):
        raise UsageError(f"--split is {split!r}; it must be train or test")
    run = load_run(workdir)
    images, labels = mnist.arrays(split, options.get("data_dir", run.config.data.data_dir))
    result = measure(run.graph, run.params, images, labels)
    print(f"step {run.step}: {split} loss {result['loss']:.4f}, accuracy {result['accuracy']:.4f}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"train": train, "evaluate": evaluate}


def _configure() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("efla_jax").setLevel(logging.INFO)
    if jax.config.jax_compilation_cache_dir is None:  # programs are compiled once a machine, not once a run
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "efla_jax" / "programs"))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command. What the user can put right ends in one line on stderr and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] == "help" or {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return
    _configure()
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise UsageError(f"unknown command {name!r}{nearest(name, COMMANDS)}; commands: {', '.join(COMMANDS)}")
        COMMANDS[name](rest)
    except _expected_errors() as error:
        print(f"efla {name}: {error}", file=sys.stderr)
        sys.exit(2)


def _expected_errors() -> tuple[type[Exception], ...]:
    from efla_jax.data.mnist_download import MnistError
    from efla_jax.training.checkpoint import CheckpointError
    from efla_jax.training.config import ConfigError
    from efla_jax.training.loop import NonFiniteError

    return (UsageError, ConfigError, CheckpointError, MnistError, NonFiniteError)
