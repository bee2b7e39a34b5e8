"""From a replay to figures: percentiles, goodput, queue; a table to read and rows to record."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.replay import Outcome, Replay


def summary(
    replay: Replay,
    target: Mapping[str, Any],
    counted: Mapping[str, Any],
    *,
    slo_ttft_s: float,
    slo_tpot_s: float,
) -> dict[str, Any]:
    """All figures of a replay, in seconds, tokens and bytes; None where the target does not say."""
    done = [one for one in replay.outcomes if one.completed]
    refused = [one for one in replay.outcomes if one.refusal is not None]
    failed = [one for one in replay.outcomes if not one.completed and one.refusal is None]
    output = sum(one.completion_tokens for one in done)
    prompt = sum(one.prompt_tokens for one in done)
    good = [one for one in done if _is_good(one, slo_ttft_s, slo_tpot_s)]
    gaps = [b - a for one in done for a, b in zip(one.pieces_s, one.pieces_s[1:], strict=False)]
    span = max(replay.seconds, 1e-9)
    return {
        "seconds": replay.seconds,
        "requests": {
            "sent": len(replay.outcomes),
            "completed": len(done),
            "refused": len(refused),
            "failed": len(failed),
            "cut_by_the_context": sum(one.completion_tokens < one.asked_tokens for one in done),
            "refusals": _reasons(one.refusal for one in refused),
            "failures": _reasons(one.failure or "never ended" for one in failed),
        },
        "ttft_s": _spread([one.ttft_s for one in done]),
        "tpot_s": _spread([one.tpot_s for one in done]),
        "gap_s": _spread(gaps),
        "latency_s": _spread([one.latency_s for one in done]),
        "throughput": {
            "output_tokens_per_s": output / span,
            "total_tokens_per_s": (output + prompt) / span,
            "requests_per_s": len(done) / span,
            "output_tokens": output,
            "prompt_tokens": prompt,
        },
        "goodput": {
            "slo_ttft_s": slo_ttft_s,
            "slo_tpot_s": slo_tpot_s,
            "share": len(good) / max(len(replay.outcomes), 1),
            "requests_per_s": len(good) / span,
        },
        "queue": _queue(replay),
        "prefix_cache": {
            "cached_tokens": sum(one.cached_tokens for one in done),
            "reusable_tokens": sum(one.reusable_tokens for one in done),
            "share_of_prompts": sum(one.cached_tokens for one in done) / max(prompt, 1),
        },
        "speculation": _speculation(done, counted),
        "memory": {
            "cache_bytes": target.get("cache_bytes"),
            "budget_bytes": target.get("budget_bytes"),
            "most_pages_held": max(
                (look.pages_held for look in replay.looks if look.pages_held is not None),
                default=None,
            ),
            "pages": target.get("pages"),
            "rss_before_bytes": target.get("rss_bytes"),
            "peak_rss_bytes": counted.get("peak_rss_bytes"),
        },
        "parkings": counted.get("parkings"),
        "steps": counted.get("steps"),
    }


def _is_good(one: Outcome, slo_ttft_s: float, slo_tpot_s: float) -> bool:
    in_time = one.ttft_s is not None and one.ttft_s <= slo_ttft_s
    return in_time and (one.tpot_s is None or one.tpot_s <= slo_tpot_s)


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    p50, p90, p99 = np.percentile(known, [50, 90, 99]).tolist()
    return {"mean": float(np.mean(known)), "p50": p50, "p90": p90, "p99": p99, "max": max(known)}


def _reasons(texts: Iterable[str | None]) -> dict[str, int]:
    """Reasons and how often, those that differ in numbers only taken together."""
    return dict(Counter(re.sub(r"\d[\d,.]*\b", "N", text or "") for text in texts).most_common())


def _queue(replay: Replay) -> dict[str, float] | None:
    """Averages over time, not over looks: a look holds until the next one."""
    if not replay.looks:
        return None
    times = [look.at_s for look in replay.looks]
    held = np.diff([*times, max(replay.seconds, times[-1])])
    weights = held if held.sum() > 0 else np.ones(len(times))
    running = [look.running for look in replay.looks]
    waiting = [look.waiting for look in replay.looks]
    return {
        "mean_running": float(np.average(running, weights=weights)),
        "most_running": max(running),
        "mean_waiting": float(np.average(waiting, weights=weights)),
        "most_waiting": max(waiting),
    }


def _speculation(done: Sequence[Outcome], counted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Drafts verified, drafts taken, and the chance of each position once those before it were."""
    tried, taken = counted.get("drafts_tried"), counted.get("drafts_taken")
    is_said = all(one.drafted_tokens is not None for one in done)
    if not is_said and tried is None:
        return None
    return {
        "drafted": sum(one.drafted_tokens or 0 for one in done) if is_said else None,
        "accepted": sum(one.accepted_tokens or 0 for one in done) if is_said else None,
        "acceptance_by_position": [
            b / a if a else None for a, b in zip(tried or (), taken or (), strict=True)
        ],
    }


# -- words -----------------------------------------------------------------------------------------


def load_in_words(load: Mapping[str, Any]) -> str:
    """How requests were sent."""
    if load["concurrency"] is not None:
        return f"closed loop, {load['concurrency']} at a time"
    return f"open loop, {load['speed']:g} times the speed of the trace"


