"""Packed weights: the bytes are those of csrc/linear.h, and nothing is lost on the way back."""

import struct
from math import ceil

import pytest
import torch
from torch import Tensor

from qnext.errors import CheckpointError
from qnext.weights.formats import (
    EXPERT_ALIGNMENT,
    LINE,
    empty_experts,
    expert_bytes,
    matrix_bytes,
    pack,
    pack_experts,
    pack_pair,
    q4_bytes,
    q8_bytes,
    unpack,
)

SHAPES = [(1, 1), (1, 300), (31, 32), (32, 16), (33, 17), (37, 257), (64, 256), (70, 544), (5, 31)]


def line_place(row: int, byte: int) -> int:
    """Byte of a pair of 64-byte lines that belongs to a row of a tile."""
    return (row // 16) * 64 + (row % 16) * 4 + byte


def q4_weight(data: bytes, cols: int, row: int, col: int) -> tuple[float, int, int]:
    """(R, s, q) of one weight, read as the comment in csrc/linear.h says it, one byte at a time."""
    tile_bytes = 128 + ceil(cols / 32) * 576
    tile = data[row // 32 * tile_bytes :][:tile_bytes]
    r = row % 32
    body = tile[128 + col // 32 * 576 :]
    [R] = struct.unpack("<f", tile[4 * r : 4 * r + 4])
    [s] = struct.unpack("b", body[(col % 32) // 16 * 32 + r :][:1])
    byte = body[64 + (col % 32) // 8 * 128 + line_place(r, col % 4)]
    nibble = byte >> 4 if col % 8 >= 4 else byte & 15
    return R, s, nibble - 8


def q8_weight(data: bytes, cols: int, row: int, col: int) -> tuple[float, int]:
    """(d, q) of one weight."""
    wide = ceil(cols / 32) * 32
    tile_bytes = ceil(wide / 256) * 128 + wide * 32
    block = data[row // 32 * tile_bytes + col // 256 * (128 + 256 * 32) :]
    r = row % 32
    [d] = struct.unpack("<f", block[4 * r : 4 * r + 4])
    return d, block[128 + (col % 256) // 4 * 128 + line_place(r, col % 4)] - 128


def random_integers(rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int8)

    R = torch.randn(rows, generator=generator)
    s = integers(-15, 16, rows, ceil(cols / 16))
    d = torch.randn(rows, ceil(cols / 256), generator=generator)
    return R, s, integers(-8, 8, rows, cols), d, integers(-127, 128, rows, cols)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_every_weight_lies_where_the_kernels_look(rows: int, cols: int) -> None:
    R, s, q, d, q8 = random_integers(rows, cols)
    four, eight = q4_bytes(R, s, q), q8_bytes(d, q8)
    assert four.numel() == matrix_bytes("q4", rows, cols)
    assert eight.numel() == matrix_bytes("q8", rows, cols)
    four, eight = bytes(four.tolist()), bytes(eight.tolist())
    assert len(four) % LINE == len(eight) % LINE == 0
    for row in range(ceil(rows / 32) * 32):
        for col in range(ceil(cols / 32) * 32):
            found4, found8 = q4_weight(four, cols, row, col), q8_weight(eight, cols, row, col)
            if row < rows and col < cols:
                assert found4 == (float(R[row]), int(s[row, col // 16]), int(q[row, col]))
                assert found8 == (float(d[row, col // 256]), int(q8[row, col]))
            else:
                assert found4[0] * found4[1] * found4[2] == 0
                assert found8[0] * found8[1] == 0
                assert (found4[2], found8[1]) == (0, 0)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("format", ["q4", "q8"])
def test_what_is_packed_comes_back(format: str, rows: int, cols: int) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(5))
    packed = pack(format, weight)
    back = unpack(packed)
    assert back.shape == weight.shape
    limit = {"q4": 0.09, "q8": 0.009}[format]
    assert (back - weight).norm() <= limit * weight.norm()
    # Packing what was packed hardly moves it: the search finds nearly the same scales.
    again = unpack(pack(format, back))
    assert (again - back).norm() <= {"q4": 0.03, "q8": 0.001}[format] * back.norm()


@pytest.mark.parametrize("format", ["q4", "q8"])
@pytest.mark.parametrize(("width", "hidden"), [(40, 64), (32, 96), (7, 33)])
def test_the_tiles_of_gate_and_up_alternate(format: str, width: int, hidden: int) -> None:
    generator = torch.Generator().manual_seed(3)
    gate_up = torch.randn(3, 2 * width, hidden, generator=generator)
    down = torch.randn(3, hidden, width, generator=generator)
    both, back = pack_experts(format, gate_up, down)
    middle, used, stride = expert_bytes(format, width, hidden)
    assert stride % EXPERT_ALIGNMENT == 0
    assert middle % LINE == 0
    assert used <= stride
    assert both.stride == back.stride == stride == both.data.stride(0)
    assert both.data.data_ptr() + middle == back.data.data_ptr()
    for e in range(3):
        gate, up = (pack(format, half).data for half in gate_up[e].chunk(2))
        tiles = both.data[e].view(-1, 2, gate.numel() // ceil(width / 32))
        assert torch.equal(tiles[:, 0].flatten(), gate)
        assert torch.equal(tiles[:, 1].flatten(), up)
        assert torch.equal(back.data[e], pack(format, down[e]).data)
    assert both.stored_rows == 2 * ceil(width / 32) * 32
    # As the kernel sees it: 32 rows of gate, 32 of up, padding with zeros.
    seen = unpack(both.matrix(1)).view(-1, 2, 32, hidden)
    logical = unpack(both)[1]
    for half, rows in enumerate(logical.chunk(2)):
        stored = seen[:, half].flatten(0, 1)
        assert torch.equal(stored[:width], rows)
        assert not stored[width:].any()
    torch.testing.assert_close(unpack(back), down, atol=0.4, rtol=0)
    pair = pack_pair(format, *gate_up[1].chunk(2))
    assert torch.equal(pair.data[0], both.data[1])
    assert torch.equal(unpack(pair)[0], logical)


def test_bytes_are_those_of_the_published_sizes() -> None:
    # 2048 columns in 4 bits: 4.5 bits a weight and one float32 a row.
    assert matrix_bytes("q4", 4096, 2048) == 4096 * (2048 * 4.5 / 8 + 4)
    assert matrix_bytes("q8", 4096, 2048) == 4096 * (2048 + 8 * 4)
    # An expert of the 80B model needs no padding to begin on a 4,096-byte boundary.
    for format in ("q4", "q8"):
        _, used, stride = expert_bytes(format, 512, 2048)
        assert used == stride


def test_importance_moves_the_error_to_columns_that_matter_less() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    importance = torch.ones(512)
    importance[::4] = 25.0
    plain = (unpack(pack("q4", weight)) - weight).square()
    aware = (unpack(pack("q4", weight, importance)) - weight).square()
    assert (aware * importance).sum() < 0.9 * (plain * importance).sum()
    assert aware[:, ::4].mean() < 0.8 * plain[:, ::4].mean()


@pytest.mark.parametrize("format", ["q4", "q8"])
def test_zeros_and_outliers_survive(format: str) -> None:
    weight = torch.zeros(40, 320)
    weight[3, 100] = 1e4
    weight[4, :] = 1e-30
    weight[5, 0], weight[5, 1] = -3.0, 0.5
    back = unpack(pack(format, weight))
    assert back.isfinite().all()
    assert not back[:3].any()
    assert back[3, 100] == pytest.approx(1e4, rel=1e-6)
    assert back[5, 0] == pytest.approx(-3.0, rel=0.04)
    assert not back[6:].any()


def test_what_cannot_be_packed_is_refused() -> None:
    weight = torch.randn(4, 8)
    weight[2, 3] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        pack("q4", weight)
    with pytest.raises(CheckpointError, match="unknown; expected one of q8, q4"):
        pack("q5", torch.randn(4, 8))
    with pytest.raises(CheckpointError, match="must be a matrix"):
        pack("q4", torch.randn(4))
    with pytest.raises(CheckpointError, match="one shape"):
        pack_pair("q8", torch.randn(4, 8), torch.randn(5, 8))
    with pytest.raises(CheckpointError, match="do not belong together"):
        pack_experts("q8", torch.randn(2, 8, 16), torch.randn(2, 16, 5))
    assert empty_experts("q8", 2, 8, 16)[0].data.shape[0] == 2
