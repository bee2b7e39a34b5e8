"""Router ties: where another rounding may let other experts run, and with what that is excused.

A near-tie of a router is like one of the sampler (``qnext.engine.ties``), a layer deeper. Where it
falls the other way, another expert may have the last word on the logits, and nothing bounds how
far they move. So whoever compares two runs has to know at which tokens that happened.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from qnext.engine import ties
from qnext.model.batch import TokenBatch
from qnext.model.model import CausalLM, Taps


class Routed(NamedTuple):
    """What the routers of a model saw of some tokens in a row of one sequence."""

    start: int
    """Position of the first."""
    ids: list[int]
    logits: torch.Tensor
    """[P, L, E]."""


@contextmanager
def noting_routers(model: CausalLM) -> Iterator[list[Routed]]:
    """Every piece of a sequence that a model runs, in order."""
    found: list[Routed] = []
    run = model.run

    def noting(batch: TokenBatch, view: Any, *, taps: Taps | None = None) -> torch.Tensor:
        assert taps is None, "nobody else looks here"
        own = Taps(want_router_logits=True)
        hidden = run(batch, view, taps=own)
        if own.router_logits:
            logits = torch.stack([one.float() for one in own.router_logits], dim=1)
            ids, positions = batch.ids.tolist(), batch.positions.tolist()
            for a, b in itertools.pairwise(batch.segments.starts):
                if b > a:
                    found.append(Routed(positions[a], ids[a:b], logits[a:b]))
        return hidden

    with mock.patch.object(model, "run", noting):
        yield found


def parted(
    one: Sequence[Routed],
    other: Sequence[Routed],
    tokens: Sequence[int],
    *,
    experts: int,
    bound: float,
) -> set[int]:
    """Positions of a sequence at which two runs chose other experts, ``experts`` in each layer.

    Raise AssertionError unless each of those choices hung by a margin within ``bound`` times the
    largest logit of the first run's router.
    """
    seen = {position: row for piece in one for position, row in _rows(piece, tokens)}
    found = set()
    for piece in other:
        for position, other_LE in _rows(piece, tokens):
            if position not in seen:
                continue
            best = seen[position].topk(experts + 1, dim=-1)
            mine = best.indices[:, :-1].sort(dim=-1).values
            theirs = other_LE.topk(experts, dim=-1).indices.sort(dim=-1).values
            for layer in (mine != theirs).any(-1).nonzero()[:, 0].tolist():
                top, last, first_out = (float(best.values[layer, i]) for i in (0, -2, -1))
                slack = ties.tolerance_of(top, bound)
                assert last - first_out <= slack, (
                    f"token {position} has other experts in layer {layer}, at a margin of "
                    f"{last - first_out} and not {slack}"
                )
                found.add(position)
    return found


def _rows(piece: Routed, tokens: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Those rows of a piece [L, E] that stand where the same tokens do, with their positions."""
    for i, token in enumerate(piece.ids):
        position = piece.start + i
        if position >= len(tokens) or tokens[position] != token:
            return
        yield position, piece.logits[i]
