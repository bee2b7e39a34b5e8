"""Causal depthwise convolution with SiLU over packed sequences, each with its saved window."""

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


class _CausalConv(torch.autograd.Function):
    """Shifted, masked multiply-adds and SiLU; the sum over taps is computed again in backward."""

    @staticmethod
    def forward(ctx, x, weight, offsets):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x, weight, offsets)
        return F.silu(_CausalConv.mixed(x, weight, offsets), inplace=True).to(x.dtype)

    @staticmethod
    def mixed(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """The sum over taps [P, ch], float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        taps = weight.to(wide)
        last = weight.shape[1] - 1
        out = x * taps[:, last]
        for back in range(1, min(last, x.shape[0] - 1) + 1):
            seen = (offsets[back:] >= back).to(x.dtype)[:, None]
            out[back:].addcmul_(x[:-back] * seen, taps[:, last - back])
        return out

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[no-untyped-def, override]
        x, weight, offsets = ctx.saved_tensors
        mixed = _CausalConv.mixed(x, weight, offsets)
        taps, last = weight.to(mixed.dtype), weight.shape[1] - 1
        d_mixed = torch.ops.aten.silu_backward(d_y.to(mixed.dtype), mixed)
        d_x = d_mixed * taps[:, last]
        d_taps = torch.zeros_like(taps)
        d_taps[:, last] = (d_mixed * x).sum(0)
        for back in range(1, min(last, x.shape[0] - 1) + 1):
            seen = (offsets[back:] >= back).to(mixed.dtype)[:, None]
            slope = d_mixed[back:] * seen
            d_x[:-back].addcmul_(slope, taps[:, last - back])
            d_taps[:, last - back] = slope.mul_(x[:-back]).sum(0)
        return d_x.to(x.dtype), d_taps.to(weight.dtype), None


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
