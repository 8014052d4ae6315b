"""The `efla` command: a thin layer over the library.

efla train --config=FILE[:ARGUMENT] --workdir=DIR [--config.SECTION.FIELD=VALUE ...]
           [--distributed | --coordinator_address=HOST:PORT --num_processes=N --process_id=I]
efla evaluate --workdir=DIR [--data_dir=DIR] [--split=test|train]
efla evaluate --workdir=DIR [--source=SOURCE] [--text_field=NAME] [--separator=LINE] [--protocol=packed|sliding]
           [--length=N] [--stride=N] [--words=N] [--batch_size=N] [--output=FILE.json]
efla evaluate --workdir=DIR --tasks=lambada,piqa,… --task_data=DIR [--limit=N] [--batch_size=N] [--output=FILE.json]
efla generate --workdir=DIR|--artifact=DIR [--prompt=TEXT|--prompt_file=FILE] [--max_new_tokens=N] [--temperature=T]
           [--top_k=N] [--top_p=P] [--seed=N] [--stop=TEXT] [--stream]
efla tokenizer train --source=SOURCE --vocab_size=N --output=FILE.json [--text_field=NAME] [--separator=LINE]
efla export --workdir=DIR --output=DIR2 [--platforms=cpu,cuda,tpu] [--batch_sizes=1,4] [--lengths=1,64,512]
efla export --workdir=DIR --output=DIR2 --format=fla
efla import --format=fla --input=DIR --output=DIR2 [--tokenizer=SPEC]
efla plot --workdir=DIR[,DIR2,…] --output=FILE.png [--metric=loss]
"""

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

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


def _join_cluster(arguments: Sequence[str]) -> list[str]:
    """Joins the processes that the arguments name, if they do; returns the other arguments."""
    from efla_jax.training.distributed import initialize

    options, rest = _options(arguments, ("coordinator_address", "num_processes", "process_id"))
    detect = "--distributed" in rest
    if detect and options:
        raise UsageError(f"--distributed finds the cluster by itself; it cannot go with --{next(iter(options))}")
    if detect or options:
        numbers = {name: _integer(name, options[name]) for name in ("num_processes", "process_id") if name in options}
        initialize(options.get("coordinator_address"), **numbers)
    return [argument for argument in rest if argument != "--distributed"]


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--{name} is {text!r}; it must be an integer") from None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--{name} is {text!r}; it must be a number") from None


def train(arguments: Sequence[str]) -> None:
    """Trains, or goes on training, in a workdir; then a single process prints what `evaluate` does."""
    from efla_jax.models import LanguageModelConfig
    from efla_jax.training.config import load_config, override
    from efla_jax.training.loop import train as run

    options, rest = _options(arguments, ("config", "workdir"))
    spec, workdir = _require(options, "config", "workdir")
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
    options, rest = _options(arguments, names)
    _refuse(rest, names)
    (workdir,) = _require(options, "workdir")
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
    choices |= {n: _integer(n, options[n]) for n in ("length", "stride", "words", "batch_size") if n in options}
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
    tasks, folder = _require(options, "tasks", "task_data")
    limit = _integer("limit", options["limit"]) if "limit" in options else None
    lm = EflaLM(TextModel(*parts), _integer("batch_size", options.get("batch_size", str(BATCH_SIZE))))
    result = run_tasks(lm, tasks.split(","), folder, limit=limit)
    print(*task_lines(result), sep="\n")
    if "output" in options:
        write_json(options["output"], {"workdir": options["workdir"], "tasks": result})


def generate(arguments: Sequence[str]) -> None:
    """Prints how a language model goes on from a prompt, which is not printed; no prompt begins a document."""
    from efla_jax.inference.export import load_artifact
    from efla_jax.inference.load import load

    numbers: dict[str, Callable[[str, str], float]] = dict(
        max_new_tokens=_integer, temperature=_number, top_k=_integer, top_p=_number, seed=_integer
    )
    names = ("workdir", "artifact", "prompt", "prompt_file", "stop", *numbers)
    options, rest = _options([argument for argument in arguments if argument != "--prompt="], names)
    _refuse([argument for argument in rest if argument != "--stream"], [*names, "stream"])
    if ("workdir" in options) == ("artifact" in options):
        raise UsageError("--workdir=… or --artifact=… must say where the model is, and not both")
    settings: dict[str, Any] = dict(max_new_tokens=256, stop=options.get("stop", ()))
    settings |= {name: read(name, options[name]) for name, read in numbers.items() if name in options}
    prompt = _prompt(options)
    model = load_artifact(options["artifact"]) if "artifact" in options else load(options["workdir"])
    pieces = model.stream(prompt, **settings) if "--stream" in rest else [model.generate(prompt, **settings)]
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _prompt(options: dict[str, str]) -> str:
    if "prompt_file" not in options:
        return options.get("prompt", "")
    if "prompt" in options:
        raise UsageError("--prompt and --prompt_file are both given; one must be left out")
    try:
        return Path(options["prompt_file"]).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompt_file is {options['prompt_file']!r}, which cannot be read: {error}") from error


