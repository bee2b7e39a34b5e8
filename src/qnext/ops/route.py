"""Routing: the experts of a token and their weights, from its router's logits."""

import torch
from torch import Tensor

from qnext import native
from qnext.ops.contracts import Impl, native_for_gradients
from qnext.ops.native_call import addresses, taken


def route_reference(*, logits: Tensor, slots: int, rescale: bool) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, its largest entries, and if asked for their shares of the sum."""
    weights_PX, ids_PX = logits.softmax(-1).topk(slots, dim=-1)
    if rescale:
        weights_PX = weights_PX / weights_PX.sum(-1, keepdim=True)
    return weights_PX, ids_PX


class _Route(torch.autograd.Function):
    """Keeps logits and what was chosen."""

    @staticmethod
    def forward(ctx, logits, slots, rescale):  # type: ignore[no-untyped-def, override]
        logits = logits.contiguous()
        weights = logits.new_empty(logits.shape[0], slots)
        ids = torch.empty(weights.shape, dtype=torch.int64)
        ctx.call = (*logits.shape, slots, rescale)
        native.load().route_forward(*ctx.call, *addresses(logits, weights, ids))
        ctx.save_for_backward(logits, weights, ids)
        ctx.mark_non_differentiable(ids)
        return weights, ids

    @staticmethod
    def backward(ctx, d_weights, _):  # type: ignore[no-untyped-def, override]
        kept = ctx.saved_tensors
        d_weights, d_logits = d_weights.contiguous(), torch.empty_like(kept[0])
        native.load().route_backward(*ctx.call, *addresses(*kept, d_weights, d_logits))
        return d_logits, None, None


def route_native(*, logits: Tensor, slots: int, rescale: bool) -> tuple[Tensor, Tensor]:
    """One native pass over the logits each way; types other than float32 as the reference does."""
    if logits.dtype != torch.float32 or not taken(logits):
        return route_reference(logits=logits, slots=slots, rescale=rescale)
    return _Route.apply(logits, slots, rescale)


IMPLS = {
    "route": (
        Impl(backend="native", load=lambda: route_native, unfit=native_for_gradients),
        Impl(backend="reference", load=lambda: route_reference),
    ),
}
