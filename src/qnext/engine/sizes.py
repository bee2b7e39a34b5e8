"""How a memory budget is spent: states of sequences, snapshots, pages."""

import re
from dataclasses import dataclass

from qnext import cost
from qnext.config import ModelConfig
from qnext.engine.speculative import MAX_DRAFTS
from qnext.errors import RequestError
from qnext.model.cache import PAGE_SIZE, Rollback

MAX_BACKLOG = 256
"""Rows the MTP layer may be behind while nothing is drafted; then it reads them in one go."""


def check_counts(**counts: int | None) -> None:
    """RequestError for a count that is not a whole number of at least 1; None is left out."""
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise RequestError(
                f"{name}: expected a whole number of at least 1, found {value!r}. Leave it out "
                "for the default."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSizes:
    """How a memory budget is spent."""

    num_slots: int
    """Sequences that can run at once."""
    num_snapshots: int
    num_pages: int
    state_bytes: int
    """Memory of a snapshot beside its pages."""
    page_bytes: int

    @classmethod
    def within(
        cls,
        config: ModelConfig,
        *,
        memory_bytes: int,
        max_num_seqs: int,
        max_model_len: int,
        dtype: str,
        prefix_cache: bool,
        max_drafts: int = 0,
        rollback: Rollback = "snapshots",
    ) -> "CacheSizes":
        """State slots of the running sequences first, then snapshots and pages.

        A running sequence needs, beside its state, room for what is undecided while ``max_drafts``
        drafts are verified, and for the hidden rows the MTP head has not read. A quarter of what
        is left goes to snapshots, at most eight per running sequence. Raises RequestError when not
        even one page fits.
        """
        state = cost.slot_bytes(config, dtype)
        running = state
        if max_drafts:
            running += cost.pending_bytes(config, dtype, tokens=max_drafts + 1, rollback=rollback)
            running += cost.backlog_bytes(config, dtype, tokens=MAX_BACKLOG + max_drafts)
        token = cost.kv_bytes_per_token(config, dtype)
        if config.num_mtp_layers:
            token += cost.mtp_kv_bytes_per_token(config, dtype)
        page = max(token * PAGE_SIZE, 1)
        left = memory_bytes - max_num_seqs * running
        if left < page:
            raise RequestError(
                f"memory: {memory_bytes:,} bytes do not hold the state of {max_num_seqs} sequences "
                f"({max_num_seqs * running:,} bytes) and one page of keys and values "
                f"({page:,} bytes). Raise memory or lower max_num_seqs."
            )
        snapshots = min(left // 4 // state, 8 * max_num_seqs) if prefix_cache else 0
        most = (max_num_seqs + snapshots) * (-(-(max_model_len + MAX_DRAFTS + 1) // PAGE_SIZE) + 1)
        return cls(
            num_slots=max_num_seqs,
            num_snapshots=snapshots,
            num_pages=max(1, min((left - snapshots * state) // page, most)),
            state_bytes=state,
            page_bytes=page,
        )


_AMOUNT = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)")
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}iB"] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power


def parse_bytes(amount: str | int, *, name: str = "memory") -> int:
    """Bytes of "2GiB", "500MB" or a plain number. Raises RequestError for anything else."""
    found = _AMOUNT.fullmatch(str(amount).strip())
    if found is None or found[2] not in _UNITS:
        raise RequestError(f"{name}: expected an amount such as 2GiB or 500MB, found {amount!r}.")
    return int(float(found[1]) * _UNITS[found[2]])


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What an engine has to know beside its runner and its pages."""

    num_slots: int
    """Sequences that can run at once."""
    num_snapshots: int
    """Slots of the runner that are set aside for snapshots."""
    page_size: int
    """Tokens of a page."""
    max_batch_tokens: int
    """Rows of a step."""
    max_model_len: int
    """Tokens of prompt and answer together."""
    vocab_size: int
    defined_ids: int
    """Ids below this can be chosen."""
    max_chunk_tokens: int | None = None
    """Rows of one prompt in a step; None for all there are."""
    speculative_tokens: int | str = 0
    """Drafts per sequence and step, or "auto"."""
    snapshot_interval: int = 0
    """Tokens of a prompt between snapshots; 0 for none."""
    tie_bound: float | None = None
    """How far rounding reaches, relative to the largest logit; None counts no near-ties."""
    state_bytes: int = 1
    """Memory of a snapshot beside its pages."""
    page_bytes: int = 1
    """Memory of a page."""
    context_share: float = 0.0
    """Arithmetic of a token per token of context, over its other arithmetic."""
