"""Functions of single numbers: sigmoid, SiLU, exponentials."""

from collections.abc import Callable

import torch
from torch import Tensor

from qnext.ops.contracts import Impl

STEADY_BLOCK = 1 << 15
"""The library gives blocks of this size to one thread and computes them without a remainder."""
LANES = 64


def elementwise_torch(*, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The function itself."""
    return function(x)


def elementwise_invariant(*, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The function on padded, contiguous blocks.

    The library computes most of a tensor with vector instructions and the rest one by one, with
    another exponential; which numbers are the rest depends on the tensor's size and strides. Padded
    blocks have no rest, and neither has a small tensor that is one already.
    """
    if x.numel() <= STEADY_BLOCK and not x.numel() % LANES and x.is_contiguous():
        return function(x)
    padded = torch.constant_pad_nd(x.reshape(-1), (0, -x.numel() % LANES))
    if padded.shape[0] <= STEADY_BLOCK:
        whole = function(padded)
    else:
        whole = torch.cat([function(block) for block in padded.split(STEADY_BLOCK)])
    return whole[: x.numel()].view(x.shape)


IMPLS = {
    "elementwise": (
        Impl(backend="torch", load=lambda: elementwise_torch),
        Impl(backend="invariant", load=lambda: elementwise_invariant),
        Impl(backend="reference", load=lambda: elementwise_torch),
    ),
}
