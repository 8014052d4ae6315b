"""Sources: every kind of file, splitting, the standard library, hubs, fingerprints, and what each refuses."""

import gzip
import json
import logging
import lzma
import sys
import sysconfig
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from efla_jax.data.text import TextError
from efla_jax.data.text.sources import FileSource, RecordSource, open_source

TEXTS = ["one\n", "zwei, drei – 四\r\n", "\n  five"]


def compress(data, suffix):
    """`data` as a file with that last suffix holds it."""
    match suffix:
        case ".gz":
            return gzip.compress(data)
        case ".xz":
            return lzma.compress(data)
        case ".zst":
            sink = pyarrow.BufferOutputStream()
            with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(data)
            return sink.getvalue().to_pybytes()
    return data


def rows(kind, texts, field="text"):
    """A file of one row a text, with another field beside it."""
    if kind == ".jsonl":
        return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()
    table = pyarrow.table({"id": list(range(len(texts))), field: texts})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def documents(spec, **options):
    return list(open_source(str(spec), **options).documents())


def refusal(spec, **options):
    """The message of the error, be it raised when the source is opened or when it is read."""
    with pytest.raises(TextError) as error:
        documents(spec, **options)
    return str(error.value)


@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".md", ".py", ".jsonl", ".parquet"])
def test_every_kind_of_file(tmp_path, kind, compression):
    if kind in (".jsonl", ".parquet"):
        write(tmp_path / f"a{kind}{compression}", compress(rows(kind, TEXTS), compression))
    else:
        for i, text in enumerate(TEXTS):
            write(tmp_path / f"{i}{kind}{compression}", compress(text.encode(), compression))
    assert documents(tmp_path / f"*{kind}{compression}") == TEXTS


def test_several_compressed_streams_in_one_file_are_one_text(tmp_path):
    for suffix in (".gz", ".xz", ".zst"):
        write(tmp_path / f"a.txt{suffix}", compress(b"one ", suffix) + compress(b"two", suffix))
    assert documents(tmp_path / "a.*") == ["one two"] * 3


def test_a_glob_goes_into_folders_and_sorts_by_path(tmp_path):
    for name in ("b/1.txt", "a/z/2.txt", "a/3.txt", "4.txt", "b/5.md"):
        write(tmp_path / name, name)
    assert documents(tmp_path / "**" / "*.txt") == ["4.txt", "a/3.txt", "a/z/2.txt", "b/1.txt"]
    assert documents(tmp_path / "*.txt") == ["4.txt"]


def test_a_file_may_be_named_like_a_pattern(tmp_path):
    write(tmp_path / "a[1].txt", "this one")
    write(tmp_path / "a1.txt", "not this one")
    assert documents(tmp_path / "a[1].txt") == ["this one"]


def test_text_field(tmp_path):
    for kind in (".jsonl", ".parquet"):
        path = write(tmp_path / f"a{kind}", rows(kind, TEXTS, field="content"))
        assert documents(path, text_field="content") == TEXTS


def test_blank_lines_are_no_rows(tmp_path):
    assert documents(write(tmp_path / "a.jsonl", '{"text": "a"}\n\n  \n{"text": "b"}')) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a\nb\n<|doc|>\nc\n", ["a\nb\n", "c\n"]),
        ("<|doc|>\na\n<|doc|>\n<|doc|>\nb<|doc|>\n <|doc|>\n<|doc|>", ["a\n", "b<|doc|>\n <|doc|>\n"]),
        ("a\r\n<|doc|>\r\nb", ["a\r\n", "b"]),
    ],
)
def test_separator_splits_at_lines_that_are_exactly_it(tmp_path, text, pieces):
    assert documents(write(tmp_path / "a.txt.gz", gzip.compress(text.encode())), separator="<|doc|>") == pieces


def test_an_empty_separator_is_an_empty_line(tmp_path):
    assert documents(write(tmp_path / "a.txt", "a\nb\n\n\nc\n"), separator="") == ["a\nb\n", "c\n"]


def test_documents_without_text_are_none(tmp_path):
    write(tmp_path / "1.txt", "")
    write(tmp_path / "2.txt", "two")
    write(tmp_path / "3.jsonl", '{"text": ""}\n{"text": "three"}')
    assert documents(tmp_path / "*") == ["two", "three"]


def test_undecodable_bytes_are_counted_and_reported(tmp_path, caplog):
    bad = write(tmp_path / "bad.txt", b"caf\xe9 \xe2\x82 ok\n---\n\xff\n")
    write(tmp_path / "good.txt", "café €")
    half = write(tmp_path / "half.jsonl", '{"text": "a\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n')
    source = open_source(str(tmp_path / "*.txt"), separator="---")
    for _ in range(2):  # the count is of one pass
        assert list(source.documents()) == ["caf� � ok\n", "�\n", "café €"]
        assert source.undecodable == {str(bad): 4}
    assert f"{bad}: 4 bytes are not UTF-8" in caplog.text
    assert "good.txt" not in caplog.text
    source = open_source(str(half))
    texts = list(source.documents())
    assert (texts[0][:2], texts[1]) == ("a�", "😀")
    assert source.undecodable == {str(half): 3}
    assert "".join(texts).encode(), "half a surrogate pair is left, which no UTF-8 can write"


