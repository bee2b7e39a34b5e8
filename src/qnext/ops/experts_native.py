"""Routed experts for training on the native kernels: a layer's experts in one call each way.

Rows are gathered where they stand, sums are float32, gradients of weights are rounded once. A call
runs on the thread that makes it.
"""

import torch
from torch import Tensor

from qnext import native
from qnext.ops.contracts import Impl, native_for_gradients
from qnext.ops.moe import experts_training
from qnext.ops.native_call import addresses, taken


class _Experts(torch.autograd.Function):
    """Keeps the input, the sorting, and what is before the activation, as the plain form does."""

    @staticmethod
    def forward(ctx, h, ids, weights, gate_up, down):  # type: ignore[no-untyped-def, override]
        E, both, D = gate_up.shape
        P, X = ids.shape
        shape, half = (P, X, E, D, both // 2), h.dtype == torch.bfloat16
        h, weights, gate_up, down = (x.contiguous() for x in (h, weights, gate_up, down))
        ids = ids.contiguous()
        order = torch.empty(P * X, dtype=torch.int32)
        starts = torch.empty(E + 1, dtype=torch.int64)
        before = h.new_empty(P * X, both)
        y = torch.empty_like(h)
        native.load().experts_forward(
            shape, half, *addresses(h, ids, weights, gate_up, down, order, starts, before, y)
        )
        ctx.save_for_backward(h, weights, gate_up, down, order, starts, before)
        ctx.shape, ctx.half = shape, half
        return y

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[no-untyped-def, override]
        kept = ctx.saved_tensors
        h, weights, gate_up, down = kept[:4]
        d_h, d_weights, d_gate_up, d_down = (
            torch.empty_like(x) for x in (h, weights, gate_up, down)
        )
        written = (d_h, d_weights, d_gate_up, d_down)
        native.load().experts_backward(
            ctx.shape, ctx.half, *addresses(*kept, d_y.contiguous(), *written)
        )
        return d_h, None, d_weights, d_gate_up, d_down


def experts_native(
    *, h: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Float32 and bfloat16 in one native call; other types and odd widths as ``training`` does."""
    odd = h.dtype == torch.bfloat16 and (h.shape[1] % 2 or down.shape[2] % 2)
    if not taken(h, gate_up, down) or odd or not h.shape[0]:
        return experts_training(h=h, ids=ids, weights=weights, gate_up=gate_up, down=down)
    return _Experts.apply(h, ids, weights.float(), gate_up, down)


IMPLS = {
    "experts": (Impl(backend="native", load=lambda: experts_native, unfit=native_for_gradients),),
}
