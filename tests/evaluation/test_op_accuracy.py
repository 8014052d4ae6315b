"""Random calls of the op, their float64 reference on a part of them, and what is said of an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax import delta_rule_attention, efla_attention
from efla_jax.evaluation import EvaluationError
from efla_jax.evaluation.op_accuracy import DELTA_RULE, Case, differences, draw, exact, sample, suspects
from efla_jax.ops.coefficients import erase_and_write

FULL = Case(2, 100, 4, 6, 5, key_heads=2, documents=3, log_decay=True, state=True, dtype="float32")


def arrays(tree):
    return {name: np.asarray(x) for name, x in tree.items()}


# ---- inputs ----


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_keys_are_unit_vectors_times_a_power_of_two(dtype):
    inputs, _ = draw(Case(2, 40, 2, 16, 8, dtype=dtype), 0)
    assert {str(inputs[name].dtype) for name in ("query", "key", "value")} == {dtype}
    key = np.asarray(inputs["key"], np.float64)
    norm = np.linalg.norm(key, axis=-1)
    power = 2.0 ** np.round(np.log2(norm))
    assert set(np.unique(power)) == {0.5, 1.0, 2.0}
    np.testing.assert_allclose(norm / power, 1, atol=5e-3)
    for name in ("key", "value"):  # divided in its own type, nothing is lost
        x = inputs[name]
        divided = np.asarray(x / jnp.asarray(power[..., None], x.dtype), np.float64)
        np.testing.assert_array_equal(divided * power[..., None], np.asarray(x, np.float64))
    assert inputs["beta"].min() >= 0
    assert 0.4 < inputs["beta"].max() <= 0.5


def test_draws_have_what_the_case_says():
    inputs, cotangents = draw(FULL, 0)
    assert inputs["query"].shape == inputs["key"].shape == (2, 100, 2, 6)
    assert inputs["value"].shape == cotangents["output"].shape == (2, 100, 4, 5)
    assert inputs["initial_state"].shape == cotangents["state"].shape == (2, 4, 6, 5)
    assert inputs["log_decay"].max() <= 0
    np.testing.assert_array_equal(np.unique(inputs["segment_ids"][1], return_index=True)[1], [0, 34, 67])
    assert FULL.borders == [0, 34, 67, 100]
    plain, plain_cotangents = draw(Case(1, 8, 1, 2, 2), 0)
    assert set(plain) == {"query", "key", "value", "beta"}
    assert set(plain_cotangents) == {"output"}
    assert not np.array_equal(plain["key"], draw(Case(1, 8, 1, 2, 2), 1).inputs["key"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch=0), "batch is 0; it must be at least 1"),
        (dict(value_dim=-1), "value_dim is -1"),
        (dict(documents=0), "documents is 0"),
        (dict(documents=101), "101 documents do not fit into length=100"),
        (dict(key_heads=3), "key_heads is 3; it must divide heads=4"),
        (dict(dtype="float64"), "dtype is 'float64'; it must be one of bfloat16, float16, float32"),
    ],
)
def test_cases_that_cannot_be(changes, message):
    with pytest.raises(EvaluationError, match=message):
        Case(**dict(batch=1, length=100, heads=4, key_dim=2, value_dim=2) | changes)


# ---- the reference ----


def one_loop(run, inputs, cotangents):
    """Results and gradients by one unbroken token loop in float64."""
    with jax.enable_x64(True):
        wide = lambda tree: {
            name: jnp.asarray(x, x.dtype if x.dtype == np.int32 else np.float64) for name, x in arrays(tree).items()
        }
        inputs, cotangents = wide(inputs), wide(cotangents)
        ids = inputs.pop("segment_ids", None)
        op = lambda inputs: run(**inputs, segment_ids=ids, implementation="scan")
        (output, state), pullback = jax.vjp(op, inputs)
        (gradients,) = pullback((cotangents["output"], cotangents.get("state", jnp.zeros_like(state))))
        results = {"output": output, "state": state} | {f"d_{name}": x for name, x in gradients.items()}
        return arrays(results)


def test_the_reference_is_the_token_loop():
    """Cut into pieces, of which the last is padded and some begin with a document."""
    inputs, cotangents = draw(FULL, 0)
    for case_inputs in (inputs, {name: x for name, x in inputs.items() if name != "segment_ids"}):
        found = exact(arrays(case_inputs), arrays(cotangents))
        right = one_loop(efla_attention, case_inputs, cotangents)
        assert set(found) == set(right)
        for name, x in right.items():
            assert found[name].dtype == np.float64
            assert np.linalg.norm(found[name] - x) < 1e-13 * np.linalg.norm(x), name
    short = Case(1, 128, 1, 4, 4, documents=2, dtype="float32")  # the second document begins with a piece
    inputs, cotangents = draw(short, 0)
    right = one_loop(efla_attention, inputs | {"initial_state": np.ones((1, 1, 4, 4), np.float32)}, cotangents)
    found = exact(arrays(inputs | {"initial_state": jnp.ones((1, 1, 4, 4))}), arrays(cotangents))
    for name, x in right.items():
        assert np.linalg.norm(found[name] - x) <= 1e-13 * np.linalg.norm(x), name


def test_the_reference_of_other_rules():
    inputs, cotangents = draw(Case(1, 70, 1, 4, 4, dtype="float32"), 0)
    forward = exact(arrays(inputs), None)
    assert set(forward) == {"output", "state"}
    euler = exact(arrays(inputs), None, "euler")
    assert np.linalg.norm(euler["output"] - forward["output"]) / np.linalg.norm(forward["output"]) > 0.1
    erase, write = erase_and_write(inputs["key"], inputs["beta"])
    given = {name: x for name, x in inputs.items() if name != "beta"} | dict(erase=erase, write=write)
    found = exact(arrays(given), arrays(cotangents), DELTA_RULE)
    right = one_loop(delta_rule_attention, given, cotangents)
    for name, x in right.items():
        assert np.linalg.norm(found[name] - x) < 1e-13 * np.linalg.norm(x), name
    np.testing.assert_allclose(found["output"], forward["output"], atol=1e-6)


def test_a_sample_is_a_part_of_the_whole():
    """Rows and heads do not read each other, so the reference of the part is the part of the reference."""
    part = sample(FULL)._replace(rows=[1], key_heads=[1])
    inputs, cotangents = draw(FULL, 0)
    whole = part.take(exact(arrays(inputs), arrays(cotangents)))
    alone = exact(part.take(inputs), part.take(cotangents))
    assert whole["output"].shape == (1, 100, 2, 5)
    assert whole["d_key"].shape == (1, 100, 1, 6)
    for name, x in alone.items():
        np.testing.assert_allclose(whole[name], x, rtol=1e-5, atol=1e-6)  # take() gives float32


def test_samples_grow_with_what_can_be_afforded():
    everything = sample(FULL)
    assert (everything.rows, everything.key_heads, everything.groups) == ([0, 1], [0, 1], 2)
    large = sample(Case(8, 2048, 16, 128, 128))
    assert large.rows == [0, 2, 5, 7]
    assert large.key_heads == [0, 15]
    longest = sample(Case(4, 1 << 20, 16, 128, 128))
    assert (longest.rows, longest.key_heads) == ([0], [0])


# ---- errors ----


def test_differences_and_suspects():
    right = {"output": np.array([3.0, 4.0]), "state": np.full((2, 2), 2.0), "d_key": np.ones(100)}
    lost = np.ones(100)
    lost[:10] = 0  # a tenth of the products silently zero
    report = differences({"output": np.array([3.0, 4.5]), "state": right["state"], "d_key": lost}, right)
    assert report["output"]["error"] == pytest.approx(0.1)
    assert report["output"]["norm_ratio"] == pytest.approx((9 + 20.25) ** 0.5 / 5)
    assert report["state"] == {"error": 0.0, "norm_ratio": 1.0}
    assert report["d_key"]["error"] == pytest.approx(0.1**0.5)
    assert suspects(report) == ["output", "d_key"]
    for bad in (np.nan, 0.0):
        assert suspects(differences({"state": np.full((2, 2), bad)}, right)) == ["state"]
