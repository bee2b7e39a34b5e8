"""The native scale search chooses what the one in PyTorch does, on every instruction set."""

import pytest
import torch

from qnext.weights.rounding import round_q4, round_q4_torch, round_q8, round_q8_torch

SHAPES = [(1, 1), (3, 16), (5, 31), (7, 257), (33, 512), (2, 1000)]


def cases(rows: int, cols: int):
    generator = torch.Generator().manual_seed(rows * 7919 + cols)
    normal = torch.randn(rows, cols, generator=generator)
    yield normal, None
    yield normal.pow(3) * 0.01, torch.rand(cols, generator=generator).square()
    sparse = normal * (torch.rand(rows, cols, generator=generator) < 0.05)
    sparse[rows // 2] = 0.0
    yield sparse, None
    yield torch.full((rows, cols), -0.75), None


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.usefixtures("kernels")
def test_q4_is_that_of_the_reference(rows: int, cols: int) -> None:
    for weight, importance in cases(rows, cols):
        R, s, q = round_q4(weight, importance)
        want_R, want_s, want_q = round_q4_torch(weight, importance)
        assert torch.equal(s, want_s)
        assert torch.equal(q, want_q)
        torch.testing.assert_close(R, want_R, rtol=2e-7, atol=0)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.usefixtures("kernels")
def test_q8_is_that_of_the_reference(rows: int, cols: int) -> None:
    for weight, importance in cases(rows, cols):
        d, q = round_q8(weight, importance)
        want_d, want_q = round_q8_torch(weight, importance)
        assert torch.equal(q, want_q)
        torch.testing.assert_close(d, want_d, rtol=2e-7, atol=0)


def test_wrong_shapes_are_refused(kernels) -> None:
    w, q = torch.zeros(4, 32), torch.zeros(4, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"expected R \[rows\] and s \[rows, groups\]"):
        kernels.round_q4(w, None, torch.zeros(4), torch.zeros(4, 3, dtype=torch.int8), q)
    with pytest.raises(ValueError, match="one importance for each column"):
        kernels.round_q8(w, torch.zeros(31), torch.zeros(4, 1), q)
    with pytest.raises(ValueError, match=r"w and q of one shape"):
        kernels.round_q8(w, None, torch.zeros(4, 1), q[:3].contiguous())
