"""Packed weights: 8-bit and 4-bit matrices in the bytes the native kernels read.

``csrc/linear.h`` fixes the two layouts and docs/formats.md draws them. In short:

    q8   w = d[row, block] * q           q in -127..127, blocks of 256 columns       8.125 bits
    q4   w = R[row] * s[row, group] * q  q in -8..7, s in -15..15, groups of 16      4.5 bits

Both are stored in tiles of 32 rows that run along the columns; rows and columns are padded to 32
with weights that are exactly zero. This file turns integers into bytes and back; which integers
stand for a weight best is decided in ``rounding.py``.

A feed-forward's gate and up matrices are stored as one, their tiles in turn (gate, up, gate, ...),
so that who finishes two neighbouring tiles holds 32 finished values of ``silu(gate) * up``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from qnext.errors import CheckpointError
from qnext.quantization import (
    BLOCK,
    COLUMNS,
    EXPERT_ALIGNMENT,
    GROUP,
    LINE,
    Q4_COLUMNS_BYTES,
    ROW_SCALES_BYTES,
    TILE_ROWS,
    expert_bytes,
    matrix_bytes,
    round_up,
    stored_rows,
    tile_bytes,
)
from qnext.weights.rounding import round_q4, round_q8

_CHUNK_WEIGHTS = 1 << 22
"""Weights that are packed or unpacked at once, which bounds the memory for it."""


__all__ = [
    "EXPERT_ALIGNMENT",
    "LINE",
    "PackedExperts",
    "PackedMatrix",
    "empty_experts",
    "expert_bytes",
    "experts_of",
    "matrix_bytes",
    "pack",
    "pack_experts",
    "pack_into",
    "pack_pair",
    "pack_pair_into",
    "pack_q4",
    "pack_q8",
    "stored_rows",
    "unpack",
    "unpack_expert_into",
    "unpack_into",
]


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix [rows, cols] as the native kernels read it."""

    format: str
    """q8 or q4."""
    rows: int
    """Outputs."""
    cols: int
    """Inputs."""
    data: Tensor
    """[matrix_bytes(format, rows, cols)] uint8."""


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """``count`` matrices of one shape, at equal distances in memory.

    ``paired`` ones are gate and up together: logical rows are gate's, then up's; each half is
    padded to 32 rows and the tiles of the halves alternate. A dense feed-forward and a shared
    expert are stored the same way with ``count`` 1.
    """

    format: str
    """q8 or q4."""
    count: int
    rows: int
    """Outputs of one matrix; of a pair: gate's and up's together."""
    cols: int
    data: Tensor
    """[count, bytes of one matrix] uint8, bytes of a row adjacent."""
    stride: int
    """Bytes from one matrix to the next, a multiple of 64."""
    paired: bool

    @property
    def stored_rows(self) -> int:
        """Rows including the padding between the halves: those of the matrix a kernel sees."""
        return stored_rows(self.rows, paired=self.paired)

    def matrix(self, index: int) -> PackedMatrix:
        """One of them as the kernel sees it: rows of a pair in stored order, padding included."""
        return PackedMatrix(self.format, self.stored_rows, self.cols, self.data[index])

    def one(self, index: int) -> "PackedExperts":
        """A stack of one of them."""
        data = self.data[index : index + 1]
        return PackedExperts(self.format, 1, self.rows, self.cols, data, self.stride, self.paired)


# -- packing -------------------------------------------------------------------------------------


def pack(format: str, weight: Tensor, importance: Tensor | None = None) -> PackedMatrix:
    """Round and pack a matrix [rows, cols] of any float dtype.

    ``importance`` [cols] weighs the squared error of each column (mean squares of its input make
    the error that of the product). Raises CheckpointError for values that are not finite.
    """
    rows, cols = _matrix_shape(weight)
    data = torch.empty(matrix_bytes(format, rows, cols), dtype=torch.uint8)
    pack_into(data, format, weight, importance)
    return PackedMatrix(format, rows, cols, data)


def pack_q4(weight: Tensor, importance: Tensor | None = None) -> PackedMatrix:
    """``pack`` to 4 bits."""
    return pack("q4", weight, importance)


