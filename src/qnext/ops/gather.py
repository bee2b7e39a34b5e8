"""Gathers of rows that know their inverse, so that no gradient is scattered with accumulation."""

import torch
from torch import Tensor


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(rows)
        ctx.rows = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, d_out):  # type: ignore[no-untyped-def, override]
        (rows,) = ctx.saved_tensors
        d_x = d_out.new_zeros(ctx.rows, *d_out.shape[1:])
        return d_x.index_copy_(0, rows, d_out), None


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]`` for rows that are all different. Shapes: x [P, ...], rows [R] -> [R, ...]."""
    return _TakeRows.apply(x, rows)
