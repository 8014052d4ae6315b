"""The kernels at the sizes that models have, against the float64 token loop on some rows and heads.

Bounds are those of tests/pallas_kernels/hopper/helpers.py, by the error of the `xla` path on the same card; of float16,
which `xla` multiplies in TF32 there, the larger of both. A norm that is off by 3 percent fails whatever the bound:
products that are silently zero show so.
"""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from efla_jax.evaluation.op_accuracy import (
    DELTA_RULE,
    Case,
    attention,
    differences,
    draw,
    exact,
    forward,
    forward_backward,
    sample,
    suspects,
)
from tests.ops.helpers import errors
from tests.pallas_kernels.hopper.helpers import FACTOR, ROUNDINGS, too_far

pytestmark = pytest.mark.gpu

SCALE = 0.5

CASES = {
    "fills the card": Case(8, 512, 16, 128, 128),
    "fills the card, all options": Case(8, 300, 16, 128, 128, 8, documents=3, log_decay=True, state=True),
    "D = 64": Case(16, 512, 16, 64, 64, state=True),
    "few heads, columns apart": Case(1, 1000, 4, 128, 128, documents=4, log_decay=True, state=True),
    "in pieces": Case(1, 4096, 2, 128, 128, documents=5, state=True),
    "in pieces, decay": Case(1, 4096, 1, 128, 128, log_decay=True, state=True),
    "K = 128, V = 64": Case(2, 200, 4, 128, 64, log_decay=True, state=True),
    "padded K and V": Case(2, 333, 3, 80, 100, documents=2, state=True),
}
ALONE = Case(2, 1100, 20, 128, 128, 10, state=True)


def results(implementation, rule, inputs, cotangents):
    run = partial(attention(rule), implementation=implementation, scale=SCALE)
    return jax.jit(partial(forward_backward, run))(inputs, cotangents)


def loop(part, inputs, cotangents, rule):
    """The float64 loop on a sample. It knows no scale: the queries are scaled instead, by a power of two."""
    inputs, cotangents = part.take(inputs), part.take(cotangents)
    found = exact(inputs | dict(query=SCALE * inputs["query"].astype(np.float64)), cotangents, rule)
    return found | dict(d_query=SCALE * found["d_query"])


def with_coefficients(inputs):
    """erase and write that have nothing to do with each other in place of beta."""
    rest = {name: x for name, x in inputs.items() if name != "beta"}
    return rest | dict(erase=inputs["beta"], write=0.3 + inputs["beta"][:, ::-1])


def first_and_last(case):
    """Of rows and key heads."""
    ends = lambda indices: sorted({indices[0], indices[-1]})
    part = sample(case)
    return part._replace(rows=ends(part.rows), key_heads=ends(part.key_heads))


RULES = pytest.mark.parametrize(
    ("rule", "dtype"), [("exact", "bfloat16"), ("euler", "bfloat16"), (DELTA_RULE, "bfloat16"), ("exact", "float16")]
)


@RULES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_accurate(case, rule, dtype):
    """Results and gradients, by the kernels that save what the gradients need."""
    inputs, cotangents = draw(replace(case, dtype=dtype), 0)
    inputs = with_coefficients(inputs) if rule == DELTA_RULE else inputs
    part = first_and_last(case)
    got, xla = (part.take(results(name, rule, inputs, cotangents)) for name in ("pallas_gpu", "xla"))
    want = loop(part, inputs, cotangents, rule)
    check(got, xla, {name: want[name] for name in got}, dtype)


@RULES
@pytest.mark.parametrize("case", [*CASES.values(), ALONE], ids=[*CASES, "few heads, all in one kernel"])
def test_forward_alone(case, rule, dtype):
    """Results, by the kernels that save nothing."""
    inputs, _ = draw(replace(case, dtype=dtype), 0)
    inputs = with_coefficients(inputs) if rule == DELTA_RULE else inputs
    part = first_and_last(case)

    def run(implementation):
        call = partial(attention(rule), implementation=implementation, scale=SCALE)
        return part.take(jax.jit(partial(forward, call))(inputs))

    taken = part.take(inputs)
    want = exact(taken | dict(query=SCALE * taken["query"].astype(np.float64)), None, rule)
    check(run("pallas_gpu"), run("xla"), want, dtype)


def check(got, xla, want, dtype):
    assert not suspects(differences(got, want))
    if dtype == "bfloat16":
        found = too_far(got, want, xla)
    else:
        found, theirs = errors(got, want), errors(xla, want)
        limits = {name: max(FACTOR * theirs[name], ROUNDINGS * 2**-11) for name in found}
        found = {name: (e, limits[name]) for name, e in found.items() if not e <= limits[name]}
    assert not found, f"errors and their bounds: {found}"