def pack_q8(weight: Tensor, importance: Tensor | None = None) -> PackedMatrix:
    """``pack`` to 8 bits."""
    return pack("q8", weight, importance)


def pack_into(data: Tensor, format: str, weight: Tensor, importance: Tensor | None = None) -> None:
    """``pack`` to bytes that are there already, [matrix_bytes(...)] uint8."""
    rows, cols = _matrix_shape(weight)
    size = tile_bytes(format, cols)
    for first, last in _chunks(rows, cols):
        piece = weight[first:last].float()
        if not bool(piece.isfinite().all()):
            raise CheckpointError(
                f"a weight to be packed holds values that are not finite (rows {first} to {last}). "
                "The checkpoint is damaged or its training diverged."
            )
        a, b = first // TILE_ROWS * size, ceil(last / TILE_ROWS) * size
        if format == "q4":
            data[a:b] = q4_bytes(*round_q4(piece, importance))
        else:
            data[a:b] = q8_bytes(*round_q8(piece, importance))


def pack_pair(
    format: str, gate: Tensor, up: Tensor, importance: Tensor | None = None
) -> PackedExperts:
    """Gate and up [F, D] of a dense feed-forward or a shared expert, tiles in turn."""
    width, hidden = _matrix_shape(gate)
    size = matrix_bytes(format, stored_rows(2 * width, paired=True), hidden)
    data = torch.empty((1, size), dtype=torch.uint8)
    pack_pair_into(data[0], format, gate, up, importance)
    return PackedExperts(format, 1, 2 * width, hidden, data, size, True)


def pack_pair_into(
    data: Tensor, format: str, gate: Tensor, up: Tensor, importance: Tensor | None = None
) -> None:
    """``pack_pair`` to bytes that are there already."""
    if gate.shape != up.shape:
        raise CheckpointError(
            f"gate and up must have one shape, found {list(gate.shape)} and {list(up.shape)}."
        )
    tiles = data.view(-1, 2, tile_bytes(format, gate.shape[1]))
    for half, weight in enumerate((gate, up)):
        tiles[:, half] = pack(format, weight, importance).data.view(len(tiles), -1)


def empty_experts(
    format: str, count: int, width: int, hidden: int
) -> tuple[PackedExperts, PackedExperts]:
    """Zeroed room for a stack: (gate and up, down), which share one buffer.

    Bytes of expert e are [gate and up | down | padding to a multiple of 4,096]; use
    ``experts_of`` for bytes that exist already.
    """
    _, _, stride = expert_bytes(format, width, hidden)
    return experts_of(format, torch.zeros((count, stride), dtype=torch.uint8), width, hidden)


def experts_of(
    format: str, data: Tensor, width: int, hidden: int
) -> tuple[PackedExperts, PackedExperts]:
    """Stored bytes [count, stride] as (gate and up [E, 2F, D], down [E, D, F])."""
    middle, used, stride = expert_bytes(format, width, hidden)
    if data.ndim != 2 or data.shape[1] != stride:
        raise CheckpointError(
            f"packed experts of width {width} and hidden size {hidden} in {format}: expected "
            f"{stride} bytes for each, found shape {list(data.shape)}."
        )
    count = data.shape[0]
    gate_up, down = data[:, :middle], data[:, middle:used]
    return (
        PackedExperts(format, count, 2 * width, hidden, gate_up, stride, True),
        PackedExperts(format, count, hidden, width, down, stride, False),
    )


