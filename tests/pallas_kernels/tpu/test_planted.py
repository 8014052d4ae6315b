"""Bugs planted in a copy of the kernels' source are found: what the other tests of this folder rest on."""

import importlib
import inspect
import types

import numpy as np
import pytest

from tests.ops import helpers
from tests.ops.helpers import EPS, errors, evaluate
from tests.pallas_kernels.hopper.helpers import documents, rounded

pytestmark = [pytest.mark.usefixtures("interpreted"), pytest.mark.cpu("interpreted as TPU kernels")]

PACKAGE = "pallas_kernels.tpu"
USERS = ("forward", "backward", "numbers", "inverse", "op")


@pytest.fixture
def plant(monkeypatch):
    """plant(name, old, new): the kernels run a copy of that module with old made new."""

    def replace(name, old, new):
        original = importlib.import_module(f"{PACKAGE}.{name}")
        source = inspect.getsource(original)
        assert source.count(old) == 1, f"{source.count(old)} times in {name}.py: {old}"
        copy = types.ModuleType(f"planted_{name}")
        exec(compile(source.replace(old, new), f"planted {original.__file__}", "exec"), copy.__dict__)
        for user in USERS:
            module = importlib.import_module(f"{PACKAGE}.{user}")
            for own, value in list(vars(module).items()):
                if getattr(value, "__module__", None) == original.__name__:
                    monkeypatch.setattr(module, own, getattr(copy, value.__name__))

    helpers._compiled.cache_clear()
    yield replace
    helpers._compiled.cache_clear()


def worst():
    """The largest error, in roundings of float32, of two groups of two heads with decay and documents."""
    inputs, cotangent = rounded(batch=1, length=100, decay=True, heads=4, key_heads=2, dtype=np.float32)
    options = dict(cotangent=cotangent, segment_ids=documents((30,), 1, 100), scale=0.5)
    got = evaluate(inputs, implementation="pallas_tpu", chunk_size=64, **options)
    return max(errors(got, evaluate(inputs, np.float64, implementation="scan", **options)).values()) / EPS


BUGS = {
    "a mask that has the diagonal": ("numbers", "i >= j, i > j, i <= j", "i >= j, i >= j, i <= j"),
    "a mask that lacks the diagonal": ("numbers", "i >= j, i > j, i <= j", "i > j, i > j, i <= j"),
    "a mask transposed for the gradient": ("numbers", "i >= j, i > j, i <= j", "i >= j, i > j, i < j"),
    "documents that see each other": ("numbers", "reach & same, below & same", "reach, below & same"),
    "state over a border": ("numbers", "jnp.where(document_1C == 0, left_HC, 0.0)", "left_HC"),
    "a state that is dropped": ("forward", "scaled(r.state[head], numbers.total[head]) + added_KV", "added_KV"),
    "a cotangent that is dropped": ("backward", "scaled(d_state_KV, self.numbers.total[self.head]) + ", ""),
    "the next key head": (
        "forward",
        "return self.keys[head // self.config.group]",
        "return self.keys[head % self.config.key_heads]",
    ),
    "an inverse that stops early": ("inverse", "while block < lowers[0].shape[0]", "while block < 32"),
    "a value head's gradient only": ("backward", "reduce(jnp.add, parts)", "parts[0]"),
}
FAST = ("documents that see each other",)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [pytest.param(*bug, id=what, marks=() if what in FAST else pytest.mark.slow) for what, bug in BUGS.items()],
)
def test_found(plant, name, old, new):
    plant(name, old, new)
    assert not worst() < 1000  # also if not a number


@pytest.mark.slow
def test_nothing_planted(plant):
    """The copies themselves are sound."""
    for name, old, _ in BUGS.values():
        plant(name, old, old)
    assert worst() < 30
