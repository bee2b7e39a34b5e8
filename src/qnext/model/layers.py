"""Small parts every block uses: norms, the dense feed-forward, rotary tables, and taps."""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qnext.config import ModelConfig, RopeConfig
from qnext.ops import Ops
from qnext.ops.linear import Projection
from qnext.ops.rope import (
    rope_frequencies,
    rope_table,
    yarn_attention_factor,
    yarn_frequencies,
)


class RmsNorm(nn.Module):
    """RMSNorm over the last axis; zero-centred for Qwen3-Next, plain for Qwen3."""

    def __init__(self, dim: int, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = config.rms_norm_eps
        self.norm = ops.rms_norm_zero_centred if config.is_hybrid else ops.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x=x, weight=self.weight, eps=self.eps)


class ResidualNorm(RmsNorm):
    """The norm of a sum that others read too."""

    def __init__(self, dim: int, config: ModelConfig, ops: Ops) -> None:
        super().__init__(dim, config, ops)
        self.joined = ops.residual_norm if config.is_hybrid else None

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[..., D] each -> x + added, and its norm."""
        if self.joined is not None:
            found = self.joined(x=x, added=added, weight=self.weight, eps=self.eps)
            if found is not None:
                return found
        total = x if added is None else x + added
        return total, self.norm(x=total, weight=self.weight, eps=self.eps)


class GatedRmsNorm(nn.Module):
    """Output norm of a delta layer; its weight is stored around 1, not around 0."""

    def __init__(self, dim: int, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = config.rms_norm_eps
        self.norm = ops.rms_norm_gated

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.norm(x=x, gate=gate, weight=self.weight, eps=self.eps)


class Mlp(nn.Module):
    """down(silu(gate x) * up x): a dense layer's feed-forward, and the shared expert."""

    def __init__(self, config: ModelConfig, width: int, ops: Ops) -> None:
        super().__init__()
        self.gate_proj = Projection(config.hidden_size, width, op=ops.linear)
        self.up_proj = Projection(config.hidden_size, width, op=ops.linear)
        self.down_proj = Projection(width, config.hidden_size, op=ops.linear)
        self.elementwise = ops.elementwise

    def forward(self, h_PD: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.gate_proj.weight.requires_grad:
            # One product of twice the width: narrow ones waste half of a core, above all backward.
            both = torch.cat((self.gate_proj.weight, self.up_proj.weight))
            gate_PF, up_PF = self.gate_proj.op(x=h_PD, weight=both).chunk(2, dim=-1)
        else:
            gate_PF, up_PF = self.gate_proj(h_PD), self.up_proj(h_PD)
        return self.down_proj(self.elementwise(function=F.silu, x=gate_PF) * up_PF)


@lru_cache(maxsize=16)
def _frequencies(rope: RopeConfig, rotary_dim: int) -> tuple[Tensor, float]:
    if rope.rope_type == "yarn":
        trained = rope.original_max_position_embeddings
        assert trained is not None, rope
        frequencies = yarn_frequencies(
            rotary_dim=rotary_dim,
            theta=rope.rope_theta,
            factor=rope.factor,
            trained_length=trained,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            truncate=rope.truncate,
        )
        multiplier = rope.attention_factor
        if multiplier is None:
            multiplier = yarn_attention_factor(
                factor=rope.factor, mscale=rope.mscale, mscale_all_dim=rope.mscale_all_dim
            )
        return frequencies, multiplier
    frequencies = rope_frequencies(rotary_dim=rotary_dim, theta=rope.rope_theta)
    if rope.rope_type == "linear":
        frequencies = frequencies / rope.factor
    return frequencies, 1.0


def rope_settings(config: ModelConfig) -> tuple[Tensor, float]:
    """Rotation per position of each pair of dimensions, [Y / 2], and the factor of cos and sin."""
    return _frequencies(config.rope, config.rotary_dim)


def rotary(
    config: ModelConfig, positions: Tensor, dtype: torch.dtype, ops: Ops
) -> tuple[Tensor, Tensor]:
    """cos and sin [P, Y] of the batch's positions, shared by all attention layers."""
    frequencies, multiplier = rope_settings(config)
    return rope_table(
        positions=positions,
        frequencies=frequencies,
        multiplier=multiplier,
        dtype=dtype,
        elementwise=ops.elementwise,
    )


@dataclass(kw_only=True, slots=True)
class Taps:
    """What to record while the model runs; each list gets one entry per layer that has it."""

    want_router_logits: bool = False
    want_attentions: bool = False
    want_hidden_states: bool = False
    router_logits: list[Tensor] = field(default_factory=list)
    """[P, E] float32 per sparse layer, the MTP layer last if it ran."""
    attentions: list[list[Tensor]] = field(default_factory=list)
    """Per full-attention layer, per sequence: softmax weights [N, T, S] float32."""
    hidden_states: list[Tensor] = field(default_factory=list)
    """[P, D]: the embedding, then the output of each layer, the last one after the final norm."""
