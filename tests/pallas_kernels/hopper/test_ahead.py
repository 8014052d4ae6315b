"""The fused kernel with two state warpgroups, where nothing is saved: helpers ahead of places for what they make."""

import jax.numpy as jnp
import pytest

from tests.pallas_kernels.hopper.helpers import assert_accurate_alone, in_whole_rows, rounded

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        (dict(length=700), "exact"),  # more chunks than there are places of any kind
        pytest.param(dict(length=700, key_dim=128, heads=2, key_heads=1), "exact", marks=pytest.mark.slow),
        pytest.param(dict(length=450), "untied", marks=pytest.mark.slow),
        pytest.param(dict(length=330, dtype=jnp.float16), "exact", marks=pytest.mark.slow),
        pytest.param(dict(length=1), "exact", marks=pytest.mark.slow),
        (dict(length=130), "exact"),
        pytest.param(dict(length=192), "untied", marks=pytest.mark.slow),
    ],
)
def test_accurate(monkeypatch, sizes, kind):
    in_whole_rows(monkeypatch)
    inputs, _ = rounded(**dict(batch=1, heads=1, value_dim=128) | sizes)
    if kind == "untied":
        beta = inputs.pop("beta")
        inputs |= dict(erase=beta, write=0.7 * beta)
    assert_accurate_alone(inputs, scale=0.5)
