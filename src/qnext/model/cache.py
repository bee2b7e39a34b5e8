"""HybridCache: what a model remembers of each sequence, and how to undo a step.

Three memories. Attention layers keep keys and values of every token, in pages. Delta layers keep
one matrix per head and the last few inputs of their convolution, in slots of fixed size. The last
hidden row of the sequence is kept for the multi-token-prediction head. This file owns the tensors
and knows no requests; which page belongs to whom is decided by the engine.

A step is: ``view`` -> the model runs -> ``keep``. ``keep(counts)`` makes the first ``counts[b]``
tokens of sequence b permanent and forgets the rest. Keys and values need no undoing, their length
shrinks. The recurrent state cannot be cropped, so a speculative view leaves it untouched while the
model runs and ``keep`` replays the accepted tokens onto it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qnext.config import ModelConfig
from qnext.ops import Ops, Segments, select

PAGE_SIZE = 64
"""Tokens of a page; equal to the chunk length of the delta layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A copy of everything but the pages of one sequence, at one length."""

    length: int
    recurrent: Tensor
    """[delta layers, W, K, M] float32."""
    conv: Tensor
    """[delta layers, J-1, ch]."""
    last_hidden: Tensor
    """[D]: output of the final norm at the last token."""


@dataclass(kw_only=True, slots=True)
class CacheView:
    """What the layers read and write in one step of some sequences."""

    cache: "HybridCache"
    slots: tuple[int, ...]
    page_table: Tensor
    """[B, max pages] int64."""
    before: tuple[int, ...]
    """Tokens each sequence already has in the cache."""
    segments: Segments
    speculative: bool
    _slot_index: Tensor
    _target_pages: Tensor
    _target_offsets: Tensor
    _inputs: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    _hidden: Tensor | None = None

    def write_kv(self, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [P, G, H] of attention layer number ``layer``; return that layer's pages.

        Returned shape: [pages, 2, page size, G, H].
        """
        pages = self.cache.kv[:, layer]
        pages[self._target_pages, 0, self._target_offsets] = k.to(pages.dtype)
        pages[self._target_pages, 1, self._target_offsets] = v.to(pages.dtype)
        return pages

    def read_state(self, layer: int) -> tuple[Tensor, Tensor]:
        """Convolution window [B, J-1, ch] and state [B, W, K, M] of delta layer ``layer``."""
        index = self._slot_index
        return self.cache.conv[layer, index], self.cache.recurrent[layer, index]

    def write_state(
        self, layer: int, conv: Tensor, recurrent: Tensor, inputs: tuple[Tensor, ...]
    ) -> None:
        """Store the state after this step, or what is needed to replay a part of it.

        ``inputs`` are the convolution inputs [P, ch] and k, v, g, beta of the delta rule.
        """
        if self.speculative:
            self._inputs[layer] = inputs
        else:
            self.cache.conv[layer, self._slot_index] = conv.to(self.cache.conv.dtype)
            self.cache.recurrent[layer, self._slot_index] = recurrent

    def remember(self, hidden: Tensor) -> None:
        """Note the final hidden rows [P, D] of this step; ``keep`` stores the last kept one."""
        self._hidden = hidden


