"""The checks of the Triton kernels: that the error model passes what is right and catches what is slightly wrong."""

import itertools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kernels.triton_cases import CASES, NAMES, VARIANTS, Case, allowed, draw, errors, evaluate
from experiments.kernels.triton_report import Compiled, assembler_report, summary

SMALL = Case(length=70, heads=2, key_dim=16, value_dim=16, decay=True, borders=(20, 65))


@pytest.fixture(scope="module")
def judged():
    """(inputs, truth, limits) of SMALL in bfloat16."""
    inputs = draw(SMALL)
    want = evaluate(inputs, SMALL.scale, np.float64)
    return inputs, want, allowed(SMALL, inputs, want)


def test_model_passes_the_plain_form(judged):
    inputs, want, limits = judged
    found = errors(evaluate(inputs, SMALL.scale, np.float32, "xla", jnp.bfloat16), want)
    assert set(found) == set(NAMES)
    assert all(found[name] <= limits[name] for name in NAMES), (found, limits)


def test_model_catches_a_hundredth(judged):
    _, want, limits = judged
    for name, x in want.items():
        assert errors({name: 1.01 * x}, {name: x})[name] > limits[name], name


def test_model_catches_one_lost_term(judged):
    """Of one token's gradient of log-decay: a fifth of one percent of the numbers."""
    _, want, limits = judged
    wrong = want["d_log_decay"].copy()
    wrong[0, 64] = 0
    assert errors({"d_log_decay": wrong}, {"d_log_decay": want["d_log_decay"]})["d_log_decay"] > limits["d_log_decay"]


def test_cases_cover_the_options():
    options = [(c.decay, c.borders is not None, c.heads != c.key_heads) for c in CASES]
    assert {True, False} == {x[0] for x in options} == {x[1] for x in options} == {x[2] for x in options}
    assert {c.dtype for c in CASES} == {"float32", "bfloat16", "float16"}
    assert {c.capability for c in CASES if c.dtype == "bfloat16"} == {80, 90}
    assert any(c.length % 64 == 0 for c in CASES)
    assert any(c.length % 64 for c in CASES)


# what ptxas 12.8 wrote of two kernels
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gradients' for 'sm_80'
ptxas info    : Function properties for gradients
    1000 bytes stack frame, 1192 bytes spill stores, 1196 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1000 bytes cumulative stack size, 528 bytes cmem[0]
ptxas info    : Compile time = 278.037 ms
"""


def test_assembler_report():
    assert assembler_report(REPORT) == (255, 1192, 1196)
    with pytest.raises(ValueError, match="expected one kernel"):
        assembler_report("ptxas info    : 0 bytes gmem")
    with pytest.raises(ValueError, match="expected one kernel"):
        assembler_report(2 * REPORT)


def test_budgets():
    forward = Compiled("scan", "bfloat16", 89, 8, 255, 0, 0, 69 << 10)
    assert forward.violations() == []
    assert replace(forward, spill_loads=4).violations() == ["scan spills 4 bytes a thread, 0 allowed"]
    assert replace(forward, kernel="gradients", spill_stores=128).violations() == []
    spilling = Compiled("gradients", "bfloat16", 80, 8, 255, 1192, 1196, 60 << 10)
    assert spilling.violations() == ["gradients spills 1196 bytes a thread, 128 allowed"]
    large = Compiled("scan", "bfloat16", 89, 8, 255, 0, 0, (99 << 10) + 1)
    assert large.violations() == [f"scan takes {large.shared_bytes} bytes of shared memory, 99 KiB allowed"]


def test_summary_shows_the_worst():
    small = Compiled("scan", "bfloat16", 89, 8, 255, 0, 8, 69 << 10)
    large = replace(small, spill_stores=4, spill_loads=0, shared_bytes=70 << 10)
    other = replace(small, capability=90)
    assert summary([small, other, large]) == [
        "scan         sm_89 bfloat16 spills   8 bytes,  70.0 KiB shared",
        "scan         sm_90 bfloat16 spills   8 bytes,  69.0 KiB shared",
    ]


def test_every_option_is_compiled_at_every_size():
    """With and without decay, documents and shared key heads, for K and V of 64 and 128."""
    sizes = [(64, 64), (64, 128), (128, 64), (128, 128)]
    for capability, dtype, size in itertools.product((80, 89, 90), ("bfloat16", "float16"), sizes):
        kind = (capability, dtype, *size)
        found = [v for v in VARIANTS if (v.capability, v.dtype, v.key_dim, v.value_dim) == kind]
        assert len({(v.key_heads, v.decay, v.documents) for v in found}) == 8
