"""Rows of documents, without decay and with nothing kept: the fused kernel, in pieces where heads are few."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax import efla_attention
from pallas_kernels.hopper import op, pieces
from tests.pallas_kernels.hopper.helpers import assert_accurate_alone, counted, documents, rounded

# Four pieces of two chunks. A piece begins: with a document; in one that began in the piece before; in one that began
# before that, in a chunk's midst or with one; in one that the row began with.
STARTS = {
    "with a document": (128, 256, 384),
    "in the piece before": (70, 129, 200, 330),
    "two documents in a chunk": (10, 20, 64, 66, 127, 140, 321, 322, 323, 383),
    "through a piece": (64, 300),
    "through a piece from within a chunk": (75, 440),
    "through all but one": (30,),
    "through the first only": (256, 270),
    "none": (),
}
SOON = ("two documents in a chunk", 2), ("through a piece from within a chunk", 0)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("starts", "lead"),
    [
        pytest.param(starts, lead, id=f"{name}, {lead}", marks=() if (name, lead) in SOON else pytest.mark.slow)
        for name, starts in STARTS.items()
        for lead in (2, 0)
    ],
)
def test_in_pieces(monkeypatch, starts, lead):
    """lead: chunks before a piece that it may be walked from; else they are summed up."""
    monkeypatch.setattr(pieces, "SHORTEST", 1)
    monkeypatch.setattr(pieces, "PROCESSORS", 4)
    monkeypatch.setattr(pieces, "LEAD", lead)
    inputs, _ = rounded(batch=1, length=488)
    assert pieces.fill(1, 488) == 4
    assert_accurate_alone(inputs, documents(starts, 1, 488), scale=0.5)


WIDE = dict(batch=2, heads=2, key_heads=1, key_dim=128, value_dim=128)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("sizes", "processors", "kind"),
    [
        pytest.param(dict(batch=1), 2, "untied", id="untied", marks=pytest.mark.slow),
        pytest.param(dict(batch=1, dtype=jnp.float16), 2, "stateless", id="no state, float16", marks=pytest.mark.slow),
        pytest.param(WIDE, 8, "given", id="two columns in a block, two pieces", marks=pytest.mark.slow),
        pytest.param(WIDE, 4, "given", id="two columns in a block"),
        pytest.param(dict(batch=1, key_dim=128, value_dim=128), 2, "given", id="columns apart", marks=pytest.mark.slow),
    ],
)
def test_kinds(monkeypatch, sizes, processors, kind):
    """What the kernel is compiled for; two pieces, or whole rows."""
    monkeypatch.setattr(pieces, "SHORTEST", 1)
    monkeypatch.setattr(pieces, "PROCESSORS", processors)
    apart = kind == "given" and sizes["batch"] == 1
    monkeypatch.setattr(sys.modules["pallas_kernels.hopper.forward"], "PROCESSORS", 2 * processors * apart)
    inputs, _ = rounded(**dict(length=266) | sizes)
    if kind == "untied":
        beta = inputs.pop("beta")
        inputs |= dict(erase=beta, write=0.7 * beta)
    if kind == "stateless":
        inputs.pop("initial_state")
    assert_accurate_alone(inputs, documents((40, 150, 151, 200), sizes["batch"], 266))


@pytest.mark.parametrize(
    ("starts", "lead", "want"),
    [
        ((128, 256, 384), 2, [-1, 0, 0, 0]),
        ((130, 256, 320), 2, [-1, -1, 0, 1]),
        ((130, 256, 320), 0, [-1, -1, 0, -2]),
        ((64, 129, 384), 2, [-1, 1, 2, 0]),
        ((64, 129, 384), 1, [-1, 1, -1, 0]),
        ((64, 300), 2, [-1, -2, -1, 2]),
        ((), 2, [-1, -1, -1, -1]),
        ((30,), 2, [-1, -1, -1, -1]),
    ],
)
def test_leads(monkeypatch, starts, lead, want):
    """Four pieces of two chunks, the last one shorter: begun with a document, before the piece, or from a state."""
    monkeypatch.setattr(pieces, "LEAD", lead)
    numbers = counted(starts, 448)
    assert op._leads(numbers, 2, 7, True).tolist() == [want]
    assert op._leads(numbers, 2, 7, False).tolist() == [[0, *want[1:]]]


MANY = (60, 130, 200, 256, 390)
KNOWN = {"short": (MANY, (100, 130, 256, 387), False), "long": (MANY, (300,), True)}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("first", "second", "summed"), KNOWN.values(), ids=KNOWN)
def test_known_when_tracing(monkeypatch, first, second, summed, given):
    """NumPy's ids that a program closes over: the same numbers, and nothing is summed up where nothing must be."""
    monkeypatch.setattr(pieces, "SHORTEST", 1)
    monkeypatch.setattr(pieces, "PROCESSORS", 8)
    inputs, _ = rounded(batch=2, length=488)
    if not given:
        inputs.pop("initial_state")
    ids = np.concatenate([documents(starts, 1, 488) for starts in (first, second)])
    attend = partial(efla_attention, implementation="pallas_gpu", scale=0.5)
    known = partial(attend, segment_ids=ids)
    for one, other in zip(jax.jit(known)(**inputs), jax.jit(attend)(**inputs, segment_ids=ids), strict=True):
        np.testing.assert_array_equal(one, other)
    assert ("efla_summaries" in str(jax.make_jaxpr(known)(**inputs))) == summed


@pytest.mark.usefixtures("interpreted")
def test_known_of_many_rows(monkeypatch):
    """Under vmap rows are folded into the batch: each of the ids stands for several."""
    monkeypatch.setattr(pieces, "SHORTEST", 1)
    monkeypatch.setattr(pieces, "PROCESSORS", 16)
    ids = np.concatenate([documents((60, 130, 256), 1, 266), documents((64, 200), 1, 266)])
    known = partial(efla_attention, segment_ids=ids, implementation="pallas_gpu")
    draws = [rounded(seed, batch=2, length=266)[0] for seed in (0, 1)]
    stacked = {name: np.stack([draw[name] for draw in draws]) for name in draws[0]}
    together = jax.jit(jax.vmap(lambda inputs: known(**inputs)))(stacked)
    assert "efla_summaries" not in str(jax.make_jaxpr(jax.vmap(lambda inputs: known(**inputs)))(stacked))
    for n, draw in enumerate(draws):
        for one, other in zip(together, jax.jit(known)(**draw), strict=True):
            np.testing.assert_array_equal(one[n], other)


@pytest.mark.usefixtures("interpreted")
def test_known_and_differentiated():
    inputs, cotangent = rounded(batch=1, length=130)
    ids = documents((30, 100), 1, 130)

    def pulled(attend):
        return jax.jit(lambda inputs: jax.vjp(attend, inputs)[1](cotangent))(inputs)

    attend = partial(efla_attention, implementation="pallas_gpu")
    both = [pulled(partial(lambda ids, inputs: attend(**inputs, segment_ids=ids), x)) for x in (ids, jnp.asarray(ids))]
    for one, other in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_array_equal(one, other)
