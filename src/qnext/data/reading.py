"""Rows of text, JSON-lines and Parquet files, plain or compressed, in bounded memory.

A row is a mapping: ``{"text": ...}`` of a text file, the object of a JSON line, the named columns
of a Parquet row. Every mistake in a file is a DataError that says where.
"""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from qnext.errors import DataError

MAX_LINE_BYTES = 64 << 20
"""Longest JSON line that is read; the text of a text file is cut instead."""
MAX_TEXT_BYTES = 1 << 20
"""A plain text without an empty line in so many bytes becomes several documents."""
COMPRESSED = (".gz", ".xz", ".zst")
FORMATS = {".txt": "text", ".md": "text", ".text": "text", ".jsonl": "json", ".ndjson": "json",
           ".json": "json", ".parquet": "parquet"}  # fmt: skip

Utf8 = Literal["strict", "repair"]
"""What happens to bytes that are not UTF-8: ``strict`` refuses the file and says where they stand;
``repair`` puts U+FFFD for every broken sequence, and the cleaner drops texts with many of them."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands."""

    value: Mapping[str, Any]
    where: str
    """Such as ``stories.jsonl.xz line 17``."""


def read_rows(
    path: str | Path,
    *,
    columns: Sequence[str] = ("text", "messages"),
    utf8: Utf8 = "strict",
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Row]:
    """Rows of one file; its format is told by its name (``.txt.gz``, ``.jsonl.xz``, ...).

    ``columns`` are those read from Parquet files, where they exist. Raises DataError for a file
    that is missing, empty, damaged, of an unknown format, or not UTF-8.
    """
    file = Path(path)
    kind = format_of(file)
    if not file.is_file():
        raise DataError(f"{file} is not there.")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty (0 bytes). Take it off the list, or fetch it again.")
    if kind == "parquet":
        yield from _parquet_rows(file, columns)
        return
    rows = _text_rows if kind == "text" else _json_rows
    found = False
    try:
        with file.open("rb") as raw, _decompressed(raw, file) as stream:
            for row in rows(stream, file, utf8, max_line_bytes):
                found = True
                yield row
    except (lzma.LZMAError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{file} is damaged or cut short: {error}. Fetch it again; nothing was written."
        ) from error
    if not found:
        raise DataError(f"{file} holds no rows, only blank lines.")


