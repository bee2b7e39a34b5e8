"""How a memory budget is spent: states of sequences, snapshots, pages."""

import re
from dataclasses import dataclass

from qnext import cost
from qnext.config import ModelConfig
from qnext.engine.speculative import MAX_DRAFTS
from qnext.errors import RequestError
from qnext.model.cache import PAGE_SIZE


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
    ) -> "CacheSizes":
        """State slots of the running sequences first, then snapshots and pages.

        A quarter of what is left goes to snapshots, at most eight per running sequence. Raises
        RequestError when not even one page fits.
        """
        state = sum(
            (
                cost.state_bytes_per_sequence(config),
                cost.conv_bytes_per_sequence(config, dtype),
                int(config.hidden_size * cost.number_bytes(dtype)),
            )
        )
        token = cost.kv_bytes_per_token(config, dtype)
        if config.num_mtp_layers:
            token += cost.mtp_kv_bytes_per_token(config, dtype)
        page = max(token * PAGE_SIZE, 1)
        left = memory_bytes - max_num_seqs * state
        if left < page:
            raise RequestError(
                f"memory: {memory_bytes:,} bytes do not hold the state of {max_num_seqs} sequences "
                f"({max_num_seqs * state:,} bytes) and one page of keys and values "
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
