"""The running batch: requests come and go, and none of them notices."""

import dataclasses

import jax
import numpy as np
import pytest

from efla_jax.inference.engine import Engine, Request
from efla_jax.inference.prefill import prefill
from efla_jax.inference.programs import JittedPrograms, decode_batch
from efla_jax.inference.sampling import Sampling
from tests.inference.small import COMPILED, ENDLESS, HYBRID, draw_tokens, greedy, parameters, programs

DRAWING = Sampling(temperature=1.0, top_p=0.95, seed=3)


def make(config=HYBRID, slots=4, burst=1):
    return Engine(programs(config), parameters(config), 257, slots, burst)


def request(number, count=6, sampling=None):
    """Prompts of 1 to 14 tokens."""
    length = (3, 14, 1, 9, 6, 11)[number]
    return Request(draw_tokens(length, seed=number), count, sampling or Sampling())


def run(engine, *requests, into=None):
    """The tokens of each request."""
    tokens = {} if into is None else into
    for each in requests:
        engine.submit(each)
    while engine.busy:
        step(engine, tokens)
    return [tokens[each] for each in requests]


def step(engine, tokens):
    ready = engine.step()
    assert len({each for each, _ in ready}) == len(ready)
    for each, token in ready:
        tokens.setdefault(each, []).append(token)


def alone(number, count=6, sampling=None):
    return run(make(slots=1), request(number, count, sampling))[0]


def test_tokens_are_the_argmax_of_full_forward_passes():
    for number in range(3):
        each = request(number)
        assert run(make(), each) == [greedy(HYBRID, each.tokens, 6)]


@pytest.mark.parametrize("sampling", [Sampling(), DRAWING], ids=["greedy", "drawn"])
def test_neighbours_and_slots_do_not_matter(sampling):
    """Prompts of several lengths together, more of them than slots, in two orders."""
    want = [alone(number, 3 + number, sampling) for number in range(6)]
    assert len({tuple(tokens) for tokens in want}) == 6
    requests = lambda: [request(number, 3 + number, sampling) for number in range(6)]
    assert run(make(slots=4), *requests()) == want
    assert run(make(slots=2), *requests()[::-1]) == want[::-1]


@pytest.mark.parametrize("sampling", [Sampling(), DRAWING], ids=["greedy", "drawn"])
def test_bursts_draw_the_same_tokens(sampling):
    """With requests that end within a burst and others that wait for their slot; several tokens come at a time."""
    want = [alone(number, 3 + 2 * number, sampling) for number in range(6)]
    engine, tokens, most = make(slots=2, burst=4), {}, 0
    requests = [request(number, 3 + 2 * number, sampling) for number in range(6)]
    for each in requests:
        engine.submit(each)
    while engine.busy:
        ready = engine.step()
        most = max(most, len(ready))
        for each, token in ready:
            tokens.setdefault(each, []).append(token)
    assert [tokens[each] for each in requests] == want
    assert most > 4


def test_a_request_that_is_done_within_a_burst_makes_room():
    engine, tokens = make(slots=1, burst=4), {}
    first, second = request(0, 1000), request(1, 6)
    engine.submit(first)
    engine.submit(second)
    while engine.busy:
        for each, token in engine.step():
            tokens.setdefault(each, []).append(token)
            first.done = len(tokens[first]) >= 6
    assert tokens[first][:6] == alone(0, 6)
    assert len(tokens[first]) < 20
    assert tokens[second] == alone(1, 6)


def test_logits_of_neighbours_do_not_matter():
    tokens = [request(number).tokens for number in range(4)]
    together, _ = prefill(programs(HYBRID), parameters(HYBRID), tokens, [None] * 4)
    for row in range(4):
        single, _ = prefill(programs(HYBRID), parameters(HYBRID), tokens[row : row + 1], [None])
        np.testing.assert_allclose(together[row], single[0], rtol=5e-5, atol=5e-5)


