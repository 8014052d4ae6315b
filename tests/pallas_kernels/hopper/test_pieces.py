"""Long rows of few heads: which kernels run, in how many pieces, the chain over them, and the op as without them."""

import importlib
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.hopper import blocks, op, pieces
from pallas_kernels.hopper.chain import chain, chain_back, split
from pallas_kernels.hopper.pieces import Parts, Plan
from pallas_kernels.hopper.prepare import prepare
from pallas_kernels.hopper.summaries import summaries
from tests.pallas_kernels.hopper.helpers import assert_accurate, assert_accurate_alone, counted, documents, rounded


@pytest.mark.parametrize(
    ("heads", "length", "count"),
    [
        (128, 2048, 1),
        (64, 4096, 2),
        (34, 8192, 2),
        (33, 8192, 4),
        (16, 16384, 8),
        (8, 8192, 16),
        (1, 1024, 2),
        (1, 448, 1),
    ],
)
def test_fill(heads, length, count):
    """What fills 132 multiprocessors, in pieces of at least 8 chunks."""
    assert pieces.fill(heads, length) == count


@pytest.mark.parametrize(
    ("direction", "heads", "length", "kind", "want"),
    [
        ("both", 128, 2048, {}, Plan("fused", 32, 32)),
        ("both", 64, 4096, {}, Plan("fused", 64, 32)),  # of two pieces no map is needed
        ("forward", 64, 4096, dict(few=True), Plan("apart", 64, 64)),
        ("forward", 64, 4096, {}, Plan("fused", 64, 64)),
        ("forward", 32, 8192, dict(few=True), Plan("fused", 32, 32)),
        ("both", 32, 8192, {}, Plan("fused", 32, 32)),
        ("both", 32, 8192, dict(decayed=True), Plan("scan", 64, 32)),
        ("forward", 32, 8192, dict(decayed=True), Plan("scan", 64, 64)),
        ("forward", 16, 4096, dict(few=True), Plan("apart", 16, 16)),  # pieces of 8 chunks
        ("forward", 16, 4096, {}, Plan("fused", 8, 8)),
        ("both", 16, 16000, {}, Plan("fused", 32, 32)),  # the last piece is shorter
        ("both", 16, 1, {}, Plan("fused", 1, 1)),
    ],
)
def test_plan(monkeypatch, direction, heads, length, kind, want):
    """Where nothing was measured."""
    monkeypatch.setattr(blocks, "lookup", lambda *args: {})
    assert pieces.plan(direction, heads, length, 128, 128, **dict(decayed=False, few=False) | kind) == want


def test_a_measured_count_comes_first(monkeypatch):
    """But where decay was not measured."""
    monkeypatch.setattr(blocks, "lookup", lambda *args: {"pieces": 4})
    assert pieces.plan("both", 128, 2048, 128, 128, decayed=False, few=False) == Plan("fused", 8, 8)
    assert pieces.plan("both", 128, 2048, 128, 128, decayed=True, few=False) == Plan("fused", 32, 32)


@pytest.mark.parametrize(
    ("measured", "few", "want"),
    [
        ({"apart": 1}, True, Plan("apart", 128, 128)),
        ({"apart": 3}, True, Plan("apart", 43, 43)),
        ({"apart": 3}, False, Plan("fused", 32, 32)),
        ({"pieces": 8}, True, Plan("fused", 16, 16)),
        ({"pieces": 2}, False, Plan("fused", 128, 128)),
    ],
    ids=str,
)
def test_measured_of_few_heads(monkeypatch, measured, few, want):
    """As measured. What the kernel of few heads does not serve is cut as if there were no such kernel."""
    monkeypatch.setattr(blocks, "lookup", lambda *args: measured)
    assert pieces.plan("forward", 32, 8192, 128, 128, decayed=False, few=few) == want


