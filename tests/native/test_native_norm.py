"""The native RMS norm equals its reference."""

import pytest
import torch

from qnext.ops.norm import rms_norm_zero_centred_reference


@pytest.mark.parametrize("width", [1, 7, 16, 61, 256, 2048])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rms_norm_equals_the_reference(kernels, rows, width):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width, generator=generator)
    weight = torch.randn(width, generator=generator)
    out = torch.full_like(x, float("nan"))
    kernels.rms_norm(x, 1.0 + weight, 1e-6, out)
    want = rms_norm_zero_centred_reference(x=x, weight=weight, eps=1e-6)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


def test_the_number_of_threads_changes_no_bit(kernels):
    x = torch.randn(9, 131, generator=torch.Generator().manual_seed(0))
    weight, outs = torch.ones(131), []
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        outs.append(torch.empty_like(x))
        kernels.rms_norm(x, weight, 1e-6, outs[-1])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
