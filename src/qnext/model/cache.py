"""HybridCache: what a model remembers of each sequence, and how to undo a step.

Three memories. Attention layers keep keys and values of every token, in pages. Delta layers keep
one matrix per head and the last few inputs of their convolution, in slots of fixed size. The last
hidden row of a sequence is kept for the multi-token-prediction head. This file owns the tensors
and knows no requests; which page belongs to whom is decided by the engine.

A step is: ``view`` -> the model runs -> ``keep``. ``keep(counts)`` makes the first ``counts[b]``
tokens of sequence b permanent and forgets the rest. Keys and values need no undoing, their length
shrinks. The recurrent state cannot be cropped: a speculative sequence leaves it untouched while
the model runs, and ``keep`` either picks the state it had after the kept tokens ("snapshots") or
applies the kept tokens once more ("replay"). Both give the same bits. A picked state is copied only
when somebody asks for it: mostly the next step does, and reads it where it was noted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qnext.config import ModelConfig
from qnext.model.large_pages import ask_for_large_pages
from qnext.model.view import CacheView, Capture, rounds_of
from qnext.ops import Ops, Segments, select

PAGE_SIZE = 64
"""Tokens of a page; equal to the chunk length of the delta layers."""

LAYOUT = "torch-1"
"""Name of the order in which this cache keeps its bytes; another order has another name."""

Rollback = Literal["snapshots", "replay", "deferred"]


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
        rollback: Rollback = "snapshots",
    ) -> None:
        self.config, self.page_size = config, page_size
        self.num_slots, self.num_pages = num_slots, num_pages
        self.ops = ops or select()
        self.rollback: Rollback = rollback
        attention_layers = len(config.attention_layers) + config.num_mtp_layers
        delta_layers = len(config.delta_layers)
        heads = config.linear_num_value_heads
        self.kv = torch.empty(
            num_pages, attention_layers, 2, page_size, config.num_key_value_heads, config.head_dim,
            dtype=dtype, device=device,
        )  # fmt: skip
        self.recurrent = torch.empty(
            delta_layers, num_slots, heads, config.linear_key_head_dim,
            config.linear_value_head_dim, dtype=torch.float32, device=device,
        )  # fmt: skip
        self.conv = torch.empty(
            delta_layers, num_slots, config.linear_conv_kernel_dim - 1, config.conv_channels,
            dtype=dtype, device=device,
        )  # fmt: skip
        self.last_hidden = torch.zeros(num_slots, config.hidden_size, dtype=dtype, device=device)
        memory = (self.kv, self.recurrent, self.conv)
        ask_for_large_pages(memory)
        for tensor in memory:
            tensor.zero_()
        self._lengths = [0] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._open_view: CacheView | None = None
        # States [T, B', W, K, M] of the last speculative step by layer, and which of them are the
        # slots' own: those in ``recurrent`` are older.
        self._noted: dict[int, Tensor] = {}
        self._noted_at: dict[int, tuple[int, int]] = {}

    # -- slots -----------------------------------------------------------------------------------

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
        self._forget_noted(slot)
        self._free.append(slot)

    def length(self, slot: int) -> int:
        """Tokens of the sequence in this slot that are in the cache."""
        return self._lengths[slot]

    def settle(self, slot: int) -> None:
        """Bring the state of a slot up to date in ``recurrent``."""
        if slot not in self._noted_at:
            return
        step, lane = self._noted_at[slot]
        for layer, states in self._noted.items():
            self.recurrent[layer, slot] = states[step, lane]
        self._forget_noted(slot)

    def _forget_noted(self, slot: int) -> None:
        if self._noted_at.pop(slot, None) is not None and not self._noted_at:
            self._noted = {}

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def copy_slot(self, source: int, target: int) -> None:
        """Copy state and length of one slot to another; both belong to the same prefix now."""
        assert self._open_view is None, "keep() of the previous step has not been called"
        self.settle(source)
        self._forget_noted(target)
        self.recurrent[:, target] = self.recurrent[:, source]
        self.conv[:, target] = self.conv[:, source]
        self.last_hidden[target] = self.last_hidden[source]
        self._lengths[target] = self._lengths[source]

    def copy_page(self, source: int, target: int) -> None:
        """Copy the keys and values of one page, all layers."""
        self.kv[target] = self.kv[source]

    def save(self, slot: int) -> Saved:
        """Copy the state of a sequence out of the cache; its pages stay its own."""
        assert self._open_view is None, "keep() of the previous step has not been called"
        self.settle(slot)
        return Saved(
            length=self._lengths[slot],
            recurrent=self.recurrent[:, slot].clone(),
            conv=self.conv[:, slot].clone(),
            last_hidden=self.last_hidden[slot].clone(),
        )

    def load(self, slot: int, saved: Saved) -> None:
        """Put a saved state into a slot; pages with its first ``length`` tokens must be mapped."""
        self._forget_noted(slot)
        self.recurrent[:, slot] = saved.recurrent
        self.conv[:, slot] = saved.conv
        self.last_hidden[slot] = saved.last_hidden
        self._lengths[slot] = saved.length

    # -- bytes -----------------------------------------------------------------------------------

    @property
    def layout(self) -> dict[str, object]:
        """Name, dtypes and shapes of what the bytes of a page and of a slot hold, in order.

        Bytes may only be loaded by a cache whose layout is equal.
        """
        slot = (self.recurrent[:, 0], self.conv[:, 0], self.last_hidden[0])
        return {
            "name": LAYOUT,
            "page": [_kind(self.kv[0])],
            "slot": [_kind(tensor) for tensor in slot],
        }

    def page_bytes(self, page: int) -> bytes:
        """Keys and values of one page, copied out."""
        return _to_bytes(self.kv[page])

    def load_page(self, page: int, data: bytes) -> None:
        """Put the bytes of ``page_bytes`` into a page."""
        self.kv[page] = _from_bytes(data, self.kv[page])

    def slot_bytes(self, slot: int) -> bytes:
        """State, convolution window and last hidden row of one slot, copied out."""
        assert self._open_view is None, "keep() of the previous step has not been called"
        self.settle(slot)
        tensors = (self.recurrent[:, slot], self.conv[:, slot], self.last_hidden[slot])
        return b"".join(_to_bytes(tensor) for tensor in tensors)

    def load_slot(self, slot: int, length: int, data: bytes) -> None:
        """Put the bytes of ``slot_bytes`` of a sequence of ``length`` tokens into a slot."""
        self._forget_noted(slot)
        at = 0
        for tensor in (self.recurrent[:, slot], self.conv[:, slot], self.last_hidden[slot]):
            size = tensor.numel() * tensor.element_size()
            tensor.copy_(_from_bytes(data[at : at + size], tensor))
            at += size
        assert at == len(data), (at, len(data))
        self._lengths[slot] = length

    # -- steps -----------------------------------------------------------------------------------

    def view(
        self,
        slots: Sequence[int],
        page_table: Tensor,
        segments: Segments,
        *,
        speculative: bool | Sequence[bool] = False,
        captures: Sequence[Capture] = (),
        keeps_first: bool = False,
    ) -> CacheView:
        """Prepare one step: ``segments.lengths[b]`` new tokens for the sequence in ``slots[b]``.

        ``page_table`` [B, max pages] must cover the new tokens. Of a speculative sequence any
        number of new tokens may be dropped by ``keep``; of the others all are kept. ``captures``
        ask for a copy of a sequence's state in the middle of its new tokens. ``keeps_first`` is a
        promise that at least one new token of every sequence will stay, so that nobody can come
        back to the state before them.
        """
        assert self._open_view is None, "keep() of the previous step has not been called"
        assert len(slots) == segments.count == page_table.shape[0], (len(slots), segments.count)
        flags = [speculative] * len(slots) if isinstance(speculative, bool) else list(speculative)
        assert not any(flags[capture.sequence] for capture in captures), (
            "the state of a speculative sequence is not settled, so it cannot be captured"
        )
        before = tuple(self._lengths[slot] for slot in slots)
        view = self._view(slots, page_table, segments, before)
        view.keeps_first = keeps_first
        if keeps_first and self._noted_at.keys() == set(slots):
            view.noted, self._noted = self._noted, {}
            at = torch.tensor([self._noted_at.pop(slot) for slot in slots], device=segments.device)
            view.noted_at = at.unbind(1)
        else:
            for slot in list(self._noted_at):
                self.settle(slot)
        view.speculative = tuple(b for b, flag in enumerate(flags) if flag)
        view.settled = tuple(b for b, flag in enumerate(flags) if not flag)
        if view.speculative and view.settled:
            starts, lengths = segments.starts, segments.lengths
            rows = [torch.arange(starts[b], starts[b] + lengths[b]) for b in view.speculative]
            view.held_rows = torch.cat(rows).to(segments.device)
        view.captures = tuple(captures)
        view.rounds = rounds_of(segments, view.speculative, view.captures, self.rollback)
        self._open_view = view
        return view

    def mtp_view(
        self,
        slots: Sequence[int],
        page_table: Tensor,
        segments: Segments,
        *,
        starts: Sequence[int],
        firsts: Sequence[int],
    ) -> CacheView:
        """A view for the MTP layer alone: rows for positions from ``starts[b]``.

        Row j of the MTP layer stands at the position of the token it embeds. Rows before
        ``firsts[b]`` do not exist and are not seen. Nothing has to be kept afterwards.
        """
        view = self._view(slots, page_table, segments, tuple(starts))
        view.first = tuple(firsts)
        return view

    def _view(
        self,
        slots: Sequence[int],
        page_table: Tensor,
        segments: Segments,
        before: tuple[int, ...],
    ) -> CacheView:
        for b, (past, new) in enumerate(zip(before, segments.lengths, strict=True)):
            assert self.pages_for(past + new) <= page_table.shape[1], (b, past, new)
        ids = segments.ids()
        positions = segments.offsets() + torch.tensor(before, device=segments.device)[ids]
        return CacheView(
            cache=self,
            slots=tuple(slots),
            page_table=page_table,
            before=before,
            segments=segments,
            slot_index=torch.tensor(list(slots), device=segments.device),
            target_pages=page_table[ids, positions // self.page_size],
            target_offsets=positions % self.page_size,
        )

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
        assert all(kept[b] == lengths[b] for b in view.settled), (
            "tokens can only be dropped from a speculative view"
        )
        assert not view.keeps_first or all(kept), "the first token was to stay"
        live = [b for b in view.speculative if kept[b]]
        if live and len(self.config.delta_layers):
            self._commit_windows(view, live, kept)
            if self.rollback == "replay":
                self._replay(view, live, kept)
            else:
                self._note(view, live, kept)
        starts = view.segments.starts
        for b, slot in enumerate(view.slots):
            self._lengths[slot] = view.before[b] + kept[b]
        rows = [starts[b] + n - 1 for b, n in enumerate(kept) if n]
        if view.hidden is not None and rows:
            owners = [slot for slot, n in zip(view.slots, kept, strict=True) if n]
            self.last_hidden[owners] = view.hidden[rows].to(self.last_hidden.dtype)

    def _commit_windows(self, view: CacheView, live: list[int], kept: tuple[int, ...]) -> None:
        """The convolution inputs before and among the kept tokens."""
        history, device = self.conv.shape[2], view.segments.device
        slots = view.slot_index[live]
        before = len(live) * history
        # In the rows of the old windows and, behind them, of everything that was held.
        sources = torch.cat(
            (torch.arange(before, device=device), view.rows_of(live, kept) + before)
        )
        tail = sources[Segments.of([kept[b] for b in live], device).tail_table(history)]
        for layer, inputs in view.held.items():
            old = self.conv[layer, slots].flatten(0, 1)
            self.conv[layer, slots] = torch.cat((old, inputs[0].to(old.dtype)))[tail]

    def _replay(self, view: CacheView, live: list[int], kept: tuple[int, ...]) -> None:
        """Apply the kept tokens to the untouched state, token by token as decoding would."""
        rows, slots = view.rows_of(live, kept), view.slot_index[live]
        segments = Segments.of([kept[b] for b in live], view.segments.device)
        for layer, inputs in view.held.items():
            k, v, g, beta = (tensor[rows] for tensor in inputs[1:])
            _, state = self.ops.gated_delta_step(
                q=k, k=k, v=v, g=g, beta=beta, state=self.recurrent[layer, slots],
                segments=segments,
            )  # fmt: skip
            self.recurrent[layer, slots] = state

    def _note(self, view: CacheView, live: list[int], kept: tuple[int, ...]) -> None:
        """The state each speculative sequence had after its last kept token is its state now."""
        place = {b: i for i, b in enumerate(view.speculative)}
        self._noted = view.states
        self._noted_at = {view.slots[b]: (kept[b] - 1, place[b]) for b in live}
        if not view.keeps_first:
            for b in live:
                self.settle(view.slots[b])


def _kind(tensor: Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _to_bytes(tensor: Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _from_bytes(data: bytes, like: Tensor) -> Tensor:
    assert len(data) == like.numel() * like.element_size(), (len(data), like.shape)
    if not data:
        return torch.empty_like(like)
    return torch.frombuffer(bytearray(data), dtype=like.dtype).view(like.shape).to(like.device)
