"""The adapter for lm-eval against likelihoods of a small model token by token."""

import dataclasses

import numpy as np
import pytest

from efla_jax.data.text.tokenizers import load_tokenizer
from efla_jax.evaluation import EvaluationError
from efla_jax.inference.folder import save_folder
from tests.evaluation.by_hand import SEPARATOR, logits, losses, pair_by_hand
from tests.inference.small import ENDLESS, HYBRID, SMALL, parameters, text_model

pytest.importorskip("lm_eval", reason="the optional extra lm-eval is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from efla_jax.evaluation import lm_eval_adapter
from efla_jax.evaluation.lm_eval_adapter import EflaLM, bucket

REACH = HYBRID.context
WINDOW = dataclasses.replace(SMALL, mixers=("sliding_window",))


@pytest.fixture(scope="module")
def linear():
    return EflaLM(text_model(ENDLESS), batch_size=3)


@pytest.fixture(scope="module")
def hybrid():
    return EflaLM(text_model(HYBRID), batch_size=3)


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def loglikelihoods(lm, pairs):
    return lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)


PAIRS = [
    ("To be", " or not"),
    ("", "To be"),
    ("that is the question", " ß"),
    ("a", "b"),
    ("Whether 'tis nobler in", " the mind"),
]


def close(got, want):
    """To float32 rounding of logits of about ±3."""
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in want], rtol=5e-5)


@pytest.mark.parametrize("config", [ENDLESS, HYBRID], ids=["linear", "hybrid"])
def test_likelihoods_are_those_token_by_token(config):
    lm = EflaLM(text_model(config), batch_size=3)
    close(loglikelihoods(lm, PAIRS), [pair_by_hand(config, *pair) for pair in PAIRS])


def test_a_continuation_is_greedy_if_each_of_its_tokens_is_the_likeliest(linear):
    likeliest = lambda text: int(logits(ENDLESS, [SEPARATOR, *text.encode()])[-1].argmax())
    words = [f"{a}{b}" for a in "abcdefgh" for b in "stuvwxyz"]
    word = next(word for word in words if likeliest(word) < 128 and likeliest(word + chr(likeliest(word))) < 128)
    first = chr(likeliest(word))
    second = chr(likeliest(word + first))
    other = "y" if second != "y" else "z"
    pairs = [(word, first), (word, first + second), (word, first + other), (word, other + second)]
    assert [greedy for _, greedy in loglikelihoods(linear, pairs)] == [True, True, False, False]


def test_white_space_between_context_and_continuation_is_the_continuations(linear):
    """As in the harness's own adapter: scored are " \n" and the word."""
    ((total, _),) = loglikelihoods(linear, [("To be \n", "or")])
    assert total == pytest.approx(pair_by_hand(ENDLESS, "To be", " \nor")[0], rel=5e-5)
    assert abs(total) > abs(pair_by_hand(ENDLESS, "To be \n", "or")[0]) + 1


def test_contexts_beyond_the_reach_of_softmax_are_cut_from_the_left(hybrid, linear):
    pairs = [("x" * number + " and so it goes on", " and on") for number in (0, 7, 8, 9, 100)]
    close(loglikelihoods(hybrid, pairs), [pair_by_hand(HYBRID, *pair) for pair in pairs])
    close(loglikelihoods(linear, pairs), [pair_by_hand(ENDLESS, *pair) for pair in pairs])


@pytest.fixture
def traced(monkeypatch):
    """Shapes of the rows that programs are compiled for."""
    shapes, scores = [], lm_eval_adapter._scores

    def counting(model, hidden_BTE, targets_BT):
        shapes.append(targets_BT.shape)
        return scores(model, hidden_BTE, targets_BT)

    monkeypatch.setattr(lm_eval_adapter, "_scores", counting)
    return shapes


def test_few_programs_are_compiled(linear, traced):
    lm = EflaLM(linear.model, batch_size=5)
    draw = np.random.default_rng(0).integers(1, 24, (40, 2))
    pairs = [("a" * before, "b" * behind) for before, behind in draw.tolist()]
    together = loglikelihoods(lm, pairs)
    alone = [loglikelihoods(lm, [pair])[0] for pair in pairs[::8]]
    close(together[::8], alone)
    assert sorted(traced) == [(5, 16), (5, 32), (5, 64)]


def test_lengths_are_padded_to_powers_of_two():
    assert [bucket(n) for n in (1, 16, 17, 32, 33, 1000)] == [16, 16, 32, 32, 64, 1024]
    assert [bucket(n, 40) for n in (1, 33, 40)] == [16, 40, 40]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("a", ""), "has no tokens of its own"),
        (("a", "b" * (REACH + 1)), f"has 33 tokens; it must have at most {REACH}"),
    ],
)
def test_what_cannot_be_scored_is_refused(hybrid, pair, message):
    with pytest.raises(EvaluationError, match=message):
        loglikelihoods(hybrid, [pair])


