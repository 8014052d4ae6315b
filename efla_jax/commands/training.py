"""efla train, efla plot, efla tokenizer."""

from collections.abc import Sequence

import jax

from efla_jax.commands.measuring import evaluate
from efla_jax.commands.options import UsageError, integer, parse, refuse, require


def _join_cluster(arguments: Sequence[str]) -> list[str]:
    """Joins the processes that the arguments name, if they do; returns the other arguments."""
    from efla_jax.training.distributed import initialize

    options, rest = parse(arguments, ("coordinator_address", "num_processes", "process_id"))
    detect = "--distributed" in rest
    if detect and options:
        raise UsageError(f"--distributed finds the cluster by itself; it cannot go with --{next(iter(options))}")
    if detect or options:
        numbers = {name: integer(name, options[name]) for name in ("num_processes", "process_id") if name in options}
        initialize(options.get("coordinator_address"), **numbers)
    return [argument for argument in rest if argument != "--distributed"]


def train(arguments: Sequence[str]) -> None:
    """Trains, or goes on training, in a workdir; then a single process prints what `evaluate` does."""
    from efla_jax.models import LanguageModelConfig
    from efla_jax.training.config import load_config, override
    from efla_jax.training.loop import train as run

    options, rest = parse(arguments, ("config", "workdir"))
    spec, workdir = require(options, "config", "workdir")
    config = override(load_config(spec), _join_cluster(rest))
    step = run(config, workdir)
    if step < config.train.steps:
        print(f"stopped at step {step} of {config.train.steps}, saved; the same command goes on from there")
        return
    unmeasured = isinstance(config.model, LanguageModelConfig) and not config.data.validation
    if jax.process_count() > 1 or unmeasured:
        source = " --source=SOURCE" if unmeasured else ""
        print(f"trained to step {step}; efla evaluate --workdir={workdir}{source} measures it")
        return
    evaluate([f"--workdir={workdir}"] + ([f"--data_dir={config.data.data_dir}"] if config.data.data_dir else []))


def tokenizer(arguments: Sequence[str]) -> None:
    """Trains a byte-level BPE on the documents of a source, and prints where it is."""
    from efla_jax.data.text.sources import open_source
    from efla_jax.data.text.tokenizers import train_bpe

    names = ("source", "vocab_size", "output", "text_field", "separator")
    options, rest = parse(arguments, names)
    if rest[:1] != ["train"]:
        raise UsageError("`train` must follow: efla tokenizer train --source=SOURCE --vocab_size=N --output=FILE.json")
    refuse(rest[1:], names)
    spec, vocab_size, output = require(options, "source", "vocab_size", "output")
    reading = {name: options[name] for name in ("text_field", "separator") if name in options}
    train_bpe(open_source(spec, **reading), integer("vocab_size", vocab_size), output)
    print(f"{output}: {vocab_size} tokens")


def plot(arguments: Sequence[str]) -> None:
    """Draws a metric of runs against the step, and prints where the picture is."""
    from efla_jax.training.plot import plot as draw

    names = ("workdir", "output", "metric")
    options, rest = parse(arguments, names)
    refuse(rest, names)
    workdirs, output = require(options, "workdir", "output")
    draw(workdirs.split(","), options.get("metric", "loss"), output)
    print(output)
