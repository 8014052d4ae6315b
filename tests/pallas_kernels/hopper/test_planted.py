"""Bugs planted in a copy of the kernels' source are found: what the other tests of this folder rest on.

The interpreter's race detection sees barriers, copies, loads and stores; it is blind to the operands of wgmma and to a
missing commit_smem or wgmma_wait, which show on a card only.
"""

import importlib
import inspect
import re
import sys
import types
from functools import partial

import jax
import numpy as np
import pytest

from efla_jax import efla_attention
from pallas_kernels.hopper import pieces
from tests.ops import helpers
from tests.ops.helpers import evaluate
from tests.pallas_kernels.hopper.helpers import attend, documents, in_whole_rows, rounded, too_far

pytestmark = pytest.mark.cpu("what the interpreter finds")


@pytest.fixture
def plant(monkeypatch):
    """plant(name, old, new): the kernels run with a copy of that module, with the pattern old made new."""

    def replace(name, old, new):
        original = importlib.import_module(f"pallas_kernels.hopper.{name}")
        source = inspect.getsource(original)
        source, count = re.subn(old, new, source)
        assert count, f"not in {name}.py: {old}"
        copy = types.ModuleType(f"planted_{name}")
        exec(compile(source, f"planted {original.__file__}", "exec"), copy.__dict__)
        users = [x for n, x in sys.modules.items() if n.startswith("pallas_kernels.hopper") and x is not original]
        for user in users:
            for own, value in list(vars(user).items()):
                if getattr(value, "__module__", None) == original.__name__:
                    monkeypatch.setattr(user, own, getattr(copy, value.__name__))

    helpers._compiled.cache_clear()
    yield replace
    helpers._compiled.cache_clear()


def results(length=200, **options):
    """Of two heads, with decay and documents: by the kernels, the float64 token loop and `xla`."""
    inputs, cotangent = rounded(batch=1, length=length, decay=True, heads=2)
    options = dict(cotangent=cotangent, segment_ids=documents((30, 64, 150), 1, length), scale=0.5) | options
    kernels = evaluate(inputs, implementation="pallas_gpu", **options)
    loop = evaluate(inputs, np.float64, implementation="scan", **options)
    return kernels, loop, evaluate(inputs, implementation="xla", **options)


# What a state warpgroup may still have to read is loaded over before it said that it has: an earlier chunk in the
# forward pass, all inputs of one chunk back in the backward pass. Or two helpers write to the same place.
LATE = {
    "places": (
        "forward_helper",
        r"( +plgpu\.barrier_wait\(config\.keys\.free\(r, n\)\)\n)(.*commit_smem.*\n +_send_on\(config, r, n\)\n)",
        r"\2\1",
    ),
    "helpers": ("forward_helper", r"part_of\(getattr\(r, name\), i\)", "part_of(getattr(r, name), 0)"),
    "inputs": ("backward", r"(plgpu\.barrier_wait\(r\.inputs_free\))\n( +)(pl.when.*load\(.*)", r"\3\n\2\1"),
}


@pytest.mark.parametrize(("name", "old", "new"), LATE.values(), ids=LATE)
def test_late_wait(races, plant, name, old, new):
    plant(name, old, new)
    assert found(races)


def found(races, run=results, **options):
    """A race, or a phase that ends before the one before it was seen: which comes first is a matter of chance."""
    failure = ""
    try:
        run(**options)
    except jax.errors.JaxRuntimeError as error:
        failure = str(error)
    return "no threads observed phase" in failure or any(state.races_found for state in races)


# Where helpers are ahead: they write before there is a place, values come while the output is still there, an output is
# written where values are, the masks of a chunk in which a document begins are read before they are there.
AHEAD = {
    "helpers": ("forward_helper", r"(    pl\.when\(at >= config\.helpers\)\(lambda: plgpu.*\n)((?:.*\n){4})", r"\2\1"),
    "values": ("forward_state", r"    plgpu\.wait_smem_to_gmem\(0, wait_read_only=True\)\n( +_, count)", r"\1"),
    "output": ("forward_state", r"columns, v_s, ", "columns, r.v_s.at[config.values.place(n + 1), w], "),
    "masks": ("forward_state", r"((?: +plgpu\.barrier_wait.*\n){2})( +_make_scores.*\n)", r"\2\1"),
    "scores": ("forward_state", r"plgpu\.barrier_wait\(r\.scores_full.*\n", "None\n"),
}


