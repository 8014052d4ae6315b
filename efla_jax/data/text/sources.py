"""Sources of documents: files, the interpreter's standard library, and the hubs of data sets.

A document without text is none: no source yields "".
"""

import glob
import hashlib
import logging
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efla_jax.choices import nearest
from efla_jax.data.text import TextError, files, hubs
from efla_jax.data.text.files import Decoded

logger = logging.getLogger(__name__)

# One file of the standard library in so many is for validation.
VALIDATION_SHARE = 20
# Its tests are two thirds of it, and not every installation has them; the others hold no library code.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class TextSource(ABC):
    """Documents in an order of their own, the same in every pass.

    `undecodable` counts, by file, the bytes that are no UTF-8 in the files that were read to their end.
    """

    spec: str
    undecodable: dict[str, int] = field(default_factory=dict, compare=False, kw_only=True)

    def documents(self) -> Iterator[str]:
        """Every document; where bytes are no UTF-8 the text has U+FFFD, and a warning counts them.

        Raises TextError for a damaged part, for a row without the text field, and if there is no document.
        """
        empty = True
        for name, part in self._parts():
            undecodable = 0
            for text, count in part:
                undecodable += count
                if text:
                    empty = False
                    yield text
            if undecodable:
                logger.warning("%s: %d bytes are not UTF-8; U+FFFD stands for them", name, undecodable)
                self.undecodable[name] = undecodable
        if empty:
            raise TextError(f"source is {self.spec!r}, which holds no text")

    @abstractmethod
    def fingerprint(self) -> str:
        """The sha256 of the content and of the options that make documents of it."""

    @abstractmethod
    def _parts(self) -> Iterator[tuple[str, Iterator[Decoded]]]:
        """Each part's name, for messages, and its texts."""


@dataclass(frozen=True)
class FileSource(TextSource):
    """The documents of some files, in their order; see `open_source`."""

    files: tuple[Path, ...]
    text_field: str
    separator: str | None

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            kind = files.kind_of(file)
            option = self.text_field if kind in files.ROW_SUFFIXES else self.separator
            digest.update(f"{kind} {file.suffix} {option!r} ".encode())
            try:
                with open(file, "rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            except OSError as error:
                raise TextError(f"{file} cannot be read: {error}") from error
        return digest.hexdigest()

    def _parts(self) -> Iterator[tuple[str, Iterator[Decoded]]]:
        for file in self.files:
            yield str(file), files.read(file, self.text_field, self.separator)


@dataclass(frozen=True)
class RecordSource(TextSource):
    """The `text_field` of the records of a hub's data set. Its fingerprint takes a pass over all of them."""

    records: hubs.Records
    text_field: str

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for text in self.documents():
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def _parts(self) -> Iterator[tuple[str, Iterator[Decoded]]]:
        def text_of(number: int, record: Mapping[str, Any]) -> Decoded:
            return files.text_of(record, self.text_field, f"{self.spec}, row {number}")

        yield self.spec, (text_of(number, record) for number, record in enumerate(self.records(), 1))


def open_source(spec: str, *, text_field: str = "text", separator: str | None = None) -> TextSource:
    """The source that `spec` names; nothing of it is read yet.

    `spec` is one of
    - a path or a glob (** too) of files .txt, .md, .py, .jsonl or .parquet, plain or with .gz, .xz or .zst, in the
      order of their paths. A row of .jsonl or .parquet is a document, its `text_field`; any other file is one
      document, or, with `separator`, one between each two lines that are exactly `separator`;
    - python, python:train or python:validation: the standard library of this interpreter, one document a file,
      without its tests; the split is a function of a file's path in it;
    - tfds:NAME[:SPLIT], a data set that TFDS has prepared as ArrayRecord, and hf:NAME[:SPLIT], one that the package
      `datasets` loads (hf:NAME/CONFIG for a configuration): a record is a document. SPLIT is train if not given.
    Raises TextError if the source is not there or of no known kind.
    """
    if separator is not None and set("\r\n") & set(separator):
        raise TextError(f"separator is {separator!r}; it must be a single line, without its end")
    scheme, colon, rest = spec.partition(":")
    if scheme == "python":
        return FileSource(spec, _standard_library(spec, rest if colon else None), text_field, separator)
    if colon and scheme in hubs.HUBS:
        name, _, split = rest.partition(":")
        if not name:
            raise TextError(f"source is {spec!r}; a name must follow {scheme}:")
        return RecordSource(spec, hubs.HUBS[scheme](name, split or "train"), text_field)
    return FileSource(spec, _matches(spec, separator), text_field, separator)


def _matches(spec: str, separator: str | None) -> tuple[Path, ...]:
    """The files that `spec` names, sorted by path."""
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        raise TextError(f"source is {spec!r}, a folder; it must be files, such as {str(Path(spec, '**', '*.txt'))!r}")
    found = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    matches = tuple(file for file in found if file.is_file())
    if not spec or not matches:
        schemes = nearest(spec.partition(":")[0], ("python", *hubs.HUBS))
        hint = (schemes or files.nearest_file(Path(spec))) if spec else ""
        raise TextError(
            f"source is {spec!r}, which matches no file{hint}; it must be a path or a glob of files, python,"
            " python:train, python:validation, tfds:NAME[:SPLIT] or hf:NAME[:SPLIT]"
        )
    for file in matches:
        if files.kind_of(file) in files.ROW_SUFFIXES and separator is not None:
            raise TextError(f"separator is {separator!r}, but {file} holds rows; it must be None")
    return matches


def _standard_library(spec: str, split: str | None) -> tuple[Path, ...]:
    """The modules of the running interpreter that are in `split`; None: in both."""
    splits = ("train", "validation")
    if split is not None and split not in splits:
        raise TextError(f"source is {spec!r}; its split must be one of {', '.join(splits)}{nearest(split, splits)}")
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    library = [path for path in paths if not _NOT_LIBRARY & set(path.parts)]
    if not library:
        raise TextError(f"source is {spec!r}, but {root} holds no modules: this Python comes without their source")
    return tuple(root / path for path in library if split in (None, splits[_for_validation(path)]))


def _for_validation(path: Path) -> bool:
    digest = hashlib.sha256(path.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") % VALIDATION_SHARE == 0
