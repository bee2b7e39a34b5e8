"""Causal attention for training on the native kernels: all documents of a batch in one call."""

import torch
from torch import Tensor

from qnext import native
from qnext.ops.attention import attention_training
from qnext.ops.contracts import Impl, native_for_gradients
from qnext.ops.native_call import addresses, taken
from qnext.ops.segments import Segments


class _Attention(torch.autograd.Function):
    """Keeps inputs, output and one logarithm per row and head."""

    @staticmethod
    def forward(ctx, q, k, v, scale, starts):  # type: ignore[no-untyped-def, override]
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        y, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        shape = (q.shape[1], k.shape[1], q.shape[2])
        ctx.call = (shape, starts, q.dtype == torch.bfloat16, scale)
        native.load().attention_forward(*ctx.call, *addresses(q, k, v, y, lse))
        ctx.save_for_backward(q, k, v, y, lse)
        return y

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[no-untyped-def, override]
        kept = ctx.saved_tensors
        d_q, d_k, d_v = (torch.empty_like(x) for x in kept[:3])
        d_y = d_y.contiguous()
        native.load().attention_backward(*ctx.call, *addresses(*kept, d_y, d_q, d_k, d_v))
        return d_q, d_k, d_v, None, None


def attention_native(
    *, q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments
) -> Tensor:
    """Float32 and bfloat16 in one native call; other types and odd heads as ``training`` does."""
    odd = q.dtype == torch.bfloat16 and q.shape[2] % 2
    if not taken(q, k, v) or odd or scale <= 0:
        return attention_training(q=q, k=k, v=v, scale=scale, segments=segments)
    return _Attention.apply(q, k, v, scale, segments.starts)


IMPLS = {
    "attention": (
        Impl(backend="native", load=lambda: attention_native, unfit=native_for_gradients),
    ),
}
