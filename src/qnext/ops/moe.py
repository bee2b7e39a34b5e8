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
    token are added in their own order, in float32. A few rows of a small layer are not sorted:
    their experts' weights are copied together and multiplied in one batched product, which saves
    more calls than it costs bytes.
    """
    chosen_bytes = ids.numel() * (gate_up[0].numel() + down[0].numel()) * h.element_size()
    if chosen_bytes <= GATHERED_BYTES and not torch.is_grad_enabled():
        return _gathered(h, ids, weights, gate_up, down)
    return _by_expert(linear_torch, elementwise_torch, h, ids, weights, gate_up, down)


GATHERED_BYTES = 4 << 20
"""Up to so many bytes of chosen experts are copied together: they stay in a core's cache."""


def _gathered(h: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    flat = ids.flatten()
    h_nD1 = h.repeat_interleave(ids.shape[1], dim=0)[..., None]
    gate, up = torch.bmm(gate_up[flat], h_nD1).chunk(2, dim=1)
    back = torch.bmm(down[flat], F.silu(gate) * up)[..., 0].unflatten(0, ids.shape)
    return _weighted_sum(back, weights).to(h.dtype)


def _weighted_sum(back: Tensor, weights: Tensor) -> Tensor:
    """[P, X, D] and [P, X] -> [P, D] float32, slots added in their order."""
    weighted = back.float() * weights.float()[..., None]
    total = weighted[:, 0]
    for x in range(1, weights.shape[1]):
        total = total + weighted[:, x]
    return total


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
    return _weighted_sum(back, weights).to(h.dtype)


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