def format_of(path: Path) -> str:
    """``text``, ``json`` or ``parquet``. Raises DataError for other names."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = FORMATS.get(suffixes[-1]) if suffixes else None
    if kind is None:
        raise DataError(
            f"{path}: the format cannot be told from the name. Expected one of "
            f"{', '.join(FORMATS)}, alone or followed by {', '.join(COMPRESSED)}."
        )
    return kind


def _decompressed(raw: IO[bytes], file: Path) -> IO[bytes]:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
    if suffix == ".xz":
        return cast("IO[bytes]", lzma.LZMAFile(raw))
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(
                f"{file}: reading .zst files needs the package zstandard. Install it "
                "(pip install zstandard), or unpack the file first."
            ) from error
        return cast("IO[bytes]", _Zstandard(zstandard, raw, file))
    return raw


class _Zstandard(io.RawIOBase):
    """A .zst stream whose errors are DataErrors, and which notices a missing end."""

    def __init__(self, library: Any, raw: IO[bytes], file: Path) -> None:
        self._raw, self._file, self._library = raw, file, library
        self._decompressor = library.ZstdDecompressor().decompressobj(read_across_frames=True)
        self._left = b""

    def readable(self) -> bool:
        return True

    def readline(self, size: int | None = -1, /) -> bytes:
        limit = -1 if size is None else size
        while True:
            end = self._left.find(b"\n")
            if end >= 0 and (limit < 0 or end < limit):
                return self._take(end + 1)
            if 0 <= limit <= len(self._left) or not self._more():
                return self._take(len(self._left) if limit < 0 else limit)

    def read(self, size: int = -1, /) -> bytes:
        while (size < 0 or len(self._left) < size) and self._more():
            pass
        return self._take(len(self._left) if size < 0 else size)

    def _take(self, count: int) -> bytes:
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def _more(self) -> bool:
        block = self._raw.read(1 << 18)
        if not block:
            if not self._left and not self._decompressor.eof and self._decompressor.unused_data:
                raise EOFError("unfinished frame")
            return False
        try:
            self._left += self._decompressor.decompress(block)
        except self._library.ZstdError as error:
            raise DataError(f"{self._file} is damaged: {error}. Fetch it again.") from error
        return True


def _json_rows(stream: IO[bytes], file: Path, utf8: Utf8, limit: int) -> Iterator[Row]:
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        where = f"{file} line {number}"
        if len(line) > limit:
            raise DataError(
                f"{where} is longer than {limit >> 20} MiB. A JSON line is one document: split it, "
                "or raise --max-line. Plain text of any length is read as .txt."
            )
        if not line.strip():
            continue
        text = _decoded(line, where, utf8)
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            cut = "" if line.endswith(b"\n") else " The file ends here: it was cut short."
            raise DataError(
                f"{where} is not a complete JSON object: {error.msg} at column {error.colno}.{cut} "
                "Mend or remove the line."
            ) from error
        if not isinstance(value, dict):
            raise DataError(
                f"{where}: expected a JSON object, found {type(value).__name__}. Each line holds "
                'one document, such as {"text": "..."}.'
            )
        yield Row(cast("dict[str, Any]", value), where)


def _text_rows(stream: IO[bytes], file: Path, utf8: Utf8, limit: int) -> Iterator[Row]:
    """Documents stand between form feeds or lines of three dashes; long ones are cut."""
    block: list[bytes] = []
    size = 0
    number = first = 1
    while True:
        line = stream.readline(MAX_TEXT_BYTES)
        ends = line.strip() in (b"\f", b"---") or not line
        if block and (ends or size + len(line) > MAX_TEXT_BYTES):
            whole, rest = (b"".join(block), b"") if ends else _cut(b"".join(block))
            where = f"{file} line {first}"
            text = _decoded(whole, where, utf8)
            if text.strip():
                yield Row({"text": text}, where)
            block, size, first = ([rest] if rest else []), len(rest), number
        if not line:
            return
        if not ends:
            block.append(line)
            size += len(line)
        number += line.endswith(b"\n")


def _cut(text: bytes) -> tuple[bytes, bytes]:
    """Cut before the end at a paragraph, a line, a space, or at least between two characters."""
    for mark in (b"\n\n", b"\n", b" "):
        at = text.rfind(mark, len(text) // 2)
        if at > 0:
            return text[: at + len(mark)], text[at + len(mark) :]
    at = len(text)
    while at > len(text) - 4 and (text[at - 1] & 0xC0) == 0x80:
        at -= 1
    # A lead byte whose followers have not been read yet belongs to the rest.
    at -= at > 0 and text[at - 1] >= 0xC0
    return text[:at], text[at:]


def _decoded(data: bytes, where: str, utf8: Utf8) -> str:
    try:
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        if utf8 == "repair":
            return data.decode("utf-8", errors="replace")
        bad = " ".join(f"{byte:02x}" for byte in data[error.start : error.start + 4])
        raise DataError(
            f"{where} is not UTF-8: byte {bad} at position {error.start + 1}. Convert the file "
            "(iconv -f LATIN1 -t UTF-8), or read it with --utf8 repair, which puts U+FFFD there "
            "and drops texts with many of them."
        ) from error


def _parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{file}: reading Parquet needs the package pyarrow. Install it (pip install "
            "'qnext[parquet]'), or convert the file to JSON lines."
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            there = [name for name in columns if name in table.schema_arrow.names]
            if not there:
                raise DataError(
                    f"{file} has no column {' or '.join(columns)}; it has "
                    f"{', '.join(table.schema_arrow.names)}. Name the right one with --field."
                )
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=there):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(value, f"{file} row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet file: {error}.") from error
    if not number:
        raise DataError(f"{file} holds no rows.")
