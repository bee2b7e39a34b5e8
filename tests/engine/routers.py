"""Router ties: where another rounding may let other experts run, and with what that is excused.

A near-tie of a router is like one of the sampler (``qnext.engine.ties``), a layer deeper. Where it
falls the other way, another expert may have the last word on the logits, and nothing bounds how
far they move. So whoever compares two runs has to know at which tokens that happened.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from qnext.engine import ties
from qnext.engine.engine import Engine
from qnext.engine.native_runner import NativeRunner
from qnext.engine.runner import Runner, Work
from qnext.model.batch import TokenBatch
from qnext.model.model import Taps


class Routed(NamedTuple):
    """What the routers of a model saw of some tokens in a row of one sequence."""

    before: tuple[int, ...]
    """The tokens of the sequence before them."""
    ids: list[int]
    logits: torch.Tensor
    """[P, L, E]."""


@contextmanager
def noting_routers(engine: Engine) -> Iterator[list[Routed]]:
    """Every piece of a sequence that an engine runs, in order."""
    found: list[Routed] = []
    runner = engine.runner

    def watched(run: Callable[..., Any], seen: Callable[[], list[Seen]]) -> Callable[..., Any]:
        def watching(*args: Any, **options: Any) -> Any:
            owners = {s.slot: s for s in engine.scheduler.running}
            result = run(*args, **options)
            for slot, start, ids, logits in seen():
                owner = owners[slot]
                tokens = (*owner.request.prompt_ids, *owner.output_ids)
                found.append(Routed(tokens[:start], ids, logits))
            return result

        return watching

    with ExitStack() as stack:
        if isinstance(runner, NativeRunner):
            runs, seen = ("forward", "advance"), stack.enter_context(_noting_native(runner))
        else:
            runs, seen = ("forward",), stack.enter_context(_noting_taps(runner))
        for name in runs:
            watching = watched(getattr(runner, name), seen)
            stack.enter_context(mock.patch.object(runner, name, watching))
        yield found


Seen = tuple[int, int, list[int], torch.Tensor]
"""Slot, first position, tokens and logits [P, L, E] of a piece."""


@contextmanager
def _noting_native(runner: NativeRunner) -> Iterator[Callable[[], list[Seen]]]:
    decoder, experts = runner.native.decoder, runner.native.config.num_experts

    def seen() -> list[Seen]:
        pieces = []
        for ids, slots, before, counts, logits in decoder.noted_routers():
            seen_PLE = torch.from_numpy(logits).view(-1, len(ids), experts).transpose(0, 1)
            first = 0
            for slot, start, count in zip(slots, before, counts, strict=True):
                rows = slice(first, first + count)
                pieces.append((slot, start, ids[rows], seen_PLE[rows]))
                first += count
        decoder.note_routers(True)
        return pieces

    decoder.note_routers(True)
    try:
        yield seen
    finally:
        decoder.note_routers(False)


@contextmanager
def _noting_taps(runner: Runner) -> Iterator[Callable[[], list[Seen]]]:
    run, forward = runner.model.run, runner.forward
    noted: list[torch.Tensor] = []
    works: list[Work] = []

    def noting(batch: TokenBatch, view: Any, *, taps: Taps | None = None) -> torch.Tensor:
        assert taps is None, "nobody else looks here"
        own = Taps(want_router_logits=True)
        hidden = run(batch, view, taps=own)
        if own.router_logits:
            noted.append(torch.stack([one.float() for one in own.router_logits], dim=1))
        return hidden

    def listing(some: Sequence[Work]) -> torch.Tensor:
        works[:] = some
        return forward(some)

    def seen() -> list[Seen]:
        rows = iter(torch.cat(noted).split([len(work.ids) for work in works]) if noted else ())
        noted.clear()
        return [(work.slot, work.start, list(work.ids), next(rows)) for work in works]

    with (
        mock.patch.object(runner.model, "run", noting),
        mock.patch.object(runner, "forward", listing),
    ):
        yield seen


def parted_at(
    one: Sequence[Routed],
    other: Sequence[Routed],
    tokens: Sequence[int],
    *,
    experts: int,
    bound: float,
) -> float:
    """The first position of a sequence at which two runs chose other experts; inf if there is none.

    ``experts`` are chosen in each layer. Raise AssertionError unless the first of those choices, in
    its first layer, hung by a margin within ``bound`` times the largest logit of the first run's
    router. What is chosen behind it may follow from it.
    """
    seen = {position: row for piece in one for position, row in _rows(piece, tokens)}
    others: list[tuple[int, int, float, float]] = []
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
                others.append((position, layer, last - first_out, slack))
    if not others:
        return math.inf
    position, layer, margin, slack = min(others)
    assert margin <= slack, (
        f"token {position} has other experts in layer {layer}, at a margin of {margin} and not "
        f"{slack}"
    )
    return position


def _rows(piece: Routed, tokens: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Those rows of a piece [L, E] that stand behind the same tokens, with their positions."""
    start = len(piece.before)
    if piece.before != tuple(tokens[:start]):
        return
    for position, token in enumerate(piece.ids, start):
        if position >= len(tokens) or tokens[position] != token:
            return
        yield position, piece.logits[position - start]
