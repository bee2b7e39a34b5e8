"""Causal depthwise convolution with SiLU over packed sequences, each with its saved window."""

import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.ops.contracts import Impl
from qnext.ops.elementwise import elementwise_invariant
from qnext.ops.segments import Segments


def causal_conv_reference(
    *, x: Tensor, weight: Tensor, state: Tensor | None, segments: Segments
) -> tuple[Tensor, Tensor]:
    """One loop over sequences and tokens, written like the definition."""
    history = weight.shape[1] - 1
    if state is None:
        state = x.new_zeros(segments.count, history, x.shape[1])
    outs, states = [], []
    for b, (start, end) in enumerate(zip(segments.starts, segments.starts[1:], strict=False)):
        window = torch.cat((state[b], x[start:end]))
        for t in range(end - start):
            taps = window[t : t + history + 1].float() * weight.float().T
            outs.append(F.silu(taps.sum(0)).to(x.dtype))
        states.append(window[window.shape[0] - history :])
    out = torch.stack(outs) if outs else x.new_zeros(x.shape)
    return out, torch.stack(states)


def causal_conv_torch(
    *, x: Tensor, weight: Tensor, state: Tensor | None, segments: Segments
) -> tuple[Tensor, Tensor]:
    """All tokens at once: each tap is a gather of earlier rows, found in the batch's tables.

    Equal to the reference because the table sends a token near the start of its sequence to the
    saved window of that same sequence, never to a neighbour.
    """
    out, state = _convolve(x, weight, state, segments)
    return F.silu(out).to(x.dtype), state


def causal_conv_invariant(
    *, x: Tensor, weight: Tensor, state: Tensor | None, segments: Segments
) -> tuple[Tensor, Tensor]:
    """The fast form with a SiLU that does not depend on the number of rows."""
    out, state = _convolve(x, weight, state, segments)
    return elementwise_invariant(function=F.silu, x=out).to(x.dtype), state


def _convolve(
    x: Tensor, weight: Tensor, state: Tensor | None, segments: Segments
) -> tuple[Tensor, Tensor]:
    """The sum over taps [P, ch] float32, and the new window."""
    history = weight.shape[1] - 1
    if state is None:
        state = x.new_zeros(segments.count, history, x.shape[1])
    rows = torch.cat((state.flatten(0, 1), x))
    if segments.longest == 1 and segments.total == segments.count:
        # One new token per sequence: its window is the saved one, no table needed.
        # Summed in the order of the general case, so that both give the same bits.
        out = x.float() * weight[:, history].float()
        for j in range(history):
            out = out + state[:, j].float() * weight[:, j].float()
        return out, torch.cat((state[:, 1:], x[:, None]), dim=1)
    table = segments.window_table(history)
    out = x.float() * weight[:, history].float()
    for j in range(history):
        out = out + rows[table[:, j]].float() * weight[:, j].float()
    return out, rows[segments.tail_table(history)]


IMPLS = {
    "causal_conv": (
        Impl(backend="torch", load=lambda: causal_conv_torch),
        Impl(backend="invariant", load=lambda: causal_conv_invariant),
        Impl(backend="reference", load=lambda: causal_conv_reference),
    ),
}
