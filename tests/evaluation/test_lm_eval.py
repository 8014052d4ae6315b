"""The adapter for lm-eval, and the benchmarks, against likelihoods of a small model token by token."""

import dataclasses
import gzip
import json
import socket
import sys
from typing import Any

import numpy as np
import pytest

from efla_jax.cli import main
from efla_jax.data.text.tokenizers import load_tokenizer
from efla_jax.evaluation import EvaluationError
from efla_jax.inference.folder import save_folder
from tests.evaluation.by_hand import SEPARATOR, logits, losses
from tests.inference.small import ENDLESS, HYBRID, SMALL, parameters, text_model

pytest.importorskip("lm_eval", reason="the optional extra lm-eval is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from efla_jax.evaluation import lm_eval_adapter
from efla_jax.evaluation.benchmarks import run_tasks, task_names
from efla_jax.evaluation.lm_eval_adapter import EflaLM, bucket

REACH = HYBRID.context
WINDOW = dataclasses.replace(SMALL, mixers=("sliding_window",))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


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


def pair_by_hand(config, context, continuation):
    """(log p, greedy) of a continuation's bytes behind the separator and the context's, of the last that fit."""
    row = [SEPARATOR, *(context + continuation).encode()]
    if config.reach is not None:
        row = row[-(config.reach + 1) :]
    count = len(continuation.encode())
    total = -losses(config, row[:-1], row[1:])[-count:].sum()
    return total, bool((logits(config, row[:-1]).argmax(axis=1)[-count:] == row[-count:]).all())


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


# Three rows of each benchmark in its own fields, and (context, continuation) of each of a row's requests.
CHOICES: list[dict[str, Any]] = [
    dict(query="Question: dry a cup?\n", choices=["towel", "a wet towel", "sun"], gold=0),
    dict(query="Question: {{braces}} 7?", choices=["ah", "a longer one"], gold=1),
    dict(query="Question: 3?", choices=["yes, and often", "no"], gold=1),
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "lambada": [
        dict(context="I don't care about", continuation="signs"),
        dict(context="context", continuation="\n\nno"),
        dict(context="and Shane", continuation="[x]"),
    ],
    "winogrande": [
        dict(context_options=["so Sarah", "so Maria"], continuation="won.", gold=1),
        dict(context_options=["but the bed", "but the blanket"], continuation="was dry.", gold=0),
        dict(context_options=["as it", "as they"], continuation="did.", gold=1),
    ],
    "openbookqa": [row | dict(query=row["query"].removeprefix("Question: ").strip()) for row in CHOICES],
} | dict.fromkeys(("arc_challenge", "arc_easy", "boolq", "piqa"), CHOICES)
FILES = dict(lambada="lambada_openai", openbookqa="openbook_qa")


def pairs_by_hand(task, row):
    if task == "lambada":
        return [(row["context"], f" {row['continuation']}")]
    if task == "winogrande":
        return [(context, f" {row['continuation']}") for context in row["context_options"]]
    context = row["query"] if task == "openbookqa" else row["query"].rstrip("\n") + "\nAnswer:"
    return [(context, f" {choice}") for choice in row["choices"]]


def scores_by_hand(task):
    """{metric: (value, standard error)}."""
    found = [[pair_by_hand(ENDLESS, *pair) for pair in pairs_by_hand(task, row)] for row in ROWS[task]]
    mean = lambda values: (np.mean(values), np.std(values, ddof=1) / np.sqrt(3))
    if task == "lambada":
        value, error = mean([-total for ((total, _),) in found])
        return dict(perplexity=(np.exp(value), np.exp(value) * error), acc=mean([greedy for ((_, greedy),) in found]))
    totals = [[total for total, _ in row] for row in found]
    right = lambda scores: mean([np.argmax(s) == row["gold"] for s, row in zip(scores, ROWS[task], strict=True)])
    if task in ("winogrande", "boolq"):
        return dict(acc=right(totals))
    lengths = [[len(choice) for choice in row["choices"]] for row in ROWS[task]]
    return dict(acc=right(totals), acc_norm=right([np.divide(*each) for each in zip(totals, lengths, strict=True)]))


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory):
    """The files, compressed but for one."""
    folder = tmp_path_factory.mktemp("rows")
    for task, rows in ROWS.items():
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        name = f"{FILES.get(task, task)}.jsonl"
        if task == "piqa":
            (folder / name).write_bytes(data)
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
    return folder


class Recording(EflaLM):
    """Keeps the strings that it is asked to score."""

    def loglikelihood(self, requests, disable_tqdm=False):
        self.asked = [request.args for request in requests]
        return super().loglikelihood(requests, disable_tqdm)


