"""A delta layer between its projections in one native call each way, for training.

Convolution, SiLU, unit lengths, gates, the delta rule and the gated norm pass over a chunk of one
key head while it is in a core's cache (``csrc/kernels/training_delta.cpp``). Documents are walked
one after the other, so that no border needs a mask. Without the kernel, or with tensors it does not
take, the model calls the ops one after the other: they are the reference.
"""

from itertools import pairwise

import torch
from torch import Tensor

from qnext import native
from qnext.ops.contracts import Impl, native_for_gradients
from qnext.ops.native_call import addresses, taken
from qnext.ops.segments import Segments

CHUNK, WIDE_CHUNK = 32, 64
"""Tokens solved at once, for heads of at most 64 dimensions and for wider ones."""


class _DeltaLayer(torch.autograd.Function):
    """Keeps its inputs, the states that enter the chunks, what tokens write and what is read."""

    @staticmethod
    def forward(ctx, qkvz, ba, conv, A_log, dt_bias, norm, eps, key_heads, starts):  # type: ignore[no-untyped-def, override]
        P, W, M = qkvz.shape[0], A_log.shape[0], norm.shape[0]
        K = (qkvz.shape[1] - 2 * W * M) // (2 * key_heads)
        chunk = CHUNK if max(K, M) <= 64 else WIDE_CHUNK
        shape = (key_heads, W, K, M, conv.shape[1], chunk)
        chunks = sum(-(-(b - a) // chunk) for a, b in pairwise(starts))
        kept = [x.contiguous() for x in (qkvz, ba, conv.float(), A_log, dt_bias, norm)]
        kept += [norm.new_empty(chunks, W, K, M), *norm.new_empty(2, P, W, M).unbind()]
        y = qkvz.new_empty(P, W * M)
        half = qkvz.dtype == torch.bfloat16
        ctx.call = (shape, starts, half, eps)
        native.load().delta_layer_forward(*ctx.call, addresses(*kept), y.data_ptr())
        ctx.save_for_backward(*kept)
        ctx.conv_dtype = conv.dtype
        return y

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[no-untyped-def, override]
        kept = ctx.saved_tensors
        found = [torch.empty_like(x) for x in kept[:6]]
        d_y = d_y.contiguous()
        native.load().delta_layer_backward(
            *ctx.call, addresses(*kept), d_y.data_ptr(), addresses(*found)
        )
        found[2] = found[2].to(ctx.conv_dtype)
        return *found, None, None, None


def delta_layer_native(
    *,
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    key_heads: int,
    segments: Segments,
) -> Tensor | None:
    """The contract of ``DeltaLayer``; None for types other than float32 and bfloat16."""
    if not taken(qkvz, ba):
        return None
    return _DeltaLayer.apply(
        qkvz, ba, conv_weight, A_log.float(), dt_bias.float(), norm_weight.float(), eps, key_heads,
        segments.starts,
    )  # fmt: skip


IMPLS = {
    "delta_layer": (
        Impl(backend="native", load=lambda: delta_layer_native, unfit=native_for_gradients),
        Impl(backend="reference", load=lambda: None),
    ),
}
