"""The model's forward pass for training: rows for every objective, and what the routers chose.

Same modules and same order as ``CausalLM.run``. What differs: a block may be computed again in
backward instead of kept (``recompute``), and router logits leave a block as its outputs, so that a
block that is computed twice is counted once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qnext.errors import ConfigError
from qnext.model.batch import TokenBatch
from qnext.model.block import DecoderLayer
from qnext.model.layers import Taps, rotary
from qnext.model.model import CausalLM
from qnext.ops import Segments
from qnext.ops.gather import take_rows


@dataclass(frozen=True, slots=True)
class Rows:
    """Output rows of the main model or of one MTP depth."""

    hidden: Tensor
    """[Q, D] after the final norm; ``lm_logits`` of a row are its prediction."""
    place: Tensor | None
    """[P] int64: where packed token t stands among the Q rows; None when Q rows are P tokens."""
    router_logits: tuple[Tensor, ...]
    """[Q, E] float32 per sparse layer that ran."""


def main_rows(model: CausalLM, batch: TokenBatch, *, recompute: bool = False) -> Rows:
    """Rows of all P packed tokens."""
    h_PD = model.model.embed_tokens(batch.ids)
    rope = rotary(model.config, batch.positions, h_PD.dtype, model.ops)
    logits: list[Tensor] = []
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        h_PD = _block(layer, h_PD, batch, rope, logits, recompute)
    return Rows(model.model.norm(h_PD), None, tuple(logits))


def mtp_rows(
    model: CausalLM,
    batch: TokenBatch,
    hidden: Rows,
    depth: int,
    *,
    recompute: bool = False,
) -> Rows:
    """Rows of MTP depth ``depth`` from those of the depth before (the main rows for depth 1).

    Row t reads the embedding of token t + depth and the previous row t, and predicts token
    t + depth + 1. It exists where that token is of the same document: documents shrink by one
    token per depth and short ones vanish; index and position stay those of token t. Raises
    ConfigError when the model has no MTP head.
    """
    if model.mtp is None:
        raise ConfigError(
            "the recipe asks for an MTP loss, but this model has no MTP head: "
            "num_nextn_predict_layers is 0. Set it to 1, or set the MTP weights to none."
        )
    kept = mtp_index(batch.segments, depth)
    lengths = mtp_lengths(batch.segments, depth)
    before = take_rows(hidden.hidden, kept if hidden.place is None else hidden.place[kept])
    shorter = TokenBatch(
        ids=batch.ids[kept],
        positions=batch.positions[kept],
        segments=Segments.of(lengths, batch.segments.device),
    )
    place = torch.full_like(batch.ids, -1)
    place[kept] = torch.arange(kept.shape[0], device=kept.device)
    if not kept.shape[0]:
        return Rows(before, place, ())
    rope = rotary(model.config, shorter.positions, before.dtype, model.ops)
    logits: list[Tensor] = []
    embedded = model.model.embed_tokens(batch.ids[kept + depth])

    def run(embedding_PD: Tensor, hidden_PD: Tensor) -> tuple[Tensor, ...]:
        assert model.mtp is not None
        taps = Taps(want_router_logits=True)
        out = model.mtp(embedding_PD, hidden_PD, shorter, rope, None, taps)
        return (out, *taps.router_logits)

    out_QD, *logits = _maybe_twice(run, (embedded, before), recompute)
    return Rows(out_QD, place, tuple(logits))


def mtp_lengths(segments: Segments, depth: int) -> tuple[int, ...]:
    """Rows of each document at an MTP depth: those whose target still belongs to it.

    A document of n tokens has n - 1 - depth of them (depth 0 is the main head).
    """
    return tuple(max(0, length - 1 - depth) for length in segments.lengths)


def mtp_index(segments: Segments, depth: int) -> Tensor:
    """int64 [Q]: packed positions t with token t + depth + 1 in the same document, in order."""
    pieces = [
        torch.arange(start, start + length)
        for start, length in zip(segments.starts, mtp_lengths(segments, depth), strict=False)
    ]
    return torch.cat(pieces).to(segments.device)


def _block(
    layer: DecoderLayer,
    h_PD: Tensor,
    batch: TokenBatch,
    rope: tuple[Tensor, Tensor],
    logits: list[Tensor],
    recompute: bool,
) -> Tensor:
    """One decoder layer; its router's logits, if it has one, are appended."""

    def run(h_PD: Tensor) -> tuple[Tensor, ...]:
        # Taps of its own: a second run in backward records into nothing that anyone reads.
        taps = Taps(want_router_logits=True)
        out_PD = layer(h_PD, batch, rope, None, taps)
        return (out_PD, *taps.router_logits)

    out_PD, *found = _maybe_twice(run, (h_PD,), recompute)
    logits.extend(found)
    return out_PD


def _maybe_twice(run: Any, inputs: tuple[Tensor, ...], recompute: bool) -> tuple[Tensor, ...]:
    if not recompute or not torch.is_grad_enabled():
        return run(*inputs)
    # There is no dropout: nothing random needs to be the same the second time.
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
