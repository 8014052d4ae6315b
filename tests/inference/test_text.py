"""Text in, text out: completions, streams, stop strings, saved states, and what is refused."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from efla_jax.data.text.tokenizers import load_tokenizer
from efla_jax.inference.sampling import sample
from efla_jax.inference.state import State
from efla_jax.inference.text import StopFilter, TextModel
from tests.inference.small import ENDLESS, HYBRID, LENGTH, SMALL, greedy, parameters, programs, text_model

PROMPT = "naïve ∑"  # of characters of one, two and three bytes
SAMPLED: dict[str, Any] = dict(temperature=0.8, top_k=20, top_p=0.9)


def encode(text):
    return [256, *text.encode()]


def test_greedy_completions_are_the_argmax_of_full_forward_passes():
    model = text_model()
    for prompt in (PROMPT, "", "x"):
        tokens = greedy(HYBRID, encode(prompt), 12)
        assert 256 not in tokens
        assert model.generate(prompt, 12) == bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "drawn"])
def test_many_prompts_give_what_each_gives(sampling):
    model = text_model()
    prompts = [PROMPT, "", "def f(x):", "a", "the same", "the same"]
    want = [model.generate(prompt, 9, **sampling, seed=seed) for seed, prompt in enumerate(prompts)]
    assert model.generate(prompts, 9, **sampling, seed=range(6)) == want
    assert (want[4] != want[5]) == bool(sampling)
    assert model.generate(prompts[:2], 9, **sampling, seed=0)[0] == want[0]
    assert model.generate([], 9) == []


class Scripted:
    """Programs that say the same tokens whatever they read. Prompts must fit into one piece."""

    batch_sizes, lengths = (1, 4), (1, 8)

    def __init__(self, tokens, vocab_size):
        self.tokens, self.vocab_size = np.array(tokens), vocab_size

    def empty_cache(self, batch):
        return (jax.numpy.full(batch, -1),)

    def forward(self, params, tokens_BL, lengths_B, cache):
        position = np.maximum(np.asarray(cache[0]), -1) + (np.asarray(lengths_B) > 0)
        likely = self.tokens[np.minimum(position, len(self.tokens) - 1)]
        return jax.nn.one_hot(likely, self.vocab_size), (jax.numpy.asarray(position),)

    def prepare(self, params):
        return params

    def decode(self, params, rows, left_B, cache, *, count, vocabulary, drawing):
        tokens = []
        for number in range(count):
            logits_BV, cache = self.forward(params, rows.token, number < left_B, cache)
            rows = sample(logits_BV, rows, vocabulary, drawing)
            tokens.append(rows.token[:, 0])
        return jax.numpy.stack(tokens), rows, cache


def scripted(text):
    return TextModel(ENDLESS, {}, load_tokenizer("bytes"), Scripted([*text.encode(), 256], 257))


def test_a_completion_ends_at_the_separator_or_after_max_new_tokens():
    model = scripted("héllo")
    assert model.generate("", 50) == "héllo"
    assert model.generate("", 6) == "héllo"
    assert model.generate("", 4) == "hél"
    assert model.generate("", 2) == "h\ufffd"  # cut off within a character
    assert scripted("").generate("x", 5) == ""


def test_a_completion_goes_on_from_the_text_of_its_prompt(tmp_path):
    """A decoder of words drops the space before the first one; that of a completion is not the first."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁one": 0, "▁two": 1, "<eos>": 2}, "<eos>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    words.decoder = tokenizers.decoders.Metaspace()
    words.add_special_tokens(["<eos>"])
    words.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(tmp_path / "words.json")
    model = TextModel(ENDLESS, {}, tokenizer, Scripted([1, 0, 2], 3))
    assert tokenizer.decode([1, 0, 2]) == "two one"
    assert model.generate("one", 5) == " two one"
    assert model.generate("", 5) == "two one"
    state = State((jax.numpy.full(1, 0),), jax.nn.one_hot(np.array([1]), 3), np.array([2, 0]), model._fingerprints)
    assert model.generate("", 5, state=state) == " two one"


