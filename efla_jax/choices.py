"""Checks of options: one of a few names, sizes; the types that models compute in."""

import difflib
from collections.abc import Iterable
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]  # of activations and products


def nearest(name: object, names: Iterable[str]) -> str:
    """'; did you mean …?' for the nearest of names, or nothing."""
    near = difflib.get_close_matches(str(name), list(names), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_choice(what: str, value: object, choices: Iterable[str]) -> None:
    """Raises ValueError, with the nearest choice, unless value is one of choices."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{what} is {value!r}; it must be one of {', '.join(choices)}{nearest(value, choices)}")


def check_sizes(config: object, *names: str) -> None:
    """Raises ValueError unless these fields are at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
