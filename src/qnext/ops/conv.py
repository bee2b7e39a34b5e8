"""Causal depthwise convolution with SiLU over packed sequences, each with its saved window."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.ops.contracts import Impl, only_for_gradients
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


BLOCK_NUMBERS = 1 << 17
"""Numbers of a block of rows, which a core's cache holds in float32 while all taps are added."""


class _CausalConv(torch.autograd.Function):
    """Shifted, masked multiply-adds and SiLU, a block of rows at a time.

    Blocks read the few rows before them (and, in backward, after them) once more. The sum over taps
    is computed again in backward.
    """

    @staticmethod
    def forward(ctx, x, weight, offsets):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x, weight, offsets)
        taps = weight.T.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        out = torch.empty_like(x)
        for start, stop in _blocks(x):
            _, mixed = _mixed(x, taps, offsets, start, stop)
            out[start:stop] = F.silu(mixed, inplace=True)
        return out

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[no-untyped-def, override]
        x, weight, offsets = ctx.saved_tensors
        history = weight.shape[1] - 1
        taps = weight.T.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        d_taps = torch.zeros_like(taps)
        d_x = torch.empty_like(x)
        for start, stop in _blocks(x):
            # The last rows of the block are also read by the first rows after it.
            after = min(stop + history, x.shape[0])
            seen_x, mixed = _mixed(x, taps, offsets, start, after)
            d_mixed = torch.ops.aten.silu_backward(d_y[start:after].to(taps.dtype), mixed)
            rows = stop - start
            d_block = d_mixed[:rows] * taps[history]
            d_taps[history] += (d_mixed[:rows] * seen_x[history : history + rows]).sum(0)
            for back in range(1, history + 1):
                slope = d_mixed * _seen(offsets[start:after], back, taps.dtype)
                earlier = seen_x[history - back : history - back + rows]
                d_taps[history - back] += (slope[:rows] * earlier).sum(0)
                inside = slope[back : back + rows]
                d_block[: inside.shape[0]].addcmul_(inside, taps[history - back])
            d_x[start:stop] = d_block
        return d_x, d_taps.T.to(weight.dtype), None


def _blocks(x: Tensor) -> Iterator[tuple[int, int]]:
    rows = max(16, BLOCK_NUMBERS // x.shape[1])
    for start in range(0, x.shape[0], rows):
        yield start, min(start + rows, x.shape[0])


def _seen(offsets: Tensor, back: int, dtype: torch.dtype) -> Tensor:
    """[rows, 1]: 1 where the row ``back`` before is of the same sequence."""
    return (offsets >= back).to(dtype)[:, None]


def _mixed(
    x: Tensor, taps: Tensor, offsets: Tensor, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Rows ``start - history ... stop`` of x, zeros before the first, and the sums of the block.

    taps [J, ch] and both results are float32; the sums are [stop - start, ch].
    """
    history = taps.shape[0] - 1
    first = max(0, start - history)
    rows = x[first:stop].to(taps.dtype)
    if start - first < history:
        rows = torch.cat((rows.new_zeros(history - (start - first), rows.shape[1]), rows))
    out = rows[history:] * taps[history]
    for back in range(1, history + 1):
        earlier = rows[history - back : history - back + stop - start]
        out.addcmul_(earlier * _seen(offsets[start:stop], back, taps.dtype), taps[history - back])
    return rows, out


def causal_conv_training(
    *, x: Tensor, weight: Tensor, state: Tensor | None, segments: Segments
) -> tuple[Tensor, Tensor]:
    """Sequences without a saved window as shifts of the packed tokens, with a backward by hand.

    Equal to the reference because a shifted row counts only where it is of the same sequence.
    Sequences that continue a window take the general form.
    """
    if state is not None:
        return causal_conv_torch(x=x, weight=weight, state=state, segments=segments)
    if not segments.total:
        return x, x.new_zeros(segments.count, weight.shape[1] - 1, x.shape[1])
    out = _CausalConv.apply(x, weight, segments.offsets())
    return out, _last_inputs(x, weight.shape[1] - 1, segments)


def _last_inputs(x: Tensor, history: int, segments: Segments) -> Tensor:
    """The last ``history`` rows of every sequence, zeros before its first: [B, history, ch]."""
    in_batch = segments.tail_table(history) - segments.count * history
    rows = x[in_batch.clamp_min(0)]
    return rows * (in_batch >= 0)[..., None].to(x.dtype)


IMPLS = {
    "causal_conv": (
        Impl(backend="training", load=lambda: causal_conv_training, unfit=only_for_gradients),
        Impl(backend="torch", load=lambda: causal_conv_torch),
        Impl(backend="invariant", load=lambda: causal_conv_invariant),
        Impl(backend="reference", load=lambda: causal_conv_reference),
    ),
}