@pytest.mark.parametrize(
    ("stop", "want"),
    [
        ("lo", "hel"),
        ("l", "he"),
        (("o w", "l wo"), "hell"),
        (("world", "xyz"), "hello "),
        ("d!", "hello worl"),
        ("d!!", "hello world!"),  # begins, and is never complete
        (("lo world", "o"), "hell"),  # the one that is complete first
        (("llo", "o"), "he"),  # of two that end together the longer
        (("nothing",), "hello world!"),
    ],
)
def test_stop_strings(stop, want):
    model = scripted("hello world!")
    assert model.generate("", 50, stop=stop) == want
    pieces = list(model.stream("", 50, stop=stop))
    assert "".join(pieces) == want
    assert "" not in pieces


@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 20), max_size=6),
)
def test_stops_do_not_depend_on_the_pieces(text, stops, cuts):
    """Against the definition on the whole text; what is passed on early never has to be taken back."""
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    want = text[: min(ends)[1]] if ends else text
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    watch, passed = StopFilter(stops), ""
    for start, end in itertools.pairwise(borders):
        passed += watch.push(text[start:end])
        assert want.startswith(passed)
    assert passed + watch.flush() == want
    assert watch.stopped == bool(ends)


def test_text_is_held_back_no_longer_than_it_must_be():
    watch = StopFilter(["\n\n", "END"])
    assert [watch.push(text) for text in "a\nbEN."] == ["a", "", "\nb", "", "", "EN."]


def test_a_stream_comes_in_whole_characters_as_they_are_drawn():
    model = scripted("aé∑𝄞b")
    assert list(model.stream("", 50)) == list("aé∑𝄞b")
    read = []
    engine_steps = model.programs
    count = itertools.count()
    forward = engine_steps.forward
    engine_steps.forward = lambda *arguments: (next(count), forward(*arguments))[1]
    for piece in model.stream("", 50):
        read.append((piece, next(count)))
    steps = [number for _, number in read]
    assert read[0][1] <= 3  # the first character is there before the others are drawn
    assert steps == sorted(steps)
    assert steps[-1] - steps[0] > 8


def test_streams_are_completions():
    model = text_model()
    for sampling in ({}, SAMPLED):
        assert "".join(model.stream(PROMPT, 15, **sampling, seed=5)) == model.generate(PROMPT, 15, **sampling, seed=5)


# ---- states ----


def test_a_prompt_is_paid_once(tmp_path):
    """Generation behind a state, one behind another, and a loaded one is generation from the whole text."""
    model = text_model()
    want = model.generate("one two three", 10)
    assert want != model.generate("three", 10)
    state = model.prefill("one two ")
    assert state.tokens.tolist() == encode("one two ")
    for _ in range(2):  # a state is not used up
        assert model.generate("three", 10, state=state) == want
    assert model.generate("ree", 10, state=model.prefill("th", state=state)) == want
    assert model.generate("", 10, state=model.prefill("three", state=state)) == want
    assert model.generate(["three", "", "three"], 10, state=state) == [want, model.generate("one two ", 10), want]
    assert "".join(model.stream("three", 10, state=state)) == want
    state.save(tmp_path / "state")
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    loaded = text_model().load_state(tmp_path / "state")
    assert text_model().generate("three", 10, state=loaded) == want
    assert loaded.tokens.tolist() == state.tokens.tolist()
    jax.tree.map(np.testing.assert_array_equal, loaded.cache, state.cache)


def test_states_of_bfloat16_models_are_saved(tmp_path):
    config = dataclasses.replace(ENDLESS, dtype="bfloat16")
    model = TextModel(config, parameters(config), load_tokenizer("bytes"), programs(config))
    state = model.prefill("one")
    assert {leaf.dtype.name for leaf in state.cache} == {"float32", "bfloat16"}
    state.save(tmp_path / "state")
    jax.tree.map(np.testing.assert_array_equal, model.load_state(tmp_path / "state").cache, state.cache)


