"""Writing packed checkpoints: shards that stream to disk, are checked, and are never half there.

A shard is written piece by piece, so memory is bounded by the largest piece, whatever the size of
the model. Its header is padded so that stacks of experts begin on multiples of 4,096 bytes and
packed matrices on multiples of 64: a mapped file is used in place.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnext.errors import CheckpointError
from qnext.quantization import EXPERT_ALIGNMENT
from qnext.weights.folder import INDEX_FILE, SINGLE_FILE
from qnext.weights.packed import Part
from qnext.weights.safetensors_file import NAMES

SHARD_BYTES = 2 * 10**9
"""A shard ends with the layer that reaches this size; an interruption costs at most one shard."""
PROGRESS_FILE = "quantize-progress.json"
_READ_BYTES = 4 * 2**20

Pieces = Callable[[Part], Iterable[Tensor]]
"""The bytes of a part: contiguous tensors of any dtype, one after another."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A part, and the dtype it has in the file."""

    part: Part
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes it takes in the file."""
        return prod(self.part.stored_shape) * self.dtype.itemsize


def shard_names(count: int) -> list[str]:
    """File names of a checkpoint in so many shards."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def divide(entries: list[Entry], shard_bytes: int = SHARD_BYTES) -> list[list[Entry]]:
    """Entries in shards; a layer is never cut in two."""
    units: dict[str, list[Entry]] = {}
    for entry in entries:
        words = entry.part.name.split(".")
        layer = words.index("layers") + 2 if "layers" in words else 2
        units.setdefault(".".join(words[:layer]), []).append(entry)
    shards: list[list[Entry]] = [[]]
    size = 0
    for unit in units.values():
        own = sum(entry.num_bytes for entry in unit)
        if shards[-1] and size + own > shard_bytes:
            shards.append([])
            size = 0
        shards[-1] += unit
        size += own
    return shards


def write_shard(file: Path, entries: list[Entry], pieces: Pieces) -> str:
    """Write one safetensors file, all at once or not at all; returns its SHA-256.

    Order in the file: stacks of experts, packed matrices, the rest from wide to narrow dtypes.
    Raises CheckpointError when the disk refuses.
    """
    ordered = sorted(entries, key=_place)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in ordered:
        begin, end = end, end + entry.num_bytes
        header[entry.part.stored_name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.part.stored_shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-(len(head) + 8) % EXPERT_ALIGNMENT)
    digest = hashlib.sha256()
    scratch = file.with_name(f".{file.name}.writing")
    try:
        with scratch.open("wb") as stream:
            start = memoryview(len(head).to_bytes(8, "little") + head)
            for block in chain((start,), _bytes_of(ordered, pieces)):
                digest.update(block)
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(file)
    except OSError as error:
        raise CheckpointError(
            f"{file} could not be written: {error.strerror or error}. Free some space or choose "
            "another path; what is finished is kept."
        ) from error
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
    return digest.hexdigest()


def _place(entry: Entry) -> tuple[int, int]:
    if entry.part.format is None:
        return 2, -entry.dtype.itemsize
    return (0 if entry.part.kind == "experts" else 1), 0


def _bytes_of(entries: list[Entry], pieces: Pieces) -> Iterator[memoryview]:
    for entry in entries:
        written = 0
        for piece in pieces(entry.part):
            flat = piece.contiguous().flatten().view(torch.uint8)
            written += flat.numel()
            yield flat.numpy().data
        assert written == entry.num_bytes, (entry, written)


def write_index(folder: Path, shards: list[list[Entry]]) -> None:
    """The index of a checkpoint of more than one shard."""
    names = shard_names(len(shards))
    if len(shards) == 1:
        return
    weight_map = {
        entry.part.stored_name: name
        for name, shard in zip(names, shards, strict=True)
        for entry in shard
    }
    total = sum(entry.num_bytes for shard in shards for entry in shard)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX_FILE, content)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON beside the file and rename: a reader sees the old content or the new."""
    scratch = file.with_name(f".{file.name}.writing")
    with scratch.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    scratch.replace(file)


def checksum(file: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
