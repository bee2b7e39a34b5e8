"""The head and its loss in blocks give what all logits at once give, in less memory."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qnext.ops import cross_entropy
from qnext.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def draw(R: int, V: int, D: int = 7, dtype: torch.dtype = torch.float64, zeros: float = 0.3):
    generator = torch.Generator().manual_seed(R + V)
    weights = torch.rand(R, generator=generator) + 0.1
    weights[torch.rand(R, generator=generator) < zeros] = 0.0
    return (
        torch.randn(R, D, generator=generator, dtype=dtype),
        torch.randn(V, D, generator=generator, dtype=dtype),
        torch.randint(V, (R,), generator=generator),
        weights,
    )


def with_gradients(function, x, weight, labels, weights, **settings):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    found = function(x, weight, labels, weights, **settings)
    (found.loss_sum * 1.7).backward()
    return found, x.grad, weight.grad


@pytest.fixture
def low(monkeypatch):
    """Few rows per block, so that small tests cross block borders."""
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 4)


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize("zeros", [0.0, 0.5])
@pytest.mark.parametrize(("R", "V"), [(1, 5), (4, 11), (13, 29), (40, 8)])
@pytest.mark.parametrize("block_bytes", [1 << 20, 200, 8], ids=["one", "rows", "vocabulary"])
def test_equals_all_logits_at_once(R, V, block_bytes, zeros):
    inputs = draw(R, V, zeros=zeros)
    want, want_x, want_w = with_gradients(linear_cross_entropy_reference, *inputs)
    got, got_x, got_w = with_gradients(linear_cross_entropy, *inputs, block_bytes=block_bytes)
    assert torch.allclose(got.loss_sum, want.loss_sum, rtol=1e-12)
    assert torch.allclose(got.loss, want.loss, atol=1e-10)
    assert torch.allclose(got.lse, want.lse, atol=1e-10)
    assert torch.equal(got.hits, want.hits)
    assert (got_x - want_x).abs().max() < 1e-10
    assert (got_w - want_w).abs().max() < 1e-10


def test_the_library_agrees():
    x, weight, labels, _ = draw(20, 30, zeros=0.0)
    found, got_x, _ = with_gradients(linear_cross_entropy, x, weight, labels, None)
    leaf = x.clone().requires_grad_()
    want = torch.nn.functional.cross_entropy(leaf @ weight.T, labels, reduction="sum")
    (want * 1.7).backward()
    assert torch.allclose(found.loss_sum, want)
    assert torch.allclose(got_x, leaf.grad)


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize("block_bytes", [1 << 20, 64])
def test_no_row_counts(block_bytes):
    x, weight, labels, weights = draw(9, 12)
    found, dx, dw = with_gradients(
        linear_cross_entropy, x, weight, labels, weights * 0, block_bytes=block_bytes
    )
    assert found.loss_sum.item() == 0.0
    assert (dx == 0).all()
    assert (dw == 0).all()
    assert not found.hits.any()


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize("block_bytes", [1 << 20, 64])
def test_rows_that_do_not_count_may_hold_anything(block_bytes):
    x, weight, labels, weights = draw(9, 12)
    weights[4] = 0.0
    want, want_x, _ = with_gradients(
        linear_cross_entropy, x, weight, labels, weights, block_bytes=block_bytes
    )
    x[4] = float("nan")
    got, got_x, got_w = with_gradients(
        linear_cross_entropy, x, weight, labels, weights, block_bytes=block_bytes
    )
    assert torch.equal(got.loss_sum, want.loss_sum)
    assert torch.equal(got_x, want_x)
    assert torch.isfinite(got_w).all()


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize("block_bytes", [1 << 20, 64])
def test_large_logits_neither_overflow_nor_vanish(block_bytes):
    x, weight, labels, weights = draw(9, 12, dtype=torch.float32, zeros=0.0)
    found, dx, _ = with_gradients(
        linear_cross_entropy, x * 300, weight, labels, weights, block_bytes=block_bytes
    )
    want, want_x, _ = with_gradients(
        linear_cross_entropy_reference, x.double() * 300, weight.double(), labels, weights
    )
    assert torch.allclose(found.loss_sum.double(), want.loss_sum, rtol=1e-5)
    assert torch.allclose(dx.double(), want_x, atol=1e-4)


def test_half_precision_accumulates_in_float32():
    x, weight, labels, weights = draw(600, 50, D=16, dtype=torch.float32)
    want, want_x, want_w = with_gradients(
        linear_cross_entropy_reference, x, weight, labels, weights
    )
    half = (x.bfloat16(), weight.bfloat16(), labels, weights)
    got, got_x, got_w = with_gradients(linear_cross_entropy, *half)
    assert got.loss_sum.dtype == torch.float32
    assert got.loss_sum.item() == pytest.approx(want.loss_sum.item(), rel=5e-3)
    assert (got_x.float() - want_x).norm() < 2e-2 * want_x.norm()
    assert (got_w.float() - want_w).norm() < 2e-2 * want_w.norm()


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor) and not one._is_view():
                self.bytes = max(self.bytes, one.numel() * one.element_size())
        return out


@pytest.mark.parametrize("gradients", [True, False])
def test_no_tensor_is_as_large_as_all_logits(gradients):
    """8,192 rows over 151,936 tokens are 5 GB of logits; only W's gradient exceeds a block."""
    R, V, D, block = 512, 30_000, 8, 1 << 20
    x, weight, labels, weights = draw(R, V, D, dtype=torch.float32, zeros=0.0)
    x.requires_grad_(gradients)
    weight.requires_grad_(gradients)
    with Largest() as seen:
        total = linear_cross_entropy(x, weight, labels, weights, block_bytes=block).loss_sum
        if gradients:
            total.backward()
    assert 50 * block < R * V * 4
    assert seen.bytes <= max(block, V * D * 4 if gradients else 0)