def test_each_benchmark_scores_its_rows_as_its_file_says(rows_folder, linear):
    assert sorted(ROWS) == task_names()
    lm = Recording(linear.model, batch_size=3)
    seen = set()
    for task, rows in ROWS.items():
        found = run_tasks(lm, [task], rows_folder)[task]
        assert sorted(lm.asked) == sorted(pair for row in rows for pair in pairs_by_hand(task, row))
        want = scores_by_hand(task)
        assert found.pop("rows") == 3
        assert set(found) == {name + end for name in want for end in ("", "_stderr")}
        for name, (value, error) in want.items():
            assert found[name] == pytest.approx(value, rel=1e-3), (task, name)
            assert found[f"{name}_stderr"] == pytest.approx(error, rel=1e-3), (task, name)
            seen.add((name, round(value, 3)))
    # the rows tell: right and wrong, summed and per character
    assert {value for name, value in seen if name == "acc"} >= {0.333, 0.667}
    assert {value for name, value in seen if name == "acc_norm"} != {value for name, value in seen if name == "acc"}


def test_a_limit_takes_the_first_rows(rows_folder, linear):
    lm = Recording(linear.model, batch_size=3)
    found = run_tasks(lm, ["lambada", "winogrande"], rows_folder, limit=1)
    assert [found[task]["rows"] for task in found] == [1, 1]
    assert found["lambada"]["acc_stderr"] is None
    assert lm.asked == [
        *pairs_by_hand("lambada", ROWS["lambada"][0]),
        *pairs_by_hand("winogrande", ROWS["winogrande"][0]),
    ]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("piqua", "", "task is 'piqua', which is none; did you mean 'piqa'\\?"),
        ("piqa", None, "has no file piqa.jsonl.gz or piqa.jsonl"),
        ("piqa", "", "piqa.jsonl has no rows"),
        ("piqa", "{", "piqa.jsonl is damaged"),
        ("piqa", '{"query": "a", "choices": ["b"], "gold": 0}\n{"query": "a"}', "row 1 has no field 'choices'"),
        ("piqa", '{"query": "a", "choices": ["b"], "gold": 0}\n[]', "row 1 has no field 'choices'"),
    ],
)
def test_a_benchmark_that_cannot_be_run_is_refused(linear, tmp_path, task, content, message):
    if content is not None:
        (tmp_path / "piqa.jsonl").write_text(content)
    with pytest.raises(EvaluationError, match=message):
        run_tasks(linear, [task], tmp_path)


def test_a_truncated_file_is_refused(linear, tmp_path):
    whole = gzip.compress(json.dumps(CHOICES[0]).encode())
    (tmp_path / "piqa.jsonl.gz").write_bytes(whole[:-9])
    with pytest.raises(EvaluationError, match=r"piqa\.jsonl\.gz is damaged"):
        run_tasks(linear, ["piqa"], tmp_path)


def test_evaluate_prints_and_writes_the_scores(folder, rows_folder, linear, capsys, tmp_path):
    output = tmp_path / "scores.json"
    options = ["--tasks=piqa,lambada", f"--task_data={rows_folder}", "--batch_size=3", f"--output={output}"]
    main(["evaluate", f"--workdir={folder}", *options])
    scores = json.loads(output.read_text())["tasks"]
    assert scores == run_tasks(linear, ["piqa", "lambada"], rows_folder)
    piqa, lambada = capsys.readouterr().out.splitlines()
    assert piqa.split() == [
        "piqa", "3", "rows", "acc", f"{scores['piqa']['acc']:.4g}", "±", f"{scores['piqa']['acc_stderr']:.4g}",
        "acc_norm", f"{scores['piqa']['acc_norm']:.4g}", "±", f"{scores['piqa']['acc_norm_stderr']:.4g}",
    ]  # fmt: skip
    assert lambada.split()[:4] == ["lambada", "3", "rows", "perplexity"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks=piqa"], "--task_data=… is missing"),
        (["--tasks=piqua", "--task_data=."], "did you mean 'piqa'?"),
        (["--tasks=piqa", "--task_data=.", "--length=8"], "--length is not for benchmarks"),
        (["--tasks=piqa", "--task_data=.", "--limit=0"], "limit is 0; it must be at least 1"),
        (["--tasks=piqa", "--task_data=.", "--batch_size=0"], "batch_size is 0; it must be at least 1"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(folder, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        main(["evaluate", f"--workdir={folder}", *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_the_harness_the_extra_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "efla_jax.evaluation.benchmarks")
    monkeypatch.delitem(sys.modules, "lm_eval.api.model")
    with pytest.raises(SystemExit):
        main(["evaluate", f"--workdir={folder}", "--tasks=piqa", "--task_data=."])
    assert "pip install 'efla-jax[lm-eval]'" in capsys.readouterr().err