def fingerprint(spec, **options):
    return open_source(str(spec), **options).fingerprint()


def test_fingerprint_is_of_content_and_options(tmp_path):
    for folder, texts in {"a": ("ab", "c"), "same": ("ab", "c"), "moved": ("a", "bc"), "other": ("ab", "d")}.items():
        for i, text in enumerate(texts):
            write(tmp_path / folder / f"{i}.txt", text)
            write(tmp_path / folder / f"{i}.jsonl", rows(".jsonl", [text]))
    for kind in ("txt", "jsonl"):
        first = fingerprint(tmp_path / "a" / f"*.{kind}")
        assert first == fingerprint(tmp_path / "a" / f"*.{kind}") == fingerprint(tmp_path / "same" / f"*.{kind}")
        assert len({first, *(fingerprint(tmp_path / name / f"*.{kind}") for name in ("moved", "other"))}) == 3
        assert first != fingerprint(tmp_path / "a" / f"0.{kind}")
    text, row = tmp_path / "a" / "*.txt", tmp_path / "a" / "*.jsonl"
    assert fingerprint(text, separator="b") not in (fingerprint(text), fingerprint(text, separator=""))
    assert fingerprint(text) == fingerprint(text, text_field="id")
    assert fingerprint(row) != fingerprint(row, text_field="id")


def test_fingerprint_of_records_is_of_their_texts():
    def records(*texts):
        source = RecordSource("letters", lambda: ({"text": text} for text in texts), "text")
        assert list(source.documents()) == list(texts)
        return source.fingerprint()

    assert records("ab", "c") == records("ab", "c")
    assert len({records("ab", "c"), records("a", "bc"), records("ab", "d"), records("c", "ab"), records("ab")}) == 5


def files_of(spec):
    source = open_source(spec)
    assert isinstance(source, FileSource)
    return source


def test_standard_library():
    source, train, validation = map(files_of, ("python", "python:train", "python:validation"))
    assert not set(train.files) & set(validation.files)
    assert set(train.files) | set(validation.files) == set(source.files)
    assert 1 / 40 < len(validation.files) / len(source.files) < 1 / 10
    root = Path(sysconfig.get_path("stdlib"))
    names = {file.relative_to(root).as_posix() for file in source.files}
    assert {"json/decoder.py", "collections/__init__.py", "ast.py"} <= names
    assert not {part for name in names for part in name.split("/")} & {"test", "tests", "site-packages"}
    assert (root / "json" / "decoder.py").read_text("utf-8") in set(source.documents())
    assert source.undecodable == {}
    assert len({part.fingerprint() for part in (source, train, validation)}) == 3


def test_standard_library_split_does_not_depend_on_where_it_lies(tmp_path, monkeypatch):
    real = {"json/decoder.py", "ast.py", "test/support/__init__.py"} | {f"m{i}.py" for i in range(60)}
    for folder in ("here", "there"):
        for name in real:
            write(tmp_path / folder / name, "x = 1\n")
    found = []
    for folder in ("here", "there"):
        monkeypatch.setattr(sysconfig, "get_path", lambda name, folder=folder: str(tmp_path / folder))
        files = files_of("python:validation").files
        found.append([file.relative_to(tmp_path / folder) for file in files])
    assert found[0] == found[1] != []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "source is '', which matches no file; it must be a path or a glob of files, python"),
        ("pythn", "which matches no file; did you mean 'python'?"),
        ("python:trian", "its split must be one of train, validation; did you mean 'train'?"),
        ("python:", "its split must be one of train, validation"),
        ("tdfs:lm1b", "did you mean 'tfds'?"),
        ("tfds:", "a name must follow tfds:"),
        ("hf::train", "a name must follow hf:"),
        ("data/notes.text", "which matches no file; did you mean 'notes.txt'?"),
        ("dta/notes.txt", "which matches no file; did you mean 'data'?"),
        ("data/*.parquet", "'data/*.parquet', which matches no file;"),
        ("data", "source is 'data', a folder; it must be files, such as 'data/**/*.txt'"),
        ("data/*.csv", "table.csv has the suffix '.csv'; it must be one of .txt, .md, .py, .jsonl, .parquet"),
        ("data/table.jsnl", "has the suffix '.jsnl'; it must be one of .txt"),
        ("data/plain", "has the suffix ''"),
        ("data/only.gz", "has the suffix ''"),
        ("data/empty.txt", "source is 'data/empty.txt', which holds no text"),
    ],
)
def test_what_is_no_source(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    for name in ("table.csv", "table.jsnl", "notes.txt", "plain", "only.gz"):
        write(tmp_path / "data" / name, "text")
    write(tmp_path / "data" / "empty.txt", "")
    assert message in refusal(spec)


def test_separators_that_cannot_serve(tmp_path):
    row = write(tmp_path / "a.jsonl", rows(".jsonl", TEXTS))
    assert "separator is 'x', but" in refusal(row, separator="x")
    assert r"separator is 'a\nb'; it must be a single line" in refusal(row, separator="a\nb")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "no such format"])
