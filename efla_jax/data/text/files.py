"""Documents in files: text, .jsonl and .parquet, each plain or compressed.

Every reader yields (text, undecodable): U+FFFD stands for what is no UTF-8, and `undecodable` counts those bytes.
"""

import gzip
import io
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from efla_jax.choices import nearest
from efla_jax.data.text import TextError

TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")

type Decoded = tuple[str, int]


def kind_of(file: Path) -> str:
    """The suffix that says how `file` is read, without that of a compression. Raises TextError for any other."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in TEXT_SUFFIXES + ROW_SUFFIXES:
        raise TextError(
            f"{file} has the suffix {kind!r}; it must be one of {', '.join(TEXT_SUFFIXES + ROW_SUFFIXES)},"
            f" alone or followed by one of {', '.join(COMPRESSIONS)}{nearest(kind, TEXT_SUFFIXES + ROW_SUFFIXES)}"
        )
    return kind


def read(file: Path, text_field: str, separator: str | None) -> Iterator[Decoded]:
    """The documents of `file`: its rows' `text_field`, or its text, whole or split at lines that are `separator`.

    Raises TextError, which names the file, for a damaged or unreadable file and for a row without the field.
    """
    kind = kind_of(file)
    try:
        with _open(file) as stream:
            if kind == ".parquet":
                yield from _parquet(file, stream, text_field)
            elif kind == ".jsonl":
                yield from _jsonl(file, stream, text_field)
            elif separator is None:
                yield decode(stream.read())
            else:
                yield from _pieces(stream, separator)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise TextError(f"{file} cannot be read: {error}") from error


def decode(data: bytes) -> Decoded:
    """The text of UTF-8 `data`."""
    try:
        return data.decode(), 0
    except UnicodeDecodeError:
        escaped = data.decode(errors="surrogateescape")  # one surrogate for each byte
        return data.decode(errors="replace"), sum("\udc80" <= character <= "\udcff" for character in escaped)


def text_of(row: Any, text_field: str, where: str) -> Decoded:
    """The text in a row, str or bytes; `where` names the row in errors."""
    if not isinstance(row, Mapping):
        raise TextError(f"{where} is of type {type(row).__name__}; it must be an object with a field {text_field!r}")
    if text_field not in row:
        raise TextError(f"{where} has no field {text_field!r}; it has {_listed(row)}{nearest(text_field, row)}")
    text = row[text_field]
    if isinstance(text, bytes):
        return decode(text)
    if not isinstance(text, str):
        raise TextError(f"{where}: {text_field!r} is of type {type(text).__name__}; it must be text")
    return decode(text.encode(errors="surrogatepass"))  # JSON can escape half a surrogate pair, which is no text


def nearest_file(path: Path) -> str:
    """'; did you mean …?' for a file that is there and named nearly as `path`, or nothing."""
    missing = path.expanduser()
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    return nearest(missing.name, os.listdir(missing.parent)) if missing.parent.is_dir() else ""


def _open(file: Path) -> BinaryIO:
    match file.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(file))
        case ".xz":
            return cast(BinaryIO, lzma.open(file))
        case ".zst":
            import pyarrow

            return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd")))
    return open(file, "rb")


def _pieces(stream: BinaryIO, separator: str) -> Iterator[Decoded]:
    """What lies between the lines that are `separator`, line ends kept, without those lines."""
    border = separator.encode()
    piece: list[bytes] = []
    for line in stream:
        if line.rstrip(b"\r\n") == border:
            yield decode(b"".join(piece))
            piece = []
        else:
            piece.append(line)
    yield decode(b"".join(piece))


def _jsonl(file: Path, stream: BinaryIO, text_field: str) -> Iterator[Decoded]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        text, undecodable = decode(line)
        try:
            row = json.loads(text)
        except ValueError as error:
            raise TextError(f"{file}, row {number} is not JSON: {error}") from error
        text, halves = text_of(row, text_field, f"{file}, row {number}")
        yield text, undecodable + halves


def _parquet(file: Path, stream: BinaryIO, text_field: str) -> Iterator[Decoded]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Parquet is read from its end: what is compressed as a whole must first be in memory.
        seekable = io.BytesIO(stream.read()) if file.suffix.lower() in COMPRESSIONS else stream
        table = pyarrow.parquet.ParquetFile(seekable)
        columns = table.schema_arrow.names
        if text_field not in columns:
            text_of(dict.fromkeys(columns), text_field, f"{file}, row 1")  # raises
        batches = table.iter_batches(columns=[text_field])
        for number, row in enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1):
            yield text_of(row, text_field, f"{file}, row {number}")
    except pyarrow.ArrowException as error:
        raise TextError(f"{file} cannot be read: {error}") from error


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