@pytest.mark.parametrize(
    ("share", "chunks", "blocks", "want"),
    [
        (64, 256, 0, Parts((0, 64, 128, 192), (0, 1, 2, 3))),
        (64, 256, 8, Parts((0, 48, 64, 96, 128, 144, 192), (0, 1, 3, 5, 6))),
        (64, 250, 8, Parts((0, 48, 64, 96, 128, 144, 192), (0, 1, 3, 5, 6))),  # the last piece is shorter
        (32, 256, 8, Parts((0, 32, 56, 64, 96, 112, 128, 160, 168, 192, 224), (0, 2, 5, 8, 10))),
        (32, 64, 4, Parts((0, 16, 32), (0, 1, 2))),
        (30, 90, 6, Parts((0, 20, 30, 40, 60), (0, 1, 3, 4))),
        (8, 128, 16, Parts(tuple(range(0, 121, 8)), tuple(range(16)))),  # the chain would cost more
        (64, 64, 8, Parts((0,), (0,))),
    ],
)
def test_parts(share, chunks, blocks, want):
    """What is summed up: all but the last piece, in runs that have as much for each block to walk."""
    assert pieces.parts(share, chunks, blocks=blocks) == want


@pytest.mark.parametrize(
    ("share", "chunks", "blocks", "want"),
    [
        (256, 1024, 8, Parts((0, 171, 256, 342, 512, 684, 768), (0, 1, 3, 4, 5, 6), True)),
        (64, 256, 8, Parts((0, 43, 64, 86, 128, 172, 192), (0, 1, 3, 4, 5, 6), True)),
        (32, 128, 4, Parts((0, 32, 39, 64, 78, 96), (0, 2, 4, 5), True)),
        (64, 128, 4, Parts((0, 26, 52, 64), (0, 1, 2, 3), True)),
        (64, 128, 5, Parts((0, 22, 44, 64), (0, 1, 2, 3))),  # no block is left over
        (8, 128, 16, Parts(tuple(range(0, 121, 8)), tuple(range(16)))),
        (64, 64, 8, Parts((0,), (0,))),
    ],
)
def test_parts_of_which_some_are_walked_twice(share, chunks, blocks, want):
    """The last run, half as long as the others."""
    assert pieces.parts(share, chunks, blocks=blocks, twice=True) == want


