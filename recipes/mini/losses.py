"""Objectives: next token, token after next, and an even load on the experts.

Head and cross-entropy are one function that works on blocks of rows, so that logits of the whole
batch never exist.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ROWS = 1024
"""Rows of logits alive at once: 1024 x 6144 x 4 bytes are 25 MB."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Which packed rows are judged, and on which token."""

    rows: Tensor
    """[R] int64: packed positions whose output is judged."""
    labels: Tensor
    """[R] int64: the token expected there."""

    @classmethod
    def ahead(cls, ids: Tensor, judged: Tensor, sequence: Tensor, distance: int) -> "Targets":
        """Row t is judged on token t + ``distance`` if it counts and is of the same document.

        ``ids``, ``judged`` and ``sequence`` (document number) are [P].
        """
        same = sequence[distance:] == sequence[:-distance]
        rows = torch.nonzero(same & judged[distance:].bool()).flatten()
        return cls(rows, ids[rows + distance])


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(x W^T)[label]; gradients are formed while the logits are
    there.
    """

    @staticmethod
    def forward(ctx, x, weight, labels):  # type: ignore[no-untyped-def, override]
        total = torch.zeros((), dtype=torch.float32)
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, x.shape[0], BLOCK_ROWS):
            piece = slice(start, start + BLOCK_ROWS)
            logits = (x[piece] @ weight.T).float()
            rows = torch.arange(logits.shape[0])
            logits -= logits.amax(-1, keepdim=True)
            picked = logits[rows, labels[piece]]
            probability = logits.exp_()
            mass = probability.sum(-1, keepdim=True)
            total += (mass[:, 0].log() - picked).sum()
            probability /= mass
            probability[rows, labels[piece]] -= 1.0
            slope = probability.to(x.dtype)
            dx[piece] = slope @ weight
            dw += slope.T @ x[piece]
        ctx.save_for_backward(dx, dw.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, scale):  # type: ignore[no-untyped-def, override]
        dx, dw = ctx.saved_tensors
        return dx * scale.to(dx.dtype), dw * scale.to(dw.dtype), None


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of rows ``x`` [R, D] under the head ``weight`` [V, D], a float32."""
    return _LinearCrossEntropy.apply(x, weight, labels)


def expert_balance(router_logits: list[Tensor], experts_per_token: int) -> Tensor:
    """Mean over layers of E * sum_e f_e P_e: 1 when every expert gets the same load.

    f_e is the share of routed slots that expert e received (a constant), P_e its mean probability.
    """
    total = torch.zeros(())
    for logits_PE in router_logits:
        P, E = logits_PE.shape
        probability_PE = logits_PE.softmax(-1)
        chosen = probability_PE.detach().topk(experts_per_token, dim=-1).indices
        share_E = torch.bincount(chosen.flatten(), minlength=E).float() / (P * experts_per_token)
        total = total + E * (share_E * probability_PE.mean(0)).sum()
    return total / max(1, len(router_logits))
