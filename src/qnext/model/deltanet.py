"""Gated DeltaNet: the linear-attention mixer of three layers out of four.

Reference: Yang, Kautz and Hatamizadeh 2024 (arXiv 2412.06464). A short causal convolution over
queries, keys and values, then the gated delta rule with one state matrix per value head, then a
norm that is gated by a projection of the input. No positions, no growing cache.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qnext.config import ModelConfig
from qnext.model.batch import TokenBatch
from qnext.model.layers import GatedRmsNorm
from qnext.model.view import CacheView
from qnext.ops import Ops
from qnext.ops.contracts import GatedDelta
from qnext.ops.gated_delta import l2_normalise
from qnext.ops.linear import Projection


class ConvWeight(nn.Module):
    """Holds the depthwise weight [ch, 1, J] under its published name."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))


class GatedDeltaNet(nn.Module):
    """One delta mixer; ``cache_layer`` is its number among the layers that have a state."""

    def __init__(self, config: ModelConfig, cache_layer: int, ops: Ops) -> None:
        super().__init__()
        self.ops, self.cache_layer = ops, cache_layer
        self.key_heads = config.linear_num_key_heads
        self.value_heads = config.linear_num_value_heads
        self.key_dim = config.linear_key_head_dim
        self.value_dim = config.linear_value_head_dim
        D, all_keys, all_values = config.hidden_size, config.delta_key_dim, config.delta_value_dim
        self.in_proj_qkvz = Projection(D, 2 * all_keys + 2 * all_values, op=ops.linear)
        self.in_proj_ba = Projection(D, 2 * self.value_heads, op=ops.linear)
        self.conv1d = ConvWeight(config.conv_channels, config.linear_conv_kernel_dim)
        # Float32 whatever the model's dtype: the decay is an exponential of an exponential.
        self.A_log = nn.Parameter(torch.empty(self.value_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads, dtype=torch.float32))
        self.norm = GatedRmsNorm(self.value_dim, config, ops)
        self.out_proj = Projection(all_values, D, op=ops.linear)

    def forward(self, h_PD: Tensor, batch: TokenBatch, view: CacheView | None) -> Tensor:
        """[P, D] -> [P, D]."""
        U, W, K, M = self.key_heads, self.value_heads, self.key_dim, self.value_dim
        if view is None and self.ops.delta_layer is not None:
            y_Px = self.ops.delta_layer(
                qkvz=self.in_proj_qkvz(h_PD),
                ba=self.in_proj_ba(h_PD),
                conv_weight=self.conv1d.weight.squeeze(1),
                A_log=self.A_log,
                dt_bias=self.dt_bias,
                norm_weight=self.norm.weight,
                eps=self.norm.eps,
                key_heads=U,
                segments=batch.segments,
            )
            if y_Px is not None:
                return self.out_proj(y_Px)
        # Rows are grouped by key head: q, k, then the values and the gates of its value heads.
        grouped_PUx = self.in_proj_qkvz(h_PD).unflatten(-1, (U, -1))
        q_PUK, k_PUK, v_PUx, z_PUx = grouped_PUx.split((K, K, W // U * M, W // U * M), dim=-1)
        b_PUr, a_PUr = self.in_proj_ba(h_PD).unflatten(-1, (U, -1)).chunk(2, dim=-1)
        z_PWM = z_PUx.reshape(-1, W, M)

        x_Pc = torch.cat([part.flatten(-2) for part in (q_PUK, k_PUK, v_PUx)], dim=-1)
        conv_state, state_BWKM = view.read_state(self.cache_layer) if view else (None, None)
        c_Pc, conv_state = self.ops.causal_conv(
            x=x_Pc,
            weight=self.conv1d.weight.squeeze(1),
            state=conv_state,
            segments=batch.segments,
        )
        q_Pc, k_Pc, v_Pc = c_Pc.split((U * K, U * K, W * M), dim=-1)
        q_PUK, k_PUK = q_Pc.unflatten(-1, (U, K)), k_Pc.unflatten(-1, (U, K))
        v_PWM = v_Pc.unflatten(-1, (W, M))
        beta_PW = self.ops.elementwise(function=torch.sigmoid, x=b_PUr.float().flatten(-2))
        dt_PW = self.ops.elementwise(
            function=F.softplus, x=a_PUr.float().flatten(-2) + self.dt_bias.float()
        )
        g_PW = -self.A_log.float().exp() * dt_PW

        if view is None or state_BWKM is None:
            o_PWM = self.ops.gated_delta_whole(
                q=q_PUK, k=k_PUK, v=v_PWM, g=g_PW, beta=beta_PW, segments=batch.segments
            )
        else:
            q_PUK, k_PUK = l2_normalise(q_PUK) * K**-0.5, l2_normalise(k_PUK)
            inputs = {"q": q_PUK, "k": k_PUK, "v": v_PWM, "g": g_PW, "beta": beta_PW}
            o_PWM, state_BWKM = self._walk(inputs, state_BWKM, view)
            held = (x_Pc, k_PUK, v_PWM, g_PW, beta_PW)
            view.write_state(self.cache_layer, conv_state, state_BWKM, held)
        return self.out_proj(self.norm(o_PWM, z_PWM).flatten(-2))

    def _walk(
        self, inputs: dict[str, Tensor], state_BWKM: Tensor, view: CacheView
    ) -> tuple[Tensor, Tensor]:
        """The delta rule in the rounds of a step, with a stop wherever a state is needed."""
        o_PWM = torch.zeros_like(inputs["v"], dtype=torch.float32)
        for piece in view.rounds:
            whole = piece.is_whole
            out_PWM, piece_BWKM = self._delta(piece.by_step, every_state=piece.speculative)(
                **(inputs if whole else {name: x[piece.rows] for name, x in inputs.items()}),
                state=state_BWKM if whole else state_BWKM[piece.lanes],
                segments=piece.segments,
            )
            if piece.speculative:
                view.states[self.cache_layer] = piece_BWKM
                piece_BWKM = piece_BWKM[-1]
            if whole:
                o_PWM, state_BWKM = out_PWM, piece_BWKM
            else:
                o_PWM[piece.rows] = out_PWM
                state_BWKM[piece.lanes] = piece_BWKM
            view.end_round(self.cache_layer, piece, piece_BWKM)
        return o_PWM, state_BWKM

    def _delta(self, by_step: bool, *, every_state: bool = False) -> GatedDelta:
        if every_state:
            return self.ops.gated_delta_verify
        return self.ops.gated_delta_step if by_step else self.ops.gated_delta_chunk