def pack_experts(
    format: str,
    gate_up: Tensor,
    down: Tensor,
    importance: Tensor | None = None,
    down_importance: Tensor | None = None,
) -> tuple[PackedExperts, PackedExperts]:
    """Stacked experts, gate_up [E, 2F, D] and down [E, D, F]. ``importance`` is [D] or [E, D]."""
    count, both, hidden = gate_up.shape
    if down.shape != (count, hidden, both // 2) or both % 2:
        raise CheckpointError(
            f"experts: gate_up {list(gate_up.shape)} and down {list(down.shape)} do not belong "
            "together; expected [E, 2F, D] and [E, D, F]."
        )
    out_gate_up, out_down = empty_experts(format, count, both // 2, hidden)
    for e in range(count):
        gate, up = gate_up[e].chunk(2)
        pack_pair_into(out_gate_up.data[e], format, gate, up, _of_expert(importance, e))
        pack_into(out_down.data[e], format, down[e], _of_expert(down_importance, e))
    return out_gate_up, out_down


def _of_expert(importance: Tensor | None, index: int) -> Tensor | None:
    return importance[index] if importance is not None and importance.ndim == 2 else importance


# -- unpacking -----------------------------------------------------------------------------------


def unpack(packed: PackedMatrix | PackedExperts, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that the bytes stand for, exactly in float32: [rows, cols], or [E, rows, cols].

    The rows of a pair are gate's, then up's. Other dtypes are rounded from float32.
    """
    if isinstance(packed, PackedMatrix):
        out = torch.empty((packed.rows, packed.cols), dtype=dtype)
        unpack_into(out, packed)
        return out
    out = torch.empty((packed.count, packed.rows, packed.cols), dtype=dtype)
    for e in range(packed.count):
        unpack_expert_into(out[e], packed, e)
    return out


def unpack_into(out: Tensor, packed: PackedMatrix) -> None:
    """``unpack`` to a tensor [rows, cols] of any float dtype that is there already."""
    size = tile_bytes(packed.format, packed.cols)
    for first, last in _chunks(packed.rows, packed.cols):
        a, b = first // TILE_ROWS * size, ceil(last / TILE_ROWS) * size
        out[first:last] = _values(packed.format, packed.data[a:b], packed.cols)[: last - first]


def unpack_expert_into(out: Tensor, packed: PackedExperts, index: int) -> None:
    """``unpack`` one of the experts, to a tensor [rows, cols]."""
    if not packed.paired:
        unpack_into(out, packed.matrix(index))
        return
    tiles = packed.data[index].view(-1, 2, tile_bytes(packed.format, packed.cols))
    for half, rows in enumerate(out.chunk(2)):
        data = tiles[:, half].reshape(-1)
        unpack_into(rows, PackedMatrix(packed.format, rows.shape[0], packed.cols, data))


def _values(format: str, data: Tensor, cols: int) -> Tensor:
    if format == "q4":
        row_scale, scale, codes = q4_integers(data, cols)
        integers = scale.repeat_interleave(GROUP, 1) * codes
        return (row_scale[:, None] * integers.float())[:, :cols]
    scale, codes = q8_integers(data, cols)
    return (scale.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]] * codes.float())[:, :cols]


# -- integers and bytes --------------------------------------------------------------------------


def q4_bytes(row_scale: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """R [rows] float32, s [rows, groups] and q [rows, cols] int8 -> bytes of the tiles, flat."""
    rows, cols = codes.shape
    tall, wide = round_up(rows, TILE_ROWS), round_up(cols, COLUMNS)
    tiles = tall // TILE_ROWS
    out = torch.empty((tiles, tile_bytes("q4", cols)), dtype=torch.uint8)
    R = _padded(row_scale[:, None].float(), tall, 1)
    out[:, :ROW_SCALES_BYTES] = R.view(tiles, TILE_ROWS).view(torch.uint8)
    body = out[:, ROW_SCALES_BYTES:].unflatten(1, (wide // COLUMNS, Q4_COLUMNS_BYTES))
    s = _padded(scale, tall, wide // GROUP).view(tiles, TILE_ROWS, wide // COLUMNS, 2)
    body[..., :64] = s.permute(0, 2, 3, 1).reshape(tiles, -1, 64).view(torch.uint8)
    q = (_padded(codes, tall, wide) + 8).view(torch.uint8)
    # tile, half of its rows, row | 32 columns, 8 columns, low or high nibble, byte
    q = q.view(tiles, 2, 16, wide // COLUMNS, 4, 2, 4).permute(5, 0, 3, 4, 1, 2, 6)
    body[..., 64:] = (q[0] | q[1] << 4).reshape(tiles, -1, 512)
    return out.view(-1)


def q4_integers(data: Tensor, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of whole tiles -> R [rows] float32, s and q int8, padding included."""
    wide = round_up(cols, COLUMNS)
    tiles = data.view(-1, tile_bytes("q4", cols))
    count = tiles.shape[0]
    R = tiles[:, :ROW_SCALES_BYTES].contiguous().view(torch.float32).view(-1)
    body = tiles[:, ROW_SCALES_BYTES:].unflatten(1, (wide // COLUMNS, Q4_COLUMNS_BYTES))
    s = body[..., :64].unflatten(2, (2, TILE_ROWS)).permute(0, 3, 1, 2)
    s = s.reshape(count * TILE_ROWS, wide // GROUP).view(torch.int8)
    both = body[..., 64:].unflatten(2, (4, 2, 16, 4)).permute(0, 3, 4, 1, 2, 5)
    q = torch.stack((both & 15, both >> 4), dim=5).view(torch.int8) - 8
    return R, s, q.reshape(count * TILE_ROWS, wide)


def q8_bytes(scale: Tensor, codes: Tensor) -> Tensor:
    """d [rows, blocks] float32 and q [rows, cols] int8 -> bytes of the tiles, flat."""
    rows, cols = codes.shape
    tall, wide = round_up(rows, TILE_ROWS), round_up(cols, COLUMNS)
    tiles = tall // TILE_ROWS
    out = torch.empty((tiles, tile_bytes("q8", cols)), dtype=torch.uint8)
    d = _padded(scale.float(), tall, ceil(wide / BLOCK)).view(tiles, TILE_ROWS, -1)
    q = _padded(codes, tall, wide).view(torch.uint8) ^ 128
    for places, columns in _blocks(cols):
        count = columns[1] - columns[0]
        blocks = ceil(count / BLOCK)
        part = out[:, places[0] : places[1]].unflatten(1, (blocks, -1))
        first = columns[0] // BLOCK
        part[..., :ROW_SCALES_BYTES] = (
            d[:, :, first : first + blocks].transpose(1, 2).contiguous().view(torch.uint8)
        )
        piece = q[:, columns[0] : columns[1]].reshape(tiles, 2, 16, blocks, -1, 4)
        part[..., ROW_SCALES_BYTES:] = piece.permute(0, 3, 4, 1, 2, 5).reshape(tiles, blocks, -1)
    return out.view(-1)


def q8_integers(data: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """Bytes of whole tiles -> d [rows, blocks] float32 and q [rows, cols] int8, with padding."""
    tiles = data.view(-1, tile_bytes("q8", cols))
    scales, codes = [], []
    for places, columns in _blocks(cols):
        blocks = ceil((columns[1] - columns[0]) / BLOCK)
        part = tiles[:, places[0] : places[1]].unflatten(1, (blocks, -1))
        d = part[..., :ROW_SCALES_BYTES].contiguous().view(torch.float32)
        scales.append(d.transpose(1, 2).reshape(-1, blocks))
        q = part[..., ROW_SCALES_BYTES:].unflatten(2, (-1, 2, 16, 4)).permute(0, 3, 4, 1, 2, 5)
        codes.append(q.reshape(-1, columns[1] - columns[0]))
    return torch.cat(scales, 1), (torch.cat(codes, 1) ^ 128).view(torch.int8)


def _blocks(cols: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """(bytes in a q8 tile, columns) of its whole blocks, then of a shorter last one."""
    wide = round_up(cols, COLUMNS)
    full = wide // BLOCK * BLOCK
    end = full // BLOCK * (ROW_SCALES_BYTES + BLOCK * TILE_ROWS)
    if full:
        yield (0, end), (0, full)
    if wide > full:
        yield (end, end + ROW_SCALES_BYTES + (wide - full) * TILE_ROWS), (full, wide)


def _padded(tensor: Tensor, rows: int, cols: int) -> Tensor:
    missing = (0, cols - tensor.shape[1], 0, rows - tensor.shape[0])
    return torch.nn.functional.pad(tensor, missing).contiguous() if any(missing) else tensor


def _chunks(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    step = max(TILE_ROWS, _CHUNK_WEIGHTS // max(1, cols) // TILE_ROWS * TILE_ROWS)
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def _matrix_shape(weight: Tensor) -> tuple[int, int]:
    if weight.ndim != 2 or 0 in weight.shape:
        raise CheckpointError(
            f"a weight to be packed must be a matrix [rows, cols], found {list(weight.shape)}."
        )
    return weight.shape[0], weight.shape[1]
