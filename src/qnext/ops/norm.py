"""Root-mean-square norms in the three conventions of the family.

References: Zhang and Sennrich 2019 (arXiv 1910.07467); the zero-centred form stores weights around
0 and multiplies by 1 + weight before the cast; the gated form closes a delta layer.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.ops.contracts import Impl
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


IMPLS = {
    "rms_norm": (Impl(backend="reference", load=lambda: rms_norm_reference),),
    "rms_norm_zero_centred": (
        Impl(backend="torch", load=lambda: rms_norm_zero_centred_torch),
        Impl(backend="reference", load=lambda: rms_norm_zero_centred_reference),
    ),
    "rms_norm_gated": (
        Impl(backend="torch", load=lambda: rms_norm_gated_torch),
        Impl(backend="invariant", load=lambda: rms_norm_gated_invariant),
        Impl(backend="reference", load=lambda: rms_norm_gated_reference),
    ),
}
