"""The three norms of the family differ in what is added to the weight and when they cast."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class EqualsReference:
    @pytest.mark.parametrize("eps", [1e-6, 0.1])
    @pytest.mark.parametrize("shape", [(1, 8), (7, 3, 5), (0, 8), (64, 1)], ids=str)
    def test_equals_reference(self, backend, shape, eps, assert_equals_reference):
        inputs = {"x": draw(*shape), "weight": draw(shape[-1], seed=1), "eps": eps}
        if self.OP == "rms_norm_gated":
            inputs["gate"] = draw(*shape, seed=2)
        assert_equals_reference(self.OP, backend, inputs)

    def test_rows_of_zeros_are_finite(self, backend):
        inputs = {"x": torch.zeros(2, 8), "weight": draw(8), "eps": EPS}
        if self.OP == "rms_norm_gated":
            inputs["gate"] = draw(2, 8)
        assert (backend.load()(**inputs) == 0).all()


class TestZeroCentred(EqualsReference):
    OP = "rms_norm_zero_centred"

    def test_weight_zero_only_normalises(self, backend):
        x = draw(5, 64) * 7
        y = backend.load()(x=x, weight=torch.zeros(64), eps=EPS)
        assert torch.allclose(y.pow(2).mean(-1), torch.ones(5), atol=1e-5)
        assert torch.allclose(y, x / x.pow(2).mean(-1, keepdim=True).sqrt(), atol=1e-5)

    def test_multiplies_in_float32_and_then_casts(self, backend):
        """A weight far below bfloat16's grid around one still has its full effect."""
        x, weight = draw(200, 64, dtype=torch.bfloat16), draw(64, dtype=torch.bfloat16, seed=1)
        y = backend.load()(x=x, weight=weight, eps=EPS)
        x32 = x.float()
        exact = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS) * (1 + weight.float())
        assert y.dtype == torch.bfloat16
        # At most one value in a thousand may round the other way; none by more than one unit.
        assert (y != exact.bfloat16()).float().mean() < 1e-3
        assert torch.allclose(y.float(), exact, rtol=2**-7, atol=0)


class TestPlain(EqualsReference):
    OP = "rms_norm"

    def test_casts_and_then_multiplies(self, backend):
        x, weight = draw(50, 64, dtype=torch.bfloat16), draw(64, dtype=torch.bfloat16, seed=1)
        x32 = x.float()
        normed = (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)).bfloat16()
        assert torch.equal(backend.load()(x=x, weight=weight, eps=EPS), weight * normed)

    def test_weight_one_only_normalises(self, backend):
        y = backend.load()(x=draw(5, 64) * 7, weight=torch.ones(64), eps=EPS)
        assert torch.allclose(y.pow(2).mean(-1), torch.ones(5), atol=1e-5)


class TestGated(EqualsReference):
    OP = "rms_norm_gated"

    def test_norm_first_gate_after(self, backend):
        x, gate, weight = draw(6, 3, 16) * 50, draw(6, 3, 16, seed=1), draw(16, seed=2)
        rms = (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        want = weight * (x / rms) * F.silu(gate)
        assert torch.allclose(
            backend.load()(x=x, gate=gate, weight=weight, eps=EPS), want, atol=1e-5
        )

    def test_result_has_the_dtype_of_the_gate(self, backend):
        x, gate, weight = draw(6, 3, 16), draw(6, 3, 16, seed=1), draw(16, seed=2)
        half = backend.load()(x=x, gate=gate.bfloat16(), weight=weight.bfloat16(), eps=EPS)
        exact = backend.load()(
            x=x, gate=gate.bfloat16().float(), weight=weight.bfloat16().float(), eps=EPS
        )
        assert half.dtype == torch.bfloat16
        # One rounding, at the end.
        assert torch.equal(half, exact.bfloat16())

    def test_large_readouts_do_not_overflow(self, backend):
        """x comes in float32 because a readout beyond half precision's range must survive."""
        x = draw(2, 1, 8) * 1e6
        y = backend.load()(x=x, gate=torch.ones(2, 1, 8).half(), weight=torch.ones(8), eps=EPS)
        assert torch.isfinite(y).all()
