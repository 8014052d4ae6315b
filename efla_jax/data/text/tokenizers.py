"""Tokenizers: bytes, `tokenizers` JSON files, SentencePiece models; training of a byte-level BPE.

A tokenizer turns text into ids below `vocab_size`, never its `separator`, the id that begins and ends every document:
text that spells a special token is text.
"""

import codecs
import hashlib
import importlib.util
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from efla_jax.choices import nearest
from efla_jax.data.text import TextError
from efla_jax.data.text.files import nearest_file
from efla_jax.data.text.sources import TextSource

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_JSON, _SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
_BYTES = b'{"type": "bytes"}\n'


class TokenStream(Protocol):
    """Text of ids that come one by one. All it returns, put together, is `decode` of all ids."""

    def push(self, token: int) -> str:
        """What is certain of the text now; never half a character."""
        ...

    def flush(self) -> str:
        """The rest, once no id follows."""
        ...


class Tokenizer(ABC):
    """Text to ids and back. `fingerprint` is the sha256 of its content, which `save` writes to a file."""

    def __init__(self, name: str, vocab_size: int, separator: int, content: bytes, filename: str):
        self.name = name
        self.vocab_size = vocab_size
        self.separator = separator
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self._content = content
        self._filename = filename

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32 [N]."""
        (ids,) = self.encode_batch([text])
        return ids

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each of `texts`, int32 [N]."""

    @abstractmethod
    def stream(self) -> TokenStream:
        """A new decoder of ids that come one by one."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Separators have none; U+FFFD stands for bytes that are no UTF-8."""
        stream = self.stream()
        return "".join([stream.push(int(token)) for token in ids]) + stream.flush()

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the file in `folder` that `load_tokenizer` makes this tokenizer of, and returns its path."""
        path = Path(folder, self._filename)
        path.write_bytes(self._content)
        return path


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8, ids 0 to 255; the separator is 256."""

    def __init__(self):
        super().__init__("bytes", vocab_size=257, separator=256, content=_BYTES, filename=_JSON)
        self._bytes = [bytes([value]) for value in range(256)] + [b""]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def stream(self) -> TokenStream:
        return _ByteStream(self._bytes)


class JsonTokenizer(Tokenizer):
    """A JSON file of the `tokenizers` library. Byte-level ones decode to the very bytes that were encoded."""

    def __init__(self, name: str, content: bytes):
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise TextError(f"{name} is no tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # as text: a document may spell one
        super().__init__(
            name,
            vocab_size=1 + max(tokenizer.get_vocab(with_added_tokens=True).values()),
            separator=_json_separator(name, tokenizer),
            content=content,
            filename=_JSON,
        )
        self._tokenizer = tokenizer
        byte_level = isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel)
        self._bytes = _token_bytes(tokenizer, self.vocab_size) if byte_level else None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def stream(self) -> TokenStream:
        return _ByteStream(self._bytes) if self._bytes else _WindowStream(self._tokenizer.decode, self.vocab_size)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its separator is the end of a sentence."""

    def __init__(self, name: str, content: bytes):
        processor = _sentencepiece(name, content)
        vocab_size, separator = processor.vocab_size(), processor.eos_id()
        if separator < 0:
            raise TextError(f"{name} has no token for the end of a sentence (eos); it must have one, as the separator")
        super().__init__(name, vocab_size, separator, content, filename=_SENTENCEPIECE)
        self._processor = processor

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._processor.encode(list(texts))]

    def stream(self) -> TokenStream:
        return _WindowStream(self._processor.decode, self.vocab_size)


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `spec` names.

    `spec` is `bytes`; `mistral`, the model of 32,000 pieces in the package mistral-common; or the path of a
    `tokenizers` JSON file, of a SentencePiece model (.model), or of a folder that a tokenizer was saved in. The
    separator of a JSON file is the first of SEPARATORS that it has. Raises TextError if it is not to be had.
    """
    name = os.fspath(spec)
    if name == "bytes":
        return ByteTokenizer()
    path = _mistral() if name == "mistral" else Path(name).expanduser()
    if name and path.is_dir():
        found = [path / filename for filename in (_JSON, _SENTENCEPIECE) if (path / filename).is_file()]
        if len(found) != 1:
            raise TextError(f"tokenizer is {name!r}, a folder; it must hold {_JSON} or {_SENTENCEPIECE}, and not both")
        (path,) = found
    if not name or not path.is_file():
        hint = nearest(name, ("bytes", "mistral")) or nearest_file(path) if name else ""
        raise TextError(
            f"tokenizer is {name!r}, which is no file{hint}; it must be bytes, mistral, or the path of a"
            " tokenizers .json or a SentencePiece .model"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error}") from error
    if path.suffix == ".json":
        return ByteTokenizer() if content == _BYTES else JsonTokenizer(name, content)
    if ".model" in path.suffixes:
        return SentencePieceTokenizer(name, content)
    raise TextError(f"tokenizer is {name!r}, of suffix {path.suffix!r}; it must be a .json or a .model file")


