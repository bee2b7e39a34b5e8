"""NativeModel: the same weights, run by the native kernels in one call per step.

Built from a PyTorch model (its tensors are used in place) or from packed weights. It has no
gradients and no taps; a model that needs those is a CausalLM. What is computed is the same: norms,
projections, mixers and experts in the order of ``model.py``, activations in float32.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from qnext import native
from qnext.config import ModelConfig
from qnext.errors import BackendError
from qnext.model.cache import PAGE_SIZE, HybridCache, Saved
from qnext.model.layers import rope_settings
from qnext.model.model import CausalLM

FORMATS = {"f32": 0, "bf16": 1, "q8": 2, "q4": 3}
_TORCH = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Packed(Protocol):
    """A matrix in one of the packed formats, as ``qnext.weights.formats`` makes it."""

    @property
    def format(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def data(self) -> Tensor: ...


class PackedStack(Protocol):
    """Packed matrices of one shape: all experts of a layer, or the one pair of a dense part."""

    @property
    def format(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def stored_rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def data(self) -> Tensor: ...
    @property
    def stride(self) -> int: ...


Weight = Tensor | Packed | PackedStack

FEW = 8
"""Up to so many rows, copying each by itself costs less than gathering and scattering them."""
TILE_ROWS = 32
"""Rows that packed formats keep together."""
DRAFT_SHARE, DRAFT_LEAST, DRAFT_MOST = 2, 1024, 32768
"""Drafts are made from one of so many parts of the vocabulary, within these bounds."""
DRAFT_LAST = 64
"""And from so many of the last defined ids: a tokenizer's control tokens follow its merges."""


PACK_DRAFTS_MOST = 1 << 25
"""An MTP layer of more weights than this is run as it is stored: packing would delay the start."""


class DraftHead(NamedTuple):
    """The rows of the head that a draft may be. Ids of byte-level BPE are in the order of its
    merges, so the first ones make up most of any text."""

    matrix: Any
    ids: np.ndarray
    """Token of each row, int32, ascending."""
    limit: int
    """Rows whose token is defined."""


