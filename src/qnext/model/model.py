"""The causal model: embedding, decoder layers, final norm, head, and the MTP head beside it.

``run`` is the one forward: packed ragged tokens, with a cache view or without. ``forward`` is the
same for a rectangle of ids with padding, with the outputs users of transformers know. Module and
parameter names are those of the published checkpoints.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qnext.config import ModelConfig
from qnext.errors import ConfigError, RequestError
from qnext.model.batch import Rectangle, TokenBatch
from qnext.model.block import DecoderLayer
from qnext.model.layers import RmsNorm, Taps, rotary
from qnext.model.mtp import MtpHead
from qnext.model.view import CacheView
from qnext.ops import Ops, OpSpec, select
from qnext.ops.linear import Projection

__all__ = ["CausalLM", "CausalOutput", "Taps", "initialise"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalOutput:
    """Result of ``model(input_ids)``; padded positions are zero."""

    logits: Tensor
    """[B, T, V] in the model's dtype."""
    hidden_states: tuple[Tensor, ...] | None = None
    """[B, T, D] each: the embedding, then every layer's output, the last one after the norm."""
    attentions: tuple[Tensor, ...] | None = None
    """[B, N, T, T] float32 for every full-attention layer."""
    router_logits: tuple[Tensor, ...] | None = None
    """[B * T, E] float32 for every sparse layer."""


