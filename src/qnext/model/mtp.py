"""The multi-token-prediction head: one extra layer that predicts the token after the next.

At index t it reads the embedding of token t + 1 and the model's final hidden row of token t, both
normed, embedding half first, and its output predicts token t + 2 through the main lm_head. The
layer is a full-attention decoder layer with its own experts and its own keys and values. To draft
further, its own output takes the place of the main hidden row.
"""

import torch
from torch import Tensor, nn

from qnext.config import ModelConfig
from qnext.model.batch import TokenBatch
from qnext.model.block import DecoderLayer
from qnext.model.layers import RmsNorm, Taps
from qnext.model.view import CacheView
from qnext.ops import Ops
from qnext.ops.linear import Projection


class MtpHead(nn.Module):
    """Tensors ``mtp.*`` of a checkpoint; embedding and lm_head are the main model's."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        D = config.hidden_size
        self.fc = Projection(2 * D, D, op=ops.linear)
        self.pre_fc_norm_embedding = RmsNorm(D, config, ops)
        self.pre_fc_norm_hidden = RmsNorm(D, config, ops)
        sparse = config.num_experts > 0
        cache_layer = len(config.attention_layers)
        self.layers = nn.ModuleList(
            [DecoderLayer(config, "full_attention", cache_layer, sparse=sparse, ops=ops)]
        )
        self.norm = RmsNorm(D, config, ops)

    def forward(
        self,
        embedding_PD: Tensor,
        hidden_PD: Tensor,
        batch: TokenBatch,
        rope: tuple[Tensor, Tensor],
        view: CacheView | None,
        taps: Taps | None,
    ) -> Tensor:
        """Embeddings of tokens t + 1 and hidden rows of tokens t, both [P, D] -> [P, D]."""
        pair_Px = torch.cat(
            (self.pre_fc_norm_embedding(embedding_PD), self.pre_fc_norm_hidden(hidden_PD)), dim=-1
        )
        h_PD = self.layers[0](self.fc(pair_Px), batch, rope, view, taps)
        return self.norm(h_PD)