def test_a_state_of_another_model_or_tokenizer_is_refused(tmp_path):
    model, other = text_model(), text_model(seed=1)
    state = model.prefill("one")
    state.save(tmp_path / "state")
    with pytest.raises(ValueError, match=r"state is of another model: its model has sha256 [0-9a-f]{64}; it must be"):
        other.generate("two", 3, state=state)
    with pytest.raises(ValueError, match="state is of another model"):
        other.load_state(tmp_path / "state")
    shorter = TextModel(dataclasses.replace(HYBRID, context=LENGTH // 2), model.params, model.tokenizer)
    with pytest.raises(ValueError, match="of another model"):  # the same parameters, otherwise computed with
        shorter.load_state(tmp_path / "state")
    tokenizer = load_tokenizer("bytes")
    tokenizer.fingerprint = "of other bytes"
    rebound = TextModel(HYBRID, model.params, tokenizer)
    with pytest.raises(ValueError, match="of another tokenizer"):
        rebound.load_state(tmp_path / "state")


def test_a_damaged_state_is_refused(tmp_path):
    model, file = text_model(), tmp_path / "state"
    model.prefill("one").save(file)
    content = file.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="state is no state, or a truncated one"):
            model.load_state(file)
    file.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
    with pytest.raises(ValueError, match="state is damaged: its sha256"):
        model.load_state(file)
    file.unlink()
    with pytest.raises(ValueError, match="No such file"):
        model.load_state(file)
    with pytest.raises(ValueError, match="cannot be written"):
        model.prefill("one").save(tmp_path / "nowhere" / "state")


# ---- bad input ----


def test_a_prompt_beyond_the_context_is_refused():
    model = text_model()
    fits = "x" * (LENGTH - 11)
    model.generate(fits, 10)
    message = (
        r"the prompt has 22 tokens and max_new_tokens is 11; together they must be at most 32, the context .* shorten"
    )
    with pytest.raises(ValueError, match=message):
        model.generate(fits, 11)
    with pytest.raises(ValueError, match=message):
        model.stream(fits, 11)  # at once, not at the first piece
    with pytest.raises(ValueError, match=message):
        model.generate("x" * 10, 11, state=model.prefill("x" * 11))
    with pytest.raises(ValueError, match="the prompt has 41 tokens and max_new_tokens is 0"):
        model.prefill("x" * 40)


def test_linear_and_sliding_models_have_no_limit():
    for mixer in ("efla", "sliding_window"):
        config = dataclasses.replace(SMALL, mixers=(mixer,))
        model = TextModel(config, parameters(config), load_tokenizer("bytes"), programs(config, (4,), (1, 8)))
        assert config.context == LENGTH
        assert model.generate("x" * 3 * LENGTH, 2 * LENGTH)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0; it must be at least 1"),
        (dict(temperature=-1), "temperature is -1"),
        (dict(top_p=0), "top_p is 0"),
        (dict(top_k=-2), "top_k is -2"),
        (dict(seed=-1), "seed is -1"),
        (dict(stop=""), "stop has ''; it must be a text of at least one character"),
        (dict(stop=["a", ""]), "stop has ''"),
        (dict(prompts=["a", "b"], seed=[1]), "seed has 1 entries; it must be one number, or have 2 of them"),
        (dict(prompts=["a", b"b"]), r"prompt is a bytes; it must be text \(str\)"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        text_model().generate(**(dict(prompts="a", max_new_tokens=3) | arguments))


def test_a_tokenizer_of_more_ids_than_the_model_is_refused():
    config = dataclasses.replace(ENDLESS, vocab_size=256)
    with pytest.raises(ValueError, match="tokenizer 'bytes' has vocab_size 257, the model 256"):
        TextModel(config, {}, load_tokenizer("bytes"))