class HybridCache:
    """Pages of keys and values, and slots of recurrent state, for many sequences.

    Shapes: kv [pages, attention layers (+ 1 for the MTP layer, last), 2, page size, G, H];
    recurrent [delta layers, slots, W, K, M] float32; conv [delta layers, slots, J-1, ch];
    last_hidden [slots, D].
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_slots: int,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        ops: Ops | None = None,
    ) -> None:
        self.config, self.page_size = config, page_size
        self.num_slots, self.num_pages = num_slots, num_pages
        self.ops = ops or select()
        attention_layers = len(config.attention_layers) + config.num_mtp_layers
        delta_layers = len(config.delta_layers)
        heads = config.linear_num_value_heads
        self.kv = torch.zeros(
            num_pages, attention_layers, 2, page_size, config.num_key_value_heads, config.head_dim,
            dtype=dtype, device=device,
        )  # fmt: skip
        self.recurrent = torch.zeros(
            delta_layers, num_slots, heads, config.linear_key_head_dim,
            config.linear_value_head_dim, dtype=torch.float32, device=device,
        )  # fmt: skip
        self.conv = torch.zeros(
            delta_layers, num_slots, config.linear_conv_kernel_dim - 1, config.conv_channels,
            dtype=dtype, device=device,
        )  # fmt: skip
        self.last_hidden = torch.zeros(num_slots, config.hidden_size, dtype=dtype, device=device)
        self._lengths = [0] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._open_view: CacheView | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.kv, self.recurrent, self.conv, self.last_hidden)
        return sum(x.numel() * x.element_size() for x in tensors)

    @property
    def slots_free(self) -> int:
        """Slots no sequence holds."""
        return len(self._free)

    def open(self) -> int:
        """Take a slot for a new, empty sequence; the state of its former owner is cleared."""
        assert self._free, "no free slot; the engine must not admit more sequences than slots"
        slot = self._free.pop()
        self.recurrent[:, slot] = 0
        self.conv[:, slot] = 0
        self.last_hidden[slot] = 0
        self._lengths[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        """Give a slot back."""
        assert slot not in self._free, slot
        self._free.append(slot)

    def length(self, slot: int) -> int:
        """Tokens of the sequence in this slot that are in the cache."""
        return self._lengths[slot]

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def view(
        self,
        slots: Sequence[int],
        page_table: Tensor,
        segments: Segments,
        *,
        speculative: bool = False,
    ) -> CacheView:
        """Prepare one step: ``segments.lengths[b]`` new tokens for the sequence in ``slots[b]``.

        ``page_table`` [B, max pages] must cover the new tokens. With ``speculative`` any number of
        the new tokens may be dropped by ``keep``; without, all of them are kept.
        """
        assert self._open_view is None, "keep() of the previous step has not been called"
        assert len(slots) == segments.count == page_table.shape[0], (len(slots), segments.count)
        before = tuple(self._lengths[slot] for slot in slots)
        for b, (past, new) in enumerate(zip(before, segments.lengths, strict=True)):
            assert self.pages_for(past + new) <= page_table.shape[1], (b, past, new)
        ids = segments.ids()
        positions = segments.offsets() + torch.tensor(before, device=segments.device)[ids]
        view = CacheView(
            cache=self,
            slots=tuple(slots),
            page_table=page_table,
            before=before,
            segments=segments,
            speculative=speculative,
            _slot_index=torch.tensor(list(slots), device=segments.device),
            _target_pages=page_table[ids, positions // self.page_size],
            _target_offsets=positions % self.page_size,
        )
        self._open_view = view
        return view

    def keep(self, counts: Sequence[int] | None = None) -> None:
        """Make the first ``counts[b]`` tokens of the last view permanent, forget the rest.

        None keeps everything.
        """
        view, self._open_view = self._open_view, None
        assert view is not None, "keep() without a view"
        lengths = view.segments.lengths
        kept = lengths if counts is None else tuple(counts)
        assert len(kept) == len(lengths), (kept, lengths)
        assert all(0 <= n <= t for n, t in zip(kept, lengths, strict=True)), (kept, lengths)
        if view.speculative:
            self._replay(view, kept)
        else:
            assert kept == lengths, "tokens can only be dropped from a speculative view"
        starts = view.segments.starts
        for b, slot in enumerate(view.slots):
            self._lengths[slot] = view.before[b] + kept[b]
            if kept[b] and view._hidden is not None:
                self.last_hidden[slot] = view._hidden[starts[b] + kept[b] - 1]

    def _replay(self, view: CacheView, kept: tuple[int, ...]) -> None:
        """Apply the kept tokens to the untouched state, token by token as decoding would."""
        if not any(kept):
            return
        device = view.segments.device
        starts = view.segments.starts
        rows = torch.cat([torch.arange(starts[b], starts[b] + n) for b, n in enumerate(kept)])
        rows = rows.to(device)
        segments = Segments.of(kept, device)
        history = self.conv.shape[2]
        tail = segments.tail_table(history)
        for layer, inputs in view._inputs.items():
            x, k, v, g, beta = (tensor[rows] for tensor in inputs)
            conv, recurrent = view.read_state(layer)
            _, recurrent = self.ops.gated_delta_step(
                q=k, k=k, v=v, g=g, beta=beta, state=recurrent, segments=segments
            )
            window = torch.cat((conv.flatten(0, 1), x.to(conv.dtype)))[tail]
            self.recurrent[layer, view._slot_index] = recurrent
            self.conv[layer, view._slot_index] = window

    def save(self, slot: int) -> Saved:
        """Copy the state of a sequence, for prefix reuse or preemption; its pages stay its own."""
        assert self._open_view is None, "keep() of the previous step has not been called"
        return Saved(
            length=self._lengths[slot],
            recurrent=self.recurrent[:, slot].clone(),
            conv=self.conv[:, slot].clone(),
            last_hidden=self.last_hidden[slot].clone(),
        )

    def load(self, slot: int, saved: Saved) -> None:
        """Put a saved state into a slot; pages with its first ``length`` tokens must be mapped."""
        self.recurrent[:, slot] = saved.recurrent
        self.conv[:, slot] = saved.conv
        self.last_hidden[slot] = saved.last_hidden
        self._lengths[slot] = saved.length
