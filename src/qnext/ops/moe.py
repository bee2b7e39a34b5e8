"""Routed experts: every token goes through the few experts its router chose."""

import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.ops.contracts import Elementwise, Impl, Linear
from qnext.ops.elementwise import elementwise_invariant, elementwise_torch
from qnext.ops.linear import linear_invariant, linear_torch, only_float32


def experts_reference(
    *, h: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """One loop over tokens and slots, written like the definition; the sum is float32."""
    rows = []
    for p in range(h.shape[0]):
        total = torch.zeros(h.shape[1], dtype=torch.float32, device=h.device)
        for x in range(ids.shape[1]):
            e = int(ids[p, x])
            gate, up = F.linear(h[p], gate_up[e]).chunk(2)
            total = total + weights[p, x].float() * F.linear(F.silu(gate) * up, down[e]).float()
        rows.append(total.to(h.dtype))
    return torch.stack(rows) if rows else h.new_zeros(h.shape)


def experts_torch(
    *, h: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Rows are sorted by expert, one matrix product per expert that has any, then gathered back.

    Equal to the reference because sorting is undone by its inverse permutation and the slots of a
    token are added in their own order, in float32.
    """
    return _by_expert(linear_torch, elementwise_torch, h, ids, weights, gate_up, down)


def _by_expert(
    linear: Linear,
    elementwise: Elementwise,
    h: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
) -> Tensor:
    slots = ids.shape[1]
    order = torch.argsort(ids.flatten(), stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    counts = torch.bincount(ids.flatten(), minlength=gate_up.shape[0]).tolist()
    sorted_h = h[order // slots]
    pieces = []
    # unbind, not indexing: its gradient is one stack instead of one full tensor per expert.
    experts = zip(gate_up.unbind(0), down.unbind(0), counts, strict=True)
    start = 0
    for gate_up_e, down_e, count in experts:
        if count:
            rows = sorted_h[start : start + count]
            gate, up = linear(x=rows, weight=gate_up_e).chunk(2, dim=-1)
            pieces.append(linear(x=elementwise(function=F.silu, x=gate) * up, weight=down_e))
            start += count
    if not pieces:
        return h.new_zeros(h.shape)
    back = torch.cat(pieces)[inverse].unflatten(0, ids.shape)
    weighted = back.float() * weights.float()[..., None]
    total = weighted[:, 0]
    for x in range(1, slots):
        total = total + weighted[:, x]
    return total.to(h.dtype)


def experts_invariant(
    *, h: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Like the fast form, with the rows of every expert padded as in ``linear_invariant``."""
    return _by_expert(linear_invariant, elementwise_invariant, h, ids, weights, gate_up, down)


IMPLS = {
    "experts": (
        Impl(backend="torch", load=lambda: experts_torch),
        Impl(backend="invariant", load=lambda: experts_invariant, unfit=only_float32),
        Impl(backend="reference", load=lambda: experts_reference),
    ),
}
