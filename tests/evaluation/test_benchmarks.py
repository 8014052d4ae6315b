"""The benchmarks of lm-eval from local files: what is scored, and the scores, against a small model token by token."""

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
from tests.evaluation.by_hand import pair_by_hand
from tests.inference.small import ENDLESS, parameters, text_model

pytest.importorskip("lm_eval", reason="the optional extra lm-eval is not installed")

from efla_jax.evaluation.benchmarks import run_tasks, task_names
from efla_jax.evaluation.lm_eval_adapter import EflaLM


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
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    save_folder(path, ENDLESS, parameters(ENDLESS), load_tokenizer("bytes"))
    return path


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
    # right answers of one kind, of an odd number of rows: always answering the other kind scores otherwise
    "boolq": [dict(query=f"Passage: so\nQuestion: is {word} so?", choices=["no", "yes"], gold=1) for word in "abc"],
} | dict.fromkeys(("arc_challenge", "arc_easy", "piqa"), CHOICES)
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
