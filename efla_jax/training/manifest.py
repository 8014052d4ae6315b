"""The manifest of a checkpoint: size and sha256 of each of its files, and what its writer adds.

A directory is what was saved if its manifest says so. The manifest holds its own sha256, too: a
damaged one must not be read as one that says something else.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

NAME = "manifest.json"


class DamagedError(Exception):
    """The directory is not what was saved; the message names the file and what is wrong."""


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` and what the files below `path` are; then all of it is on the disk."""
    files = {name: {"size": file.stat().st_size, "sha256": _sha256(file)} for name, file in _files(path).items()}
    (path / NAME).write_bytes(_encode(content | {"files": files}))
    for entry in (path, *path.rglob("*")):
        sync(entry)


def read(path: Path) -> dict[str, Any]:
    """Returns the manifest's content.

    Raises DamagedError unless it is intact and the files are there, at their sizes and no others;
    their bytes are for `verify`.
    """
    try:
        raw = (path / NAME).read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"half-written, {NAME} is missing") from None
    try:
        content = json.loads(raw)["content"]
        if _encode(content) != raw:
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise DamagedError(f"{NAME} is corrupt, its sha256 differs") from None
    needed = {name: entry["size"] for name, entry in content["files"].items()}
    sizes = {name: file.stat().st_size for name, file in _files(path).items()}
    for name in sorted(needed.keys() | sizes.keys()):
        if name not in sizes:
            raise DamagedError(f"half-written, {name} is missing")
        if name not in needed:
            raise DamagedError(f"{name} is not one of its files")
        if sizes[name] != needed[name]:
            raise DamagedError(f"half-written, {name} has {sizes[name]} of {needed[name]} bytes")
    return content


def verify(path: Path, content: dict[str, Any]) -> None:
    """Raises DamagedError unless every file has the bytes that were saved."""
    for name, entry in content["files"].items():
        if _sha256(path / name) != entry["sha256"]:
            raise DamagedError(f"{name} is corrupt, its sha256 differs")


def sync(path: Path) -> None:
    """Brings a file, or a directory's list of names, to the disk: a power cut cannot undo it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(content: dict[str, Any]) -> bytes:
    """The one form of the manifest's bytes, so that any other byte is damage."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({"content": content, "sha256": digest}, sort_keys=True, indent=1).encode()


def _files(path: Path) -> dict[str, Path]:
    """Every file below `path` but the manifest, by relative name."""
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    files.pop(NAME, None)
    return files


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
