"""Gradients of one optimiser step: micro-batches side by side, added in their order.

Every worker computes whole micro-batches on its share of the threads, which wastes less than all
threads inside every small product. Gradients are added in float32 in the order of the
micro-batches, so the sum does not depend on who was ready first.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qnext.errors import DataError
from qnext.model.model import CausalLM
from qnext.train.batch import TrainBatch
from qnext.train.losses import Denominators, Losses, objectives, router_count
from qnext.train.recipe import Objectives


@dataclass(slots=True)
class StepResult:
    """Sums over the micro-batches of a step."""

    grads: list[Tensor | None]
    """float32, one per parameter in the model's order; None where nothing reached."""
    total: float = 0.0
    losses: dict[str, float] = field(default_factory=dict[str, float])
    hits: dict[str, float] = field(default_factory=dict[str, float])
    terms: dict[str, float] = field(default_factory=dict[str, float])
    lse_max: float = float("-inf")
    counts_LE: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    entropy_L: Tensor = field(default_factory=lambda: torch.zeros(0))
    tokens: int = 0
    """Without padding."""
    lengths: list[int] = field(default_factory=list[int])
    """Of all documents, for counting operations."""
    bad: list[int] = field(default_factory=list[int])
    """Micro-batches whose loss is not finite."""

    def hit_rates(self) -> dict[str, float]:
        """Share of right first guesses per objective."""
        return {name: self.hits[name] / t for name, t in self.terms.items() if t > 0}


def compute(
    model: CausalLM,
    batches: Sequence[TrainBatch],
    *,
    wanted: Objectives,
    fractions_LE: Tensor | None,
    recompute: bool,
    pool: ThreadPoolExecutor,
) -> StepResult:
    """Losses and gradients of a step. Raises DataError for ids outside the vocabulary."""
    for number, batch in enumerate(batches):
        check_ids(batch, model.config.vocab_size, number)
    depths = len(wanted.mtp_weights)
    counted = Denominators.of(batches, depths)
    parameters = list(model.parameters())

    def one(batch: TrainBatch) -> tuple[Losses, tuple[Tensor | None, ...]]:
        found = objectives(
            model,
            batch.to(model.device),
            denominators=counted,
            mtp_weights=wanted.mtp_weights,
            balance=wanted.balance,
            z=wanted.z,
            balance_fractions=fractions_LE,
            scope=wanted.balance_scope,
            recompute=recompute,
        )
        # Not backward(): workers would add to the same .grad at the same time.
        return found, torch.autograd.grad(found.total, parameters, allow_unused=True)

    result = StepResult(
        grads=[None] * len(parameters),
        counts_LE=torch.zeros(router_count(model), model.config.num_experts, dtype=torch.int64),
        entropy_L=torch.zeros(router_count(model)),
    )
    waiting = deque(pool.submit(one, batch) for batch in batches)
    try:
        for number in range(len(batches)):
            found, grads = waiting.popleft().result()
            # Workers that have nothing left to compute add side by side, each whole parameters.
            each = pool.map if all(other.done() for other in waiting) else map
            result.grads = list(each(_sum, result.grads, grads))
            _add(result, found, number)
    finally:
        for other in waiting:  # after an error nobody asks for them
            other.cancel()
    result.grads = list(pool.map(_in_float32, result.grads))
    for batch in batches:
        result.tokens += batch.real_tokens
        result.lengths += batch.tokens.segments.lengths[: batch.documents]
    return result


def check_ids(batch: TrainBatch, vocab_size: int, number: int) -> None:
    """Raise DataError if an id is not of the vocabulary."""
    low, high = int(batch.ids.min()), int(batch.ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        at = int(torch.nonzero(batch.ids == wrong)[0])
        document = sum(start <= at for start in batch.cu_seqlens[:-1]) - 1
        source = f" (from {batch.sources[document]})" if document < len(batch.sources) else ""
        raise DataError(
            f"micro-batch {number}, document {document}{source}: token id {wrong} is outside the "
            f"vocabulary (0 ... {vocab_size - 1}). The data was made with another tokenizer; "
            "prepare it again."
        )


_CACHED = 1 << 17
"""Numbers converted and added at a time: they stay in a core's cache."""


@torch.no_grad()  # of the thread that adds
def _sum(so_far: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """In float32, but for a first gradient: that one is converted when there is one to add."""
    if so_far is None or grad is None:
        return grad if so_far is None else so_far
    if so_far.dtype == torch.float32:
        return so_far.contiguous().add_(grad)
    total = so_far.new_empty(so_far.shape, dtype=torch.float32)
    parts = (x.reshape(-1).split(_CACHED) for x in (so_far, grad, total))
    for first, second, part in zip(*parts, strict=True):
        torch.add(first.float(), second, out=part)
    return total


def _in_float32(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.float().contiguous()


@torch.no_grad()
def _add(result: StepResult, found: Losses, number: int) -> None:
    total = float(found.total.detach())
    if not abs(total) < float("inf"):
        result.bad.append(number)
    result.total += total
    for sums, values in (
        (result.losses, found.parts), (result.hits, found.hits), (result.terms, found.terms)
    ):  # fmt: skip
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    result.lse_max = max(result.lse_max, float(found.lse_max))
    result.counts_LE += found.counts_LE.cpu()
    result.entropy_L += found.entropy_L.cpu()
