"""The token cache: right tokens, reuse by content, damage, races, a disk that takes no more."""

import errno
import json
import logging
import os
import resource
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from efla_jax.data.text import TextError
from efla_jax.data.text import store as store_module
from efla_jax.data.text.sources import FileSource, open_source
from efla_jax.data.text.store import tokenise
from efla_jax.data.text.tokenizers import ByteTokenizer, JsonTokenizer

TEXTS = ["one two\n", "zwei – drei", "  ", "é" * 1000]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "text").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    source = open_source(str(tmp_path / "text" / "*.txt"))
    assert isinstance(source, FileSource)
    return source


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def check(store, texts=TEXTS):
    """`store` holds the bytes of `texts`."""
    data = [text.encode() for text in texts]
    assert (store.tokens.dtype, store.offsets.dtype) == (np.uint16, np.int64)
    assert store.documents == len(texts)
    assert store.tokens.tolist() == list(b"".join(data))
    assert store.offsets.tolist() == [0, *np.cumsum([len(text) for text in data])]
    assert store.text_bytes == sum(map(len, data))
    assert store.text_words == sum(len(text.split()) for text in texts)


def entries(cache):
    """The names in the cache, hidden ones too."""
    return sorted(os.listdir(cache)) if cache.exists() else []


def words(count):
    """A tokenizer of `count` words, w0 …, and a separator."""
    model = models.WordLevel({f"w{i}": i for i in range(count - 1)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    return JsonTokenizer(f"{count} words", tokenizer.to_str().encode())


def test_tokens_are_those_of_the_documents(source, cache, monkeypatch):
    check(tokenise(source, ByteTokenizer(), cache))
    monkeypatch.setattr(store_module, "_BATCH_CHARACTERS", 9)
    check(tokenise(source, ByteTokenizer(), cache.with_name("other")))


def test_arrays_are_mapped_not_read(source, cache):
    store = tokenise(source, ByteTokenizer(), cache)
    for array in (store.tokens, store.offsets):
        assert isinstance(array.base, np.memmap)
        assert not array.flags.writeable


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_the_largest_ids_fit(tmp_path, cache, vocab_size, dtype):
    (tmp_path / "a.txt").write_text(f"w1 w{vocab_size - 2}")
    store = tokenise(open_source(str(tmp_path / "a.txt")), words(vocab_size), cache)
    assert store.tokens.dtype == dtype
    assert store.tokens.tolist() == [1, vocab_size - 2]


def test_the_default_cache_is_in_the_home_folder(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    check(tokenise(source, ByteTokenizer()))
    assert len(entries(tmp_path / ".cache" / "efla_jax" / "tokens")) == 1


def test_an_entry_is_reused_for_the_same_content(source, cache, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "efla_jax")
    tokenise(source, ByteTokenizer(), cache)
    assert "tokenised" in caplog.text
    caplog.clear()
    shutil.copytree(tmp_path / "text", tmp_path / "moved")
    monkeypatch.setattr(FileSource, "documents", lambda self: pytest.fail("the documents were read again"))
    check(tokenise(open_source(str(tmp_path / "moved" / "*.txt")), ByteTokenizer(), cache))
    assert "reusing the token cache" in caplog.text
    assert len(entries(cache)) == 1


def test_other_content_is_another_entry(source, cache, tmp_path):
    tokenise(source, ByteTokenizer(), cache)
    tokenise(source, words(9), cache)
    (tmp_path / "text" / "0.txt").write_text("one two three")
    check(tokenise(source, ByteTokenizer(), cache), ["one two three", *TEXTS[1:]])
    assert len(entries(cache)) == 3


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def falsify(path):
    """Another count of bytes, in a file that is JSON still."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_bytes": 1}))


DAMAGE = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "emptied": lambda path: path.write_bytes(b""),
    "gone": os.remove,
}
DAMAGED = [(file, damage) for file in ("tokens", "offsets", "meta.json") for damage in DAMAGE.values()]


@pytest.mark.parametrize(("file", "damage"), [*DAMAGED, ("meta.json", falsify)])
def test_a_damaged_entry_is_named_and_made_afresh(source, cache, caplog, file, damage):
    tokenise(source, ByteTokenizer(), cache)
    (name,) = entries(cache)
    damage(cache / name / file)
    check(tokenise(source, ByteTokenizer(), cache))
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert f"the token cache {cache / name} is damaged and is made afresh: " in warning
    caplog.clear()
    check(tokenise(source, ByteTokenizer(), cache))
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    assert entries(cache) == [name]


def test_a_file_in_the_place_of_an_entry(source, cache):
    tokenise(source, ByteTokenizer(), cache)
    (name,) = entries(cache)
    shutil.rmtree(cache / name)
    (cache / name).write_text("")
    check(tokenise(source, ByteTokenizer(), cache))
    assert entries(cache) == [name]
    assert (cache / name).is_dir()


@dataclass(frozen=True)
class Overtaken(FileSource):
    """While its documents are read, `overtake` runs."""

    overtake: Callable[[], None]

    def documents(self):
        yield from super().documents()
        self.overtake()


@pytest.mark.parametrize("damaged", [False, True])
def test_another_process_is_first(source, cache, damaged):
    """It fills the same entry, which may have been damaged before, while this one is busy."""
    if damaged:
        tokenise(source, ByteTokenizer(), cache)
        flip(cache / entries(cache)[0] / "tokens")
    inodes = []

    def overtake():
        check(tokenise(source, ByteTokenizer(), cache))
        inodes.append(os.stat(cache / entries(cache)[-1] / "tokens").st_ino)

    slow = Overtaken(source.spec, source.files, source.text_field, source.separator, overtake)
    store = tokenise(slow, ByteTokenizer(), cache)
    check(store)
    (name,) = entries(cache)
    assert [os.stat(cache / name / "tokens").st_ino] == inodes, "the other's good entry was replaced"
    check(tokenise(source, ByteTokenizer(), cache))


def test_another_process_removes_the_damaged_entry(source, cache, monkeypatch):
    """Just as this one, its tokens made, looks at the entry for the second time."""
    tokenise(source, ByteTokenizer(), cache)
    (name,) = entries(cache)
    flip(cache / name / "tokens")
    opened = []

    def open_overtaken(folder, real=store_module._open):
        opened.append(folder)
        if opened.count(cache / name) == 2:
            shutil.rmtree(cache / name)
        return real(folder)

    monkeypatch.setattr(store_module, "_open", open_overtaken)
    check(tokenise(source, ByteTokenizer(), cache))
    assert opened.count(cache / name) == 2
    assert entries(cache) == [name]
    check(tokenise(source, ByteTokenizer(), cache))


@pytest.mark.parametrize("damaged", [False, True])
def test_several_at_once(source, cache, damaged):
    """They meet at an entry that is missing, or that all of them find damaged."""
    tokenise(source, ByteTokenizer(), cache)
    flip(cache / entries(cache)[0] / "tokens")
    start = threading.Barrier(4)

    def race(turn):
        start.wait(timeout=60)
        return tokenise(source, ByteTokenizer(), turn)

    with ThreadPoolExecutor(4) as pool:
        for turn in range(20):
            folder = cache.with_name(f"cache {turn}")
            if damaged:
                shutil.copytree(cache, folder)
            for store in pool.map(race, [folder] * 4):
                check(store)
            assert len(entries(folder)) == 1
            check(tokenise(source, ByteTokenizer(), folder))


def test_a_disk_that_takes_no_more(tmp_path, cache):
    """The operating system lets files grow to 100 kB and no further."""
    (tmp_path / "a.txt").write_text("x" * 60_000)  # 120 kB of tokens
    source = open_source(str(tmp_path / "a.txt"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(TextError) as error:
            tokenise(source, ByteTokenizer(), cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"the token cache {cache} cannot be written: [Errno {errno.EFBIG}]" in str(error.value)
    assert entries(cache) == []
    check(tokenise(source, ByteTokenizer(), cache), ["x" * 60_000])


def test_a_cache_that_cannot_be(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TextError, match=r"the token cache .*file/cache cannot be written: "):
        tokenise(source, ByteTokenizer(), tmp_path / "file" / "cache")


def test_a_source_that_fails_midway_leaves_nothing(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(store_module, "_BATCH_CHARACTERS", 1)
    path = Path(tmp_path, "a.jsonl")
    path.write_text('{"text": "good"}\n{"txt": "bad"}\n')
    with pytest.raises(TextError, match="row 2 has no field 'text'"):
        tokenise(open_source(str(path)), ByteTokenizer(), cache)
    assert entries(cache) == []


def test_text_that_has_no_tokens(tmp_path, cache):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(TextError, match="of whose text 9 words makes no tokens"):
        tokenise(open_source(str(tmp_path / "a.txt")), words(9), cache)
    assert entries(cache) == []