TEXTS = ["To be, or not to be, that is the question: whether", "", "ß", "a" * 16, "b" * 17, "or to take arms against a"]


@pytest.mark.parametrize("config", [ENDLESS, WINDOW], ids=["linear", "sliding_window"])
def test_a_rolling_likelihood_carries_the_state_through_the_document(config, traced, monkeypatch):
    monkeypatch.setattr(lm_eval_adapter, "_PIECE", 16)
    lm = EflaLM(text_model(config), batch_size=4)
    got = lm.loglikelihood_rolling([request("loglikelihood_rolling", text) for text in TEXTS], disable_tqdm=True)
    want = [-losses(config, [SEPARATOR, *text.encode()[:-1]], text.encode()).sum() if text else 0.0 for text in TEXTS]
    np.testing.assert_allclose(got, want, rtol=5e-5)
    assert traced == [(4, 16)]


def test_a_rolling_likelihood_of_softmax_goes_by_windows(hybrid):
    """Disjoint windows of REACH tokens, each from the token before it; the last one begins as early as it can."""
    texts = [*TEXTS, "c" * REACH, "d" * (REACH + 1), "the slings and arrows " * 4]
    got = hybrid.loglikelihood_rolling([request("loglikelihood_rolling", text) for text in texts], disable_tqdm=True)
    want = []
    for text in texts:
        row, total = [SEPARATOR, *text.encode()], 0.0
        for first in range(1, len(row), REACH):
            last = min(first + REACH, len(row))
            start = max(last - REACH - 1, 0)
            total -= losses(HYBRID, row[start : last - 1], row[start + 1 : last])[first - last :].sum()
        want.append(total)
    np.testing.assert_allclose(got, want, rtol=5e-5, atol=1e-9)


def generate(lm, requests):
    return lm.generate_until([request("generate_until", *each) for each in requests], disable_tqdm=True)


def test_generation_is_the_models_own(linear):
    model = linear.model
    whole = model.generate(["To be", "", "or not"], 12)
    stop = next(character for character in whole[2][1:] if character not in whole[2][:1])
    asked = [
        ("To be", dict(until=[], max_gen_toks=12)),
        ("or not", dict(until=[stop, ""], max_gen_toks=12, do_sample=False, temperature=0.7)),
        ("", dict(until=[], max_gen_toks=12)),
        ("To be", dict(until=[], max_gen_toks=3)),
        ("To be", dict(until=[], max_gen_toks=12, do_sample=True, temperature=1.5)),
        ("To be", dict(until=[], max_gen_toks=12, do_sample=True, temperature=1.5)),
    ]
    *greedy, one, another = generate(linear, asked)
    assert greedy == [whole[0], whole[2][: whole[2].index(stop)], whole[1], model.generate("To be", 3)]
    assert one == model.generate("To be", 12, temperature=1.5, seed=4)
    assert one != another  # repeats of a request are samples of their own


def test_prompts_beyond_the_reach_of_softmax_are_cut_from_the_left(hybrid, monkeypatch):
    """Room for the separator and the new tokens; a character that is cut through goes."""
    options = dict(until=[], max_gen_toks=8)
    room = REACH - 8 - 1
    texts = ["x" * 30 + "question", "y" * 20 + "ß" + "z" * (room - 1), "short"]
    kept = ["x" * (room - 8) + "question", "z" * (room - 1), "short"]
    want, own, asked = hybrid.model.generate(kept, 8), hybrid.model.generate, []
    monkeypatch.setattr(hybrid.model, "generate", lambda prompts, **call: asked.extend(prompts) or own(prompts, **call))
    assert generate(hybrid, [(text, options) for text in texts]) == want
    assert asked == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(until=[], repetition_penalty=2.0), "generation_kwargs has 'repetition_penalty', which is not served"),
        (dict(until=[], max_gen_toks=32), "max_gen_toks is 32; it must be less than 32"),
    ],
)
def test_a_generation_that_is_not_served_is_refused(hybrid, options, message):
    with pytest.raises(EvaluationError, match=message):
        generate(hybrid, [("a", options)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    save_folder(path, ENDLESS, parameters(ENDLESS), load_tokenizer("bytes"))
    return path


def test_the_harness_knows_the_adapter(folder):
    lm = get_model("efla").create_from_arg_string(f"model={folder}", {"batch_size": 3})
    assert isinstance(lm, EflaLM)
    close(loglikelihoods(lm, PAIRS[:1]), [pair_by_hand(ENDLESS, *PAIRS[0])])