def test_a_damaged_file_is_named(tmp_path, suffix, damage):
    whole = compress(np.random.default_rng(0).bytes(100_000), suffix)
    file = write(tmp_path / f"a.txt{suffix}", whole[:-9] if damage == "truncated" else b"x" * 99)
    assert f"{file} cannot be read: " in refusal(file)


def test_damaged_parquet_is_named(tmp_path):
    whole = rows(".parquet", TEXTS)
    for name, data in {"cut.parquet": whole[:-9], "text.parquet": b"text", "cut.parquet.gz": whole}.items():
        file = write(tmp_path / name, data)
        assert f"{file} cannot be read: " in refusal(file)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"txt": "a", "id": 1}', "row 2 has no field 'text'; it has 'txt', 'id'; did you mean 'txt'?"),
        ("{}", "row 2 has no field 'text'; it has none"),
        ('{"text": null}', "row 2: 'text' is of type NoneType; it must be text"),
        ('{"text": ["a"]}', "row 2: 'text' is of type list; it must be text"),
        ('["text"]', "row 2 is of type list; it must be an object with a field 'text'"),
        ('{"text": "a"', "row 2 is not JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    file = write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n{row}\n')
    assert f"{file}, {message}" in refusal(file)


def test_a_bad_parquet_column_is_named(tmp_path):
    file = write(tmp_path / "a.parquet", rows(".parquet", TEXTS, field="txt"))
    assert f"{file}, row 1 has no field 'text'; it has 'id', 'txt'; did you mean 'txt'?" in refusal(file)
    assert f"{file}, row 1: 'id' is of type int; it must be text" in refusal(file, text_field="id")


@pytest.fixture
def prepared(tmp_path):
    """A data set that TFDS has prepared: aaa, bbb for training, ccc for validation."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class EflaLetters(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos: ClassVar = {}

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int32)})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples("ab"), "validation": self._generate_examples("c")}

        def _generate_examples(self, letters):
            for n, letter in enumerate(letters):
                yield n, {"text": 3 * letter, "n": n}

    tfds.disable_progress_bar()
    EflaLetters(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    tfds.core.add_data_dir(tmp_path)
    return "tfds:efla_letters"


def test_tfds(prepared):
    assert documents(prepared) == ["aaa", "bbb"]
    assert documents(f"{prepared}:validation") == ["ccc"]
    assert documents(f"{prepared}:train[1:]") == ["bbb"]
    assert fingerprint(prepared) == fingerprint(f"{prepared}:train") != fingerprint(f"{prepared}:train[1:]")
    assert f"{prepared}, row 1 has no field 'txt'; it has " in refusal(prepared, text_field="txt")
    assert "Unknown split 'valid'" in refusal(f"{prepared}:valid")
    assert "tensorflow" not in sys.modules


def test_tfds_without_the_data_fails_at_once():
    begun = time.monotonic()
    assert "tfds:lm1b is not prepared: " in refusal("tfds:lm1b")
    assert "TFDS knows no such data set; did you mean 'lm1b'?" in refusal("tfds:lm1bb")
    assert time.monotonic() - begun < 10, "it waited for a host"


def test_hugging_face_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "hf:owner/name needs the package datasets: pip install 'efla-jax[hf]'" in refusal("hf:owner/name")


def test_hugging_face_that_does_not_answer_fails_at_once(monkeypatch):
    pytest.importorskip("datasets", reason="the extra hf is not installed")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    begun = time.monotonic()
    message = refusal("hf:owner/name")
    assert time.monotonic() - begun < 10, "it tried again and again"
    assert "hf:owner/name: http://127.0.0.1:9 does not answer: " in message


def test_hugging_face(tmp_path, monkeypatch, caplog):
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "letters"
    write(folder / "train.jsonl", rows(".jsonl", ["aaa", "bbb"]))
    write(folder / "validation.jsonl", rows(".jsonl", ["ccc"]))
    caplog.set_level(logging.ERROR)
    assert documents(f"hf:{folder}") == ["aaa", "bbb"]
    assert documents(f"hf:{folder}:validation") == ["ccc"]
    assert 'Unknown split "valid"' in refusal(f"hf:{folder}:valid")
