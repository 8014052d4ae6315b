"""Tokenizers: round trips, separators, streams, files; training of a byte-level BPE; what each refuses."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from efla_jax.cli import COMMANDS, main
from efla_jax.data.text import TextError
from efla_jax.data.text.sources import open_source
from efla_jax.data.text.tokenizers import ByteTokenizer, JsonTokenizer, load_tokenizer, train_bpe

STDLIB = Path(os.__file__).parent
# Spaces, characters of one to four bytes, what looks like special tokens, control characters.
AWKWARD = " \n\t  a\r\n  é – 漢字 😀👩‍👩‍👧 ﬁ e\u0301 \x00\x7f\u200b\ufeff<|endoftext|></s><s>[SEP] <unk> ��"
TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("ab é漢😀\n▁")))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A byte-level BPE of 400 tokens, trained on the standard library's json."""
    path = tmp_path_factory.mktemp("bpe") / "bpe.json"
    train_bpe(open_source(str(STDLIB / "json" / "*.py")), 400, path)
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece model that falls back to bytes, and the arguments that trained it."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the extra sentencepiece is not installed")
    folder = tmp_path_factory.mktemp("pieces")
    sentencepiece.SentencePieceTrainer.train(
        input=STDLIB / "json" / "decoder.py",
        model_prefix=folder / "pieces",
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return load_tokenizer(folder / "pieces.model")


def fallback_json():
    """A JSON tokenizer as Llama's: spaces are ▁, one leads, and characters it does not know are bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *"▁abé", "▁a", "ab"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [("▁", "a"), ("a", "b")], byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="module")
def fallback():
    return JsonTokenizer("fallback", fallback_json().to_str().encode())


@pytest.fixture(params=["bytes", "bpe", "pieces", "fallback"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue(request.param)


def test_every_tokenizer_gives_awkward_text_back(tokenizer):
    ids = tokenizer.encode(AWKWARD)
    assert (ids.dtype, ids.ndim) == (np.int32, 1)
    assert tokenizer.decode(ids) == AWKWARD
    assert tokenizer.separator not in ids
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


def test_separators_have_no_text(tokenizer):
    a, b = tokenizer.encode("aé"), tokenizer.encode("b")
    joined = [tokenizer.separator, *a, tokenizer.separator, *b, tokenizer.separator]
    assert tokenizer.decode(joined) == tokenizer.decode([*a, *b])
    assert tokenizer.decode([]) == tokenizer.decode([tokenizer.separator]) == ""


def test_a_batch_is_its_texts(tokenizer):
    texts = ["def f(x):\n", "", "é" * 50, " a"]
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert tokenizer.decode(ids) == text


@given(TEXTS)
@example(AWKWARD)
@settings(deadline=None)
def test_bytes(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.separator) == (257, 256)


@given(st.lists(st.integers(0, 256)))
@settings(deadline=None)
def test_bytes_of_no_text(ids):
    assert ByteTokenizer().decode(ids) == bytes(value for value in ids if value < 256).decode(errors="replace")


@given(TEXTS)
@example(AWKWARD)
@settings(deadline=None)
def test_byte_level_bpe_is_exact(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.separator not in ids


@given(st.lists(st.integers(0, 399)))
@settings(deadline=None)
def test_byte_level_bpe_decodes_as_its_library(bpe, ids):
    reference = tokenizers.Tokenizer.from_buffer(bpe._content)
    assert bpe.decode(ids) == reference.decode(ids)


def test_bpe_shortens_text(bpe):
    text = (STDLIB / "json" / "decoder.py").read_text()
    assert len(bpe.encode(text)) < len(text) / 2
    assert (bpe.vocab_size, bpe.separator) == (400, 0)


@given(TEXTS.filter(lambda text: not {"\ufffd", "▁"} & set(text)))  # ▁ is a space to some of them
@settings(deadline=None)
def test_streams_show_whole_characters(bpe, fallback, text):
    for tokenizer in (ByteTokenizer(), bpe, fallback):
        stream = tokenizer.stream()
        shown = [stream.push(int(token)) for token in tokenizer.encode(text)]
        assert not any("\ufffd" in part for part in shown), "half a character is shown"
        assert "".join(shown) == text, "whole characters are kept back"
        assert stream.flush() == ""


def test_a_stream_of_pieces_shows_whole_characters(pieces):
    stream, ids = pieces.stream(), pieces.encode("  def é漢😀(a,  b)\n")
    shown = [stream.push(int(token)) for token in ids]
    assert not any("\ufffd" in part for part in shown)
    assert "".join(shown) == "  def é漢😀(a,  b)\n"
    assert sum(part == "" for part in shown) >= 6, "bytes of é漢😀 were shown one by one"


def test_what_is_left_of_a_stream_is_flushed(tokenizer):
    ids = tokenizer.encode("a€")
    cut = tokenizer.stream()
    shown = "".join(cut.push(int(token)) for token in ids[:-1])
    assert shown == "a"
    rest = cut.flush()
    assert set(rest) == {"\ufffd"}
    assert tokenizer.decode(ids[:-1]) == shown + rest


@given(st.lists(st.integers(0, 264)))
@settings(deadline=None)
def test_a_stream_agrees_with_its_library_on_whole_characters(ids):
    """Bytes that are no UTF-8 may be marked by more or fewer U+FFFD, as the window falls."""
    tokenizer = fallback_json()
    stream = JsonTokenizer("fallback", tokenizer.to_str().encode())
    ids = [i for i in ids if i < 3 + 128 or i >= 3 + 256]
    assert stream.decode(ids) == tokenizer.decode(ids)


def test_pieces_decode_as_their_library(pieces):
    sentencepiece = pytest.importorskip("sentencepiece")
    reference = sentencepiece.SentencePieceProcessor(model_proto=pieces._content)
    for seed in range(50):
        ids = np.random.default_rng(seed).integers(3 + 256, pieces.vocab_size, 30).tolist()
        assert pieces.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_ids_that_are_none(tokenizer, token):
    with pytest.raises(ValueError, match=rf"token is {token}; it must be in \[0, {tokenizer.vocab_size}\)"):
        tokenizer.decode([token])


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path)
    for again in (load_tokenizer(path), load_tokenizer(tmp_path)):
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert (again.vocab_size, again.separator) == (tokenizer.vocab_size, tokenizer.separator)
        np.testing.assert_array_equal(again.encode(AWKWARD), tokenizer.encode(AWKWARD))
        again.save(tmp_path)
        assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_fingerprints_differ(bpe, fallback):
    assert len({tokenizer.fingerprint for tokenizer in (ByteTokenizer(), bpe, fallback)}) == 3


def test_mistral():
    pytest.importorskip("sentencepiece", reason="the extra sentencepiece is not installed")
    if importlib.util.find_spec("mistral_common") is None:
        pytest.skip("the extra sentencepiece is not installed")
    tokenizer = load_tokenizer("mistral")
    assert (tokenizer.vocab_size, tokenizer.separator) == (32000, 2)
    assert tokenizer.decode(tokenizer.encode(AWKWARD)) == AWKWARD
    assert len(tokenizer.encode(" The quick brown fox jumps over the lazy dog")) < 15
    assert "mistral_common" not in sys.modules


def test_extras_that_are_missing_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TextError, match=r"needs mistral-common: pip install 'efla-jax\[sentencepiece\]'"):
        load_tokenizer("mistral")
    (tmp_path / "a.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TextError, match=r"needs the package sentencepiece: pip install 'efla-jax\[sentencepiece\]'"):
        load_tokenizer(tmp_path / "a.model")


def word_level(*special, words=("a", "b")):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def test_the_separator_is_the_first_of_those_known():
    content = word_level("[SEP]", "<pad>", "</s>").to_str().encode()
    assert JsonTokenizer("words", content).separator == 4  # a, b, [SEP], <pad>, </s>
    with pytest.raises(TextError, match=r"words has no separator .* its special tokens are <pad>, <s>"):
        JsonTokenizer("words", word_level("<pad>", "<s>").to_str().encode())


def test_truncation_and_padding_of_a_file_are_not_applied():
    tokenizer = word_level("</s>")
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    ids = JsonTokenizer("words", tokenizer.to_str().encode()).encode_batch(["a b a b", "a"])
    assert [document.tolist() for document in ids] == [[0, 1, 0, 1], [0]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "tokenizer is '', which is no file; it must be bytes, mistral, or the path"),
        ("byte", "did you mean 'bytes'?"),
        ("files/tokenizr.json", "did you mean 'tokenizer.json'?"),
        ("files", "a folder; it must hold tokenizer.json or tokenizer.model, and not both"),
        ("empty", "a folder; it must hold tokenizer.json or tokenizer.model, and not both"),
        ("files/tokenizer.json", "files/tokenizer.json is no tokenizer: "),
        ("files/tokenizer.txt", "of suffix '.txt'; it must be a .json or a .model file"),
    ],
)
def test_what_is_no_tokenizer(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("files", "empty"):
        Path(folder).mkdir()
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer.txt"):
        Path("files", name).write_text("{}")
    with pytest.raises(TextError) as error:
        load_tokenizer(spec)
    assert message in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"x" * 99])
def test_what_is_no_sentencepiece_model(tmp_path, content):
    pytest.importorskip("sentencepiece", reason="the extra sentencepiece is not installed")
    (tmp_path / "a.model").write_bytes(content)
    with pytest.raises(TextError, match=r"a\.model is no SentencePiece model"):
        load_tokenizer(tmp_path / "a.model")


def test_a_sentencepiece_model_without_an_end(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="the extra sentencepiece is not installed")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"] * 9),
        model_prefix=tmp_path / "a",
        vocab_size=7,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(TextError, match=r"a\.model has no token for the end of a sentence"):
        load_tokenizer(tmp_path / "a.model")


def test_training_is_deterministic(tmp_path, capsys):
    """The command's file, in this process and in others, whatever their hashes and threads."""
    source = f"--source={STDLIB / 'json' / '*.py'}"
    main(["tokenizer", "train", source, "--vocab_size=400", f"--output={tmp_path / 'a.json'}"])
    assert capsys.readouterr().out == f"{tmp_path / 'a.json'}: 400 tokens\n"
    command = [sys.executable, "-m", "efla_jax", "tokenizer", "train", source, "--vocab_size=400"]
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "5"}
    subprocess.run([*command, f"--output={tmp_path / 'b.json'}"], check=True, env=environment, capture_output=True)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert load_tokenizer(tmp_path / "a.json").vocab_size == 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`train` must follow: efla tokenizer train --source=SOURCE"),
        (["train"], "--source=… is missing"),
        (["train", "--surce=a.txt"], "unknown option '--surce=a.txt'; did you mean '--source'?"),
        (["train", "--source=a.txt", "--vocab_size=4k", "--output=a.json"], "--vocab_size is '4k'; it must be an int"),
        (["train", "--source=a.txt", "--vocab_size=256", "--output=a.json"], "vocab_size is 256; it must be at least"),
        (["train", "--source=a.txt", "--vocab_size=400", "--output=a.json"], "vocab_size is 400; the text of 'a.txt'"),
        (["train", "--source=a.txt", "--vocab_size=300", "--output=a.bin"], "output is 'a.bin'; it must end in .json"),
        (["train", "--source=a.txt", "--vocab_size=300", "--output=b/a.json"], "its folder must exist"),
        (["train", "--source=b.txt", "--vocab_size=300", "--output=a.json"], "matches no file; did you mean 'a.txt'?"),
    ],
)
def test_training_that_cannot_be(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("ab ab ab")
    with pytest.raises(SystemExit) as error:
        main(["tokenizer", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == ["a.txt"]


def test_a_pair_that_occurs_once_is_no_token(tmp_path):
    (tmp_path / "a.txt").write_text("abcdef")
    with pytest.raises(TextError, match=r"vocab_size is 258; the text of .*a\.txt' gives 257 at most"):
        train_bpe(open_source(str(tmp_path / "a.txt")), 258, tmp_path / "a.json")


def test_training_reads_fields_and_separators(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"code": "abab abab abab"}\n')
    output = tmp_path / "a.json"
    options = ["--vocab_size=260", f"--output={output}", f"--source={tmp_path / 'a.jsonl'}", "--text_field=code"]
    main(["tokenizer", "train", *options])
    assert len(load_tokenizer(output).encode("abab")) < 3
    (tmp_path / "a.txt").write_text("1\n<->\n2\n<->\n3\n")  # its only pairs that occur twice are of the separator
    options = ["--vocab_size=258", f"--output={output}", f"--source={tmp_path / 'a.txt'}"]
    main(["tokenizer", "train", *options])
    with pytest.raises(TextError, match=r"vocab_size is 258; the text of .*a\.txt' gives 257 at most"):
        COMMANDS["tokenizer"](["train", *options, "--separator=<->"])