@pytest.mark.parametrize("planted", AHEAD)
def test_late_wait_ahead(races, plant, monkeypatch, planted):
    in_whole_rows(monkeypatch)
    plant(*AHEAD[planted])

    def run():
        inputs, _ = rounded(batch=1, length=500, heads=1, value_dim=128)
        ids = documents((30, 150, 200, 290, 350, 410), 1, 500) if planted == "masks" else None
        jax.block_until_ready(efla_attention(**inputs, segment_ids=ids, implementation="pallas_gpu"))

    assert found(races, run)


def test_half_of_the_scores_early(races, plant, monkeypatch):
    """Where something is saved both state warpgroups make half of the scores too."""
    in_whole_rows(monkeypatch)
    plant("forward_state", r"plgpu\.barrier_wait\(r\.scores_full.*\n", "None\n")
    inputs, cotangent = rounded(batch=1, length=300, heads=1, value_dim=128)
    assert found(races, partial(evaluate, inputs, implementation="pallas_gpu", cotangent=cotangent))


# A chunk is sent for before its place is free.
EARLY = (
    "mosaic",
    r"( +plgpu\.barrier_wait\(ring\.free\(r, n\)\)\n)(.*commit_smem.*\n)(.*pl\.when.*\n)",
    r"\3\2\1",
)


@pytest.mark.slow
def test_late_wait_in_pieces(races, plant, monkeypatch):
    monkeypatch.setattr(pieces, "SHORTEST", 1)
    monkeypatch.setattr(pieces, "PROCESSORS", 8)
    plant(*EARLY)
    assert found(races, length=1000)


# Or a helper writes over an inverse that may still be read.
LATE_OF_FEW_HEADS = {
    "loader": EARLY,
    "place": ("forward_helper", r"config\.products\.wait_place\(r, n\(\)\)", "pass"),
}


@pytest.mark.parametrize(("name", "old", "new"), LATE_OF_FEW_HEADS.values(), ids=LATE_OF_FEW_HEADS)
def test_late_wait_in_few_heads(races, plant, monkeypatch, name, old, new):
    monkeypatch.setattr(pieces, "plan", lambda *call, **kind: pieces.Plan("apart", 11, 11))
    plant(name, old, new)

    def run():
        inputs, _ = rounded(batch=1, length=700, value_dim=128)
        jax.block_until_ready(efla_attention(**inputs, implementation="pallas_gpu"))

    assert found(races, run)


def test_missing_wait(races, plant):
    plant("backward", r"plgpu\.barrier_wait\(r\.inputs_free\)", "None")
    with pytest.raises(jax.errors.JaxRuntimeError, match="Barrier completed phase 1, but no threads observed phase 0"):
        results()


WRONG = {
    "values of another chunk": ("forward_state", r"r\.v_s\.at\[values\.place\(n\), w", "r.v_s.at[0, w"),
    "gradient over a document border": (
        "backward",
        r"per_row\(documents\[0\], SQUARE\) == ",
        "per_row(documents[0], SQUARE) >= ",
    ),
}


@pytest.mark.parametrize(("name", "old", "new"), WRONG.values(), ids=WRONG)
def test_wrong_number(races, plant, name, old, new):
    plant(name, old, new)
    assert too_far(*results())


