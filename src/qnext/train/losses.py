"""Objectives: next token, the tokens after it (MTP), an even load on experts, small router logits.

One denominator rule: every objective is a sum over this micro-batch divided by a count of the
whole optimiser step, which the caller makes from all its micro-batches before the first backward.
So gradients, values and counts of micro-batches are added, never averaged, and the result does not
depend on how a step is cut into micro-batches.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qnext.model.model import CausalLM
from qnext.ops.cross_entropy import CrossEntropy, linear_cross_entropy
from qnext.ops.gather import take_rows
from qnext.train.batch import TrainBatch
from qnext.train.forward import Rows, main_rows, mtp_lengths, mtp_rows

SCOPES = ("lagged", "micro")


@dataclass(frozen=True, kw_only=True, slots=True)
class Denominators:
    """Counts of one optimiser step, all micro-batches (and ranks) together."""

    loss: float
    """Sum of the weights of the next-token loss; MTP losses of every depth are divided by it too.
    """
    tokens: int
    """Tokens without padding: rows of every router of the main model."""
    mtp_tokens: tuple[int, ...] = ()
    """Rows of the MTP layer at depth 1, 2, ...; padding not counted."""

    @classmethod
    def of(cls, batches: Iterable[TrainBatch], depths: int = 0) -> "Denominators":
        """Counts of all micro-batches of a step whose MTP loss goes ``depths`` deep."""
        loss, tokens, mtp = 0.0, 0, [0] * depths
        for batch in batches:
            loss += batch.loss_tokens
            tokens += batch.real_tokens
            for depth in range(1, depths + 1):
                mtp[depth - 1] += _real_mtp_rows(batch, depth)
        return cls(loss=loss, tokens=tokens, mtp_tokens=tuple(mtp))

    def __add__(self, other: "Denominators") -> "Denominators":
        """Both counted together, for instance two ranks."""
        pairs = zip(self.mtp_tokens, other.mtp_tokens, strict=True)
        return Denominators(
            loss=self.loss + other.loss,
            tokens=self.tokens + other.tokens,
            mtp_tokens=tuple(a + b for a, b in pairs),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """Losses of one micro-batch. Everything is a share of the step: micro-batches are added."""

    total: Tensor
    """Scalar float32 to call ``backward`` on."""
    parts: dict[str, Tensor]
    """Detached scalars, not yet multiplied by their weights: ``main``, ``mtp_1`` ..., ``balance``
    (1 when every expert gets the same load) and ``z``."""
    hits: dict[str, Tensor]
    """Detached scalars for ``main``, ``mtp_1`` ...: weighted number of right first guesses over the
    weighted number of guesses of the *step's* main loss (``terms`` turns them into rates)."""
    terms: dict[str, float]
    """Share of the step's main loss terms that each of ``main``, ``mtp_1`` ... has here; the rate
    of right guesses is hits / terms after adding up."""
    counts_LE: Tensor
    """[routers, E] int64: slots routed to each expert; the MTP layer last, zero if it did not run.
    Padding is not counted. Empty without routers."""
    probability_LE: Tensor
    """[routers, E] float32: sum over rows of the routing probability, detached."""
    entropy_L: Tensor
    """[routers] float32: sum over rows of the entropy of the routing probability, in nats."""
    lse_max: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Largest logarithm of the sum of exponentials of a row's logits, detached."""


def router_count(model: CausalLM) -> int:
    """Rows of ``Losses.counts_LE``: sparse layers, and the MTP layer if it is sparse."""
    config = model.config
    layers = sum(map(config.is_sparse, range(config.num_hidden_layers)))
    return layers + int(model.mtp is not None and config.num_experts > 0)


def fractions(counts_LE: Tensor) -> Tensor:
    """Share of slots per expert, float32 [routers, E]; 1 / E for a router that has not run."""
    total_L1 = counts_LE.sum(-1, keepdim=True)
    even = 1.0 / max(1, counts_LE.shape[-1])
    return torch.where(total_L1 > 0, counts_LE / total_L1.clamp_min(1), even).float()


def objectives(
    model: CausalLM,
    batch: TrainBatch,
    *,
    denominators: Denominators,
    mtp_weights: Sequence[float] = (),
    balance: float = 0.0,
    z: float = 0.0,
    balance_fractions: Tensor | None = None,
    scope: str = "lagged",
    recompute: bool = False,
) -> Losses:
    """Run the model on a micro-batch and sum up its objectives.

    ``total = main + sum_d mtp_weights[d - 1] * mtp_d + balance * LB + z * Z``. An empty
    ``mtp_weights`` leaves the MTP layer out of the step. ``balance_fractions`` [routers, E] float32
    are the shares of slots of the previous optimiser step (``fractions`` of its summed
    ``counts_LE``); None, as in the first step, means an even load, whose gradient is zero. With
    ``scope="micro"`` each micro-batch's own shares are used instead. ``recompute`` keeps only the
    inputs of every block and computes the rest again in backward.
    """
    assert scope in SCOPES, scope
    assert len(denominators.mtp_tokens) >= len(mtp_weights), (denominators, mtp_weights)
    main = main_rows(model, batch.tokens, recompute=recompute)
    by_depth = [main]
    for depth in range(1, len(mtp_weights) + 1):
        by_depth.append(mtp_rows(model, batch.tokens, by_depth[-1], depth, recompute=recompute))
    weights = (1.0, *mtp_weights)
    total, parts, hits, terms, lse_max = _token_losses(
        model, batch, by_depth, weights, denominators.loss
    )
    routing = _Routing(model, batch, denominators, balance_fractions, scope)
    routing.add(main, by_depth[1:])
    if balance and routing.ran:
        total = total + balance * routing.balance
    if z and routing.ran:
        total = total + z * routing.z
    parts["balance"], parts["z"] = routing.balance.detach(), routing.z.detach()
    return Losses(
        total=total,
        parts=parts,
        hits=hits,
        terms=terms,
        counts_LE=routing.counts_LE,
        probability_LE=routing.probability_LE,
        entropy_L=routing.entropy_L,
        lse_max=lse_max,
    )


