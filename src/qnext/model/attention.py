"""Full attention: grouped queries, norms on q and k, partial rotary positions, an output gate.

Qwen3-Next multiplies the attention output by a sigmoid gate that is computed together with the
query; Qwen3 dense and Qwen3-MoE have the same layer without the gate.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from qnext.config import ModelConfig
from qnext.model.batch import TokenBatch
from qnext.model.layers import RmsNorm, Taps
from qnext.model.view import CacheView
from qnext.ops import Ops
from qnext.ops.attention import attention_weights
from qnext.ops.linear import Projection


class GatedAttention(nn.Module):
    """One full-attention mixer; ``cache_layer`` is its number among the layers that have pages."""

    def __init__(self, config: ModelConfig, cache_layer: int, ops: Ops) -> None:
        super().__init__()
        self.ops, self.cache_layer = ops, cache_layer
        self.head_dim, self.scale = config.head_dim, config.head_dim**-0.5
        self.gated = config.is_hybrid
        D, H, bias = config.hidden_size, config.head_dim, config.attention_bias
        N, G = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Projection(D, N * H * (2 if self.gated else 1), op=ops.linear, bias=bias)
        self.k_proj = Projection(D, G * H, op=ops.linear, bias=bias)
        self.v_proj = Projection(D, G * H, op=ops.linear, bias=bias)
        self.o_proj = Projection(N * H, D, op=ops.linear, bias=bias)
        self.q_norm = RmsNorm(H, config, ops)
        self.k_norm = RmsNorm(H, config, ops)

    def forward(
        self,
        h_PD: Tensor,
        batch: TokenBatch,
        rope: tuple[Tensor, Tensor],
        view: CacheView | None,
        taps: Taps | None,
    ) -> Tensor:
        """[P, D] -> [P, D]."""
        H, (cos_PY, sin_PY) = self.head_dim, rope
        gate_PNH = None
        if self.gated:
            # Rows alternate per head: H of the query, then H of its gate.
            q_PNH, gate_PNH = self.q_proj(h_PD).unflatten(-1, (-1, 2 * H)).chunk(2, dim=-1)
        else:
            q_PNH = self.q_proj(h_PD).unflatten(-1, (-1, H))
        k_PGH = self.k_proj(h_PD).unflatten(-1, (-1, H))
        v_PGH = self.v_proj(h_PD).unflatten(-1, (-1, H))
        q_PNH = self.ops.apply_rope(x=self.q_norm(q_PNH), cos=cos_PY, sin=sin_PY)
        k_PGH = self.ops.apply_rope(x=self.k_norm(k_PGH), cos=cos_PY, sin=sin_PY)
        if view is None:
            out_PNH = self.ops.attention(
                q=q_PNH, k=k_PGH, v=v_PGH, scale=self.scale, segments=batch.segments
            )
        else:
            out_PNH = self.ops.attention_paged(
                q=q_PNH,
                pages=view.write_kv(self.cache_layer, k_PGH, v_PGH),
                page_table=view.page_table,
                before=view.before,
                first=view.first,
                scale=self.scale,
                segments=batch.segments,
            )
        if taps is not None and taps.want_attentions:
            assert view is None, "attention weights are recorded without a cache only"
            taps.attentions.append(self._weights(q_PNH, k_PGH, batch))
        if gate_PNH is not None:
            out_PNH = out_PNH * self.ops.elementwise(function=torch.sigmoid, x=gate_PNH)
        return self.o_proj(out_PNH.flatten(-2))

    def _weights(self, q_PNH: Tensor, k_PGH: Tensor, batch: TokenBatch) -> list[Tensor]:
        return [
            attention_weights(q=q_PNH[a:b], k=k_PGH[a:b], scale=self.scale, before=0)
            for a, b in pairwise(batch.segments.starts)
        ]
