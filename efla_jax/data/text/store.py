"""The tokens of a source, made once and kept in a cache keyed by content.

A cache entry is a folder: `tokens`, uint16 or uint32; `offsets`, int64; and meta.json, which has their sizes and
digests. It is filled under another name and appears by one rename, so an entry is whole or not there.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from efla_jax.data.text import TextError
from efla_jax.data.text.sources import TextSource
from efla_jax.data.text.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_CACHE = Path("~/.cache/efla_jax/tokens")
_FORMAT = 1
_META, _TOKENS, _OFFSETS = "meta.json", "tokens", "offsets"
# Documents are encoded so many characters at a time: enough for the tokenizer's threads, little memory.
_BATCH_CHARACTERS = 2**20


@dataclass(frozen=True, eq=False)
class TokenStore:
    """`tokens`, uint16 or uint32 [N]; document d is tokens[offsets[d] : offsets[d + 1]].

    `offsets` is int64 [documents + 1]; both are mapped from files. `text_bytes` and `text_words` count the text, in
    UTF-8 and by str.split. `digest` is the sha256 of the tokens, "" where nobody has asked.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    text_bytes: int
    text_words: int
    digest: str = ""

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1


def tokenise(source: TextSource, tokenizer: Tokenizer, cache_dir: str | os.PathLike[str] | None = None) -> TokenStore:
    """The tokens of every document of `source`, from the cache if they are there, else made and put there.

    `cache_dir` overrides ~/.cache/efla_jax/tokens. A damaged entry is named in a warning and made afresh. Several
    processes may do this at once. Raises TextError if the source or the cache fails, for a full disk too; no part of
    an entry is left then.
    """
    cache = Path(cache_dir or DEFAULT_CACHE).expanduser()
    entry = cache / _key(source, tokenizer)
    store = _reuse(entry)
    if store is not None:
        return store
    begun = time.perf_counter()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as temporary:
            filled = Path(temporary, entry.name)
            filled.mkdir()
            _fill(filled, source, tokenizer)
            # Mapped now: whichever process's files get the name, these stay readable.
            store = _open(filled)
            _publish(filled, entry)
    except (OSError, _DamagedError) as error:
        raise TextError(f"the token cache {cache} cannot be written: {error}") from error
    logger.info(
        "tokenised %s by %s in %.1f s: %d documents, %d bytes, %d tokens, kept in %s",
        *(source.spec, tokenizer.name, time.perf_counter() - begun),
        *(store.documents, store.text_bytes, len(store.tokens), entry),
    )
    return store


class _DamagedError(Exception):
    """A cache entry is not as it was written."""


@dataclass(frozen=True)
class _File:
    """What meta.json says of one array: its dtype, its size in bytes, its digest."""

    dtype: str
    size: int
    sha256: str


class _ArrayWriter:
    """Writes an array to a file piece by piece."""

    def __init__(self, stream: BinaryIO, dtype: str):
        self._stream = stream
        self._dtype = dtype
        self._size = 0
        self._digest = hashlib.sha256()

    def append(self, values: Any) -> None:
        data = np.asarray(values).astype(self._dtype).tobytes()
        self._stream.write(data)
        self._digest.update(data)
        self._size += len(data)

    def finish(self) -> _File:
        """Call it last; the array is on disk when it returns."""
        _to_disk(self._stream)
        return _File(self._dtype, self._size, self._digest.hexdigest())


def _key(source: TextSource, tokenizer: Tokenizer) -> str:
    text = f"{source.fingerprint()} {tokenizer.fingerprint} {_FORMAT}"
    return hashlib.sha256(text.encode()).hexdigest()


def _reuse(entry: Path) -> TokenStore | None:
    """The store at `entry` if it is there and good."""
    if not entry.exists():
        return None
    try:
        store = _open(entry)
    except _DamagedError as error:
        logger.warning("the token cache %s is damaged and is made afresh: %s", entry, error)
        return None
    logger.info("reusing the token cache %s: %d documents, %d tokens", entry, store.documents, len(store.tokens))
    return store


def _fill(folder: Path, source: TextSource, tokenizer: Tokenizer) -> None:
    """Writes the three files of an entry."""
    text_bytes = text_words = end = 0
    with open(folder / _TOKENS, "xb") as tokens_file, open(folder / _OFFSETS, "xb") as offsets_file:
        tokens = _ArrayWriter(tokens_file, "<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        offsets = _ArrayWriter(offsets_file, "<i8")
        offsets.append([0])
        for texts in _batches(source.documents()):
            ids = tokenizer.encode_batch(texts)
            ends = end + np.cumsum([len(document) for document in ids])
            end = int(ends[-1])
            tokens.append(np.concatenate(ids))
            offsets.append(ends)
            text_bytes += sum(len(text.encode()) for text in texts)
            text_words += sum(len(text.split()) for text in texts)
        if end == 0:
            raise TextError(f"source is {source.spec!r}, of whose text {tokenizer.name} makes no tokens")
        meta = {
            "source": source.spec,
            "tokenizer": tokenizer.name,
            "text_bytes": text_bytes,
            "text_words": text_words,
            _TOKENS: asdict(tokens.finish()),
            _OFFSETS: asdict(offsets.finish()),
        }
    with open(folder / _META, "xb") as meta_file:
        meta_file.write(json.dumps(meta | {"sha256": _digest(meta)}, indent=1).encode())
        _to_disk(meta_file)
    _folder_to_disk(folder)


def _publish(filled: Path, entry: Path) -> None:
    """Gives the folder `filled` the name `entry`, unless a good entry has it already."""
    if entry.exists():
        try:
            _open(entry)
        except _DamagedError:
            with contextlib.suppress(FileNotFoundError):  # another process did it
                os.rename(entry, filled.with_name("damaged"))
    try:
        os.rename(filled, entry)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return  # another process was first
    _folder_to_disk(entry.parent)


def _open(folder: Path) -> TokenStore:
    """Maps an entry's arrays. Raises _DamagedError unless all of it is as it was written."""
    try:
        meta = json.loads((folder / _META).read_bytes())
        if meta.pop("sha256") != _digest(meta):
            raise _DamagedError(f"{folder / _META} does not have the sha256 that it says")
        tokens = _map(folder / _TOKENS, _File(**meta[_TOKENS]))
        offsets = _map(folder / _OFFSETS, _File(**meta[_OFFSETS]))
        return TokenStore(tokens, offsets, meta["text_bytes"], meta["text_words"], meta[_TOKENS]["sha256"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # missing, or no such JSON
        raise _DamagedError(f"{type(error).__name__}: {error}") from error


def _map(path: Path, written: _File) -> np.ndarray:
    size = path.stat().st_size
    if size != written.size:
        raise _DamagedError(f"{path} has {size} bytes; it must have {written.size}")
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != written.sha256:
        raise _DamagedError(f"{path} has the sha256 {digest}; it must be {written.sha256}")
    # The plain array over the same mapping: indexing a memmap is several times slower.
    return np.asarray(np.memmap(path, np.dtype(written.dtype), mode="r"))


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _to_disk(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _folder_to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
