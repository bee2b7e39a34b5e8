"""Sparse feed-forward: a router, many small experts of which few run, and a shared expert."""

import torch
from torch import Tensor, nn

from qnext.config import ModelConfig
from qnext.model.layers import Mlp, Taps
from qnext.ops import Ops
from qnext.ops.contracts import SharedWeights
from qnext.ops.linear import Projection


class Experts(nn.Module):
    """Stacked weights of the routed experts; checkpoints store them one by one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))


class SparseMoe(nn.Module):
    """Top-k of softmax over all experts, in float32, plus the gated shared expert if there is one.

    The k probabilities are rescaled to sum to one when ``norm_topk_prob`` is set. No token is
    dropped and no expert has a capacity.
    """

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.experts_per_token = config.num_experts_per_tok
        self.rescale = config.norm_topk_prob
        self.gate = Projection(config.hidden_size, config.num_experts, op=ops.linear)
        self.experts = Experts(config)
        self.shared_expert: Mlp | None = None
        self.shared_expert_gate: Projection | None = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = Mlp(config, config.shared_expert_intermediate_size, ops)
            self.shared_expert_gate = Projection(config.hidden_size, 1, op=ops.linear)

    def forward(self, h_PD: Tensor, taps: Taps | None, residual_PD: Tensor) -> Tensor:
        """[P, D], and what it is added to -> [P, D]."""
        if self.ops.sparse_layer is not None:
            found = self.ops.sparse_layer(
                h=h_PD,
                residual=residual_PD,
                router=self.gate.weight,
                gate_up=self.experts.gate_up_proj,
                down=self.experts.down_proj,
                shared=self._shared(),
                slots=self.experts_per_token,
                rescale=self.rescale,
            )
            if found is not None:
                y_PD, logits_PE = found
                if taps is not None and taps.want_router_logits:
                    taps.router_logits.append(logits_PE)
                return y_PD
        # Float32 router: the tenth and eleventh of 512 logits are often closer than bfloat16 sees.
        logits_PE = self.ops.linear(x=h_PD.float(), weight=self.gate.weight.float())
        weights_PX, ids_PX = self.ops.route(
            logits=logits_PE, slots=self.experts_per_token, rescale=self.rescale
        )
        if taps is not None and taps.want_router_logits:
            taps.router_logits.append(logits_PE)
        y_PD = self.ops.experts(
            h=h_PD,
            ids=ids_PX,
            weights=weights_PX,
            gate_up=self.experts.gate_up_proj,
            down=self.experts.down_proj,
        )
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            share_P1 = self.ops.elementwise(function=torch.sigmoid, x=self.shared_expert_gate(h_PD))
            y_PD = y_PD + share_P1 * self.shared_expert(h_PD)
        return residual_PD + y_PD

    def _shared(self) -> SharedWeights | None:
        expert, opening = self.shared_expert, self.shared_expert_gate
        if expert is None or opening is None:
            return None
        return (
            expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight, opening.weight
        )  # fmt: skip
