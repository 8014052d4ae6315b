"""The benchmark of kernels on a tiny shape, and that other libraries' form of the rule is the same function."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from efla_jax import delta_rule_attention
from efla_jax.evaluation.comparison import Bench, measure
from efla_jax.evaluation.op_accuracy import Case
from efla_jax.evaluation.op_speed import BOTH, FORWARD
from experiments.kernels.peers import peer, unit_form

ROOT = Path(__file__).parents[2]
BEST = {"bytes_per_second": 1e9, "flops_per_second": 1e11}


def run(*options):
    command = [sys.executable, "-m", "experiments.kernels.benchmark", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_benchmark(tmp_path):
    done = run(
        "--shapes=1x128x2x64,1x70x1x16x8p3,1x70x1x16k2", "--implementations=xla,scan,pallas_tpu,jla", "--repeats=2",
        "--commit=abc", f"--output={tmp_path / 'new'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert results["commit"] == "abc"
    assert "--shapes=1x128x2x64,1x70x1x16x8p3,1x70x1x16k2 --directions=forward,both --repeats=2" in results["command"]
    rows = results["rows"]
    assert len(rows) == 3 * 2 * 4
    known = "1×70×1×16, 2 documents known when tracing"
    assert {row["shape"] for row in rows} == {"1×128×2×64", "1×70×1×16×8, 3 documents", known}
    for row in rows:
        assert row["implementation"] in done.stdout
        if row["implementation"] in ("xla", "scan"):
            assert row["seconds"]["median"] > 0
            names = {"output", "state"} if row["direction"] == FORWARD else {"output"}
            names |= {f"d_{name}" for name in ("query", "key", "value", "beta")} if row["direction"] == BOTH else set()
            assert set(row["errors"]) == names
            assert all(result["error"] < 1e-2 for result in row["errors"].values())
            assert row["suspects"] == []
    assert all("it needs a TPU" in row["reason"] for row in rows if row["implementation"] == "pallas_tpu")
    assert all("not installed" in row["reason"] for row in rows if row["implementation"] == "jla")
    text = (tmp_path / "new" / "results.md").read_text()
    assert text.startswith("# Speed of the kernels\n")
    assert "- commit: abc\n" in text
    assert "**1×70×1×16×8, 3 documents, forward + backward**" in text
    assert (tmp_path / "new" / "times.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--shapes=8x2048", "shape is '8x2048'; it must be BxTxHxD"),
        ("--implementations=xla,fal", "implementation is 'fal'"),
    ],
)
def test_refusals(option, message):
    done = run(option)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


# ---- peers ----


@pytest.fixture
def jla(monkeypatch):
    """A library that knows the delta rule with a gate, as those that are measured."""
    calls = []

    def linear_attention(kind, q, k, v, *, beta, scale, impl, output_final_state, segment_ids):
        calls.append((kind, impl, str(beta.dtype)))
        output, state = delta_rule_attention(q, k, v, beta, beta, segment_ids=segment_ids, scale=scale)
        return output, state if output_final_state else None

    module = ModuleType("jla.ops")
    module.__dict__["linear_attention"] = linear_attention
    monkeypatch.setitem(sys.modules, "jla", ModuleType("jla"))
    monkeypatch.setitem(sys.modules, "jla.ops", module)
    return calls


@pytest.mark.parametrize(("dtype", "documents"), [("float32", 3), pytest.param("bfloat16", 1, marks=pytest.mark.slow)])
def test_a_peer_computes_the_exact_rule(jla, dtype, documents):
    bench = Bench(Case(2, 70, 2, 8, 4, documents=documents, dtype=dtype), gradients=True)
    bound = 1e-5 if dtype == "float32" else 1e-2
    for direction, names in (
        (FORWARD, {"output", "state"}),
        (BOTH, {"output", "d_query", "d_key", "d_value", "d_beta"}),
    ):
        row = measure(bench, "jla", direction, BEST, build=peer, repeats=1)
        assert row["reason"] is None
        assert set(row["errors"]) == names
        assert all(result["error"] < bound for result in row["errors"].values())
    assert set(jla) == {("deltanet", "mosaic_gpu", "float32")}


def test_the_unit_form_rounds_nothing():
    bench = Bench(Case(1, 40, 2, 16, 8), gradients=False)
    inputs = bench.draws[0].inputs
    _, key, value, gate = (np.asarray(x, np.float64) for x in unit_form(inputs))
    whole_key, whole_value = (np.asarray(inputs[name], np.float64) for name in ("key", "value"))
    power = 2.0 ** np.round(np.log2(np.linalg.norm(whole_key, axis=-1, keepdims=True)))
    assert set(np.unique(power)) == {0.5, 1.0, 2.0}
    np.testing.assert_allclose(np.linalg.norm(key, axis=-1), 1, atol=5e-3)
    np.testing.assert_array_equal(key * power, whole_key)
    np.testing.assert_array_equal(value * power, whole_value)
    assert gate.min() >= 0
    assert gate.max() < 1