def train_bpe(source: TextSource, vocab_size: int, output: str | os.PathLike[str]) -> None:
    """Trains a byte-level BPE of `vocab_size` tokens, <|endoftext|> among them, and writes its JSON file.

    The same documents give the same file. Raises TextError if they have too few pairs that occur twice.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    output = Path(output).expanduser()
    if output.suffix != ".json":
        raise TextError(f"output is {str(output)!r}; it must end in .json")
    if not output.parent.is_dir():
        raise TextError(f"output is {str(output)!r}; its folder must exist")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise TextError(f"vocab_size is {vocab_size}; it must be at least {len(alphabet) + 1}: the bytes, a separator")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[SEPARATORS[0]],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(source.documents(), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise TextError(
            f"vocab_size is {vocab_size}; the text of {source.spec!r} gives {tokenizer.get_vocab_size()} at most"
        )
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        tokenizer.save(str(Path(folder, output.name)))
        os.replace(Path(folder, output.name), output)


class _ByteStream:
    """Each id stands for some bytes, whatever stands beside it."""

    def __init__(self, bytes_of: Sequence[bytes]):
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        _check(token, len(self._bytes_of))
        return self._decoder.decode(self._bytes_of[token])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """The library's own decoder over a window of ids: the ones last shown, then those not shown yet.

    Decoders drop a leading space and join the bytes of a character, so an id's text depends on its neighbours.
    """

    def __init__(self, decode: Callable[[list[int]], str], vocab_size: int):
        self._decode = decode
        self._vocab_size = vocab_size
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        _check(token, self._vocab_size)
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):  # nothing yet, or maybe the first bytes of a character
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._ids, self._shown = [], 0
        return text

    def _new_text(self) -> str:
        shown, text = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        return text[len(shown) :] if text.startswith(shown) else self._decode(self._ids[self._shown :])


def _check(token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise ValueError(f"token is {token}; it must be in [0, {vocab_size})")


def _json_separator(name: str, tokenizer: "tokenizers.Tokenizer") -> int:
    for token in SEPARATORS:
        separator = tokenizer.token_to_id(token)
        if separator is not None:
            return separator
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    raise TextError(
        f"{name} has no separator of documents: it must have one of {', '.join(SEPARATORS)};"
        f" its special tokens are {', '.join(special) or 'none'}"
    )


def _token_bytes(tokenizer: "tokenizers.Tokenizer", vocab_size: int) -> list[bytes]:
    """The bytes of each id of a byte-level tokenizer; none for a special token or an id that is not in use."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    byte_of = {chr(value): value for value in printable} | {chr(256 + n): value for n, value in enumerate(others)}
    table = [b""] * vocab_size
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        table[index] = b"".join(bytes([byte_of[c]]) if c in byte_of else c.encode() for c in token)
    for index, token in tokenizer.get_added_tokens_decoder().items():
        table[index] = b"" if token.special else token.content.encode()
    return table


def _sentencepiece(name: str, content: bytes) -> "sentencepiece.SentencePieceProcessor":
    try:
        import sentencepiece
    except ImportError as error:
        raise TextError(
            f"{name} needs the package sentencepiece: pip install 'efla-jax[sentencepiece]' ({error})"
        ) from error
    try:
        if not content:  # which the library takes for no model given
            raise RuntimeError("the file is empty")
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise TextError(f"{name} is no SentencePiece model: {error}") from error


def _mistral() -> Path:
    """The file in mistral-common, found without importing that package."""
    package = importlib.util.find_spec("mistral_common")
    for folder in package.submodule_search_locations or () if package else ():
        path = Path(folder, "data", "tokenizer.model.v1")
        if path.is_file():
            return path
    raise TextError("tokenizer is 'mistral', which needs mistral-common: pip install 'efla-jax[sentencepiece]'")
