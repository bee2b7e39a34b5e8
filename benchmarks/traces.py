"""Traces of real traffic: when requests came, how long they were, what they shared.

Two published formats are read, plain or compressed with xz:

* Azure LLM inference traces, 2023 (CC BY 4.0; Patel et al., "Splitwise", ISCA 2024): CSV with the
  columns ``TIMESTAMP,ContextTokens,GeneratedTokens``.
* Mooncake traces (Apache-2.0; Qin et al., "Mooncake", FAST 2025): JSON lines with ``timestamp`` in
  milliseconds, ``input_length``, ``output_length`` and ``hash_ids``, one id for each block of 512
  tokens of the prompt. A hash covers everything up to its block, so equal ids mean equal prefixes.

Traces hold no text. ``write_prompts`` makes token ids up: the same ones for the same block, so that
prompts share exactly the prefixes they shared in reality, and others nowhere.
"""

import csv
import json
import lzma
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from qnext.errors import DataError

BLOCK_TOKENS = 512
"""Tokens of a prompt that one hash id of a Mooncake trace stands for."""
KNOWN = {
    "azure-conv": "azure_2023_conv*.csv*",
    "azure-code": "azure_2023_code*.csv*",
    "mooncake": "mooncake_conversation*.jsonl*",
}
"""Short names of traces -> files they are found as."""