# Of documents without decay: what is not seen, and what the state warpgroups forget.
WRONG_OF_DOCUMENTS = {
    "queries of the next document": ("forward_state", r"out = scaled_if\(.*\)", "pass"),
    "a state kept": ("forward_state", r"emptied_if\(.*, state\)", "state"),
    "pairs of two documents": ("masks", r"jnp\.where\(_one_document\(r, slot\), tile, 0\.0\)", "tile"),
    "what the next document's keys recall": ("forward_state", r"forgotten = scaled_if\(.*\)", "pass"),
    "updates of the document before": ("forward_helper", r"CHUNK - 1\], 1\.0, 0\.0\)", "CHUNK - 1], 1.0, 1.0)"),
    "a walk begun too late": ("forward_helper", r"return first - lead, count \+ lead", "return first, count"),
    "another part's map": ("summaries", r"return r\.leads\[r\.b, (.*) \+ 1\]", r"return r.leads[r.b, \1]"),
}


# The same where helpers are ahead: with all columns of a head in a block.
WRONG_OF_DOCUMENTS_AHEAD = {
    "scores of two documents": ("forward_helper", r"\(row <= column\) & same", "row <= column"),
    "keys of the document before": ("forward_state", r"lambda: _forget_keys\(config, r, w, n\)", "lambda: None"),
    "what the next document's keys recall": ("forward_state", r"forgotten = scaled_if\(.*\)", "pass"),
} | {name: WRONG_OF_DOCUMENTS[name] for name in ("queries of the next document", "a state kept")}


def first_soon(bugs):
    """All but the first are slow."""
    return [
        pytest.param(*bug, id=name, marks=pytest.mark.slow if n else ()) for n, (name, bug) in enumerate(bugs.items())
    ]


def results_of_documents(value_dim=64):
    """Of a row in four pieces, a piece walked from before, and one from a state that is summed up."""
    inputs, _ = rounded(batch=1, length=488, value_dim=value_dim)
    ids = documents((75, 100, 170, 440), 1, 488)
    kernels, xla = (attend(inputs, ids, implementation=name) for name in ("pallas_gpu", "xla"))
    return kernels, attend(inputs, ids, np.float64, implementation="scan"), xla


def in_four_pieces(monkeypatch, ahead=False):
    monkeypatch.setattr(pieces, "SHORTEST", 1)
    monkeypatch.setattr(pieces, "PROCESSORS", 4)
    monkeypatch.setattr(pieces, "LEAD", 1)
    if ahead:  # with both halves of the columns in a block
        monkeypatch.setattr(importlib.import_module("pallas_kernels.hopper.forward"), "PROCESSORS", 0)


@pytest.mark.parametrize(("name", "old", "new"), first_soon(WRONG_OF_DOCUMENTS))
def test_wrong_number_of_documents(races, plant, monkeypatch, name, old, new):
    in_four_pieces(monkeypatch)
    plant(name, old, new)
    assert too_far(*results_of_documents())


@pytest.mark.parametrize(("name", "old", "new"), first_soon(WRONG_OF_DOCUMENTS_AHEAD))
def test_wrong_number_of_documents_ahead(races, plant, monkeypatch, name, old, new):
    in_four_pieces(monkeypatch, ahead=True)
    plant(name, old, new)
    assert too_far(*results_of_documents(value_dim=128))


@pytest.mark.slow
@pytest.mark.parametrize("early", ["forgotten", "scores_full"])
def test_keys_forgotten_early(races, plant, monkeypatch, early):
    """One state warpgroup's part of the keys by the other, or before the other has read them."""
    in_four_pieces(monkeypatch, ahead=True)
    plant("forward_state", rf"plgpu\.barrier_wait\(r\.{early}.*\n", "None\n")
    assert found(races, results_of_documents, value_dim=128)


@pytest.mark.slow
def test_output_of_another_piece(races, plant, monkeypatch):
    """What a piece makes of the chunks before it, the piece before writes too."""
    in_four_pieces(monkeypatch)
    plant("forward_state", r"n >= r\.lead if config\.mixing else None", "None")
    assert found(races, results_of_documents)


def test_nothing_planted(interpreted, plant):
    """The copy itself is sound."""
    for name in ("forward", "forward_state", "backward"):
        plant(name, "SQUARE", "SQUARE")
    assert not too_far(*results())
