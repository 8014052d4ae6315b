"""efla generate, efla export, efla import."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from efla_jax.choices import nearest
from efla_jax.commands.options import UsageError, integer, integers, number, parse, refuse, require


def generate(arguments: Sequence[str]) -> None:
    """Prints how a language model goes on from a prompt, which is not printed; no prompt begins a document."""
    from efla_jax.inference.export import load_artifact
    from efla_jax.inference.load import load

    numbers: dict[str, Callable[[str, str], float]] = dict(
        max_new_tokens=integer, temperature=number, top_k=integer, top_p=number, seed=integer
    )
    names = ("workdir", "artifact", "prompt", "prompt_file", "stop", *numbers)
    options, rest = parse([argument for argument in arguments if argument != "--prompt="], names)
    refuse([argument for argument in rest if argument != "--stream"], [*names, "stream"])
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


def export(arguments: Sequence[str]) -> None:
    """Writes a model as a folder with compiled programs, or as a checkpoint of fla, and prints where it is."""
    from efla_jax.inference.export import BATCH_SIZES, LENGTHS, PLATFORMS, export_model
    from efla_jax.inference.load import load_parts

    names = ("workdir", "output", "format", "platforms", "batch_sizes", "lengths", "implementations")
    options, rest = parse(arguments, names)
    refuse(rest, names)
    workdir, output = require(options, "workdir", "output")
    form = check_format(options.get("format", "programs"), ("programs", "fla"))
    if form == "fla":
        from efla_jax.interop import fla

        if set(options) & {"platforms", "batch_sizes", "lengths", "implementations"}:
            raise UsageError(
                "--platforms, --batch_sizes, --lengths and --implementations are of programs; --format=fla has none"
            )
        fla.save(output, *load_parts(workdir))
    else:
        platforms = options["platforms"].split(",") if "platforms" in options else PLATFORMS
        sizes = dict(
            batch_sizes=integers(options, "batch_sizes", BATCH_SIZES), lengths=integers(options, "lengths", LENGTHS)
        )
        given = [pair.partition(":") for pair in filter(None, options.get("implementations", "").split(","))]
        implementations = {platform: name for platform, _, name in given}
        export_model(output, *load_parts(workdir), platforms=platforms, implementations=implementations, **sizes)
    print(output)


def import_(arguments: Sequence[str]) -> None:
    """Writes another library's checkpoint as a model folder, and prints where it is."""
    from efla_jax.inference.folder import save_folder
    from efla_jax.inference.load import load_parts

    names = ("format", "input", "output", "tokenizer")
    options, rest = parse(arguments, names)
    refuse(rest, names)
    form, source, output = require(options, "format", "input", "output")
    check_format(form, ("fla",))
    save_folder(output, *load_parts(source, options.get("tokenizer")))
    print(output)


def check_format(name: str, names: Sequence[str]) -> str:
    if name not in names:
        raise UsageError(f"--format is {name!r}; it must be {' or '.join(names)}{nearest(name, names)}")
    return name
