"""How an answer grows: sampled and forced tokens, when they are told of, why it ends.

Forced tokens are known before they are run. They join the output at once and are run like the rest
of a prompt, in one step if they fit. Without log-probabilities they are told of at once, too; with
them, when the row before each has been run.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence

from torch import Tensor

from qnext.engine.request import EndedBy, Event, FinishReason, Request, TokenLogprobs, Usage
from qnext.engine.sequence import Sequence as Running

LogprobsOf = Callable[[Tensor, Sequence[int], Sequence[int]], list[TokenLogprobs]]
"""Of logits [R, V], one token of each row and so many of the best."""


def stop_ids(request: Request) -> tuple[int, ...]:
    """Tokens that end a request."""
    eos = () if request.params.ignore_eos else request.eos_ids
    return (*eos, *request.params.stop_token_ids)


def step_on(sequence: Running, token: int, *, after: int) -> FinishReason | None:
    """Note a sampled token; why the answer ends with it, being ``after`` tokens long."""
    guide = sequence.guide
    if guide is not None:
        guide.commit(token)
    return _end(sequence, token, after)


def _end(sequence: Running, token: int, length: int) -> FinishReason | None:
    guide = sequence.guide
    if token in stop_ids(sequence.request) or (guide is not None and guide.is_done):
        return "stop"
    if guide is not None and guide.failed is not None:
        return "error"
    return "length" if length == sequence.max_tokens else None


def force(sequence: Running) -> None:
    """Add what follows the output without a choice."""
    assert sequence.guide is not None
    found = sequence.guide.forced(
        room=sequence.max_tokens - len(sequence.output_ids), stops=stop_ids(sequence.request)
    )
    if found:
        first = len(sequence.output_ids)
        sequence.output_ids.extend(found)
        sequence.counts.update(found)
        sequence.forced.extend(range(first, first + len(found)))
        sequence.ends = _end(sequence, found[-1], len(sequence.output_ids))


def known_rows(sequence: Running, count: int) -> range:
    """Of the next ``count`` rows of a sequence, those before forced tokens to be told of.

    Empty unless log-probabilities are wanted.
    """
    if sequence.request.params.logprobs is None:
        return range(0)
    start = sequence.done
    first = sequence.settled - 1 - start
    return range(max(first, 0), max(first, 0, min(count, sequence.length - 1 - start)))


def note_forced(sequence: Running, logits: Tensor, logprobs_of: LogprobsOf) -> None:
    """Log-probabilities of forced tokens, from the rows [n, V] before them."""
    top = sequence.request.params.logprobs
    if top is None or not len(logits):
        return
    first = sequence.told + len(sequence.untold)
    tokens = sequence.output_ids[first : first + len(logits)]
    found = logprobs_of(logits, tokens, [top] * len(tokens))
    sequence.untold += found
    if first < sequence.lead:
        sequence.lead_logprobs += found


def is_untold(sequence: Running) -> bool:
    """Whether there is something to tell although nothing was sampled."""
    return bool(sequence.untold) or (
        sequence.ends is not None and sequence.request.params.logprobs is None
    )


def tell(sequence: Running, emitted: Sequence[int], reason: FinishReason | None) -> Event:
    """Add sampled tokens, and what is forced behind them, to an answer; the event about it."""
    if emitted:
        sequence.output_ids.extend(emitted)
        sequence.counts.update(emitted)
    if reason is not None:
        sequence.ends = reason
    elif emitted and sequence.guide is not None:
        force(sequence)
    logprobs = ()
    if sequence.request.params.logprobs is None:
        ready = len(sequence.output_ids)
    else:
        ready = sequence.told + len(sequence.untold)
        logprobs, sequence.untold = tuple(sequence.untold), []
    tokens = tuple(sequence.output_ids[sequence.told : ready])
    scored = () if sequence.told else tuple(sequence.prompt_logprobs)
    forced_at = _among(sequence.forced, sequence.told, ready)
    ties_at = _among(sequence.near_ties, sequence.told, ready)
    sequence.told = ready
    reason = sequence.ends if ready == len(sequence.output_ids) else None
    return Event(
        request_id=sequence.request.id,
        token_ids=tokens,
        finish_reason=reason,
        ended_by=None if reason is None else ended_by(sequence, reason),
        usage=usage_of(sequence),
        logprobs=logprobs,
        prompt_logprobs=scored,
        forced_at=forced_at,
        ties_at=ties_at,
        cut_at=_cut_at(sequence),
    )


def ended_by(sequence: Running, reason: FinishReason) -> EndedBy:
    """What exactly ended an answer."""
    request, params = sequence.request, sequence.request.params
    if reason == "length":
        is_own = params.max_tokens is not None and sequence.max_tokens == params.max_tokens
        return "max_tokens" if is_own or request.score_only else "context"
    if reason != "stop":
        return reason
    last = sequence.output_ids[-1]
    if last in request.eos_ids and not params.ignore_eos:
        return "end_token"
    return "stop_token" if last in params.stop_token_ids else "form"


def _among(places: Sequence[int], start: int, end: int) -> tuple[int, ...]:
    """Those of some places, in order, that lie in start ... end - 1."""
    if not places or places[-1] < start:
        return ()
    return tuple(places[bisect_left(places, start) : bisect_left(places, end)])


def _cut_at(sequence: Running) -> int | None:
    return None if sequence.guide is None else sequence.guide.cut_at


def usage_of(sequence: Running) -> Usage:
    """What a request has cost so far, in tokens that events have told of."""
    cut_at = _cut_at(sequence)
    return Usage(
        prompt_tokens=len(sequence.request.prompt_ids),
        completion_tokens=sequence.told,
        cached_tokens=sequence.report.cached if sequence.report else 0,
        cache=sequence.report,
        reasoning_tokens=sequence.guide.state.thought if sequence.guide else 0,
        drafted_tokens=sequence.drafted,
        accepted_tokens=sequence.accepted,
        forced_tokens=bisect_left(sequence.forced, sequence.told),
        reasoning_was_cut=cut_at is not None and cut_at < sequence.told,
        near_ties=bisect_left(sequence.near_ties, sequence.told),
    )
