"""One decoder layer: a token mixer and a feed-forward, each behind a norm and beside a residual."""

from torch import Tensor, nn

from qnext.config import ModelConfig
from qnext.model.attention import GatedAttention
from qnext.model.batch import TokenBatch
from qnext.model.deltanet import GatedDeltaNet
from qnext.model.layers import Mlp, ResidualNorm, Taps
from qnext.model.moe import SparseMoe
from qnext.model.view import CacheView
from qnext.ops import Ops


class DecoderLayer(nn.Module):
    """``h = h + mixer(norm(h)); h = h + feed_forward(norm(h))``.

    The mixer lives under its published name: ``linear_attn`` or ``self_attn``.
    """

    def __init__(
        self, config: ModelConfig, kind: str, cache_layer: int, *, sparse: bool, ops: Ops
    ) -> None:
        super().__init__()
        self.kind = kind
        if kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(config, cache_layer, ops)
        else:
            self.self_attn = GatedAttention(config, cache_layer, ops)
        self.mlp = SparseMoe(config, ops) if sparse else Mlp(config, config.intermediate_size, ops)
        self.input_layernorm = ResidualNorm(config.hidden_size, config, ops)
        self.post_attention_layernorm = ResidualNorm(config.hidden_size, config, ops)

    def forward(
        self,
        h_PD: Tensor,
        batch: TokenBatch,
        rope: tuple[Tensor, Tensor],
        view: CacheView | None,
        taps: Taps | None,
    ) -> Tensor:
        """[P, D] -> [P, D]."""
        h_PD, normed_PD = self.input_layernorm(h_PD)
        if self.kind == "linear_attention":
            mixed_PD = self.linear_attn(normed_PD, batch, view)
        else:
            mixed_PD = self.self_attn(normed_PD, batch, rope, view, taps)
        h_PD, normed_PD = self.post_attention_layernorm(h_PD, mixed_PD)
        if isinstance(self.mlp, SparseMoe):
            return self.mlp(normed_PD, taps, h_PD)
        return h_PD + self.mlp(normed_PD)
