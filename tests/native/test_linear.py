"""Products with a weight matrix: every format equals a float64 reference, and every bit of a result
depends on its row of W and its row of x alone."""

import numpy as np
import pytest
import torch

from qnext.weights.formats import q4_bytes, q8_bytes

FORMATS = ("f32", "bf16", "q8", "q4")
BLOCK = 256


def bf16_bits(x):
    """float32 rounded to bf16, ties to even, as uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_round(x):
    return (bf16_bits(x).astype(np.uint32) << 16).view(np.float32)


def aligned(data: bytes) -> np.ndarray:
    """The bytes at an address that is a multiple of 64."""
    room = np.empty(len(data) + 64, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + len(data)] = np.frombuffer(data, np.uint8)
    return room[start : start + len(data)]


def pack_q8(q, d):
    """q [rows, cols] in -127..127 and d [rows, blocks], in tiles of 32 rows."""
    codes = torch.from_numpy(np.array(q, np.int8))
    return aligned(q8_bytes(torch.from_numpy(np.array(d, np.float32)), codes).numpy().tobytes())


def pack_q4(q, s, r):
    """q [rows, cols] in -8..7, s [rows, groups of 16] in -15..15, r [rows]."""
    codes, scales = (torch.from_numpy(np.array(part, np.int8)) for part in (q, s))
    factors = torch.from_numpy(np.array(r, np.float32))
    return aligned(q4_bytes(factors, scales, codes).numpy().tobytes())


class Weights:
    """A random matrix in one format: its bytes, and what they mean."""

    def __init__(self, format, rows, cols, seed=0):
        g = np.random.default_rng(seed)
        self.format, self.rows, self.cols = format, rows, cols
        blocks = -(-cols // BLOCK)
        if format == "f32":
            self.values = g.standard_normal((rows, cols)).astype(np.float32)
            self.data = aligned(self.values.tobytes())
        elif format == "bf16":
            self.values = bf16_round(g.standard_normal((rows, cols)).astype(np.float32))
            self.data = aligned(bf16_bits(self.values).tobytes())
        elif format == "q8":
            self.q = g.integers(-127, 128, (rows, cols))
            self.d = g.uniform(0.5, 2, (rows, blocks)).astype(np.float32) / 100
            self.data = pack_q8(self.q, self.d)
            self.values = self.q * np.repeat(self.d.astype(np.float64), BLOCK, 1)[:, :cols]
        else:
            self.q = g.integers(-8, 8, (rows, cols))
            self.s = g.integers(-15, 16, (rows, -(-cols // 16)))
            self.r = g.uniform(-2, 2, rows).astype(np.float32) / 100
            self.data = pack_q4(self.q, self.s, self.r)
            self.integers = self.q * np.repeat(self.s, 16, 1)[:, :cols]
            self.values = self.integers * self.r.astype(np.float64)[:, None]

    def seen(self, x):
        """The activations as the kernels see them, in float64."""
        if self.format == "f32":
            return x.astype(np.float64)
        if self.format == "bf16":
            return bf16_round(x).astype(np.float64)
        q, scale = quantised(x)
        return (q * np.repeat(scale, BLOCK, 1)[:, : x.shape[1]]).astype(np.float64)


def quantised(x):
    """int8 and float32 scales per block of 256 columns: amax / 127, ties to even."""
    count, cols = x.shape
    blocks = -(-cols // BLOCK)
    wide = np.zeros((count, blocks * BLOCK), np.float32)
    wide[:, :cols] = x
    wide = wide.reshape(count, blocks, BLOCK)
    top = np.abs(wide).max(-1)
    with np.errstate(divide="ignore"):
        inverse = np.where(top > 0, np.float32(127) / top, np.float32(0)).astype(np.float32)
    q = np.rint(wide * inverse[..., None]).astype(np.int64).reshape(count, -1)[:, :cols]
    return q, top / np.float32(127)


def product(kernels, w, x, index=None, **rows):
    """The kernel's result, in an output poisoned with NaN."""
    count = len(x) if index is None else len(index)
    out = np.full((count, w.rows), np.nan, np.float32)
    index = None if index is None else np.asarray(index, np.int32)
    kernels.linear(w.format, w.data, x, index, out, **rows)
    return out


def inputs(count, cols, seed=1):
    return np.random.default_rng(seed).standard_normal((count, cols)).astype(np.float32)


def bits(x):
    return np.ascontiguousarray(x).view(np.uint32)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 101])
@pytest.mark.parametrize("cols", [1, 7, 32, 61, 255, 256, 257, 544, 1000])
def test_products_equal_a_float64_reference(kernels, format, rows, cols):
    w = Weights(format, rows, cols, seed=rows)
    assert len(w.data) == kernels.matrix_bytes(format, rows, cols)
    for count in (1, 2, 3, 5, 8, 13):
        x = inputs(count, cols, seed=count)
        want = w.seen(x) @ w.values.astype(np.float64).T
        size = np.abs(w.seen(x)) @ np.abs(w.values).astype(np.float64).T
        got = product(kernels, w, x)
        assert (np.abs(got - want) <= 2e-6 * size + 1e-30).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(70, 640), (33, 257), (96, 2048), (5, 96)])