def test_a_prompt_joins_a_running_batch():
    engine, tokens = make(slots=2), {}
    first, second, third = request(0, 12), request(1, 4), request(2, 5)
    engine.submit(first)
    for _ in range(4):
        step(engine, tokens)
    assert len(tokens[first]) == 4
    engine.submit(second)
    engine.submit(third)  # waits until the second is done
    step(engine, tokens)
    assert second in tokens
    assert third not in tokens
    run(engine, into=tokens)
    assert tokens[first] == alone(0, 12)
    assert tokens[second] == alone(1, 4)
    assert tokens[third] == alone(2, 5)


def test_a_request_that_is_done_makes_room_and_stays_silent():
    engine, tokens = make(slots=1), {}
    first, second, cancelled = request(0, 1000), request(1, 4), request(2, 4)
    for each in (first, cancelled, second):
        engine.submit(each)
    cancelled.done = True
    for _ in range(3):
        step(engine, tokens)
    first.done = True
    run(engine, into=tokens)
    assert tokens == {first: alone(0, 3), second: alone(1, 4)}


def test_ids_behind_the_vocabulary_are_never_drawn():
    """A head of 260 with the last three ids raised: they win everywhere, yet the tokenizer has 257."""
    params = jax.tree.map(lambda leaf: leaf, parameters(HYBRID))
    kernel = params["head"]["kernel"]
    kernel[...] = kernel[...].at[:, 257:].multiply(50)
    for sampling in (Sampling(), Sampling(temperature=5.0)):
        engine = Engine(programs(HYBRID), params, 257, 2)
        assert max(max(tokens) for tokens in run(engine, request(0, 30, sampling), request(3, 20, sampling))) < 257
    unlimited = run(Engine(programs(HYBRID), params, 260, 2), request(0, 20))
    assert max(unlimited[0]) >= 257


def test_memory_is_constant_and_nothing_is_compiled_while_decoding():
    """Live buffers after 8 and after 800 tokens are equal, and the cache is updated in place."""
    engine = make(ENDLESS, slots=2)
    live = lambda: sum(array.nbytes for array in jax.live_arrays())
    COMPILED.clear()
    engine.submit(request(0, 1000))
    engine.submit(request(1, 1000, DRAWING))
    for _ in range(8):
        engine.step()
    COMPILED.clear()
    cache = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(engine._cache)]
    before, size = live(), sum(leaf.nbytes for leaf in jax.tree.leaves(engine._cache))
    for _ in range(792):
        assert len(engine.step()) == 2
    assert live() == before
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(engine._cache)) == size
    assert len(engine._unread) == 1
    assert COMPILED == []
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(engine._cache)] == cache


def test_parameters_are_cast_once():
    """Of a model that computes in bfloat16: matrices alone, and to what each call would round them."""
    served, params = programs(dataclasses.replace(ENDLESS, dtype="bfloat16")), parameters(ENDLESS)
    prepared = served.prepare(params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(prepared) if leaf.ndim > 1} == {"bfloat16"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(prepared) if leaf.ndim == 1} == {"float32"}
    tokens = [request(0).tokens]
    want, got = (np.asarray(prefill(served, given, tokens, [None])[0]) for given in (params, prepared))
    assert np.linalg.norm(got - want) <= 0.02 * np.linalg.norm(want)


def test_a_single_request_has_an_idle_row_beside_it_on_a_gpu(monkeypatch):
    served = JittedPrograms(HYBRID, (1, 2, 4), (1, 8))
    assert [decode_batch(served, slots) for slots in (1, 2, 3, 9)] == [1, 2, 4, 4]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [decode_batch(served, slots) for slots in (1, 2, 3, 9)] == [2, 2, 4, 4]
    assert decode_batch(programs(HYBRID), 1) == 1  # of sizes 1 and 4
    monkeypatch.undo()
    monkeypatch.setattr("efla_jax.inference.engine.decode_batch", lambda *_: 2)
    assert run(Engine(served, parameters(HYBRID), 257, slots=1), request(0)) == [alone(0)]


def test_programs_are_few_whatever_the_prompts():
    served = JittedPrograms(ENDLESS, (1, 2), (1, 3))
    COMPILED.clear()
    for length in range(1, 14):
        for rows in (1, 2):
            requests = [Request(draw_tokens(length + row), 2) for row in range(rows)]
            run(Engine(served, parameters(ENDLESS), 257, rows), *requests)
    assert COMPILED.count("jit(forward)") == 4
