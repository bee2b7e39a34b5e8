"""The zero-centred norm for training on the native kernels, alone or with the sum before it: one
pass each way.
"""

import torch
from torch import Tensor

from qnext import native
from qnext.ops.contracts import Impl, native_for_gradients
from qnext.ops.native_call import addresses, taken
from qnext.ops.norm import rms_norm_zero_centred_training


class _ZeroCentred(torch.autograd.Function):
    """Keeps the input in its own dtype and one number per row."""

    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def, override]
        x, stride = _rows(x)
        weight32 = weight.float().contiguous()
        y = x.new_empty(x.shape)
        inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.call = (inverse.numel(), x.shape[-1], stride, x.dtype == torch.bfloat16)
        native.load().norm_forward(
            *ctx.call, eps, x.data_ptr(), *addresses(weight32, y, inverse), 0, 0
        )
        ctx.save_for_backward(x, weight32, inverse)
        ctx.weight_dtype = weight.dtype
        return y

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[no-untyped-def, override]
        x, weight, inverse = ctx.saved_tensors
        d_y, d_x, d_weight = d_y.contiguous(), x.new_empty(x.shape), torch.empty_like(weight)
        native.load().norm_backward(
            *ctx.call, x.data_ptr(), *addresses(weight, inverse, d_y), 0, *addresses(d_x, d_weight)
        )
        return d_x, d_weight.to(ctx.weight_dtype), None


class _Residual(torch.autograd.Function):
    """Keeps the sum and one number per row; its gradient has both of its readers in it."""

    @staticmethod
    def forward(ctx, x, added, weight, eps):  # type: ignore[no-untyped-def, override]
        x, weight32 = x.contiguous(), weight.float().contiguous()
        more = None if added is None else added.contiguous()
        total = x if more is None else torch.empty_like(x)
        y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.call = (inverse.numel(), x.shape[-1], x.shape[-1], x.dtype == torch.bfloat16)
        native.load().norm_forward(
            *ctx.call, eps, *addresses(x, weight32, y, inverse),
            *((0, 0) if more is None else addresses(more, total)),
        )  # fmt: skip
        ctx.save_for_backward(total, weight32, inverse)
        ctx.weight_dtype, ctx.added = weight.dtype, added is not None
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    def backward(ctx, d_total, d_y):  # type: ignore[no-untyped-def, override]
        total, weight, inverse = ctx.saved_tensors
        if d_y is None:
            return d_total, d_total if ctx.added else None, None, None
        d_x, d_weight = torch.empty_like(total), torch.empty_like(weight)
        d_y, more = d_y.contiguous(), None if d_total is None else d_total.contiguous()
        native.load().norm_backward(
            *ctx.call, *addresses(total, weight, inverse, d_y),
            0 if more is None else more.data_ptr(), *addresses(d_x, d_weight),
        )  # fmt: skip
        return d_x, d_x if ctx.added else None, d_weight.to(ctx.weight_dtype), None


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x itself if its rows lie equally far apart, else a copy; and how far, in numbers."""
    even = x.stride(-1) == 1 and all(
        x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.ndim - 2)
    )
    if x.ndim == 1 or not even:
        return x.contiguous(), x.shape[-1]
    return x, x.stride(-2)


def rms_norm_zero_centred_native(*, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Float32 and bfloat16 in one native call; other types as ``training`` does."""
    if not taken(x):
        return rms_norm_zero_centred_training(x=x, weight=weight, eps=eps)
    return _ZeroCentred.apply(x, weight, eps)


def residual_norm_native(
    *, x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor] | None:
    """The contract of ``ResidualNorm``; None for types other than float32 and bfloat16."""
    if not taken(x, *(() if added is None else (added,))):
        return None
    return _Residual.apply(x, added, weight, eps)


IMPLS = {
    "residual_norm": (
        Impl(backend="native", load=lambda: residual_norm_native, unfit=native_for_gradients),
        Impl(backend="reference", load=lambda: None),
    ),
    "rms_norm_zero_centred": (
        Impl(
            backend="native",
            load=lambda: rms_norm_zero_centred_native,
            unfit=native_for_gradients,
        ),
    ),
}
