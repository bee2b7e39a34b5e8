"""One file of the disk cache: a checked header and a payload of opaque bytes.

    magic 8, version u32, header length u32 | header, JSON | BLAKE2b-16 of all before | payload

The header carries a BLAKE2b-16 of every MiB of the payload, so a damaged file is found before any
of it is used. A file is written beside its place, flushed, and then renamed: under its name there
is always a whole file or none.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qnext.errors import QnextError

MAGIC = b"QNXCACHE"
FORMAT_VERSION = 1
BLOCK_BYTES = 1 << 20
"""Bytes of payload per checksum."""
TEMPORARY = ".tmp"
"""Ending of a file that is not finished."""
_START = struct.Struct("<8sII")
_DIGEST = 16
_MAX_HEADER = 1 << 24

Check = Callable[[Any], Any]
_HEADER: dict[str, Check] = {
    "kind": lambda value: value in ("page", "state"),
    "namespace": lambda value: isinstance(value, str),
    "parent": lambda value: isinstance(value, str) and re.fullmatch(r"([0-9a-f]{32})?", value),
    "ids": lambda value: isinstance(value, list) and all(_is_count(i) for i in value),
    "mtp_first": lambda value: _is_count(value),
    "parts": lambda value: isinstance(value, list) and all(_is_count(i) for i in value),
    "checksums": lambda value: isinstance(value, list) and all(type(i) is str for i in value),
}


class DamagedBlob(QnextError):
    """A file is not what was written: short, changed, or of another kind."""


class NewerBlob(QnextError):
    """A file of a later version of the format: not for this program, and not to be touched."""


def digest(*parts: bytes) -> str:
    """BLAKE2b-16 in hexadecimal."""
    state = hashlib.blake2b(digest_size=_DIGEST)
    for part in parts:
        state.update(part)
    return state.hexdigest()


def write_blob(path: Path, header: Mapping[str, Any], parts: Sequence[bytes]) -> int:
    """Write a file so that it appears whole or not at all; returns its size. Raises OSError."""
    payload = b"".join(parts)
    checksums = [
        digest(payload[at : at + BLOCK_BYTES]) for at in range(0, len(payload), BLOCK_BYTES)
    ]
    full = {**header, "parts": [len(part) for part in parts], "checksums": checksums}
    text = json.dumps(full, sort_keys=True, separators=(",", ":")).encode()
    start = _START.pack(MAGIC, FORMAT_VERSION, len(text))
    content = b"".join((start, text, bytes.fromhex(digest(start, text)), payload))
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb", opener=_private) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return len(content)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The checked header of a file, and the file's size; the payload is not read.

    Raises DamagedBlob, NewerBlob, or OSError when the file cannot be read.
    """
    with open(path, "rb") as file:
        header, _ = _header(file, path)
        return header, os.fstat(file.fileno()).st_size


def read_blob(path: Path) -> tuple[dict[str, Any], list[bytes]]:
    """The checked header and parts of a file. Raises like ``read_header``."""
    with open(path, "rb") as file:
        header, size = _header(file, path)
        payload = file.read(size)
    for number, expected in enumerate(header["checksums"]):
        at = number * BLOCK_BYTES
        if digest(payload[at : at + BLOCK_BYTES]) != expected:
            raise DamagedBlob(f"{path}: the bytes from {at} on are not those that were written.")
    parts, at = [], 0
    for length in header["parts"]:
        parts.append(payload[at : at + length])
        at += length
    return header, parts


def _header(file: Any, path: Path) -> tuple[dict[str, Any], int]:
    """The header of an open file, which is left at the payload; and the payload's size."""
    start = file.read(_START.size)
    if len(start) < _START.size or start[:8] != MAGIC:
        raise DamagedBlob(f"{path}: not a file of the cache.")
    _, version, length = _START.unpack(start)
    if version > FORMAT_VERSION:
        raise NewerBlob(f"{path}: format {version}, this program knows {FORMAT_VERSION}.")
    if version < 1 or length > _MAX_HEADER:
        raise DamagedBlob(f"{path}: format {version} with a header of {length} bytes.")
    text, checksum = file.read(length), file.read(_DIGEST)
    if checksum.hex() != digest(start, text):
        raise DamagedBlob(f"{path}: the header is not the one that was written.")
    header = json.loads(text)  # its checksum is right, so it is what this program wrote
    wrong = [name for name, check in _HEADER.items() if not check(header.get(name))]
    if wrong:
        raise DamagedBlob(f"{path}: the header lacks {', '.join(wrong)}.")
    size = sum(header["parts"])
    found = os.fstat(file.fileno()).st_size - _START.size - length - _DIGEST
    blocks = -(-size // BLOCK_BYTES)
    if found != size or len(header["checksums"]) != blocks:
        raise DamagedBlob(f"{path}: {found:,} bytes of payload, expected {size:,}.")
    return header, size


def make_folder(path: Path) -> None:
    """Make a folder that only its owner can enter, and those above it; durably."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames and removals in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
