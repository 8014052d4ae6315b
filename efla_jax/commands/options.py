"""Options on a command line: --NAME=VALUE or --NAME VALUE."""

from collections.abc import Sequence

from efla_jax.choices import nearest
from efla_jax.errors import UserError


class UsageError(UserError, ValueError):
    """The command line is not right."""


def parse(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
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


def require(options: dict[str, str], *names: str) -> list[str]:
    for name in names:
        if name not in options:
            raise UsageError(f"--{name}=… is missing")
    return [options[name] for name in names]


def refuse(rest: Sequence[str], names: Sequence[str]) -> None:
    for argument in rest:
        raise UsageError(f"unknown option {argument!r}{nearest(argument, [f'--{name}' for name in names])}")


def integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--{name} is {text!r}; it must be an integer") from None


def number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--{name} is {text!r}; it must be a number") from None


def integers(options: dict[str, str], name: str, default: Sequence[int]) -> Sequence[int]:
    """The numbers, separated by commas, of an option that may be left out."""
    return [integer(name, text) for text in options[name].split(",")] if name in options else default
