"""Implementations of the op side by side on one case: a row for each, with times and errors, or why there are none."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from efla_jax.choices import nearest
from efla_jax.evaluation import EvaluationError
from efla_jax.evaluation.op_accuracy import (
    DELTA_RULE,
    Case,
    Draw,
    attention,
    differences,
    draw,
    exact,
    forward,
    forward_backward,
    sample,
    suspects,
)
from efla_jax.evaluation.op_speed import (
    FORWARD,
    DoesNotFit,
    Program,
    call_seconds,
    compile_jax,
    floor_seconds,
    kernel_seconds,
    spread,
)
from efla_jax.ops.coefficients import INTEGRATORS, erase_and_write
from efla_jax.ops.registry import NAMES

Row = dict[str, Any]

_CACHES = 1 << 29  # bytes; all sets of inputs together are at least as large, so that no GPU's cache holds them
_MOST_SETS = 4


class Bench:
    """One case: inputs, and references, each computed when it is first asked for."""

    def __init__(self, case: Case, *, gradients: bool):
        self.case, self.sample, self.gradients = case, sample(case), gradients
        first: Draw = draw(case, 0)
        size = sum(x.nbytes for x in jax.tree.leaves(first))
        sets = 1 if jax.default_backend() == "cpu" else min(_MOST_SETS, math.ceil(_CACHES / size))
        self.draws: list[Draw] = [first] + [draw(case, seed) for seed in range(1, sets)]
        self._exact: dict[str, dict[str, np.ndarray]] = {}

    def inputs(self, rule: str) -> list[Draw]:
        """The draws as a rule takes them."""
        if rule != DELTA_RULE:
            return self.draws

        def given(inputs):
            erase, write = erase_and_write(inputs["key"], inputs["beta"], inputs.get("log_decay"))
            return {name: x for name, x in inputs.items() if name != "beta"} | {"erase": erase, "write": write}

        return [Draw(jax.jit(given)(draw.inputs), draw.cotangents) for draw in self.draws]

    def exact(self, rule: str) -> dict[str, np.ndarray]:
        """What a rule gives for the sampled rows and heads of the first draw."""
        if rule not in self._exact:
            inputs, cotangents = (self.sample.take(part) for part in self.inputs(rule)[0])
            self._exact[rule] = exact(inputs, cotangents if self.gradients else None, rule)
        return self._exact[rule]


class Candidate(NamedTuple):
    """A program, and how its results become {name: array} of the sampled rows and heads; {} if it is another
    function, which nothing is compared with."""

    program: Program
    results: Callable[[Any], dict[str, np.ndarray]]


def split_name(name: str) -> tuple[str, str]:
    """(implementation, rule) of NAME or NAME:RULE.

    Raises:
        EvaluationError: there is no such implementation or rule; the nearest is named.
    """
    own, _, rule = name.partition(":")
    rules = (*INTEGRATORS, DELTA_RULE)
    for what, given, names in (("implementation", own, NAMES), ("rule", rule or "exact", rules)):
        if given not in names:
            choices = ", ".join(names)
            raise EvaluationError(f"{what} is {given!r}; it must be one of {choices}{nearest(given, names)}")
    return own, rule or "exact"


def implementation(name: str, bench: Bench, direction: str) -> Candidate:
    """NAME or NAME:RULE of this library, by its public call.

    Raises:
        NotImplementedError: it does not serve the case here, with the reason.
        DoesNotFit: it needs more memory than there is.
    """
    own, rule = split_name(name)
    run = partial(attention(rule), implementation=own)
    draws = bench.inputs(rule)
    if bench.case.known:  # ids are the same in all draws
        run = partial(run, segment_ids=np.asarray(draws[0].inputs["segment_ids"]))
        free = lambda inputs: {name: x for name, x in inputs.items() if name != "segment_ids"}
        draws = [Draw(free(draw.inputs), draw.cotangents) for draw in draws]
    if direction == FORWARD:
        program = compile_jax(partial(forward, run), [(draw.inputs,) for draw in draws])
    else:
        program = compile_jax(partial(forward_backward, run), [tuple(draw) for draw in draws])
    return Candidate(program, bench.sample.take)


def declined(bench: Bench, name: str, direction: str, best: dict[str, float], reason: str) -> Row:
    """The row of what was not measured."""
    floor = floor_seconds(bench.case, direction, best)
    shape = str(bench.case)
    return {"shape": shape, "direction": direction, "implementation": name, "floor_seconds": floor, "reason": reason}


def measure(
    bench: Bench,
    name: str,
    direction: str,
    best: dict[str, float],
    *,
    build: Callable[[str, Bench, str], Candidate] = implementation,
    repeats: int,
    kernel_time: bool = True,
) -> Row:
    """A row: times and errors of build(name, bench, direction); `best` is what `ceilings` measured.

    One that does not serve the case, or does not fit into memory, has its reason in the row.
    """
    row = declined(bench, name, direction, best, "")
    try:
        program, results = build(name, bench, direction)
        found = program.run(0)
        program.wait(found)
        found = results(found)
        errors = differences(found, bench.exact(name.partition(":")[2] or "exact")) if found else {}
        return row | {
            "reason": None,
            "errors": errors,
            "suspects": suspects(errors),
            "seconds": spread(call_seconds(program, repeats)),
            "kernels": kernel_seconds(program) if kernel_time else None,
            "compile_seconds": program.compile_seconds,
            "peak_bytes": program.peak_bytes,
        }
    except (NotImplementedError, DoesNotFit) as error:
        return row | {"reason": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"reason": str(error).splitlines()[0]}
