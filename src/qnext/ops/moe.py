"""Routed experts: every token goes through the few experts its router chose."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.ops.contracts import Elementwise, Impl, Linear, only_for_gradients
from qnext.ops.elementwise import elementwise_invariant, elementwise_torch
from qnext.ops.linear import ROW_BLOCK, linear_torch, only_some_dtypes


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
    """Like the fast form, with the rows of every expert padded as in ``linear_invariant``.

    They are laid out with their padding once, and cut to size once, at the end.
    """
    flat, slots = ids.flatten(), ids.shape[1]
    if not flat.numel():
        return h.new_zeros(h.shape)
    order = torch.argsort(flat, stable=True)
    count_E = torch.bincount(flat, minlength=gate_up.shape[0])
    room_E = (count_E + (ROW_BLOCK - 1)) // ROW_BLOCK * ROW_BLOCK
    # How much further down than without padding an expert's rows begin.
    shift_E = (room_E - count_E).cumsum(0) - (room_E - count_E)
    place = torch.arange(flat.numel(), device=h.device) + shift_E[flat[order]]
    rooms = room_E.tolist()
    rows = h.new_zeros(sum(rooms), h.shape[1]).index_copy(0, place, h[order // slots])
    both = torch.cat([F.linear(rows[part], gate_up[e]) for e, part in _parts(rooms)])
    gate, up = both.chunk(2, dim=-1)
    opened = elementwise_invariant(function=F.silu, x=gate) * up
    out = torch.cat([F.linear(opened[part], down[e]) for e, part in _parts(rooms)])
    back = out[torch.empty_like(place).index_copy(0, order, place)].unflatten(0, ids.shape)
    return _weighted_sum(back, weights).to(h.dtype)


class _Experts(torch.autograd.Function):
    """Rows sorted by expert, one product per expert, gathered back; nothing is scattered.

    The weight of a slot multiplies the activation, before the way down, so that expert outputs need
    not be kept for its gradient: that is the product of the activation with what flows back to it.
    Kept are the input, the sorting, and what is before the activation.
    """

    @staticmethod
    def forward(ctx, h, ids, weights, gate_up, down):  # type: ignore[no-untyped-def, override]
        E, both = gate_up.shape[:2]
        slots = ids.shape[1]
        flat = ids.flatten()
        order = torch.argsort(flat, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        counts = torch.bincount(flat, minlength=E).tolist()
        source = order // slots
        sorted_h = h.index_select(0, source)
        before = h.new_empty(sorted_h.shape[0], both)
        for e, part in _parts(counts):
            torch.mm(sorted_h[part], gate_up[e].T, out=before[part])
        scaled = _activation(before, weights.flatten()[order])
        out = sorted_h  # its rows are not needed again: the backward gathers them anew
        for e, part in _parts(counts):
            torch.mm(scaled[part], down[e].T, out=out[part])
        ctx.save_for_backward(h, weights, gate_up, down, before, order, inverse)
        ctx.counts = counts
        return _sum_slots(out, inverse, slots)

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[no-untyped-def, override]
        h, weights, gate_up, down, before, order, inverse = ctx.saved_tensors
        slots, width = weights.shape[1], down.shape[2]
        counts, source = ctx.counts, order // weights.shape[1]
        sorted_d = d_y.index_select(0, source)
        weight_n1 = weights.flatten()[order][:, None]
        d_scaled = sorted_d.new_empty(sorted_d.shape[0], width)
        d_down = torch.zeros_like(down) if 0 in counts else torch.empty_like(down)
        scaled = _activation(before, weight_n1[:, 0])
        for e, part in _parts(counts):
            torch.mm(sorted_d[part], down[e], out=d_scaled[part])
            torch.mm(sorted_d[part].T, scaled[part], out=d_down[e])
        d_before, d_weight_n = _through_activation(before, weight_n1, d_scaled)
        torch.index_select(h, 0, source, out=sorted_d)
        d_gate_up = torch.zeros_like(gate_up) if 0 in counts else torch.empty_like(gate_up)
        for e, part in _parts(counts):
            torch.mm(d_before[part].T, sorted_d[part], out=d_gate_up[e])
            torch.mm(d_before[part], gate_up[e], out=sorted_d[part])
        d_h = _sum_slots(sorted_d, inverse, slots)
        d_weights = d_weight_n[inverse].view_as(weights).to(weights.dtype)
        return d_h, None, d_weights, d_gate_up, d_down


def _parts(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows."""
    start = 0
    for e, count in enumerate(counts):
        if count:
            yield e, slice(start, start + count)
        start += count


def _activation(before: Tensor, weight_n: Tensor) -> Tensor:
    """weight * silu(gate) * up of [n, 2F], in its dtype -> [n, F]."""
    gate, up = before.chunk(2, dim=-1)
    wide = torch.promote_types(before.dtype, torch.float32)
    return F.silu(gate.to(wide)).mul_(up).mul_(weight_n[:, None]).to(before.dtype)


def _through_activation(
    before: Tensor, weight_n1: Tensor, d_scaled: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``before`` [n, 2F] and of the slots' weights [n]."""
    gate, up = before.to(torch.promote_types(before.dtype, torch.float32)).chunk(2, dim=-1)
    opened = F.silu(gate)
    d_opened = d_scaled * up
    d_weight_n = (d_opened * opened).sum(-1)
    d_before = torch.empty_like(before)
    d_gate, d_up = d_before.chunk(2, dim=-1)
    d_gate.copy_(torch.ops.aten.silu_backward(d_opened.mul_(weight_n1), gate))
    d_up.copy_(opened.mul_(d_scaled).mul_(weight_n1))
    return d_before, d_weight_n


def _sum_slots(rows: Tensor, inverse: Tensor, slots: int) -> Tensor:
    """Row p of the result is the sum of the slots of token p, added in their order."""
    if slots == 1:
        return rows.index_select(0, inverse)
    if rows.dtype == torch.float64:  # the fused form is for the dtypes of models
        return rows.index_select(0, inverse).unflatten(0, (-1, slots)).sum(1)
    return F.embedding_bag(inverse.view(-1, slots), rows, mode="sum")


def experts_training(
    *, h: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Like the fast form, with a backward by hand."""
    return _Experts.apply(h, ids, weights, gate_up, down)


IMPLS = {
    "experts": (
        Impl(backend="training", load=lambda: experts_training, unfit=only_for_gradients),
        Impl(backend="torch", load=lambda: experts_torch),
        Impl(backend="invariant", load=lambda: experts_invariant, unfit=only_some_dtypes),
        Impl(backend="reference", load=lambda: experts_reference),
    ),
}