def tokenizer(arguments: Sequence[str]) -> None:
    """Trains a byte-level BPE on the documents of a source, and prints where it is."""
    from efla_jax.data.text.sources import open_source
    from efla_jax.data.text.tokenizers import train_bpe

    names = ("source", "vocab_size", "output", "text_field", "separator")
    options, rest = _options(arguments, names)
    if rest[:1] != ["train"]:
        raise UsageError("`train` must follow: efla tokenizer train --source=SOURCE --vocab_size=N --output=FILE.json")
    _refuse(rest[1:], names)
    spec, vocab_size, output = _require(options, "source", "vocab_size", "output")
    reading = {name: options[name] for name in ("text_field", "separator") if name in options}
    train_bpe(open_source(spec, **reading), _integer("vocab_size", vocab_size), output)
    print(f"{output}: {vocab_size} tokens")


def export(arguments: Sequence[str]) -> None:
    """Writes a model as a folder with compiled programs, or as a checkpoint of fla, and prints where it is."""
    from efla_jax.inference.export import BATCH_SIZES, LENGTHS, PLATFORMS, export_model
    from efla_jax.inference.load import load_parts

    names = ("workdir", "output", "format", "platforms", "batch_sizes", "lengths")
    options, rest = _options(arguments, names)
    _refuse(rest, names)
    workdir, output = _require(options, "workdir", "output")
    form = _format(options.get("format", "programs"), ("programs", "fla"))
    if form == "fla":
        from efla_jax.interop import fla

        if set(options) & {"platforms", "batch_sizes", "lengths"}:
            raise UsageError("--platforms, --batch_sizes and --lengths are of programs; --format=fla has none")
        fla.save(output, *load_parts(workdir))
    else:
        platforms = options["platforms"].split(",") if "platforms" in options else PLATFORMS
        sizes = dict(
            batch_sizes=_integers(options, "batch_sizes", BATCH_SIZES), lengths=_integers(options, "lengths", LENGTHS)
        )
        export_model(output, *load_parts(workdir), platforms=platforms, **sizes)
    print(output)


def import_(arguments: Sequence[str]) -> None:
    """Writes another library's checkpoint as a model folder, and prints where it is."""
    from efla_jax.inference.folder import save_folder
    from efla_jax.inference.load import load_parts

    names = ("format", "input", "output", "tokenizer")
    options, rest = _options(arguments, names)
    _refuse(rest, names)
    form, source, output = _require(options, "format", "input", "output")
    _format(form, ("fla",))
    save_folder(output, *load_parts(source, options.get("tokenizer")))
    print(output)


def plot(arguments: Sequence[str]) -> None:
    """Draws a metric of runs against the step, and prints where the picture is."""
    from efla_jax.training.plot import plot as draw

    names = ("workdir", "output", "metric")
    options, rest = _options(arguments, names)
    _refuse(rest, names)
    workdirs, output = _require(options, "workdir", "output")
    draw(workdirs.split(","), options.get("metric", "loss"), output)
    print(output)


def _format(name: str, names: Sequence[str]) -> str:
    if name not in names:
        raise UsageError(f"--format is {name!r}; it must be {' or '.join(names)}{nearest(name, names)}")
    return name


def _integers(options: dict[str, str], name: str, default: Sequence[int]) -> Sequence[int]:
    """The numbers, separated by commas, of an option that may be left out."""
    return [_integer(name, text) for text in options[name].split(",")] if name in options else default


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "tokenizer": tokenizer,
    "export": export,
    "import": import_,
    "plot": plot,
}


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
        _leave(2)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        _leave(1)


def _leave(status: int) -> NoReturn:
    """Ends this process after an error, and leaves its cluster at once, so that the others notice: the usual end would
    wait for them, while they wait for this process."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _expected_errors() -> tuple[type[Exception], ...]:
    from efla_jax.data.mnist_download import MnistError
    from efla_jax.data.text import TextError
    from efla_jax.evaluation import EvaluationError
    from efla_jax.inference import InferenceError
    from efla_jax.training.checkpoint import CheckpointError
    from efla_jax.training.config import ConfigError
    from efla_jax.training.distributed import LostProcessError
    from efla_jax.training.loop import NonFiniteError

    known = (
        ConfigError,
        CheckpointError,
        EvaluationError,
        InferenceError,
        MnistError,
        TextError,
        NonFiniteError,
        LostProcessError,
    )
    return (UsageError, *known)
