"""Router ties: where rounding would let other experts run, and how two runs break them alike.

A near-tie of a router is like one of the sampler (``qnext.engine.ties``), a layer deeper. Where it
falls the other way another expert has a say, and nothing bounds how far the logits of that token
move, and those of the tokens that look back at it. So a run that is to be compared with another one
breaks the ties of its routers as that one did: what else differs is rounding, and is bounded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from qnext.engine import ties
from qnext.engine.engine import Engine
from qnext.engine.runner import Runner, Work
from qnext.model.moe import SparseMoe

Routes = dict[tuple[int, ...], list[Tensor]]
"""Router logits [E] of every layer for a token, by the tokens of its sequence up to itself."""


@dataclass
class Followed:
    """What happened where a run was to choose the experts of another one."""

    broken_alike: int = 0
    """Choices that rounding would have made otherwise."""
    complaints: list[str] = field(default_factory=list)
    """Choices that differ by more than rounding; they were left as they are."""


@contextmanager
def noting_routes(engine: Engine) -> Iterator[Routes]:
    """Logits of the routers for every token that a PyTorch engine runs."""
    found: Routes = {}

    def note(layer: int, contexts: Sequence[tuple[int, ...]], logits_PE: Tensor) -> Tensor:
        for context, logits_E in zip(contexts, logits_PE.float(), strict=True):
            layers = found.setdefault(context, [])
            # A token may come twice: what was taken off begins anew.
            if layer == 0:
                layers.clear()
            layers.append(logits_E.clone())
        return logits_PE

    with _watching_routers(engine, note):
        yield found


@contextmanager
def following_routes(engine: Engine, routes: Routes, bound: float) -> Iterator[Followed]:
    """Let a PyTorch engine break the ties of its routers as in ``routes``."""
    followed, model = Followed(), engine.runner.model
    choose = chooser_of(model.ops.route, model.config.num_experts_per_tok)

    def follow(layer: int, contexts: Sequence[tuple[int, ...]], logits_PE: Tensor) -> Tensor:
        rows = [row for row, context in enumerate(contexts) if context in routes]
        if not rows:
            return logits_PE
        logits_PE = logits_PE.clone()
        wanted_RE = torch.stack([routes[contexts[row]][layer] for row in rows])
        others_R = (choose(wanted_RE) != choose(logits_PE[rows])).any(-1)
        for i in others_R.nonzero()[:, 0].tolist():
            row = rows[i]
            try:
                followed.broken_alike += break_ties_as_in(
                    wanted_RE[i], logits_PE[row], choose=choose, bound=bound
                )
            except ValueError as error:
                place = f"token {len(contexts[row]) - 1} in layer {layer}"
                followed.complaints.append(f"{place}: {error}")
        return logits_PE

    with _watching_routers(engine, follow):
        yield followed


Choose = Callable[[Tensor], Tensor]
"""Logits [R, E] -> the experts that run [R, k], in rising order."""


def chooser_of(route: Callable[..., Any], experts: int) -> Choose:
    """What the op ``route`` chooses: of probabilities, which can be equal where logits are not."""

    def choose(logits_RE: Tensor) -> Tensor:
        _, ids_RX = route(logits=logits_RE, slots=experts, rescale=True)
        return ids_RX.sort(dim=-1).values

    return choose


def break_ties_as_in(one_E: Tensor, other_E: Tensor, *, choose: Choose, bound: float) -> int:
    """Let ``other_E`` choose the experts that ``one_E`` does; how many were others before.

    Its logits are exchanged where ties fell otherwise. Raise ValueError, and change nothing, unless
    in both all experts that change places are within ``bound`` times the largest logit.
    """
    mine, theirs = (set(choose(x[None])[0].tolist()) for x in (one_E, other_E))
    left_out, let_in = sorted(mine - theirs), sorted(theirs - mine)
    if not left_out:
        return 0
    for x, above, below in ((one_E, left_out, let_in), (other_E, let_in, left_out)):
        margin, slack = x[above].max() - x[below].min(), ties.tolerance_of(float(x.max()), bound)
        if margin > slack:
            raise ValueError(f"other experts, at a margin of {float(margin)} and not {slack}")
    other_E[[*left_out, *let_in]] = other_E[[*let_in, *left_out]]
    if set(choose(other_E[None])[0].tolist()) != mine:
        # They were equal, as logits or as probabilities.
        other_E[let_in] -= slack
    assert set(choose(other_E[None])[0].tolist()) == mine
    return len(left_out)


Watcher = Callable[[int, Sequence[tuple[int, ...]], Tensor], Tensor]
"""Layer, tokens up to each row, and logits [P, E] -> the logits that count."""


@contextmanager
def _watching_routers(engine: Engine, watch: Watcher) -> Iterator[None]:
    runner = engine.runner
    assert isinstance(runner, Runner), "the native kernels give the same bits on every path"
    forward = runner.forward
    contexts: list[tuple[int, ...]] = []

    def knowing(works: Sequence[Work]) -> Tensor:
        owners = {sequence.slot: sequence for sequence in engine.scheduler.running}
        contexts.clear()
        for work in works:
            owner = owners[work.slot]
            tokens = (*owner.request.prompt_ids, *owner.output_ids)[: work.start] + tuple(work.ids)
            contexts.extend(tokens[: work.start + i + 1] for i in range(len(work.ids)))
        return forward(works)

    def watched(layer: int, route: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*, logits: Tensor, **settings: Any) -> Any:
            return route(logits=watch(layer, contexts, logits), **settings)

        return watching

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(runner, "forward", knowing))
        moes = [
            layer.mlp for layer in runner.model.model.layers if isinstance(layer.mlp, SparseMoe)
        ]
        for number, moe in enumerate(moes):
            ops = replace(moe.ops, route=watched(number, moe.ops.route))
            stack.enter_context(mock.patch.object(moe, "ops", ops))
        yield
