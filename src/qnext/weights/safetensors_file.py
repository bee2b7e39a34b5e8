"""One safetensors file: read its header, map its bytes, write a new one.

The format is 8 bytes of little-endian header length, a JSON header, then the tensors end to end.
It is read here rather than through a library for two promises: a damaged file is named together
with what is wrong with it, and the mapped pages that were already copied are handed back to the
system while the rest of the file is still being read. What the names mean is not known here.
"""

import json
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor

from qnext.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's dtype names."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""And back."""
_MAX_HEADER_BYTES = 100_000_000
_RELEASE_BYTES = 32 * 2**20
"""Mapped pages are let go after so many bytes were read through them."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: str
    """The format's name: BF16, F32, F8_E4M3, ..."""
    shape: tuple[int, ...]
    file: Path
    """The file that holds it."""
    start: int
    """Byte offset in the file."""
    num_bytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, dtypes, shapes and places of all tensors of a file, in the order of their bytes.

    Raises CheckpointError when the file is truncated or is not a safetensors file at all.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        if first + stream.read(8) == b"version https://":
            raise CheckpointError(
                f"{file} is a Git LFS pointer, not the weights themselves. "
                "Run `git lfs pull` in that folder, or download the file again."
            )
        stream.seek(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length < 2 or length > _MAX_HEADER_BYTES:
            raise _foreign(file, "it does not begin with the length of a header")
        if 8 + length > size:
            raise CheckpointError(
                f"{file} is truncated: its header alone takes {8 + length} bytes, the file has "
                f"{size}. Download or copy it again."
            )
        head = stream.read(length)
    try:
        raw = json.loads(head.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _foreign(file, f"its header is not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise _foreign(file, "its header is not a JSON object")
    entries = {k: v for k, v in cast("dict[str, Any]", raw).items() if k != "__metadata__"}
    infos = [(name, _info(file, name, entry, 8 + length)) for name, entry in entries.items()]
    infos.sort(key=lambda item: (item[1].start, item[1].num_bytes))
    end = 8 + length
    for name, info in infos:
        if info.start != end:
            raise _foreign(file, f"the bytes of {name} overlap another tensor or leave a gap")
        end += info.num_bytes
    if size < end:
        raise CheckpointError(
            f"{file} is truncated: its header promises {end} bytes, the file has {size}. "
            "Download or copy it again."
        )
    if size > end:
        raise _foreign(file, f"{size - end} bytes follow the last tensor")
    return dict(infos)


def _info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _foreign(file, f"the entry of {name} lacks dtype, shape or data_offsets") from None
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: {name} has dtype {dtype!r}, which is not supported; "
            f"expected one of {', '.join(DTYPES)}."
        )
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise _foreign(file, f"the shape or the offsets of {name} are not natural numbers")
    if end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise _foreign(file, f"{name} is {dtype} {list(shape)} but occupies {end - begin} bytes")
    return TensorInfo(dtype, shape, file, data_start + begin, end - begin)


def _foreign(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is not a valid safetensors file: {why}. Download it again, or convert the weights "
        "with the safetensors library."
    )


class MappedFile:
    """The tensors of one file as views of mapped memory; nothing is read until it is touched.

    A context manager. Views must not outlive it.
    """

    def __init__(self, file: Path) -> None:
        # A private mapping: torch takes only writable buffers without complaint, and nothing here
        # ever writes, so the pages stay those of the file.
        with file.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        self._read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # On failure a view may live on in the traceback; the mapping then ends with it.
        if kind is None:
            self._map.close()

    def tensor(self, info: TensorInfo) -> Tensor:
        """A view in the stored dtype and shape; a copy only where the bytes are misaligned."""
        dtype = DTYPES[info.dtype]
        if info.num_bytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        data = torch.frombuffer(
            self._map, dtype=torch.uint8, count=info.num_bytes, offset=info.start
        )
        if data.data_ptr() % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(info.shape)

    def done_with(self, num_bytes: int) -> None:
        """Say that so many bytes were copied out; now and then their pages are given back.

        A page that is needed again is simply read again, so this never changes a value.
        """
        self._read += num_bytes
        if self._read >= _RELEASE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read = 0


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor to be written, and the dtype it is to have in the file."""

    name: str
    tensor: Tensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes it takes in the file."""
        return self.tensor.numel() * self.dtype.itemsize


def write_file(file: Path, tensors: Iterable[OutTensor]) -> None:
    """Write a safetensors file and force it to the disk; each tensor is read where it lies.

    Wide dtypes come first, which keeps every tensor aligned; otherwise the given order is kept.
    Raises OSError when the disk refuses.
    """
    ordered = sorted(tensors, key=lambda out: -out.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for out in ordered:
        begin, end = end, end + out.num_bytes
        header[out.name] = {
            "dtype": NAMES[out.dtype],
            "shape": list(out.tensor.shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little"))
        stream.write(head)
        for out in ordered:
            flat = out.tensor.detach().to(device="cpu", dtype=out.dtype).contiguous().flatten()
            stream.write(flat.view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