def _token_losses(
    model: CausalLM,
    batch: TrainBatch,
    by_depth: Sequence[Rows],
    weights: Sequence[float],
    denominator: float,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], dict[str, float], Tensor]:
    """Main and MTP rows go through the head in one call: one pass over it, one gradient of it."""
    rows, labels, scaled, plain = [], [], [], []
    for depth, (found, weight) in enumerate(zip(by_depth, weights, strict=True)):
        targets = batch.targets(depth)
        at = targets.rows if found.place is None else found.place[targets.rows]
        rows.append(take_rows(found.hidden, at))
        labels.append(targets.labels)
        plain.append(targets.weights / max(denominator, 1e-9))
        scaled.append(plain[-1] * weight)
    head = model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    judged: CrossEntropy = linear_cross_entropy(
        torch.cat(rows), head, torch.cat(labels), torch.cat(scaled),
        rows_op=model.ops.cross_entropy_rows_,
    )  # fmt: skip
    parts: dict[str, Tensor] = {}
    hits: dict[str, Tensor] = {}
    terms: dict[str, float] = {}
    start = 0
    for depth, share in enumerate(plain):
        name = "main" if depth == 0 else f"mtp_{depth}"
        piece = slice(start, start + share.shape[0])
        parts[name] = (judged.loss[piece] * share).sum()
        hits[name] = (judged.hits[piece] * share).sum()
        terms[name] = float(share.sum(dtype=torch.float64))
        start += share.shape[0]
    lse_max = judged.lse.amax() if start else judged.loss_sum.detach()
    return judged.loss_sum, parts, hits, terms, lse_max


class _Routing:
    """Balance, z-loss and counts of all routers of a micro-batch."""

    def __init__(
        self,
        model: CausalLM,
        batch: TrainBatch,
        denominators: Denominators,
        fractions_LE: Tensor | None,
        scope: str,
    ) -> None:
        self.batch, self.denominators, self.scope = batch, denominators, scope
        self.load, self.slots = model.ops.router_load, model.config.num_experts_per_tok
        self.experts = model.config.num_experts
        self.fractions_LE = fractions_LE
        count, device = router_count(model), model.device
        self.mtp_row = count - 1
        self.counts_LE = torch.zeros(count, self.experts, dtype=torch.int64, device=device)
        self.probability_LE = torch.zeros(count, self.experts, device=device)
        self.entropy_L = torch.zeros(count, device=device)
        self.balance = self.z = torch.zeros((), device=device)
        self.ran = 0

    def add(self, main: Rows, by_depth: Sequence[Rows]) -> None:
        """Count the routers of the main rows, then the one MTP router over all its depths."""
        self.ran = len(main.router_logits)
        runs_mtp = self.mtp_row >= self.ran and len(by_depth) > 0
        routers = self.ran + runs_mtp
        if not routers:
            return
        real = self.batch.real_tokens
        for layer, logits_PE in enumerate(main.router_logits):
            self._count(layer, [logits_PE[:real]], self.denominators.tokens, routers)
        if runs_mtp:
            depths = range(1, len(by_depth) + 1)
            pieces = [
                logits[: _real_mtp_rows(self.batch, depth)]
                for depth, rows in zip(depths, by_depth, strict=True)
                for logits in rows.router_logits
            ]
            tokens = sum(self.denominators.mtp_tokens[: len(by_depth)])
            self._count(self.mtp_row, pieces, tokens, routers)
        self.ran = routers

    def _count(self, router: int, pieces: list[Tensor], tokens: int, routers: int) -> None:
        """One router: ``pieces`` are its logits [rows, E] of real rows."""
        if not pieces or not sum(piece.shape[0] for piece in pieces):
            return
        logits_nE = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        load = self.load(logits=logits_nE, slots=self.slots)
        if self.scope == "micro":
            share_E = fractions(load.counts[None])[0]
        elif self.fractions_LE is None:
            share_E = load.probability.new_full((self.experts,), 1.0 / self.experts)
        else:
            share_E = self.fractions_LE[router].to(load.probability)
        sums = (share_E * load.probability).sum()
        self.balance = self.balance + self.experts * sums / (tokens * routers)
        self.z = self.z + load.squares / (tokens * routers)
        self.counts_LE[router] += load.counts
        self.probability_LE[router] += load.probability.detach()
        self.entropy_L[router] += load.entropy


def _real_mtp_rows(batch: TrainBatch, depth: int) -> int:
    """Rows of an MTP depth that are not padding; padding, if any, is the last segment."""
    lengths = mtp_lengths(batch.tokens.segments, depth)
    return sum(lengths[: batch.documents])
