"""Goals of the native kernels beside what was measured: the rows of docs/benchmarks.md.

A row has ``what``, ``value``, ``goal`` and ``met``; misses stand in the table like the rest. Where
a least is named beside the goal, a value between them is "least".
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Report = Mapping[str, Any]
Rows = dict[str, Any]


def rows_of(reports: Mapping[str, Report]) -> Iterator[Rows]:
    """Every goal, in the order of docs/benchmarks.md; what was not measured says so."""
    for name in ("int4", "int8", "bf16"):
        goal, least = (0.90, None) if name == "bf16" else (0.93, 0.88)
        yield _share(reports, name, "decode at 0", goal, least, head=True)
    for context, goal, ratio in ((4096, 0.88, 1.7), (32768, 0.85, 2.0)):
        for name in ("int4", "int8"):
            yield _share(reports, name, f"decode at {context}", goal, 0.80, head=name == "int4")
            yield _ratio(reports, name, f"decode at {context}", ratio, None, head=name == "int4")
    yield _ratio(reports, "int4", "decode at 0", 1.5, None, head=True)
    yield _equal_bytes(reports, "int4", "decode at 0", 1.3)
    yield _ratio(reports, "int8", "decode at 0", 1.4, None, head=True)
    for tokens in (512, 4096):
        yield _ratio(reports, "int4", f"prefill {tokens}", 4.0, 3.3, head=True)
        yield _share(reports, "int4", f"prefill {tokens}", None, None)
    yield _ratio(reports, "int8", "prefill 512", None, None)
    for tokens in (512, 4096):
        yield _ratio(reports, "transformers_m", f"prefill {tokens}", 4.5, None, head=tokens == 512)
    yield _ratio(reports, "transformers_s", "prefill 512", 2.5, None, shape="S")
    yield _ratio(reports, "transformers_m", "decode at 0", None, None)
    for count, goal in ((8, 0.85), (16, 0.80)):
        yield _share(reports, "int4", f"batch {count}", goal, None, head=True)
        yield _ratio(reports, "int4", f"batch {count}", 1.9, None, head=count == 8)
    yield _share(reports, "int8", "batch 8", 0.85, None)
    for case in ("verify 3", "verify 3 at 4096"):
        yield _verify(reports, case)
    yield _number(
        reports, "int4", "dropping drafts, share of a verifying step", 0.02,
        lambda r: r["rollback_share"]["median"], "{:.1%}", head=True,
    )  # fmt: skip
    yield _number(
        reports, "int4", "time outside the native call, share of an engine's step", 0.01,
        lambda r: r["outside_kernels_share"], "{:.1%}", head=True,
    )  # fmt: skip
    for name in ("int4", "int8", "bf16"):
        yield _number(
            reports, name, "most memory held, over weights and caches", 1.1,
            lambda r: r["start"]["peak_share"], "{:.2f}", head=name == "int4",
        )  # fmt: skip
        yield _number(
            reports, name, "second start to first token, seconds", 2.0,
            lambda r: r["start"]["first_token_seconds"], "{:.2f}", head=name == "int4",
        )  # fmt: skip
    for level in ("avx2", "avx2vnni"):
        for case in ("decode at 0", "prefill 512"):
            yield _level(reports, level, case)
    levels = reports.get("int4_isa", {}).get("levels", {})
    for case in ("decode at 0", "prefill 512"):
        row = _ratio(levels, "avx2", case, 1.2, None)
        row["what"] = f"int4 {case}, avx2 only, times as fast as llama.cpp without AVX-512"
        yield row


# -- kinds of rows -------------------------------------------------------------------------------


def _case(reports: Mapping[str, Report], part: str, case: str) -> Report | None:
    for row in reports.get(part, {}).get("cases", ()):
        if row["case"] == case:
            return row
    return None


def _share_case(reports: Mapping[str, Report], part: str, case: str) -> Report | None:
    """Shares are those measured alone, where there are any."""
    return _case(reports, f"{part}_alone", case) or _case(reports, part, case)


def _row(what: str, conditions: str, *, head: bool) -> Rows:
    return {
        "what": what,
        "value": "not measured",
        "goal": "",
        "met": "",
        "conditions": conditions,
        "head": head,
    }


def _judged(row: Rows, value: float, goal: float | None, least: float | None, *, low: bool) -> Rows:
    """``low``: the less the better."""

    def reached(bound: float) -> bool:
        return value <= bound if low else value >= bound

    if goal is not None:
        row["met"] = "yes" if reached(goal) else "no"
        if row["met"] == "no" and least is not None and reached(least):
            row["met"] = "least"
    return row


def _share(
    reports: Mapping[str, Report],
    part: str,
    case: str,
    goal: float | None,
    least: float | None,
    *,
    head: bool = False,
) -> Rows:
    row = _row(f"{_name(part)} {case}, share of the limit", "", head=head)
    row["goal"] = _goal(goal, least, "{:.0%}", "at least")
    found = _share_case(reports, part, case)
    if found is None:
        return row
    share = found["limit_share"]
    speed = found["tokens_per_second"]
    row["value"] = f"{share['median']:.1%} ({share['low']:.1%} to {share['high']:.1%})"
    row["conditions"] = (
        f"{speed['median']:.4g} tokens/s ({speed['low']:.4g} to {speed['high']:.4g}); limited by "
        f"{found['limited_by']}; {found['bytes_per_token'] / 1e6:.1f} MB a token, "
        f"{found['gigabytes_per_second']:.4g} GB/s; {found['repetitions']} repetitions"
    )
    return _judged(row, share["median"], goal, least, low=False)


def _slowest(found: Report) -> Report:
    """The peer qnext is least ahead of: its best format and setting."""
    return min(found["against"], key=lambda other: other["ratio"]["median"])


def _ratio(
    reports: Mapping[str, Report],
    part: str,
    case: str,
    goal: float | None,
    least: float | None,
    *,
    shape: str = "M",
    head: bool = False,
) -> Rows:
    other = "transformers" if part.startswith("transformers") else "llama.cpp"
    where = "" if shape == "M" else f", shape {shape}"
    row = _row(f"{_name(part)} {case}, times as fast as {other}{where}", "", head=head)
    row["goal"] = _goal(goal, least, "{:.1f}", "at least")
    found = _case(reports, part, case)
    if found is None or not found["against"]:
        return row
    best = _slowest(found)
    ratio = best["ratio"]
    row["value"] = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
    row["conditions"] = "; ".join(
        f"{one['name']} {one['tokens_per_second']['median']:.4g} tokens/s, "
        f"{one['ratio']['median']:.2f} times"
        for one in found["against"]
    )
    return _judged(row, ratio["median"], goal, least, low=False)


def _equal_bytes(reports: Mapping[str, Report], part: str, case: str, goal: float) -> Rows:
    what = f"{_name(part)} {case}, times as fast as llama.cpp if both read as much"
    row = _row(what, "", head=False)
    row["goal"] = _goal(goal, None, "{:.1f}", "at least")
    found = _case(reports, part, case)
    if found is None or not found["against"]:
        return row
    values = {one["name"]: one["ratio_at_equal_bytes"] for one in found["against"]}
    row["value"] = f"{min(values.values()):.2f}"
    row["conditions"] = "; ".join(f"{name} {value:.2f}" for name, value in values.items())
    return _judged(row, min(values.values()), goal, None, low=False)


def _verify(reports: Mapping[str, Report], case: str) -> Rows:
    row = _row(f"int4 {case}, times the time its bytes need", "", head=case == "verify 3")
    row["goal"] = _goal(1.12, None, "{:.2f}", "at most")
    found = _share_case(reports, "int4", case)
    if found is None:
        return row
    times = 1 / found["bandwidth_share"]
    row["value"] = f"{times:.3f}"
    row["conditions"] = (
        f"{found['milliseconds_per_step']['median']:.3g} ms, "
        f"{found['bytes_per_step'] / 1e6:.1f} MB a step, "
        f"{found['experts_per_step']:g} experts in all layers; {found['repetitions']} repetitions"
    )
    return _judged(row, times, 1.12, None, low=True)


def _number(
    reports: Mapping[str, Report],
    part: str,
    what: str,
    goal: float,
    value: Callable[[Report], float],
    form: str,
    *,
    head: bool = False,
) -> Rows:
    row = _row(f"{_name(part)}: {what}", "", head=head)
    row["goal"] = _goal(goal, None, form, "at most")
    if part in reports:
        found = value(reports[part])
        row["value"] = form.format(found)
        _judged(row, found, goal, None, low=True)
    return row


def _level(reports: Mapping[str, Report], level: str, case: str) -> Rows:
    row = _row(f"int4 {case}, {level} only, share of the limit", "", head=False)
    found = _case(reports.get("int4_isa", {}).get("levels", {}), level, case)
    if found is not None:
        share, speed = found["limit_share"], found["tokens_per_second"]
        row["value"] = f"{share['median']:.1%}"
        row["conditions"] = f"{speed['median']:.4g} tokens/s"
    return row


def _name(part: str) -> str:
    return "int4" if part.startswith("transformers") else part


def _goal(goal: float | None, least: float | None, form: str, word: str) -> str:
    if goal is None:
        return ""
    text = f"{word} {form.format(goal)}"
    return text if least is None else f"{text} (least {form.format(least)})"
