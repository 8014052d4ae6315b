"""The study of errors on a few tokens: its draws, its oracle, its rows, and that it goes on where it stopped."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax import efla_attention
from efla_jax.evaluation.op_accuracy import forward_backward
from experiments.numerics.draws import TYPES, Keys, Sizes, draw, held_in, rounded
from experiments.numerics.measure import errors, evaluate, first_nonfinite, oracle_error
from experiments.numerics.results import Rows

ROOT = Path(__file__).parents[2]
SIZES, KEYS = Sizes(32, 2, 8), Keys(1e-2, 1e2)


@pytest.mark.parametrize("kind", TYPES)
def test_draws(kind):
    inputs, cotangents = draw(SIZES, KEYS, kind, 0)
    plain, _ = draw(SIZES, KEYS, "float32", 0)
    assert inputs["key"].dtype == cotangents["output"].dtype == held_in(kind)
    assert inputs["beta"].dtype == cotangents["state"].dtype == jnp.float32
    unit = {"float32": 0, "bfloat16": 2**-8, "float16": 2**-11, "float8": 2**-4}[kind]
    value, want = (np.asarray(x["value"], np.float64) for x in (inputs, plain))
    assert np.all(abs(value - want) <= unit * abs(want) + unit * 1e-2)
    square = np.sum(np.asarray(plain["key"]) ** 2, -1)
    assert 1e-2 * 0.99 < square.min() < 0.1
    assert 10 < square.max() < 1e2 * 1.01


def test_float8_is_scaled_by_a_power_of_two():
    """Numbers of four significant bits come through exactly, wherever the tensor lies."""
    x = jnp.asarray([1.0, 1.125, -1.875, 0.25, 0.0]) * 2.0**-20
    np.testing.assert_array_equal(rounded(x, "float8").astype(jnp.float32), x)
    assert rounded(jnp.zeros(3), "float8").tolist() == [0, 0, 0]


@pytest.mark.parametrize("rule", ["exact", "euler"])
def test_the_composed_program_is_the_op(rule):
    inputs, cotangents = draw(SIZES, Keys(0.1, 1.0), "bfloat16", 0)
    call = lambda **inputs: efla_attention(**inputs, integrator=rule, implementation="xla")
    want = jax.jit(lambda *x: forward_backward(call, *x))(inputs, cotangents)
    got = evaluate("xla", "bfloat16", rule, SIZES, inputs, cotangents)
    assert set(got) == set(want)
    for name, x in want.items():
        assert x.dtype == got[name].dtype
        difference = np.asarray(got[name], np.float64) - np.asarray(x, np.float64)
        assert np.linalg.norm(difference) <= 4e-3 * np.linalg.norm(np.asarray(x, np.float64)), name


def test_the_oracle_is_the_token_loop():
    inputs, cotangents = draw(SIZES, KEYS, "float32", 0)
    assert max(oracle_error("exact", SIZES, inputs, cotangents).values()) < 1e-12


def test_errors():
    with jax.enable_x64(True):
        right = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 2, 3)))
        half = jnp.concatenate([right[:, :32], 1.5 * right[:, 32:]], 1)
        rounded_once, broken = right.astype(jnp.bfloat16), half.at[0, 40, 1].set(jnp.nan)
    found = errors({"output": half}, {"output": right})["output"]
    assert found["by_position"] == pytest.approx([0] * 8 + [0.5] * 8)
    assert 0.3 < found["error"] < 0.4
    assert found["floor"] == found["nonfinite"] == 0
    low = errors({"output": rounded_once}, {"output": right})["output"]
    assert low["error"] == low["floor"]
    assert 5e-4 < low["error"] < 4e-3
    found = errors({"output": broken}, {"output": right})["output"]
    assert found["error"] is None
    assert found["nonfinite"] == 3
    assert found["by_position"][9] is not None
    assert found["by_position"][10] is None
    assert first_nonfinite({"output": broken}) == 40
    assert first_nonfinite({"output": half}) is None


def test_rows_go_on(tmp_path):
    path = tmp_path / "new" / "rows.json"
    first = Rows(path, {"commit": "a"})
    first.add("x", {"error": 1})
    again = Rows(path, {"commit": "a"})
    assert again.has("x")
    assert not again.has("y")
    other = Rows(path, {"commit": "b"})
    assert not other.has("x")
    other.add("y", {"error": 2})
    found = json.loads(path.read_text())
    assert {key: found["runs"][row["run"]]["commit"] for key, row in found["rows"].items()} == {"x": "a", "y": "b"}


def test_the_program(tmp_path):
    command = [
        sys.executable, "-m", "experiments.numerics.error", f"--output={tmp_path}", "--parts=lengths,oracle",
        "--lengths=32", "--types=bfloat16", "--heads=1", "--dim=8", "--commit=abc",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "error.json").read_text())["rows"]
    assert len(rows) == 3 * 2 + 3
    for key, row in rows.items():
        assert key in done.stdout
        if row["part"] == "oracle":
            assert max(row["loop_errors"].values()) < 1e-12
        elif row["implementation"] == "xla":
            assert set(row["errors"]) == {"output", "state", "d_query", "d_key", "d_value", "d_beta"}
            assert all(1e-4 < result["error"] < 3e-2 for result in row["errors"].values())
        else:
            assert "Hopper" in row["reason"]
