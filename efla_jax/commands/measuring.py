"""efla evaluate."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efla_jax.commands.options import UsageError, integer, parse, refuse, require

_DIGITS = ("data_dir", "split")
_TASKS = ("tasks", "task_data", "limit", "batch_size", "output")
_TEXT = ("source", "text_field", "separator", "protocol", "length", "stride", "words", "batch_size", "output")


def evaluate(arguments: Sequence[str]) -> None:
    """Measures the model in a workdir, at its newest good checkpoint, or a language model's folder."""
    from efla_jax.data.text.tokenizers import load_tokenizer
    from efla_jax.inference.load import load_parts
    from efla_jax.models import LanguageModelConfig
    from efla_jax.training.config import DataConfig
    from efla_jax.training.loop import load_run

    names = ("workdir", *dict.fromkeys((*_DIGITS, *_TEXT, *_TASKS)))
    options, rest = parse(arguments, names)
    refuse(rest, names)
    (workdir,) = require(options, "workdir")
    if options.get("split", "test") not in ("train", "test"):
        raise UsageError(f"--split is {options['split']!r}; it must be train or test")
    if _is_model_folder(workdir):
        parts, data = load_parts(workdir), DataConfig()
    else:
        run = load_run(workdir)
        if not isinstance(run.config.model, LanguageModelConfig):
            return _evaluate_digits(run, options)
        print(f"step {run.step}")
        parts, data = (run.config.model, run.params, load_tokenizer(Path(workdir) / "tokenizer")), run.config.data
    return _evaluate_tasks(parts, options) if "tasks" in options else _evaluate_text(parts, data, options)


def _is_model_folder(path: str) -> bool:
    """Whether it has a config.json, and that is not of a run."""
    try:
        content = json.loads((Path(path) / "config.json").read_text())
    except (OSError, ValueError):  # load_run says what is wrong
        return False
    return isinstance(content, dict) and ("format" in content or "model_type" in content)


def _allow(options: dict[str, str], what: str, names: Sequence[str]) -> None:
    for name in options:
        if name not in ("workdir", *names):
            raise UsageError(f"--{name} is not for {what}; its options are {', '.join(f'--{name}' for name in names)}")


def _evaluate_digits(run: Any, options: dict[str, str]) -> None:
    """Prints loss and accuracy of a classifier."""
    from efla_jax.data import mnist
    from efla_jax.evaluation.accuracy import evaluate as measure

    _allow(options, "a classifier", _DIGITS)
    split = options.get("split", "test")
    images, labels = mnist.arrays(split, options.get("data_dir", run.config.data.data_dir))
    result = measure(run.graph, run.params, images, labels)
    print(f"step {run.step}: {split} loss {result['loss']:.4f}, accuracy {result['accuracy']:.4f}")


def _evaluate_text(parts: tuple[Any, Any, Any], data: Any, options: dict[str, str]) -> None:
    """Prints the perplexity of a language model, (config, params, tokenizer), on a source; `data` has the defaults."""
    from efla_jax.data.text.sources import open_source
    from efla_jax.evaluation.perplexity import perplexity
    from efla_jax.evaluation.report import figure_lines, write_json

    _allow(options, "a language model", _TEXT)
    spec = options.get("source", data.validation)
    if not spec:
        raise UsageError("--source=… is missing, and the run's config.data.validation, its default, is empty")
    reading = {name: options.get(name, getattr(data, name)) for name in ("text_field", "separator")}
    choices: dict[str, Any] = {"length": min(data.sequence_length, parts[0].reach or data.sequence_length)}
    choices |= {n: integer(n, options[n]) for n in ("length", "stride", "words", "batch_size") if n in options}
    if "protocol" in options:
        choices["protocol"] = options["protocol"]
    result = perplexity(*parts, open_source(spec, **reading), cache_dir=data.cache_dir, **choices)
    print(*figure_lines({"source": spec} | result), sep="\n")
    if "output" in options:
        write_json(options["output"], {"workdir": options["workdir"], "source": spec} | result)


def _evaluate_tasks(parts: tuple[Any, Any, Any], options: dict[str, str]) -> None:
    """Prints the scores of a language model, (config, params, tokenizer), on benchmarks."""
    try:
        from efla_jax.evaluation.benchmarks import run_tasks
        from efla_jax.evaluation.lm_eval_adapter import BATCH_SIZE, EflaLM
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UsageError("--tasks needs the package lm-eval: pip install 'efla-jax[lm-eval]'") from error
    from efla_jax.evaluation.report import task_lines, write_json
    from efla_jax.inference.text import TextModel

    _allow(options, "benchmarks", _TASKS)
    tasks, folder = require(options, "tasks", "task_data")
    limit = integer("limit", options["limit"]) if "limit" in options else None
    lm = EflaLM(TextModel(*parts), integer("batch_size", options.get("batch_size", str(BATCH_SIZE))))
    result = run_tasks(lm, tasks.split(","), folder, limit=limit)
    print(*task_lines(result), sep="\n")
    if "output" in options:
        write_json(options["output"], {"workdir": options["workdir"], "tasks": result})