class Backbone(nn.Module):
    """Everything below the head; holds the tensors ``model.*``."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        # Not drawn: initialise() or a checkpoint gives every parameter its value, and drawing on
        # the meta device makes torch load its compiler, which takes longer than mapping a model.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        numbers = {"linear_attention": 0, "full_attention": 0}
        layers = []
        for i, kind in enumerate(config.layer_types):
            sparse = config.is_sparse(i)
            layers.append(DecoderLayer(config, kind, numbers[kind], sparse=sparse, ops=ops))
            numbers[kind] += 1
        self.layers = nn.ModuleList(layers)
        self.norm = RmsNorm(config.hidden_size, config, ops)


class CausalLM(nn.Module):
    """A Qwen3-Next, Qwen3 or Qwen3-MoE model. Parameters are created, not initialised."""

    def __init__(self, config: ModelConfig, *, ops: Ops | None = None) -> None:
        super().__init__()
        self.config = config
        self.ops = ops or select(OpSpec())
        self.model = Backbone(config, self.ops)
        self.lm_head: Projection | None = None
        if not config.tie_word_embeddings:
            self.lm_head = Projection(config.hidden_size, config.vocab_size, op=self.ops.linear)
        self.mtp = MtpHead(config, self.ops) if config.num_mtp_layers else None
        self.source_folder: Path | None = None
        """Folder the weights were read from; saving copies its tokenizer files along."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations and of all parameters but the float32 decay terms."""
        return self.model.embed_tokens.weight.dtype

    @property
    def has_mtp(self) -> bool:
        """Whether there is a multi-token-prediction head."""
        return self.mtp is not None

    @property
    def kernels(self) -> tuple[str, ...]:
        """One line per op: what runs, and why nothing better."""
        return self.ops.report

    def run(
        self, batch: TokenBatch, view: CacheView | None = None, *, taps: Taps | None = None
    ) -> Tensor:
        """Hidden rows after the final norm, [P, D]. With a view, the cache is read and extended."""
        h_PD = self.model.embed_tokens(batch.ids)
        rope = rotary(self.config, batch.positions, h_PD.dtype, self.ops)
        states = taps.hidden_states if taps is not None and taps.want_hidden_states else None
        for layer in self.model.layers:
            if states is not None:
                states.append(h_PD)
            h_PD = layer(h_PD, batch, rope, view, taps)
        h_PD = self.model.norm(h_PD)
        if states is not None:
            states.append(h_PD)
        if view is not None:
            view.remember(h_PD)
        return h_PD

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden rows [..., D] that come after a final norm (main or MTP)."""
        if self.lm_head is None:
            return self.ops.linear(x=hidden, weight=self.model.embed_tokens.weight)
        return self.lm_head(hidden)

    def run_mtp(
        self,
        batch: TokenBatch,
        next_ids: Tensor,
        hidden: Tensor,
        view: CacheView | None = None,
        *,
        taps: Taps | None = None,
    ) -> Tensor:
        """MTP rows after their own norm, [P, D]; ``lm_logits`` of row t predicts token t + 2.

        ``next_ids`` [P] is token t + 1 for every t of the batch, ``hidden`` [P, D] the result of
        ``run`` (or, to draft further, of the previous ``run_mtp``). Raises ConfigError when the
        model has no MTP head.
        """
        if self.mtp is None:
            raise ConfigError(
                "this model has no multi-token-prediction head: its checkpoint holds no mtp.* "
                "tensors. Choose a checkpoint that has them, or do not ask for MTP."
            )
        rope = rotary(self.config, batch.positions, hidden.dtype, self.ops)
        embedding_PD = self.model.embed_tokens(next_ids)
        return self.mtp(embedding_PD, hidden, batch, rope, view, taps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        output_router_logits: bool = False,
    ) -> CausalOutput:
        """Logits of [B, T] ids; ``attention_mask`` marks padding (left or right) with 0.

        Raises RequestError for ids outside the vocabulary and for masks with holes.
        """
        self._check_ids(input_ids)
        batch, rectangle = Rectangle.pack(input_ids, attention_mask)
        taps = Taps(
            want_attentions=output_attentions,
            want_hidden_states=output_hidden_states,
            want_router_logits=output_router_logits,
        )
        logits = rectangle.unpack(self.lm_logits(self.run(batch, taps=taps)))
        hidden_states = attentions = router_logits = None
        if output_hidden_states:
            hidden_states = tuple(rectangle.unpack(h) for h in taps.hidden_states)
        if output_attentions:
            attentions = tuple(self._square(layer, rectangle) for layer in taps.attentions)
        if output_router_logits:
            router_logits = tuple(rectangle.unpack(r).flatten(0, 1) for r in taps.router_logits)
        return CausalOutput(
            logits=logits,
            hidden_states=hidden_states,
            attentions=attentions,
            router_logits=router_logits,
        )

    def mtp_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The MTP head's logits [B, T - 1, V] of [B, T] ids.

        Entry [b, t] is computed from tokens 0 ... t + 1 of row b and predicts its token t + 2; so
        entry t belongs to the same prediction as ``model(input_ids).logits[b, t + 1]``. Padded
        positions, and the last token of a right-padded row, are zero.
        """
        self._check_ids(input_ids)
        batch, rectangle = Rectangle.pack(input_ids, attention_mask)
        if rectangle.shape[1] < 2:
            raise RequestError(
                "mtp_logits: expected at least 2 tokens per row, because the head reads a token "
                f"and its successor; found {rectangle.shape[1]}."
            )
        hidden_PD = self.run(batch)
        # The last token of a sequence has no successor; nothing before it can see that row.
        next_ids = torch.cat((batch.ids[1:], batch.ids.new_zeros(1)))
        rows_PV = self.lm_logits(self.run_mtp(batch, next_ids, hidden_PD))
        has_next = torch.ones_like(batch.ids, dtype=torch.bool)
        has_next[batch.segments.last_rows()] = False
        return rectangle.unpack(rows_PV * has_next[:, None])[:, :-1]

    def _check_ids(self, ids: Tensor) -> None:
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise RequestError(f"input_ids: expected integers, found {ids.dtype}.")
        if ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise RequestError(
                    f"input_ids: token id {wrong} is outside the vocabulary "
                    f"(0 ... {self.config.vocab_size - 1})."
                )

    @staticmethod
    def _square(weights: list[Tensor], rectangle: Rectangle) -> Tensor:
        """Per-sequence weights [N, T, T] laid into [B, N, T, T] at their unpadded places."""
        rows, width = rectangle.shape
        out = weights[0].new_zeros(rows, weights[0].shape[0], width, width)
        first = 0
        for row, piece in enumerate(weights):
            length = piece.shape[-1]
            start = int(rectangle.index[first]) - row * width
            first += length
            out[row, :, start : start + length, start : start + length] = piece
        return out


@torch.no_grad()
def initialise(model: CausalLM, seed: int) -> None:
    """Give every parameter its starting value, reproducibly.

    ======================================  ==========================================
    embedding, linear layers, experts        normal(0, initializer_range)
    conv1d                                   uniform(-1/sqrt(J), 1/sqrt(J))
    norms of Qwen3-Next (zero-centred)       0
    norms of Qwen3, gated norm               1
    A_log                                    log(uniform(0.01, 16))
    dt_bias                                  1
    biases                                   0
    ======================================  ==========================================
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, dtype=torch.float32)
        if name.endswith("A_log"):
            # The lower bound keeps the logarithm finite.
            value.uniform_(0.01, 16.0, generator=generator).log_()
        elif name.endswith(("dt_bias", "linear_attn.norm.weight")):
            value.fill_(1.0)
        elif name.endswith("bias"):
            value.zero_()
        elif name.endswith("conv1d.weight"):
            bound = model.config.linear_conv_kernel_dim**-0.5
            value.uniform_(-bound, bound, generator=generator)
        elif parameter.ndim == 1:
            value.fill_(0.0 if model.config.is_hybrid else 1.0)
        else:
            value.normal_(0.0, model.config.initializer_range, generator=generator)
        parameter.copy_(value)
