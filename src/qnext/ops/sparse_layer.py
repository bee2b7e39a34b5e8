"""A sparse layer after its norm in one native call each way, for training.

Router, choice, routed experts, the shared expert with its gate and the residual: what they add to a
token is summed in float32 and rounded once (``csrc/kernels/training_sparse.cpp``). Without the
kernel, or with tensors it does not take, the model calls the ops one after the other: they are the
reference.
"""

import torch
from torch import Tensor

from qnext import native
from qnext.ops.contracts import Impl, SharedWeights, native_for_gradients
from qnext.ops.native_call import addresses, taken


class _SparseLayer(torch.autograd.Function):
    """Keeps the input, logits, the sorting, and what is before the activations."""

    @staticmethod
    def forward(ctx, h, residual, router, gate_up, down, slots, rescale, *shared):  # type: ignore[no-untyped-def, override]
        (P, D), (E, both, _) = h.shape, gate_up.shape
        h, router, gate_up, down = (x.contiguous() for x in (h, router, gate_up, down))
        order = torch.empty(P * slots, dtype=torch.int32)
        starts = torch.empty(E + 1, dtype=torch.int64)
        before, logits = h.new_empty(P * slots, both), router.new_empty(P, E)
        ids, weights = torch.empty(P, slots, dtype=torch.int64), router.new_empty(P, slots)
        kept = [h, router, gate_up, down, order, starts, before, logits, ids, weights]
        width = shared[0].shape[0] if shared else 0
        if shared:
            kept += [x.contiguous() for x in shared]
            kept += [router.new_empty(P), h.new_empty(P, 2 * width)]
        ctx.call = ((P, slots, E, D, both // 2, width), h.dtype == torch.bfloat16, rescale)
        y = torch.empty_like(h)
        added = None if residual is None else residual.contiguous()
        native.load().sparse_layer_forward(
            *ctx.call, addresses(*kept), 0 if added is None else added.data_ptr(), y.data_ptr()
        )
        ctx.save_for_backward(*kept)
        ctx.added = residual is not None
        ctx.set_materialize_grads(False)
        return y, logits

    @staticmethod
    def backward(ctx, d_y, d_logits):  # type: ignore[no-untyped-def, override]
        kept = ctx.saved_tensors
        d_y = torch.zeros_like(kept[0]) if d_y is None else d_y.contiguous()
        d_logits = None if d_logits is None else d_logits.contiguous()
        read = (*kept[:4], kept[9], *kept[10:15])
        found = [torch.empty_like(x) for x in read]
        native.load().sparse_layer_backward(
            *ctx.call, addresses(*kept), d_y.data_ptr(),
            0 if d_logits is None else d_logits.data_ptr(), addresses(*found),
        )  # fmt: skip
        d_residual = d_y if ctx.added else None
        return found[0], d_residual, *found[1:4], None, None, *found[5:9]


def sparse_layer_native(
    *,
    h: Tensor,
    residual: Tensor | None,
    router: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: SharedWeights | None,
    slots: int,
    rescale: bool,
) -> tuple[Tensor, Tensor] | None:
    """The contract of ``SparseLayer``; None for other types than float32 and bfloat16, odd widths
    in bfloat16, and no tokens."""
    numbers = [h, gate_up, down, *(shared or ())]
    if residual is not None:
        numbers.append(residual)
    widths = [h.shape[1], down.shape[2], *([shared[0].shape[0]] if shared else [])]
    odd = h.dtype == torch.bfloat16 and any(width % 2 for width in widths)
    if not taken(*numbers) or odd or not h.shape[0]:
        return None
    return _SparseLayer.apply(
        h, residual, router.float(), gate_up, down, slots, rescale, *(shared or ())
    )


IMPLS = {
    "sparse_layer": (
        Impl(backend="native", load=lambda: sparse_layer_native, unfit=native_for_gradients),
        Impl(backend="reference", load=lambda: None),
    ),
}