def test_a_result_depends_on_its_two_rows_alone(kernels, format, rows, cols):
    w, x = Weights(format, rows, cols), inputs(150, cols)
    alone = np.concatenate([product(kernels, w, x[i : i + 1]) for i in range(len(x))])
    for count in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 23, 48, 80, 97, 150):
        assert np.array_equal(bits(product(kernels, w, x[:count])), bits(alone[:count]))
    for threads in (1, 3):
        kernels.set_threads(threads)
        assert np.array_equal(bits(product(kernels, w, x)), bits(alone))
    for index in ([149], [3, 3], [7, 1, 140, 0, 7], list(range(149, 0, -2))):
        assert np.array_equal(bits(product(kernels, w, x, index)), bits(alone[index]))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("count", [1, 9, 70])
def test_a_range_of_rows_writes_these_rows_alone(kernels, format, count):
    w, x = Weights(format, 110, 288), inputs(count, 288)
    whole = product(kernels, w, x)
    for first, last in ((0, 32), (32, 96), (64, 110), (96, 110), (32, 32)):
        part = product(kernels, w, x, first=first, last=last)
        assert np.array_equal(bits(part[:, first:last]), bits(whole[:, first:last]))
        assert np.isnan(part[:, :first]).all()
        assert np.isnan(part[:, last:]).all()


@pytest.mark.parametrize("format", ["q8", "q4"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (33, 257), (64, 2048), (40, 999)])
def test_integers_give_the_same_bits_on_every_instruction_set(kernels, format, rows, cols):
    w, x = Weights(format, rows, cols), inputs(60, cols)
    here, isa = product(kernels, w, x), kernels.isa()
    kernels.set_isa("scalar")
    there = product(kernels, w, x)
    kernels.set_isa(isa)
    assert np.array_equal(bits(here), bits(there))


@pytest.mark.parametrize("format", ["q8", "q4"])
def test_blocks_are_added_in_rising_order_with_one_rounding_each(kernels, format):
    """The exact definition of a result, with Python's integers and float64 standing in for fma."""
    w, x = Weights(format, 3, 600), inputs(2, 600)
    q, scale = quantised(x)
    got = product(kernels, w, x)
    for i in range(2):
        for row in range(3):
            total = np.float32(0)
            for block in range(3):
                part = slice(block * BLOCK, (block + 1) * BLOCK)
                weights = w.q[row, part] if format == "q8" else w.integers[row, part]
                exact = int((q[i, part] * weights).sum())
                step = scale[i, block]
                if format == "q8":
                    step = np.float32(step * w.d[row, block])
                # 24 + 24 bits and one addition: the float64 rounding is far below a float32's.
                total = np.float32(np.float64(exact) * np.float64(step) + np.float64(total))
            want = total if format == "q8" else np.float32(total * w.r[row])
            assert got[i, row] == want


@pytest.mark.parametrize("format", ["q8", "q4"])
def test_the_largest_integers_do_not_overflow(kernels, format):
    rows, cols = 32, 512
    w = Weights(format, rows, cols)
    signs = np.where(np.arange(rows)[:, None] % 2, 1, -1)
    if format == "q8":
        w.q = np.broadcast_to(signs * 127, (rows, cols))
        w.data = pack_q8(w.q, np.ones((rows, 2), np.float32))
        weight = 127
    else:
        w.q = np.full((rows, cols), -8)
        w.data = pack_q4(w.q, np.broadcast_to(signs * -15, (rows, cols // 16)), np.ones(rows))
        weight = 120
    for sign in (1, -1):
        x = np.full((3, cols), sign * 127, np.float32)
        want = np.broadcast_to(signs[:, 0] * sign * 127 * weight * cols, (3, rows))
        assert np.array_equal(product(kernels, w, x), want.astype(np.float32))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 300, 301])
def test_a_value_that_is_not_finite_makes_its_row_nan_and_no_other(kernels, format, poison, where):
    w, x = Weights(format, 45, 302), inputs(9, 302)
    clean = product(kernels, w, x)
    x[4, where] = poison
    got = product(kernels, w, x)
    assert np.isnan(got[4]).all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert np.array_equal(bits(got[others]), bits(clean[others]))


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_give_zeros_and_extreme_sizes_stay_right(kernels, format):
    w = Weights(format, 33, 300)
    assert (product(kernels, w, np.zeros((2, 300), np.float32)) == 0).all()
    tiny = product(kernels, w, np.full((1, 300), 1e-40, np.float32))
    assert (np.abs(tiny) < 1e-35).all()
    x = inputs(1, 300)
    plain, large = product(kernels, w, x), product(kernels, w, x * np.float32(2.0**100))
    assert np.array_equal(large, plain * np.float32(2.0**100))


def test_a_bf16_overflow_of_a_finite_activation_is_not_a_finite_product(kernels):
    w = Weights("bf16", 4, 32)
    x = np.zeros((1, 32), np.float32)
    x[0, 3] = np.finfo(np.float32).max
    assert np.isnan(product(kernels, w, x)).all()


def test_wrong_arguments_are_refused(kernels):
    w, x = Weights("q8", 40, 64), inputs(2, 64)
    out = np.empty((2, 40), np.float32)
    with pytest.raises(ValueError, match="expected exactly the bytes"):
        kernels.linear("q4", w.data, x, None, out)
    with pytest.raises(ValueError, match="expected f32, bf16, q8 or q4"):
        kernels.linear("q5", w.data, x, None, out)
    with pytest.raises(ValueError, match="outside the rows of x"):
        kernels.linear("q8", w.data, x, np.array([0, 2], np.int32), out)
    with pytest.raises(ValueError, match="multiples of 32"):
        kernels.linear("q8", w.data, x, None, out, first=8)
    shifted = aligned(b"." + w.data.tobytes())[1:]
    with pytest.raises(ValueError, match="not aligned"):
        kernels.linear("q8", shifted, x, None, out)
