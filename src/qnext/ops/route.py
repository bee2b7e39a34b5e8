"""Routing: the experts of a token and their weights, and the load that many tokens make."""

import torch
from torch import Tensor

from qnext import native
from qnext.ops.contracts import Impl, RouterLoad, native_for_gradients
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


def router_load_reference(*, logits: Tensor, slots: int) -> RouterLoad:
    """Softmax and its logarithm of every row, then sums."""
    lse_n1 = logits.logsumexp(-1, keepdim=True)
    log_p_nE = logits - lse_n1
    p_nE = log_p_nE.exp()
    chosen_nX = logits.detach().topk(slots, dim=-1).indices
    return RouterLoad(
        counts=torch.bincount(chosen_nX.flatten(), minlength=logits.shape[1]),
        probability=p_nE.sum(0),
        squares=lse_n1.square().sum(),
        entropy=-(p_nE.detach() * log_p_nE.detach()).sum(),
    )


class _RouterLoad(torch.autograd.Function):
    """Keeps logits and one number per row."""

    @staticmethod
    def forward(ctx, logits, slots):  # type: ignore[no-untyped-def, override]
        logits = logits.contiguous()
        rows, experts = logits.shape
        lse, probability = logits.new_empty(rows), logits.new_empty(experts)
        counts = torch.empty(experts, dtype=torch.int64)
        squares, entropy = logits.new_empty(()), logits.new_empty(())
        native.load().load_forward(
            rows, experts, slots, *addresses(logits, lse, counts, probability, squares, entropy)
        )
        ctx.save_for_backward(logits, lse)
        ctx.mark_non_differentiable(counts, entropy)
        return counts, probability, squares, entropy

    @staticmethod
    def backward(ctx, _, d_probability, d_squares, __):  # type: ignore[no-untyped-def, override]
        logits, lse = ctx.saved_tensors
        d_logits = torch.empty_like(logits)
        given = addresses(logits, lse, d_probability.contiguous())
        native.load().load_backward(*logits.shape, *given, float(d_squares), d_logits.data_ptr())
        return d_logits, None


def router_load_native(*, logits: Tensor, slots: int) -> RouterLoad:
    """One native pass over the logits each way; types other than float32 as the reference does."""
    if logits.dtype != torch.float32 or not taken(logits) or not logits.shape[0]:
        return router_load_reference(logits=logits, slots=slots)
    return RouterLoad(*_RouterLoad.apply(logits, slots))


IMPLS = {
    "router_load": (
        Impl(backend="native", load=lambda: router_load_native, unfit=native_for_gradients),
        Impl(backend="reference", load=lambda: router_load_reference),
    ),
    "route": (
        Impl(backend="native", load=lambda: route_native, unfit=native_for_gradients),
        Impl(backend="reference", load=lambda: route_reference),
    ),
}
