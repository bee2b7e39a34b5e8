"""Head and cross-entropy in one function, in blocks: the logits of a whole batch never exist.

Gradients are formed in the forward pass, while the logits of a block are there; backward only
multiplies them by the incoming number. Rows of weight 0 are left out before the first product.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qnext import native
from qnext.ops.contracts import CrossEntropyRows, Impl, native_for_gradients
from qnext.ops.native_call import addresses, taken

BLOCK_BYTES = 32 << 20
"""Float32 logits alive at once. Every block adds to the whole gradient of the head, so that small
ones cost more than they save."""
LEAST_ROWS = 256
"""Rows of a block; a vocabulary too wide for that many is cut into blocks as well."""


class CrossEntropy(NamedTuple):
    """What is known about R rows; only ``loss_sum`` carries a gradient."""

    loss_sum: Tensor
    """Scalar float32: sum over rows of weight * (lse - logit of the label)."""
    loss: Tensor
    """[R] float32, not weighted; 0 for rows of weight 0."""
    lse: Tensor
    """[R] float32: logarithm of the sum of exponentials of the logits; 0 for rows of weight 0."""
    hits: Tensor
    """[R] bool: the label has the largest logit; False for rows of weight 0."""


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None = None
) -> CrossEntropy:
    """The definition, with all logits at once. Shapes as in ``linear_cross_entropy``."""
    if weights is None:
        weights = x.new_ones(x.shape[0], dtype=torch.float32)
    used = weights != 0
    logits_RV = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
    lse = logits_RV.logsumexp(-1)
    loss = lse - logits_RV.gather(1, labels[:, None])[:, 0]
    hits = logits_RV.argmax(-1) == labels
    # where, not a product: a row that does not count may hold anything, infinities included.
    loss, lse = (torch.where(used, value, 0.0) for value in (loss, lse))
    return CrossEntropy((weights * loss).sum(), loss.detach(), lse.detach(), hits & used)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
    rows_op: CrossEntropyRows | None = None,
) -> CrossEntropy:
    """Weighted cross-entropy of rows under a head, at most ``block_bytes`` of logits at a time.

    Shapes: x [R, D], weight [V, D], labels [R] int64, weights [R] float32 (None for ones).
    Products are in the dtype of x, everything after them is float32. Without gradients the second
    half of the work is skipped. ``rows_op`` is what judges blocks of whole rows, the reference if
    left out.
    """
    rows_op = rows_op or cross_entropy_rows_reference_
    if weights is None:
        weights = x.new_ones(x.shape[0], dtype=torch.float32)
    used = torch.nonzero(weights).flatten()
    if used.shape[0] == x.shape[0]:
        return CrossEntropy(
            *_LinearCrossEntropy.apply(x, weight, labels, weights, block_bytes, rows_op)
        )
    total, *rows = _LinearCrossEntropy.apply(
        x[used], weight, labels[used], weights[used], block_bytes, rows_op
    )
    scattered = [row.new_zeros(x.shape[0]).index_copy(0, used, row) for row in rows]
    return CrossEntropy(total, *scattered)


class _LinearCrossEntropy(torch.autograd.Function):
    """Rows that all count; see ``linear_cross_entropy``."""

    @staticmethod
    def forward(ctx, x, weight, labels, weights, block_bytes, rows_op):  # type: ignore[no-untyped-def, override]
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        R, V = x.shape[0], weight.shape[0]
        wide = torch.promote_types(x.dtype, torch.float32)
        loss, lse = x.new_empty(R, dtype=wide), x.new_empty(R, dtype=wide)
        hits = torch.empty(R, dtype=torch.bool, device=x.device)
        # Only the native form needs no copy of the logits in a wider type.
        size = x.itemsize if rows_op is cross_entropy_rows_native_ else wide.itemsize
        rows = max(LEAST_ROWS, max(1, block_bytes // size) // V)
        columns = max(1, min(V, max(1, block_bytes // size) // rows))
        # One block's gradients are those of all rows: nothing has to be added, and rounded later.
        only = 0 < R <= rows and columns == V
        dx = torch.zeros_like(x) if needs_x and not only else None
        dw = torch.zeros_like(weight, dtype=wide) if needs_weight and not only else None
        for start in range(0, R, rows):
            part = slice(start, start + rows)
            x_BD, labels_B, weights_B = x[part], labels[part], weights[part].to(wide)
            if columns == V:
                logits_BV = x_BD @ weight.T
                wanted = needs_x or needs_weight
                loss[part], lse[part], hits[part] = rows_op(
                    logits=logits_BV, labels=labels_B, weights=weights_B, slopes=wanted
                )
                if only and needs_x:
                    dx = logits_BV @ weight
                if only and needs_weight:
                    dw = logits_BV.T @ x
                slopes = ((0, logits_BV),) if wanted and not only else ()
            else:
                lse[part], label_B, first_B = _scan(x_BD, weight, labels_B, columns, wide)
                loss[part], hits[part] = lse[part] - label_B, first_B == labels_B
                given = (x_BD, weight, labels_B, weights_B, lse[part], columns)
                slopes = _slopes(*given) if needs_x or needs_weight else ()
            for first, slope_Bv in slopes:
                columns_v = slice(first, first + slope_Bv.shape[1])
                if dx is not None:
                    dx[part] += slope_Bv @ weight[columns_v]
                if dw is not None:
                    dw[columns_v] += slope_Bv.T @ x_BD
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(loss, lse, hits)
        return (weights.to(wide) * loss).sum(), loss, lse, hits

    @staticmethod
    def backward(ctx, scale, *_):  # type: ignore[no-untyped-def, override]
        dx, dw = ctx.saved_tensors
        if dx is not None:
            dx = dx * scale.to(dx.dtype)
        if dw is not None:
            dw = (dw * scale).to(ctx.weight_dtype)
        return dx, dw, None, None, None, None


def _scan(
    x: Tensor, weight: Tensor, labels: Tensor, columns: int, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """lse [B], logit of the label [B] and likeliest token [B], one block of the vocabulary at once.

    The sum of exponentials is kept relative to the largest logit so far.
    """
    top = x.new_full((x.shape[0],), float("-inf"), dtype=wide)
    mass, label = torch.zeros_like(top), torch.zeros_like(top)
    winner = torch.zeros_like(labels)
    for first in range(0, weight.shape[0], columns):
        logits = (x @ weight[first : first + columns].T).to(wide)
        highest, place = logits.max(-1)
        winner = torch.where(highest > top, place + first, winner)
        new_top = torch.maximum(top, highest)
        mass = mass * (top - new_top).exp()
        top = new_top
        inside = labels - first
        here = (inside >= 0) & (inside < logits.shape[1])
        found = logits.gather(1, inside.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        label = torch.where(here, found, label)
        mass = mass + logits.sub_(top[:, None]).exp_().sum(-1)
    return top + mass.log(), label, winner


def _slopes(  # type: ignore[no-untyped-def]
    x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, lse: Tensor, columns: int
):
    """(first token, slope of the block [B, columns]), with the logits computed once more."""
    for first in range(0, weight.shape[0], columns):
        share = (x @ weight[first : first + columns].T).to(lse.dtype)
        share.sub_(lse[:, None]).exp_()
        inside = labels - first
        here = (inside >= 0) & (inside < share.shape[1])
        yield first, _slope(share, inside, here, weights).to(x.dtype)


def _slope(share: Tensor, labels: Tensor, here: Tensor, weights: Tensor) -> Tensor:
    """weights * (share - 1 at the label, where it is ``here``); overwrites ``share`` [B, v]."""
    place = labels.clamp(0, share.shape[1] - 1)[:, None]
    share.scatter_add_(1, place, -here.to(share.dtype)[:, None])
    return share.mul_(weights[:, None])


def cross_entropy_rows_reference_(
    *, logits: Tensor, labels: Tensor, weights: Tensor, slopes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One softmax in float32 (or wider)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    top_B, first_B = logits.max(-1)
    share_BV = logits.softmax(-1, dtype=wide)
    # The largest share is at least 1 / V, so that its logarithm is always finite.
    lse_B = top_B.to(wide) - share_BV.gather(1, first_B[:, None])[:, 0].log()
    label_B = logits.gather(1, labels[:, None])[:, 0].to(wide)
    if slopes:
        logits.copy_(_slope(share_BV, labels, torch.ones_like(labels), weights))
    return lse_B - label_B, lse_B, first_B == labels


def cross_entropy_rows_native_(
    *, logits: Tensor, labels: Tensor, weights: Tensor, slopes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in one native call; types other than float32 and bfloat16 as the reference does."""
    if not taken(logits) or not logits.is_contiguous():
        return cross_entropy_rows_reference_(
            logits=logits, labels=labels, weights=weights, slopes=slopes
        )
    loss, lse = torch.empty(2, logits.shape[0]).unbind()
    hits = torch.empty(logits.shape[0], dtype=torch.bool)
    given = (labels.contiguous(), weights.float().contiguous())
    native.load().cross_entropy(
        *logits.shape, logits.dtype == torch.bfloat16, slopes,
        *addresses(logits, *given, loss, lse, hits),
    )  # fmt: skip
    return loss, lse, hits


IMPLS = {
    "cross_entropy_rows_": (
        Impl(backend="native", load=lambda: cross_entropy_rows_native_, unfit=native_for_gradients),
        Impl(backend="reference", load=lambda: cross_entropy_rows_reference_),
    ),
}