@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 299), st.integers(1, 16), st.booleans())
def test_every_division(share, full, rest, blocks, twice):
    """Parts cover all but the last piece, and no part two pieces or two runs; none has more to walk than by pieces."""
    chunks = full * share + rest % share
    bounds, walks, is_twice = pieces.parts(share, chunks, blocks=blocks, twice=twice)
    end = -(-chunks // share) * share - share
    assert [*bounds] == sorted(set(bounds))
    assert set(range(0, end + 1, share)) <= set(bounds)
    assert bounds[-1] == end
    assert [*walks] == sorted(set(walks))
    assert (walks[0], walks[-1]) == (0, len(bounds) - 1)
    runs = [bounds[b] - bounds[a] for a, b in pairwise(walks)]
    if is_twice:
        runs[-1] *= 2
    if len(walks) < len(bounds):
        count = len(range(0, end, share))
        assert 2 * len(runs) - 1 - is_twice <= blocks
        assert max(runs) <= share * -(-(2 * count - 1) // blocks)


def _sums(count, size, form):
    """Maps (transposed, of norm about 1), Eᵀ, a state, the first two as `chain` takes them, and the error of one step
    of the chain relative to what it is made of."""
    random = np.random.default_rng(0)
    forget, ends = random.normal(size=(count, size, size)) / 16, random.normal(size=(count, size, size))
    if form == "map":
        maps, error = forget, 2**-15
        given = jnp.concatenate(split(jnp.asarray(maps, jnp.float32)), axis=1)
    else:  # the state rounded and the map rounded
        maps, error = np.eye(size) - forget, 2 * 2.0 ** -(9 if form == jnp.bfloat16 else 12)
        given = jnp.asarray(forget, form)
    return maps, ends, random.normal(size=(size, size)), (given[None, None], jnp.float32(ends)[None, None]), error


FORMS = pytest.mark.parametrize("form", ["map", jnp.bfloat16, jnp.float16], ids=str)


@pytest.mark.usefixtures("interpreted")
@FORMS
@pytest.mark.parametrize(
    ("given", "count", "wanted"), [(True, 4, (0, 1, 3)), (False, 4, (0, 2, 3, 4)), (True, 1, (0, 1))]
)
def test_chain(given, count, wanted, form):
    """S_end = M S_start + E from part to part."""
    maps, ends, first, arrays, error = _sums(count, 64, form)
    state = jnp.asarray(first, jnp.float32)[None, None] if given else None
    want = [first if given else np.zeros_like(first), ends[0]]  # the first end is of what is before it already
    for n in range(1, count):
        want.append(ends[n] + want[-1] @ maps[n])
    got = np.asarray(chain(state, *arrays, wanted))[0, 0]
    np.testing.assert_allclose(got, np.stack([want[n] for n in wanted]), atol=count * error * np.abs(want).max())


@pytest.mark.usefixtures("interpreted")
@FORMS
@pytest.mark.parametrize("walks", [(0, 2, 3, 6), (0, 1, 4, 6)])
def test_chain_of_runs(walks, form):
    """Parts lead from the state before their run; those of the first one have no maps."""
    maps, ends, first, arrays, error = _sums(6, 64, form)
    arrays = arrays[0].at[:, :, : walks[1]].set(jnp.nan), arrays[1]
    want, before = [first], first
    for n in range(6):
        before = want[-1] if n in walks else before
        want.append(ends[n] + (before @ maps[n] if n >= walks[1] else 0))
    got = np.asarray(chain(jnp.asarray(first, jnp.float32)[None, None], *arrays, range(7), walks))[0, 0]
    np.testing.assert_allclose(got, np.stack(want), atol=6 * error * np.abs(want).max())


@pytest.mark.usefixtures("interpreted")
@FORMS
@pytest.mark.parametrize("given", [True, False])
def test_chain_back(given, form):
    """The cotangents from the far end by Mᵀ, of pieces whose last map was not made."""
    maps, ends, last, (parts, all_ends), error = _sums(4, 64, form)
    state = jnp.asarray(last, jnp.float32)[None, None] if given else None
    want = [last if given else np.zeros_like(last), ends[3]]
    for n in (2, 1):
        want.append(ends[n] + want[-1] @ maps[n].T)
    got = np.asarray(chain_back(state, parts[:, :, :-1], all_ends))[0, 0]
    np.testing.assert_allclose(got, np.stack(want[::-1]), atol=4 * error * np.abs(want).max())


CASES = [
    pytest.param(dict(length=440), (10, 64, 150, 290), id="exact, documents, a shorter last piece"),
    pytest.param(dict(length=440), None, id="exact"),
    pytest.param(dict(length=264, decay=True, value_dim=128), None, id="decay, two columns", marks=pytest.mark.slow),
]


def test_borders():
    """Of each piece, the chunks before the last one in which a document begins, and those up to the first such one."""
    starts = (10, 64, 70, 64 * 5 + 63, 64 * 9)
    numbers = counted(starts, 64 * 10)
    leads, first = op._borders(numbers, (0, 3, 6, 9, 10))  # chunks 0, 1; 5; none; 9, the only one
    assert np.array_equal(-1 - leads[:, 1:], [[1, 2, 0, 0]])
    assert np.array_equal(first, [[1, 3, 3, 1]])
    leads, first = op._borders(numbers, (0, 1, 5, 7))  # chunk 0; 1; 5
    assert np.array_equal(-1 - leads[:, 1:], [[0, 0, 0]])
    assert np.array_equal(first, [[1, 1, 1]])
    leads, first = op._borders(jnp.zeros((1, 64 * 5), jnp.int32), (0, 3, 5))
    assert np.array_equal(-1 - leads[:, 1:], [[0, 0]])
    assert np.array_equal(first, [[3, 2]])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("sizes", "starts"), CASES)
def test_op_in_pieces(monkeypatch, sizes, starts):
    """Four pieces, forward and backward, states at both ends given."""
    monkeypatch.setattr(pieces, "SHORTEST", 1)
    monkeypatch.setattr(pieces, "PROCESSORS", 4)
    inputs, cotangent = rounded(batch=1, **sizes)
    assert pieces.fill(1, sizes["length"]) == 4
    ids = None if starts is None else documents(starts, *inputs["key"].shape[:2])
    assert_accurate(inputs, cotangent, segment_ids=ids)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("dim", "decay", "walks", "twice"),
    [
        (64, False, (0, 1, 3), False),
        (64, True, (0, 2, 3), False),
        (128, False, (0, 1, 3), False),
        (128, False, (0, 1, 3), True),
        (128, False, (0, 2, 3), True),
    ],
)
def test_walks(dim, decay, walks, twice):
    """What is left after each part of a run is what the chain makes of its parts alone."""
    inputs, _ = rounded(batch=1, length=320, key_dim=dim, value_dim=dim, decay=decay)
    vectors, _ = op._vectors(inputs["beta"], inputs["log_decay"] if decay else None, None)
    options = dict(chunks=4, tied=not decay, save=False, exact=not decay)
    made = prepare(inputs["key"], vectors, None, jnp.bfloat16, **options)
    gain = vectors.pop("gain")
    vectors |= dict(erase=jnp.swapaxes(gain, 1, 2)) if decay else {}
    initial = jnp.swapaxes(inputs["initial_state"], 2, 3)
    arrays = inputs["key"], inputs["value"], made["solve"], vectors, initial
    bounds, states = (0, 1, 2, 4), []
    for parts in (Parts(bounds, (0, 1, 2, 3)), Parts(bounds, walks, twice)):
        summed = summaries(*arrays, tied=not decay, parts=parts)
        states.append(np.asarray(chain(initial, summed["maps"], summed["ends"], range(4), parts.walks)))
    np.testing.assert_allclose(*states, atol=3 * 2.0**-8 * np.abs(states[0]).max())
    assert np.abs(states[0]).max() > 0.1


