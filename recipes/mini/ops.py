"""The ops the model trains with: the package's own, with shapes that suit short documents on a CPU."""

from dataclasses import replace
from functools import partial

from qnext.ops import Ops, OpSpec, select
from qnext.ops.gated_delta import gated_delta_chunk_torch


def training_ops() -> Ops:
    """Chunks of 32 instead of 64 tokens: with 64-wide heads that is less work per token."""
    chosen = select(OpSpec())
    return replace(chosen, gated_delta_chunk=partial(gated_delta_chunk_torch, chunk=32))
