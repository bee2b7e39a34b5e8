"""Is a token's result really independent of how it was computed? Checked before it is promised.

In path-independent mode, and on the native kernels always, the number computed for a token depends
on the tokens before it and on nothing else: not on the batch, the chunks, the cache or the drafts.
PyTorch's ops of that mode rely on how the machine's libraries sum, so every engine that is asked to
promise it first compares some splits of a sequence bit by bit.
"""

from itertools import pairwise

import torch
from torch import Tensor

from qnext.engine.native_runner import NativeRunner
from qnext.engine.runner import Work
from qnext.errors import BackendError
from qnext.model.batch import TokenBatch
from qnext.model.cache import PAGE_SIZE, HybridCache
from qnext.model.layers import Taps
from qnext.model.model import CausalLM
from qnext.model.native import NativeModel

TOKENS = 150
SPLITS = ((1, 2, 3, 5, 8, 17, 64), (64, 128), (16, 17, 18, 66), (149,))
COMPANY = (1, 30, 7)
"""Lengths of other sequences that run beside the last split."""


@torch.inference_mode()
def check_path_independence(model: CausalLM | NativeModel) -> None:
    """Raise BackendError, naming the layer, if a split changes a bit of a hidden row."""
    config = model.config
    tokens = min(TOKENS, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (tokens,), generator=generator)
    whole = _layers(model, ids, (), company=False)
    for number, splits in enumerate(SPLITS):
        inside = tuple(split for split in splits if split < tokens)
        pieces = _layers(model, ids, inside, company=number == len(SPLITS) - 1)
        for layer, (one, other) in enumerate(zip(whole, pieces, strict=True)):
            if not torch.equal(one, other):
                where = "the embedding" if layer == 0 else f"layer {layer - 1}"
                remedy = "Load the model with path-independent ops, or leave batch_invariant out."
                if isinstance(model, NativeModel):
                    where, remedy = "the native decoder", "This is a mistake in qnext: report it."
                raise BackendError(
                    f"batch_invariant: {where} gives other bits when a prompt is split at "
                    f"{inside}: the rows of a batch are not summed independently. {remedy}"
                )


def _layers(
    model: CausalLM | NativeModel, ids: Tensor, splits: tuple[int, ...], *, company: bool
) -> list[Tensor]:
    """Output of every layer for one sequence that is run in pieces."""
    lengths = COMPANY if company else ()
    if isinstance(model, NativeModel):
        return [_native_logits(model, ids.tolist(), splits, lengths)]
    pages = -(-ids.shape[0] // 64)
    cache = HybridCache(
        model.config,
        num_slots=1 + len(lengths),
        num_pages=pages * (1 + len(lengths)),
        dtype=model.dtype,
        device=model.device,
        ops=model.ops,
    )
    slots = [cache.open() for _ in range(1 + len(lengths))]
    table = torch.arange(pages * len(slots), device=model.device).view(len(slots), pages)
    found: list[list[Tensor]] = []
    for start, end in pairwise([0, *splits, ids.shape[0]]):
        pieces = [ids[start:end], *(ids[:length] for length in lengths if start == 0)]
        some = slots[: len(pieces)]
        batch = TokenBatch.pack(
            pieces, first_positions=[cache.length(slot) for slot in some], device=model.device
        )
        taps = Taps(want_hidden_states=True)
        model.run(batch, cache.view(some, table[: len(some)], batch.segments), taps=taps)
        cache.keep()
        found.append([states[: end - start] for states in taps.hidden_states])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _native_logits(
    model: NativeModel, ids: list[int], splits: tuple[int, ...], lengths: tuple[int, ...]
) -> Tensor:
    """Logits [T, V] of a sequence run in pieces: the native decoder shows nothing before them."""
    pages = -(-len(ids) // PAGE_SIZE)
    runner = NativeRunner(
        model,
        num_slots=1 + len(lengths),
        num_pages=pages * (1 + len(lengths)),
        track_mtp=False,
    )
    slots = [runner.open() for _ in range(1 + len(lengths))]
    table = [list(range(b * pages, (b + 1) * pages)) for b in range(len(slots))]
    found = []
    for start, end in pairwise([0, *splits, len(ids)]):
        works = [
            Work(slot=slots[0], pages=table[0], start=start, ids=ids[start:end],
                 rows=range(end - start))
        ]  # fmt: skip
        if start == 0:
            works += [
                Work(slot=slots[b], pages=table[b], start=0, ids=ids[:length])
                for b, length in enumerate(lengths, start=1)
            ]
        found.append(runner.forward(works))
        runner.keep([len(work.ids) for work in works])
    return torch.cat(found)
