"""Perplexity: every token scored once, behind the context that its protocol gives it, and what is made of the sums."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest

from efla_jax.cli import main
from efla_jax.data.pipeline import batches
from efla_jax.data.text.packing import PackedRows
from efla_jax.data.text.sources import open_source
from efla_jax.data.text.store import tokenise
from efla_jax.data.text.tokenizers import load_tokenizer
from efla_jax.evaluation import EvaluationError
from efla_jax.evaluation.perplexity import evaluation_rows, perplexity, score
from efla_jax.inference.folder import save_folder
from efla_jax.models import graph_of
from efla_jax.models.cross_entropy import token_losses
from efla_jax.training.checkpoint import Checkpoints
from efla_jax.training.config import Config, ConfigError, DataConfig, to_json
from tests.evaluation.by_hand import SEPARATOR, losses
from tests.inference.small import ENDLESS, HYBRID, parameters

LENGTH, STRIDE = 16, 6
# Shorter than a window, as long as one, and of several; the second has characters of more than one byte.
DOCUMENTS = ["Once.\n", " \n = Blitz, Größe = \n \n", "It was the best of times, it was the worst\nof <unk> .", "e"]


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return open_source(str(file))


def pairs(text):
    """[(input, target)] of a document."""
    ids = list(text.encode())
    return list(zip([SEPARATOR, *ids], [*ids, SEPARATOR], strict=True))


def expected(config, protocol):
    """[(tokens of context, loss)] of every pair of all documents, each from where its window begins."""
    result, total = [], 0
    for document in map(pairs, DOCUMENTS):
        for number in range(len(document)):
            if protocol == "packed":  # rows are cut every LENGTH pairs of all documents
                start = max(0, number - (total + number) % LENGTH)
            else:  # the first window that reaches so far
                start = max(0, math.ceil((number + 1 - LENGTH) / STRIDE)) * STRIDE
            result.append((number - start, losses(config, *zip(*document[start : number + 1], strict=True))[-1]))
        total += len(document)
    return result


@pytest.mark.parametrize("protocol", ["packed", "sliding"])
@pytest.mark.parametrize("config", [ENDLESS, HYBRID], ids=["linear", "hybrid"])
def test_is_the_loss_token_by_token(config, protocol, source, tmp_path):
    want = expected(config, protocol)
    stride = STRIDE if protocol == "sliding" else None
    tokenizer = load_tokenizer("bytes")
    result = perplexity(
        config, parameters(config), tokenizer, source,
        protocol=protocol, length=LENGTH, stride=stride, batch_size=3, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    size = sum(len(text.encode()) for text in DOCUMENTS)
    assert (result["tokens"], result["bytes"], result["documents"]) == (size + len(DOCUMENTS), size, len(DOCUMENTS))
    total = sum(loss for _, loss in want)
    assert np.std([loss for _, loss in want]) > 1  # the tokens tell, the losses are not those of any order
    # to float32 rounding of logits of about ±3
    assert result["loss"] == pytest.approx(total / len(want), rel=5e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / len(want)), rel=5e-4)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=5e-5)
    assert result["words"] == sum(len(text.split()) for text in DOCUMENTS) + 1 + 3 + 2 + 1
    assert result["word_perplexity"] == pytest.approx(math.exp(total / result["words"]), rel=1e-2)
    bins = {0: [], 1: [], 2: [], 4: [], 8: []}
    for context, loss in want:
        bins[1 << context.bit_length() - 1 if context else 0].append(loss)
    assert [entry["context"] for entry in result["by_context"]] == list(bins)
    assert [entry["tokens"] for entry in result["by_context"]] == [len(found) for found in bins.values()]
    for entry, found in zip(result["by_context"], bins.values(), strict=True):
        assert entry["loss"] == pytest.approx(np.mean(found), rel=5e-5)


def test_words_are_those_that_wikitext_is_reported_per(source, tmp_path):
    """str.split, and one <eos> a line, as the word-level release is tokenised."""
    text = " \n = Robert <unk> = \n \n Robert <unk> is an English film . \n"
    (tmp_path / "wiki.txt").write_text(text)
    tokens = [word for line in text.split("\n")[:-1] for word in [*line.split(), "<eos>"]]
    call = functools.partial(
        perplexity, ENDLESS, parameters(ENDLESS), load_tokenizer("bytes"), open_source(str(tmp_path / "wiki.txt")),
        length=LENGTH, batch_size=3, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    counted, given = call(), call(words=7)
    assert counted["words"] == len(tokens)
    assert given["words"] == 7
    total = counted["loss"] * counted["tokens"]
    assert counted["word_perplexity"] == pytest.approx(math.exp(total / len(tokens)), rel=1e-9)
    assert given["word_perplexity"] == pytest.approx(math.exp(total / 7), rel=1e-9)


def test_batches_do_not_matter_and_compile_once(source, tmp_path, monkeypatch):
    store = tokenise(source, load_tokenizer("bytes"), tmp_path / "cache")
    rows = evaluation_rows(store, SEPARATOR, "sliding", LENGTH, STRIDE)
    traced = []

    def counting(hidden_BTE, kernel_EV, targets_BT):
        traced.append(targets_BT.shape)
        return token_losses(hidden_BTE, kernel_EV, targets_BT)

    monkeypatch.setattr("efla_jax.evaluation.perplexity.token_losses", counting)
    small, large = (score(graph_of(ENDLESS), parameters(ENDLESS), rows, batch_size=size) for size in (4, 64))
    assert traced == [(4, LENGTH), (64, LENGTH)]
    assert len(rows) % 4  # the last batch is filled up
    np.testing.assert_array_equal(small.tokens, large.tokens)
    np.testing.assert_allclose(small.nll, large.nll, rtol=1e-5)


def test_an_untrained_model_has_no_number_of_words_that_overflows(tmp_path):
    (tmp_path / "one.txt").write_text("a" * 700)
    result = perplexity(
        ENDLESS, parameters(ENDLESS), load_tokenizer("bytes"), open_source(str(tmp_path / "one.txt")),
        length=LENGTH, words=1, batch_size=3, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    assert result["word_perplexity"] == math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(protocol="slide"), "protocol is 'slide'; it must be packed or sliding"),
        (dict(length=1), "length is 1; it must be at least 2"),
        (dict(length=33), "length is 33; it must be at most 32, the context of the softmax blocks"),
        (dict(stride=4), "stride is 4, which protocol 'packed' does not have"),
        (dict(protocol="sliding", stride=0), r"stride is 0; it must be in \[1, length = 16\]"),
        (dict(protocol="sliding", stride=17), r"stride is 17; it must be in \[1, length = 16\]"),
        (dict(words=0), "words is 0; it must be at least 1"),
        (dict(batch_size=0), "batch_size is 0; it must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, message, source):
    with pytest.raises(EvaluationError, match=message):
        perplexity(HYBRID, None, load_tokenizer("bytes"), source, **dict(length=LENGTH) | options)


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(source):
    config = dataclasses.replace(ENDLESS, vocab_size=256)
    with pytest.raises(ConfigError, match="vocab_size is 256; it must be at least 257"):
        perplexity(config, None, load_tokenizer("bytes"), source, length=LENGTH)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """As training leaves it, at step 3, with text to validate on."""
    path = tmp_path_factory.mktemp("run")
    (path / "valid.txt").write_text("\n".join(DOCUMENTS))
    data = DataConfig(
        source="python:train", validation=str(path / "valid.txt"), sequence_length=LENGTH, cache_dir=str(path / "cache")
    )
    config = Config(model=HYBRID, data=data)
    (path / "config.json").write_text(to_json(config))
    (path / "tokenizer").mkdir()
    load_tokenizer("bytes").save(path / "tokenizer")
    store = tokenise(open_source(data.validation), load_tokenizer("bytes"), path / "cache")
    records = batches(PackedRows(store, LENGTH, SEPARATOR), batch_size=2, seed=0)
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(3, dict(params=parameters(HYBRID)), records)
    return path


def printed(capsys, *arguments):
    """{name: figure} of the lines that `efla evaluate` prints."""
    main(["evaluate", *arguments])
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_evaluate_prints_and_writes_every_figure(workdir, capsys, tmp_path):
    figures = printed(
        capsys, f"--workdir={workdir}", "--protocol=sliding", "--stride=6", f"--output={tmp_path / 'x.json'}"
    )
    written = json.loads((tmp_path / "x.json").read_text())
    want = perplexity(
        HYBRID, parameters(HYBRID), load_tokenizer("bytes"), open_source(str(workdir / "valid.txt")),
        protocol="sliding", length=LENGTH, stride=6, cache_dir=str(workdir / "cache"),
    )  # fmt: skip
    assert written == {"workdir": str(workdir), "source": str(workdir / "valid.txt")} | want
    assert figures.pop("step") == "3"
    assert figures.pop("source") == str(workdir / "valid.txt")
    assert figures == {
        name: f"{x:.6g}" if isinstance(x, float) else str(x) for name, x in want.items() if name != "by_context"
    }


def test_evaluate_takes_a_source_and_a_model_folder(workdir, capsys, tmp_path):
    (tmp_path / "other.txt").write_text("one\n---\ntwo two")
    save_folder(tmp_path / "model", HYBRID, parameters(HYBRID), load_tokenizer("bytes"))
    options = [f"--source={tmp_path / 'other.txt'}", "--separator=---", "--length=8", "--batch_size=2"]
    of_run = printed(capsys, f"--workdir={workdir}", *options)
    of_folder = printed(capsys, f"--workdir={tmp_path / 'model'}", *options)
    assert of_run == {"step": "3"} | of_folder
    assert (of_run["documents"], of_run["words"], of_run["length"]) == ("2", "5", "8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lenght=8"], "unknown option '--lenght=8'; did you mean '--length'?"),
        (["--length=x"], "--length is 'x'; it must be an integer"),
        (["--length=64"], "length is 64; it must be at most 32, the context of the softmax blocks"),
        (["--split=test"], "--split is not for a language model"),
        (["--limit=3"], "--limit is not for a language model"),
        (["--source=nowhere.txt"], "nowhere.txt"),
        (["--output=/nowhere/x.json"], "output is '/nowhere/x.json', which cannot be written"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(workdir, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        main(["evaluate", f"--workdir={workdir}", *options])
    assert error.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("efla evaluate: ")
    assert message in errors[-1]


def test_a_model_without_a_source_to_validate_on(capsys, tmp_path):
    save_folder(tmp_path / "model", HYBRID, parameters(HYBRID), load_tokenizer("bytes"))
    with pytest.raises(SystemExit):
        main(["evaluate", f"--workdir={tmp_path / 'model'}"])
    assert "--source=… is missing" in capsys.readouterr().err
