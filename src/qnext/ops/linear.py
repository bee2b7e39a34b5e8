"""Matrix products with a weight: ``x W^T + b``, one row per token."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qnext.ops.contracts import Impl, Linear, OpSpec

ROW_BLOCK = 16
"""Row counts that are multiples of this give every row the same bits, whatever the others are."""


def linear_torch(*, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The library's product; it is also the reference."""
    return F.linear(x, weight, bias)


def linear_invariant(*, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The library's product on a padded number of rows.

    The library chooses its algorithm by the number of rows, and for few rows sums in another
    order. From ``ROW_BLOCK`` rows on it does not; the padding rows are cut off again.
    """
    # The inner form of pad, and views: around small products, time goes into such calls.
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    missing = -rows.shape[0] % ROW_BLOCK
    if not missing:
        out = F.linear(rows.contiguous(), weight, bias)
    else:
        out = F.linear(torch.constant_pad_nd(rows, (0, 0, 0, missing)), weight, bias)
        out = out[: rows.shape[0]]
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])


def only_some_dtypes(spec: OpSpec) -> str | None:
    """Why an invariant form does not fit, if so."""
    if spec.dtype not in (torch.float32, torch.bfloat16):
        return f"rows are independent in float32 and bfloat16 only, not in {spec.dtype}."
    if spec.device != "cpu":
        return f"it was made for the CPU, not for {spec.device}."
    return None


class Projection(nn.Linear):
    """A linear layer whose product is an op; parameters are those of ``nn.Linear``."""

    def __init__(self, inputs: int, outputs: int, *, op: Linear, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x=x, weight=self.weight, bias=self.bias)


IMPLS = {
    "linear": (
        Impl(backend="torch", load=lambda: linear_torch),
        Impl(backend="invariant", load=lambda: linear_invariant, unfit=only_some_dtypes),
        Impl(backend="reference", load=lambda: linear_torch),
    ),
}
