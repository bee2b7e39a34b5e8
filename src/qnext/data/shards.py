"""Shards: the tokenised documents of one source as memory-mapped arrays with checksums.

A shard is a folder: ``ids.bin`` (little-endian uint16 or uint32, documents end to end),
``weights.bin`` (uint8: 1 where the token is a target of the loss), ``documents.bin`` (int64 pairs:
where each document ends, and the UTF-8 bytes of its judged text) and ``shard.json``. It appears
under its name only when it is complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from qnext.errors import DataError

FORMAT = 1
DESCRIPTION = "shard.json"
FILES = ("ids.bin", "weights.bin", "documents.bin")


class ShardWriter:
    """Writes one shard; use it as a context. Nothing is left behind when the block fails."""

    def __init__(
        self, folder: Path, name: str, *, id_limit: int, tokenizer: str, about: dict[str, Any]
    ) -> None:
        """``id_limit`` bounds the ids, ``tokenizer`` is its digest, ``about`` is kept as it is."""
        self.target = folder / name
        self._partial = folder / f".{name}.{os.getpid()}.partial"
        self._dtype = np.dtype("<u2") if id_limit <= 1 << 16 else np.dtype("<u4")
        self._id_limit, self._about = id_limit, about
        self._tokenizer = tokenizer
        self.documents = self.tokens = self.judged = self.bytes = 0

    def __enter__(self) -> Self:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._files = {name: (self._partial / name).open("wb") for name in FILES}
        self._hashes = {name: hashlib.sha256() for name in FILES}
        return self

    def add(self, ids: Sequence[int], weights: Sequence[int], judged_bytes: int) -> None:
        """Append a document: ids, for each 1 if it is a target, and the bytes these stand for."""
        assert len(ids) == len(weights) > 0, (len(ids), len(weights))
        array = np.asarray(ids)
        assert array.min() >= 0, ids
        assert array.max() < self._id_limit, (int(array.max()), self._id_limit)
        marks = np.asarray(weights, dtype=np.uint8)
        self.documents += 1
        self.tokens += len(array)
        self.judged += int(marks[1:].sum())
        self.bytes += judged_bytes
        ends = np.array([self.tokens, judged_bytes], dtype="<i8")
        for name, part in zip(FILES, (array.astype(self._dtype), marks, ends), strict=True):
            data = part.tobytes()
            self._files[name].write(data)
            self._hashes[name].update(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for file in self._files.values():
                file.close()
            shutil.rmtree(self._partial, ignore_errors=True)

    def _finish(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        description = {
            "format": FORMAT,
            "name": self.target.name,
            "documents": self.documents,
            "tokens": self.tokens,
            "judged_tokens": self.judged,
            "judged_bytes": self.bytes,
            "dtype": self._dtype.str,
            "id_limit": self._id_limit,
            "tokenizer": self._tokenizer,
            "about": self._about,
            "files": {
                name: {
                    "bytes": (self._partial / name).stat().st_size,
                    "sha256": self._hashes[name].hexdigest(),
                }
                for name in FILES
            },
        }
        with (self._partial / DESCRIPTION).open("w", encoding="utf-8") as file:
            file.write(json.dumps(description, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self.target.exists():
            shutil.rmtree(self.target)
        os.rename(self._partial, self.target)


@dataclass(frozen=True)
class Shard:
    """One shard, open for reading."""

    folder: Path
    description: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> Self:
        """Read the description and check sizes, and with ``verify`` checksums too.

        Raises DataError when the shard is missing, incomplete, changed, or of a newer format.
        """
        path = folder / DESCRIPTION
        if not path.is_file():
            raise DataError(f"{folder} is not a shard: {DESCRIPTION} is missing.")
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            if description["format"] != FORMAT:
                raise DataError(
                    f"{folder} has shard format {description['format']}; this version reads "
                    f"{FORMAT}. Prepare the data again."
                )
            for name, expected in description["files"].items():
                _check(folder / name, expected["bytes"], expected["sha256"] if verify else None)
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is damaged ({error!r}). Prepare the data again.") from error
        return cls(folder, description)

    def __len__(self) -> int:
        return int(self.description["documents"])

    @property
    def name(self) -> str:
        """Name of the source."""
        return str(self.description["name"])

    @property
    def tokens(self) -> int:
        """All tokens, judged or not."""
        return int(self.description["tokens"])

    @cached_property
    def ids(self) -> np.ndarray:
        """Token ids, documents end to end, memory-mapped."""
        return self._map("ids.bin", np.dtype(self.description["dtype"]), self.tokens)

    @cached_property
    def weights(self) -> np.ndarray:
        """uint8 [tokens], memory-mapped: 1 where the token is a target."""
        return self._map("weights.bin", np.dtype(np.uint8), self.tokens)

    @cached_property
    def ends(self) -> np.ndarray:
        """int64 [documents]: where each document ends."""
        pairs = self._map("documents.bin", np.dtype("<i8"), 2 * len(self))
        return np.array(pairs[::2])

    @cached_property
    def judged_bytes(self) -> np.ndarray:
        """int64 [documents]: UTF-8 bytes of each document's judged text."""
        return np.array(self._map("documents.bin", np.dtype("<i8"), 2 * len(self))[1::2])

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, weights) of one document."""
        start = int(self.ends[index - 1]) if index else 0
        end = int(self.ends[index])
        return self.ids[start:end], self.weights[start:end]

    def _map(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        if not count:
            return np.empty(0, dtype=dtype)
        return np.memmap(self.folder / name, dtype=dtype, mode="r", shape=(count,))


def _check(file: Path, size: int, digest: str | None) -> None:
    if not file.is_file():
        raise DataError(f"{file} is missing. Prepare the data again.")
    if file.stat().st_size != size:
        raise DataError(
            f"{file} has {file.stat().st_size:,} bytes, expected {size:,}: it was cut short or "
            "changed. Prepare the data again."
        )
    if digest is not None:
        found = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                found.update(block)
        if found.hexdigest() != digest:
            raise DataError(f"{file} was changed: its checksum differs. Prepare the data again.")


def open_shards(folder: str | Path, *, verify: bool = True) -> dict[str, Shard]:
    """All shards of a folder by name. Raises DataError if there are none or one is damaged."""
    place = Path(folder)
    found = sorted(path.parent for path in place.glob(f"*/{DESCRIPTION}"))
    if not found:
        raise DataError(f"no shards in {place}. Make them with qnext data prepare.")
    return {path.name: Shard.open(path, verify=verify) for path in found}