def unfit(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> str | None:
    """Why the native kernels cannot run this model here, in one sentence, or None."""
    reason = native.unfit()
    if reason is not None:
        return reason
    if torch.device(device).type != "cpu":
        return f"the native kernels run on the CPU, not on {device}."
    if dtype not in _TORCH:
        return f"the native kernels hold keys and values in float32 or bfloat16, not in {dtype}."
    if config.attention_bias:
        return "the native kernels have no biases in attention (attention_bias is set)."
    if config.hidden_act != "silu":
        return f"the native kernels know hidden_act 'silu', not {config.hidden_act!r}."
    return None


class NativeModel:
    """A decoder with weights in any of the native formats.

    ``weights`` maps the checkpoint's tensor names to tensors or packed weights; experts may be
    stacked under ``mlp.experts.gate_up_proj`` and ``mlp.experts.down_proj``, and gate and up of a
    dense part packed as one ``gate_up_proj.weight``. ``dtype`` is that of keys, values and
    convolution windows. A token's numbers depend on the tokens before it alone, not on batch,
    chunks, drafts or threads. ``pack_drafts`` packs a matrix of the MTP layer, or of
    the head it drafts with, which changes drafts and never tokens; None leaves them as they are.
    Raises BackendError when ``unfit`` has a reason.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Weight],
        *,
        dtype: torch.dtype,
        pack_drafts: Callable[[Tensor], Packed] | None = None,
    ) -> None:
        reason = unfit(config, dtype)
        if reason is not None:
            raise BackendError(reason)
        self.config, self.dtype, self.device = config, dtype, torch.device("cpu")
        self.has_mtp = "mtp.fc.weight" in weights
        self.module: Any = native.load()
        self._native = self.module
        self._weights = weights
        self._pack_drafts = None
        if pack_drafts is not None and _size_of_mtp(weights) <= PACK_DRAFTS_MOST:
            self._pack_drafts = pack_drafts
        self._alive: list[object] = []
        tied = config.tie_word_embeddings
        self._head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        self._draft_heads: dict[int, DraftHead] = {}
        self._drafting: dict[int, Any] = {}
        self.decoder = self._build()
        self.cache: weakref.ref[DeferredCache] | None = None
        """The cache the decoder reads and writes now."""

    @classmethod
    def from_model(
        cls,
        model: CausalLM,
        *,
        pack_drafts: Callable[[Tensor], Packed] | None = None,
    ) -> "NativeModel":
        """The native twin of a model; both read the same tensors."""
        weights: dict[str, Weight] = dict(model.state_dict())
        return cls(model.config, weights, dtype=model.dtype, pack_drafts=pack_drafts)

    @property
    def kernels(self) -> tuple[str, ...]:
        """What runs: the instruction set, and the formats of the weights."""
        n = self._native
        found = sorted({_format_of(weight) for weight in self._weights.values()})
        return f"decoder: native ({n.isa()})", f"weights: {', '.join(found)}"

    def draft_head(self, defined_ids: int) -> DraftHead:
        """A copy of the head's rows for the likeliest of the ids below ``defined_ids``."""
        if defined_ids in self._draft_heads:
            return self._draft_heads[defined_ids]
        vocabulary = self.config.vocab_size
        low = min(max(vocabulary // DRAFT_SHARE, DRAFT_LEAST), DRAFT_MOST)
        first_last = max(defined_ids - DRAFT_LAST, 0) // TILE_ROWS
        tiles = [
            tile
            for tile in range(-(-defined_ids // TILE_ROWS))
            if tile < low // TILE_ROWS or tile >= first_last
        ]
        ids = np.concatenate([np.arange(TILE_ROWS, dtype=np.int32) + t * TILE_ROWS for t in tiles])
        ids = ids[ids < vocabulary]
        matrix = (
            self._matrix(self._head)
            if len(ids) == vocabulary and self._pack_drafts is None
            else self._some_tiles(self._weights[self._head], tiles, ids)
        )
        head = DraftHead(matrix, ids, int((ids < defined_ids).sum()))
        self._draft_heads[defined_ids] = head
        return head

    def drafting(self, defined_ids: int) -> Any:
        """What a native step needs to make drafts; an empty one for a model without MTP head."""
        found = self._drafting.get(defined_ids)
        if found is None:
            n, none = self._native, np.zeros(0, dtype=np.int32)
            head = self.draft_head(defined_ids) if self.has_mtp else (n.Matrix(), none, 0)
            found = self._drafting[defined_ids] = n.Drafting(*head)
        return found

    # -- building --------------------------------------------------------------------------------

    def _some_tiles(self, weight: Weight, tiles: Sequence[int], ids: np.ndarray) -> Any:
        if isinstance(weight, Tensor):
            rows = weight.detach()[torch.from_numpy(ids).long()]
            if self._pack_drafts is not None:
                return self._packed(self._pack_drafts(rows.float()))
            return self._matrix_of(rows)
        packed = cast("Packed", weight)
        data = packed.data.flatten().view(torch.uint8)
        per_tile = data.view(-(-packed.rows // TILE_ROWS), -1)
        # Room to start on a 64-byte line, as the kernels want it.
        room = torch.empty(len(tiles) * per_tile.shape[1] + 64, dtype=torch.uint8)
        skip = -room.data_ptr() % 64
        chosen = room[skip : skip + len(tiles) * per_tile.shape[1]]
        torch.index_select(
            per_tile, 0, torch.tensor(tiles), out=chosen.view(len(tiles), per_tile.shape[1])
        )
        self._alive.append(room)
        kind = FORMATS[packed.format]
        return self._native.Matrix(kind, len(ids), packed.cols, chosen.data_ptr(), chosen.numel())

    def _build(self) -> Any:
        config, n = self.config, self._native
        shape = n.Shape()
        shape.hidden, shape.vocabulary = config.hidden_size, config.vocab_size
        shape.query_heads, shape.kv_heads = config.num_attention_heads, config.num_key_value_heads
        shape.head_dim, shape.rotary = config.head_dim, config.rotary_dim
        shape.gated_attention = config.is_hybrid
        shape.key_heads = config.linear_num_key_heads
        shape.value_heads = config.linear_num_value_heads
        shape.key_dim, shape.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        shape.taps = config.linear_conv_kernel_dim
        shape.experts_per_token = config.num_experts_per_tok if config.num_experts else 0
        shape.rescale_top_k, shape.eps = config.norm_topk_prob, config.rms_norm_eps
        frequencies, multiplier = rope_settings(config)
        shape.rope_multiplier = multiplier
        decoder = n.Decoder(shape)
        decoder.frequencies = frequencies.float().tolist()
        decoder.embedding = self._matrix("model.embed_tokens.weight")
        decoder.head = self._matrix(self._head)
        self._floats(decoder, "final_norm", "model.norm.weight", norm=True)
        pages = states = 0
        for i, kind in enumerate(config.layer_types):
            layer = self._layer(f"model.layers.{i}.", kind, sparse=config.is_sparse(i))
            if kind == "full_attention":
                layer.pages_layer, pages = pages, pages + 1
            else:
                layer.state_layer, states = states, states + 1
            decoder.add_layer(layer)
        if self.has_mtp:
            decoder.mtp_fc = self._matrix("mtp.fc.weight")
            self._floats(decoder, "mtp_norm", "mtp.norm.weight", norm=True)
            for name in ("embedding", "hidden"):
                where = f"mtp.pre_fc_norm_{name}.weight"
                self._floats(decoder, f"mtp_{name}_norm", where, norm=True)
            layer = self._layer("mtp.layers.0.", "full_attention", sparse=config.num_experts > 0)
            layer.pages_layer = pages
            decoder.mtp_layer = layer
        return decoder

    def _layer(self, prefix: str, kind: str, *, sparse: bool) -> Any:
        layer = self._native.Layer()
        self._floats(layer, "input_norm", prefix + "input_layernorm.weight", norm=True)
        self._floats(layer, "post_norm", prefix + "post_attention_layernorm.weight", norm=True)
        if kind == "full_attention":
            layer.is_attention = True
            for name in "qkvo":
                setattr(layer, name, self._matrix(f"{prefix}self_attn.{name}_proj.weight"))
            for name in ("q_norm", "k_norm"):
                self._floats(layer, name, f"{prefix}self_attn.{name}.weight", norm=True)
        else:
            mixer = prefix + "linear_attn."
            layer.qkvz = self._matrix(mixer + "in_proj_qkvz.weight")
            layer.ba = self._matrix(mixer + "in_proj_ba.weight")
            layer.out = self._matrix(mixer + "out_proj.weight")
            self._conv(layer, mixer + "conv1d.weight")
            self._floats(layer, "a_log", mixer + "A_log")
            self._floats(layer, "dt_bias", mixer + "dt_bias")
            self._floats(layer, "gated_norm", mixer + "norm.weight")
        mlp = prefix + "mlp."
        if not sparse:
            layer.shared = self._feed_forward(mlp, self.config.intermediate_size)
            return layer
        layer.router = self._matrix(mlp + "gate.weight")
        for expert in self._experts(mlp + "experts."):
            layer.add_expert(expert)
        if self.config.shared_expert_intermediate_size:
            width = self.config.shared_expert_intermediate_size
            layer.shared = self._feed_forward(mlp + "shared_expert.", width)
            layer.shared_gate = self._matrix(mlp + "shared_expert_gate.weight")
        return layer

    def _feed_forward(self, prefix: str, width: int) -> Any:
        ff = self._native.FeedForward()
        ff.width = width
        if f"{prefix}gate_up_proj.weight" in self._weights:
            [ff.gate_up] = self._stack(f"{prefix}gate_up_proj.weight")
        else:
            ff.gate = self._matrix(f"{prefix}gate_proj.weight")
            ff.up = self._matrix(f"{prefix}up_proj.weight")
        ff.down = self._matrix(f"{prefix}down_proj.weight")
        return ff

    def _experts(self, prefix: str) -> Iterator[Any]:
        width = self.config.moe_intermediate_size
        if f"{prefix}gate_up_proj" not in self._weights:
            for e in range(self.config.num_experts):
                yield self._feed_forward(f"{prefix}{e}.", width)
            return
        stacks = self._stack(f"{prefix}gate_up_proj"), self._stack(f"{prefix}down_proj")
        for gate_up, down in zip(*stacks, strict=True):
            ff = self._native.FeedForward()
            ff.width, ff.gate_up, ff.down = width, gate_up, down
            yield ff

    def _stack(self, name: str) -> list[Any]:
        """The matrices of a stack: all experts of a projection, or the one pair of a dense part."""
        weight = self._weights[name]
        if isinstance(weight, Tensor):
            if weight.dtype not in _TORCH:
                weight = weight.float()
            weight = weight.detach().contiguous()
            self._alive.append(weight)
            count, rows, cols = weight.shape
            format, stride = _TORCH[weight.dtype], weight.stride(0) * weight.element_size()
            data = weight
        else:
            stack = cast("PackedStack", weight)
            count, rows, cols = stack.count, stack.stored_rows, stack.cols
            format, stride, data = stack.format, stack.stride, stack.data
        first, kind = data.data_ptr(), FORMATS[format]
        return [
            self._native.Matrix(kind, rows, cols, first + e * stride, stride) for e in range(count)
        ]

    def _matrix(self, name: str) -> Any:
        weight = self._weights[name]
        if isinstance(weight, Tensor):
            # The router and gates of one row decide by small differences.
            large = min(weight.shape) > 1 and not name.endswith(".mlp.gate.weight")
            if self._pack_drafts is not None and large and name.startswith("mtp."):
                return self._packed(self._pack_drafts(weight.detach().float()))
            return self._matrix_of(weight)
        return self._packed(cast("Packed", weight))

    def _packed(self, packed: Packed) -> Any:
        self._alive.append(packed)
        data = packed.data
        size = data.numel() * data.element_size()
        kind = FORMATS[packed.format]
        return self._native.Matrix(kind, packed.rows, packed.cols, data.data_ptr(), size)

    def _matrix_of(self, weight: Tensor) -> Any:
        if weight.dtype not in _TORCH:
            weight = weight.float()
        weight = weight.detach().contiguous()
        self._alive.append(weight)
        (rows, cols), kind = weight.shape, FORMATS[_TORCH[weight.dtype]]
        size = weight.numel() * weight.element_size()
        return self._native.Matrix(kind, rows, cols, weight.data_ptr(), size)

    def _conv(self, layer: Any, where: str) -> None:
        weight = self._weights[where]
        assert isinstance(weight, Tensor), where
        taps_first = weight.detach().float().squeeze(1).t().contiguous()
        self._alive.append(taps_first)
        layer.set_floats("conv", taps_first.flatten())

    def _floats(self, owner: Any, name: str, where: str, *, norm: bool = False) -> None:
        weight = self._weights[where]
        assert isinstance(weight, Tensor), where
        values = weight.detach().float()
        if norm and self.config.is_hybrid:
            values = 1.0 + values
        values = values.flatten().contiguous()
        self._alive.append(values)
        owner.set_floats(name, values)


def _size_of_mtp(weights: Mapping[str, Weight]) -> int:
    mtp = [weight for name, weight in weights.items() if name.startswith("mtp.")]
    return sum(weight.numel() for weight in mtp if isinstance(weight, Tensor))


def _format_of(weight: Weight) -> str:
    return _TORCH.get(weight.dtype, "f32") if isinstance(weight, Tensor) else weight.format


class Piece(NamedTuple):
    """New tokens of one sequence in a step."""

    slot: int
    tokens: int
    before: int
    """Position of the first one."""
    speculative: bool


class DeferredCache(HybridCache):
    """A HybridCache whose rejected tokens cost nothing: accepted ones are applied one step later.

    A speculative step leaves the state as it was and notes what each token would have done to it.
    ``keep`` counts the accepted ones; the next step applies them while it reads the state anyway,
    with the arithmetic stepping would have used. Whoever copies a state applies them first.

    ``num_pending`` sequences may have undecided tokens at once, ``most_pending`` each. pending
    [delta layers, num_pending, most, U K + W M + W] float32: normalised key, correction, decay;
    pending_window [delta layers, num_pending, most, ch]: the convolution's inputs.
    """

    def __init__(
        self,
        model: NativeModel,
        *,
        num_slots: int,
        num_pages: int,
        num_pending: int = 0,
        most_pending: int = 0,
    ) -> None:
        config = model.config
        super().__init__(config, num_slots=num_slots, num_pages=num_pages, dtype=model.dtype)
        self.model, self.most_pending = model, most_pending
        size = (len(config.delta_layers), num_pending, most_pending)
        per_token = config.delta_key_dim + config.delta_value_dim + config.linear_num_value_heads
        self.pending = torch.zeros(*size, per_token)
        self.pending_window = torch.zeros(*size, config.conv_channels, dtype=model.dtype)
        self.kept = [0] * num_slots
        """By slot: pending tokens that were accepted and are not in the state yet."""
        self.pending_row: dict[int, int] = {}
        """By slot: where its pending tokens are."""
        self._free_rows = list(range(num_pending - 1, -1, -1))
        self._open_pieces: tuple[Piece, ...] | None = None
        self._hidden: Tensor | None = None

    @property
    def decoder(self) -> Any:
        """The model's decoder, turned to this cache: the caches of several engines may share it."""
        model = self.model
        if model.cache is None or model.cache() is not self:
            model.decoder.set_cache(
                self.kv.view(torch.uint8), self.kv.shape[1], PAGE_SIZE,
                model.dtype == torch.bfloat16, self.recurrent, self.conv.view(torch.uint8),
                self.num_slots, self.pending.shape[1], self.most_pending, self.pending,
                self.pending_window.view(torch.uint8), self.last_hidden.view(torch.uint8),
            )  # fmt: skip
            model.cache = weakref.ref(self)
        return model.decoder

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        pending = (self.pending, self.pending_window)
        return super().nbytes + sum(x.numel() * x.element_size() for x in pending)

    def open(self) -> int:
        """Take a slot for a new, empty sequence; the state of its former owner is cleared."""
        slot = super().open()
        self.kept[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        """Give a slot back."""
        super().close(slot)
        if slot in self.pending_row:
            self._free_rows.append(self.pending_row.pop(slot))

    def settle(self, slot: int) -> None:
        """Apply the accepted tokens of a slot to its state now."""
        if self.kept[slot]:
            self.decoder.settle(slot, self.pending_row[slot], self.kept[slot])
            self.kept[slot] = 0

    def load_slot(self, slot: int, length: int, data: bytes) -> None:
        """Put the bytes of ``slot_bytes`` of a sequence of ``length`` tokens into a slot."""
        super().load_slot(slot, length, data)
        self.kept[slot] = 0

    def copy_slot(self, source: int, target: int) -> None:
        """Copy state and length of one slot to another; both belong to the same prefix now."""
        super().copy_slot(source, target)
        self.kept[target] = 0

    def load(self, slot: int, saved: Saved) -> None:
        """Put a saved state into a slot; pages with its first ``length`` tokens must be mapped."""
        super().load(slot, saved)
        self.kept[slot] = 0

    def pending_of(self, slot: int) -> int:
        """Where the undecided tokens of a slot go; 0 if sequences have none."""
        if not self.pending.shape[1]:
            return 0
        if slot not in self.pending_row:
            self.pending_row[slot] = self._free_rows.pop()
        return self.pending_row[slot]

    # -- steps -----------------------------------------------------------------------------------

    def advance(self, slot: int, count: int, pending: int) -> None:
        """Steps run by the decoder alone have added so many tokens to a sequence.

        The last ``pending`` of them are not in its state yet.
        """
        self._lengths[slot] += count
        self.kept[slot] = pending

    def begin(self, pieces: Sequence[Piece]) -> None:
        """Note what the coming step of the decoder runs; ``keep`` ends it."""
        assert self._open_pieces is None, "keep() of the previous step has not been called"
        for piece in pieces:
            assert piece.before == self._lengths[piece.slot], (piece, self._lengths[piece.slot])
            if piece.speculative and self.pending.shape[1]:
                assert piece.tokens <= self.most_pending, (piece, self.most_pending)
                self.pending_of(piece.slot)
        self._open_pieces = tuple(pieces)

    def remember(self, hidden: Tensor, captures: Sequence[tuple[int, int, int]]) -> None:
        """Note the hidden rows [P, D] of the step; the decoder has filled the captured slots.

        ``captures`` are (sequence, count, slot).
        """
        assert self._open_pieces is not None
        self._hidden = hidden
        starts = [0, *accumulate(piece.tokens for piece in self._open_pieces)]
        for piece in self._open_pieces:
            self.kept[piece.slot] = 0
        for sequence, count, slot in captures:
            self.last_hidden[slot] = hidden[starts[sequence] + count - 1]
            self._lengths[slot] = self._open_pieces[sequence].before + count
            self.kept[slot] = 0

    def keep(self, counts: Sequence[int] | None = None) -> None:
        """Make the first ``counts[b]`` tokens of the last step permanent, forget the rest."""
        pieces, self._open_pieces = self._open_pieces, None
        assert pieces is not None, "keep() without a step"
        assert self._hidden is not None
        kept = tuple(piece.tokens for piece in pieces) if counts is None else tuple(counts)
        row, rows, slots = 0, [], []
        for piece, count in zip(pieces, kept, strict=True):
            assert 0 <= count <= piece.tokens, (count, piece)
            assert piece.speculative or count == piece.tokens, (
                "tokens can only be dropped from a speculative sequence"
            )
            if piece.slot in self.pending_row and piece.speculative:
                self.kept[piece.slot] = count
            self._lengths[piece.slot] = piece.before + count
            if count:
                rows.append(row + count - 1)
                slots.append(piece.slot)
            row += piece.tokens
        if len(rows) <= FEW:
            for row, slot in zip(rows, slots, strict=True):
                self.last_hidden[slot].copy_(self._hidden[row])
        else:
            self.last_hidden[slots] = self._hidden[rows].to(self.last_hidden.dtype)
        self._hidden = None