_AZURE_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedRequest:
    """One request as the trace has it."""

    arrival_s: float
    """Seconds after the first request."""
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Ids of the blocks of ``BLOCK_TOKENS`` tokens of its prompt; empty when nothing is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A request that can be sent: token ids, and when."""

    index: int
    arrival_s: float
    prompt_ids: tuple[int, ...]
    output_tokens: int
    """Exactly so many tokens are asked for."""
    seed: int
    reusable_tokens: int
    """Length of the longest prefix an earlier prompt had too, at most all tokens but the last."""


# -- reading ---------------------------------------------------------------------------------------


def find_trace(name: str, folder: Path) -> Path:
    """The file of a trace: one of ``KNOWN`` in ``folder``, or a path. Raises DataError."""
    if name in KNOWN:
        files = sorted(folder.glob(KNOWN[name]))
        if files:
            return files[0]
        raise DataError(
            f"--trace {name}: expected a file {KNOWN[name]} in {folder}, found none. Name the "
            "folder of the traces with --data, or give the path of a trace file."
        )
    path = Path(name)
    if not path.is_file():
        raise DataError(
            f"--trace {name}: expected one of {', '.join(KNOWN)} or a trace file (.csv or .jsonl, "
            "with or without .xz); there is no such file."
        )
    return path


def read_trace(path: Path, count: int) -> list[TracedRequest]:
    """The first ``count`` requests of a trace, in order of arrival.

    Raises DataError when the file is not one of the two formats, contradicts itself, or holds
    fewer requests.
    """
    kind = path.name.removesuffix(".xz").rpartition(".")[2]
    if kind not in ("csv", "jsonl"):
        raise DataError(
            f"{path}: expected a trace that ends in .csv or .jsonl (or .csv.xz, .jsonl.xz)."
        )
    opener = lzma.open if path.suffix == ".xz" else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as lines:
            rows = (_azure if kind == "csv" else _mooncake)(path, lines)
            found = [row for row, _ in zip(rows, range(count), strict=False)]
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}: the file is damaged or not a text file ({error}).") from error
    if len(found) < count:
        raise DataError(
            f"{path}: --requests {count} are more than the {len(found)} the trace holds."
        )
    return found


def _azure(path: Path, lines: Iterator[str]) -> Iterator[TracedRequest]:
    table = csv.DictReader(lines)
    if table.fieldnames != _AZURE_COLUMNS:
        raise DataError(
            f"{path}: expected the columns {','.join(_AZURE_COLUMNS)}, found "
            f"{','.join(table.fieldnames or ['nothing'])}."
        )
    clock = _Clock(path)
    for row in table:
        where = f"{path}, line {table.line_num}"
        try:
            # The seventh decimal is more than datetime holds; spared rather than misread.
            stamp, _, fraction = row["TIMESTAMP"].partition(".")
            seconds = datetime.fromisoformat(stamp + "+00:00").timestamp()
            seconds += float(f"0.{fraction or 0}")
            prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: expected a time and two numbers ({error}).") from error
        yield _checked(where, clock.since_first(seconds, where), prompt, output)


def _mooncake(path: Path, lines: Iterator[str]) -> Iterator[TracedRequest]:
    clock = _Clock(path)
    places: dict[int, tuple[int, int | None]] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            seconds = float(row["timestamp"]) / 1000
            prompt, output = int(row["input_length"]), int(row["output_length"])
            blocks = tuple(int(block) for block in row["hash_ids"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: expected a JSON object with timestamp, input_length, output_length and "
                f"hash_ids ({error!r})."
            ) from error
        one = _checked(where, clock.since_first(seconds, where), prompt, output, blocks)
        if len(one.blocks) != -(-one.prompt_tokens // BLOCK_TOKENS):
            raise DataError(
                f"{where}: {one.prompt_tokens} tokens are "
                f"{-(-one.prompt_tokens // BLOCK_TOKENS)} blocks of {BLOCK_TOKENS}, found "
                f"{len(one.blocks)} hash_ids."
            )
        before = None
        for place, block in enumerate(one.blocks):
            if places.setdefault(block, (place, before)) != (place, before):
                raise DataError(
                    f"{where}: hash id {block} follows another block than before; an id must stand "
                    "for a whole prefix."
                )
            before = block
        yield one


@dataclass(slots=True)
class _Clock:
    """Turns times of day into seconds since the first request, and sees that they never fall."""

    path: Path
    first: float | None = None
    last: float = 0.0

    def since_first(self, seconds: float, where: str) -> float:
        if self.first is None:
            self.first = self.last = seconds
        if seconds < self.last:
            raise DataError(f"{where}: earlier than the request before it; expected time order.")
        self.last = seconds
        return seconds - self.first


def _checked(
    where: str, arrival_s: float, prompt: int, output: int, blocks: tuple[int, ...] = ()
) -> TracedRequest:
    if prompt < 1 or output < 1:
        raise DataError(
            f"{where}: expected at least one token in prompt and answer, found {prompt} and "
            f"{output}."
        )
    return TracedRequest(
        arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, blocks=blocks
    )


# -- fitting ---------------------------------------------------------------------------------------


def fitting_scale(requests: Sequence[TracedRequest], context: int) -> float:
    """The least divisor of all lengths (at least 1, in hundredths) that fits a context of tokens.

    A request needs its prompt and its answer in the context together.
    """
    longest = max(one.prompt_tokens + one.output_tokens for one in requests)
    # A length is never less than 1, so a request whose one part is tiny may need a little more.
    scale = max(100, -(-100 * longest // context)) / 100
    while any(sum(scaled(one, scale)) > context for one in requests):
        scale = round(scale + 0.01, 2)
    return scale


def scaled(request: TracedRequest, scale: float) -> tuple[int, int]:
    """Tokens of prompt and answer after division, each at least 1."""
    return (
        max(1, int(request.prompt_tokens / scale)),
        max(1, int(request.output_tokens / scale)),
    )


def describe(requests: Sequence[TracedRequest], scale: float) -> str:
    """What the lengths are, and what dividing them has made of them."""

    def spread(lengths: Sequence[int]) -> str:
        middle = int(statistics.median(lengths))
        return f"{min(lengths):,} to {max(lengths):,} (median {middle:,})"

    def both(lengths: Sequence[tuple[int, int]]) -> str:
        prompts, outputs = zip(*lengths, strict=True)
        return f"prompts of {spread(prompts)} tokens, answers of {spread(outputs)}"

    before = both([(one.prompt_tokens, one.output_tokens) for one in requests])
    if scale == 1.0:
        return f"{before}; lengths as in the trace."
    after = both([scaled(one, scale) for one in requests])
    return f"{before}; all lengths divided by {scale:g}: {after}."


# -- text ------------------------------------------------------------------------------------------


def write_prompts(
    requests: Sequence[TracedRequest], token_ids: Sequence[int], *, scale: float, seed: int
) -> list[Job]:
    """Token ids for every request, drawn from ``token_ids``: the same for the same ``seed``.

    With ``blocks``, position p of the traced prompt becomes position p / scale, and the tokens of a
    block depend on its id alone. Without, every prompt is its own.
    """
    vocabulary = np.asarray(token_ids)
    seen: dict[int, int] = {}
    """Block -> where the longest prompt so far has left it."""
    jobs = []
    for index, one in enumerate(requests):
        prompt, output = scaled(one, scale)
        ids: list[int] = []
        reusable = 0
        if one.blocks:
            for place, block in enumerate(one.blocks):
                start = int(place * BLOCK_TOKENS / scale)
                end = min(int((place + 1) * BLOCK_TOKENS / scale), prompt)
                ids += _tokens(vocabulary, max(end - start, 0), seed, 1, block)
                if reusable == start and block in seen:
                    reusable = min(end, seen[block])
                seen[block] = max(end, seen.get(block, 0))
        else:
            ids = _tokens(vocabulary, prompt, seed, 0, index)
        assert len(ids) == prompt, (len(ids), prompt)
        jobs.append(
            Job(
                index=index,
                arrival_s=one.arrival_s,
                prompt_ids=tuple(ids),
                output_tokens=output,
                seed=seed * 1_000_003 + index,
                reusable_tokens=min(reusable, prompt - 1),
            )
        )
    return jobs


def _tokens(vocabulary: np.ndarray, count: int, *key: int) -> list[int]:
    """The first ``count`` tokens of the endless row that belongs to a key."""
    choices = np.random.default_rng(key).integers(len(vocabulary), size=count)
    return vocabulary[choices].tolist()
