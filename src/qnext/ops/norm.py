"""Root-mean-square norms in the three conventions of the family.

References: Zhang and Sennrich 2019 (arXiv 1910.07467); the zero-centred form stores weights around
0 and multiplies by 1 + weight before the cast; the gated form closes a delta layer.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.ops.contracts import Impl, only_for_gradients
from qnext.ops.elementwise import elementwise_invariant


def rms_norm_reference(*, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Qwen3 dense and MoE: normalise in float32, cast, multiply by the weight."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rms_norm_zero_centred_reference(*, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Qwen3-Next: normalise and multiply by 1 + weight in float32, then cast."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.float())).to(x.dtype)


def rms_norm_gated_reference(*, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Output norm of a delta layer: norm first, gate after, float32 until the end."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * normed * F.silu(gate.float())).to(gate.dtype)


def rms_norm_zero_centred_torch(*, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Uses the library's fused norm with the weight 1 + w in float32: one pass instead of five."""
    return F.rms_norm(x.float(), x.shape[-1:], 1.0 + weight.float(), eps).to(x.dtype)


def rms_norm_gated_torch(*, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The library's fused norm in float32, then the gate."""
    normed = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
    return (normed * F.silu(gate.float())).to(gate.dtype)


def rms_norm_gated_invariant(*, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The fast form with a SiLU that does not depend on the number of rows."""
    normed = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
    return (normed * elementwise_invariant(function=F.silu, x=gate.float())).to(gate.dtype)


class _ZeroCentred(torch.autograd.Function):
    """Keeps the input in its own dtype and one number per row."""

    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def, override]
        x32, inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x32 * inverse).mul_(1.0 + weight.to(x32.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[no-untyped-def, override]
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        d32 = d_y.to(normed.dtype)
        d_weight = (d32 * normed).flatten(0, -2).sum(0)
        d_x = _through_rms(d32 * (1.0 + weight.to(normed.dtype)), normed, inverse)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


class _Gated(torch.autograd.Function):
    """Keeps both inputs; the normed rows and the opened gate are computed again."""

    @staticmethod
    def forward(ctx, x, gate, weight, eps):  # type: ignore[no-untyped-def, override]
        x32, inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, gate, weight, inverse)
        opened = F.silu(gate.to(x32.dtype))
        return (x32 * inverse).mul_(weight.to(x32.dtype)).mul_(opened).to(gate.dtype)

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[no-untyped-def, override]
        x, gate, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        d32, gate32, weight32 = (t.to(normed.dtype) for t in (d_y, gate, weight))
        d_opened = d32 * F.silu(gate32)
        d_weight = (d_opened * normed).flatten(0, -2).sum(0)
        d_gate = torch.ops.aten.silu_backward(d32.mul(normed).mul_(weight32), gate32)
        d_x = _through_rms(d_opened.mul_(weight32), normed, inverse)
        return d_x.to(x.dtype), d_gate.to(gate.dtype), d_weight.to(weight.dtype), None


def _inverse_rms(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x in float32 (or wider) and 1 / rms of its rows [..., 1]."""
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    size = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
    return x32, size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _through_rms(d_normed: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of x from that of ``x * inverse``; overwrites ``d_normed``."""
    along = (d_normed * normed).mean(-1, keepdim=True)
    return d_normed.addcmul_(normed, along, value=-1).mul_(inverse)


def rms_norm_zero_centred_training(*, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference with a backward by hand, which keeps no float32 copy of the input."""
    return _ZeroCentred.apply(x, weight, eps)


def rms_norm_gated_training(*, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference with a backward by hand."""
    return _Gated.apply(x, gate, weight, eps)


IMPLS = {
    "rms_norm": (Impl(backend="reference", load=lambda: rms_norm_reference),),
    "rms_norm_zero_centred": (
        Impl(
            backend="training",
            load=lambda: rms_norm_zero_centred_training,
            unfit=only_for_gradients,
        ),
        Impl(backend="torch", load=lambda: rms_norm_zero_centred_torch),
        Impl(backend="reference", load=lambda: rms_norm_zero_centred_reference),
    ),
    "rms_norm_gated": (
        Impl(
            backend="training",
            load=lambda: rms_norm_gated_training,
            unfit=only_for_gradients,
        ),
        Impl(backend="torch", load=lambda: rms_norm_gated_torch),
        Impl(backend="invariant", load=lambda: rms_norm_gated_invariant),
        Impl(backend="reference", load=lambda: rms_norm_gated_reference),
    ),
}