def table(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    lines = [
        "",
        f"{report['trace']} to {report['target']}: {load_in_words(report['load'])}, "
        f"{report['seconds']:.1f} s",
        "",
        f"{'':26}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}",
    ]
    for name, label, unit in _LATENCIES:
        spread = report[name]
        factor = 1000 if unit == "ms" else 1
        cells = (
            "".join(f"{factor * spread[key]:>10.{3 if unit == 's' else 1}f}" for key in spread)
            if spread
            else f"{'-':>10}"
        )
        lines.append(f"{label + ', ' + unit:26}{cells}")
    lines.append("")
    lines += [f"{name:26}{value}" for name, value in _facts(report)]
    for kind in ("refusals", "failures"):
        lines += [
            f"  {count} {kind.removesuffix('s')}{'s' if count > 1 else ''}: {reason}"
            for reason, count in report["requests"][kind].items()
        ]
    return "\n".join(lines)


_LATENCIES = (
    ("ttft_s", "time to first token", "s"),
    ("tpot_s", "time per output token", "ms"),
    ("gap_s", "time between pieces", "ms"),
    ("latency_s", "whole answer", "s"),
)


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    requests, rate, good = report["requests"], report["throughput"], report["goodput"]
    found = [
        (
            "requests",
            f"{requests['completed']} completed, {requests['refused']} refused, "
            f"{requests['failed']} failed of {requests['sent']}"
            + (
                f"; {requests['cut_by_the_context']} answers ended early, the context was full"
                if requests["cut_by_the_context"]
                else ""
            ),
        ),
        (
            "throughput",
            f"{rate['output_tokens_per_s']:,.1f} output tokens/s, "
            f"{rate['total_tokens_per_s']:,.1f} with prompts, "
            f"{rate['requests_per_s']:.2f} requests/s",
        ),
        (
            "goodput",
            f"{good['share']:.1%} of requests, {good['requests_per_s']:.2f} requests/s "
            f"(first token in {good['slo_ttft_s']:g} s, others in {good['slo_tpot_s']:g} s each)",
        ),
    ]
    queue = report["queue"]
    if queue is not None:
        found.append(
            (
                "in the engine",
                f"{queue['mean_running']:.1f} running (most {queue['most_running']}), "
                f"{queue['mean_waiting']:.1f} waiting (most {queue['most_waiting']})",
            )
        )
    cache = report["prefix_cache"]
    reused = f"{cache['share_of_prompts']:.1%} of prompt tokens from the cache"
    if cache["reusable_tokens"]:
        share = cache["cached_tokens"] / cache["reusable_tokens"]
        reused += f", {share:.1%} of the {cache['reusable_tokens']:,} an earlier prompt had too"
    found.append(("prefix cache", reused))
    drafts = report["speculation"]
    if drafts is not None:
        parts = []
        if drafts["drafted"]:
            parts.append(f"{drafts['accepted']:,} of {drafts['drafted']:,} drafts accepted")
        rates = [rate for rate in drafts["acceptance_by_position"] if rate is not None]
        if rates:
            parts.append("acceptance by position " + ", ".join(f"{rate:.1%}" for rate in rates))
        found.append(("speculation", "; ".join(parts) or "no drafts"))
    found += _memory(report)
    return found


def _memory(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    memory, found = report["memory"], []
    if memory["cache_bytes"] is not None:
        text = f"{_mib(memory['cache_bytes'])} of a budget of {_mib(memory['budget_bytes'])}"
        if memory["most_pages_held"] is not None:
            text += f"; at most {memory['most_pages_held']:,} of {memory['pages']:,} pages held"
        found.append(("cache", text))
    if memory["peak_rss_bytes"] is not None:
        before = memory["rss_before_bytes"]
        text = f"peak {_mib(memory['peak_rss_bytes'])}"
        if before is not None:
            text += f", {_mib(before)} before the first request"
        found.append(("memory of the process", text))
    if report["parkings"]:
        found.append(("parked", f"{report['parkings']} times"))
    return found


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def result_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows for docs/results."""
    engine = report["engine"]
    where = {"llm": "in process", "http": "over HTTP"}.get(report["target"], "a running server")
    conditions = [
        f"{report['requests']['sent']} requests",
        load_in_words(report["load"]),
        f"lengths divided by {report['scale']:g}",
        where,
    ]
    if engine:
        conditions.append(
            f"{engine['model']}, {engine['dtype']}, {engine['max_num_seqs']} at a time, "
            f"speculative_tokens {engine['speculative_tokens']}"
        )
    said = "; ".join(conditions)
    rows = []
    for name, label, unit in _LATENCIES:
        spread = report[name]
        if spread is not None:
            factor = 1000 if unit == "ms" else 1
            values = " / ".join(f"{factor * spread[key]:.3g}" for key in ("p50", "p90", "p99"))
            rows.append((f"{label.capitalize()}, p50 / p90 / p99", f"{values} {unit}"))
    rows += [(name.capitalize(), value) for name, value in _facts(report)]
    return [{"what": what, "value": value, "conditions": said} for what, value in rows]