@pytest.mark.parametrize(
    ("given", "message"), [(dict(left=None), "nothing decays"), (dict(leads=None), "run of its own")], ids=str
)
def test_walks_that_there_are_not(given, message):
    """With decay a map would have the values of its first turn; with leads a run would go on over what is left out."""
    shape = jax.ShapeDtypeStruct
    keys, numbers = shape((1, 256, 1, 128), jnp.bfloat16), shape((1, 1, 256), jnp.float32)
    solve = shape((1, 1, 4, 64, 64), jnp.bfloat16)
    vectors, leads = (dict(left=numbers, right=numbers), None) if "left" in given else ({}, shape((1, 3), jnp.int32))
    parts = Parts((0, 1, 2, 4), (0, 1, 2, 3), True) if "left" in given else Parts((0, 1, 2), (0, 2))
    run = partial(summaries, initial=None, tied=True, parts=parts)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, keys, keys, solve, vectors, leads=leads)


@pytest.mark.usefixtures("interpreted")
def test_op_in_two_pieces(monkeypatch):
    """Only the backward pass is in pieces; no map is made."""
    monkeypatch.setattr(pieces, "SHORTEST", 1)
    monkeypatch.setattr(pieces, "PROCESSORS", 2)
    inputs, cotangent = rounded(batch=1, length=192)
    assert_accurate(inputs, cotangent)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("share", "sizes"),
    [
        pytest.param(2, dict(length=440, key_dim=128, value_dim=128), id="exact"),
        pytest.param(1, dict(length=300, heads=2), id="of one chunk, grouped", marks=pytest.mark.slow),
        pytest.param(3, dict(length=500, decay=True), id="decay", marks=pytest.mark.slow),
        pytest.param(3, dict(length=500, key_dim=128), id="one group of columns", marks=pytest.mark.slow),
    ],
)
def test_fused_in_pieces(monkeypatch, share, sizes):
    """The kernel that makes the inverse, on pieces whose first states runs over several of them have made, or, where it
    saves what the backward pass needs, runs over one each."""
    monkeypatch.setattr(pieces, "plan", lambda *call, **kind: Plan("fused", share, share))
    monkeypatch.setattr(op, "PROCESSORS", 4 * sizes.get("heads", 1))
    monkeypatch.setattr(importlib.import_module("pallas_kernels.hopper.forward"), "PROCESSORS", 1)
    monkeypatch.setattr(pieces, "parts", partial(_longer, pieces.parts))
    inputs, cotangent = rounded(batch=1, **sizes)
    assert_accurate_alone(inputs)
    assert_accurate(inputs, cotangent)


def _longer(parts, share, chunks, *, blocks, **options):
    """Runs of two pieces and of all others, even where they would save too little."""
    found = parts(share, chunks, blocks=blocks, **options)
    if not blocks or len(found.bounds) < 4 or len(found.walks) < len(found.bounds):
        return found
    return Parts(found.bounds, (0, 2, len(found.bounds) - 1))


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_even_runs(monkeypatch):
    """Two pieces long enough for runs of equal length, one of them walked twice."""
    monkeypatch.setattr(pieces, "plan", lambda *call, **kind: Plan("fused", 9, 9))
    monkeypatch.setattr(op, "PROCESSORS", 4)
    assert pieces.parts(9, 18, blocks=4, twice=True).twice
    inputs, _ = rounded(batch=1, length=1152, key_dim=128, value_dim=128)
    assert_accurate_alone(inputs)
