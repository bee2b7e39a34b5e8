"""The commands of ``qnext bench``: which contestants run which cases, and what is said of it."""

import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from qnext import native
from qnext.bench.cases import (
    Case,
    Repetition,
    Spread,
    case_cost,
    ratios,
    rounded,
    shares,
)
from qnext.bench.kernels import measure_kernels
from qnext.bench.ours import Subject, time_outside
from qnext.bench.race import Machine, Session, machine_report, race
from qnext.errors import RequestError

STEPS = 24
"""Decode steps of one repetition."""
OURS = "qnext"


class Peer(Protocol):
    """Another program that runs the same shape."""

    name: str

    def open(self, case: Case) -> Mapping[str, Session]:
        """Sessions for a case, one for every setting that is tried."""
        ...

    def bytes_per_step(self, case: Case, experts: float | None) -> float | None:
        """Bytes a step reads of this program's own weights and caches, None if not known."""
        ...

    def about(self) -> dict[str, Any]:
        """Version and settings, JSON-ready."""
        ...

    def close(self) -> None:
        """Let go of the memory."""
        ...


def cases_of(arguments: Namespace) -> list[Case]:
    """The cases a command line asks for."""
    contexts: Sequence[int] = arguments.context
    kind = arguments.what
    if kind == "kernels":
        if arguments.against:
            raise RequestError(
                "kernels cannot be compared with another program: leave out --against, or measure "
                "decode, prefill or batch."
            )
        return []
    if kind == "decode":
        return [Case(kind="decode", context=n, steps=STEPS) for n in contexts]
    if kind == "verify":
        rows = arguments.tokens[0] if arguments.tokens else 3
        if not 2 <= rows <= 5:
            raise RequestError(
                f"verify --tokens: expected 2 to 5 (one token and 1 to 4 drafts), found {rows}."
            )
        return [Case(kind="verify", rows=rows, context=n, steps=STEPS) for n in contexts]
    if kind == "batch":
        return [
            Case(kind="batch", sequences=count, context=n, steps=STEPS)
            for count in arguments.sequences
            for n in contexts
        ]
    return [
        Case(kind="prefill", rows=rows, context=n, steps=1)
        for rows in arguments.tokens or [512]
        for n in contexts
    ]


def measure(
    subject: Subject,
    cases: Sequence[Case],
    *,
    repetitions: int,
    machine: Machine,
    peers: Sequence[Peer] = (),
) -> list[dict[str, Any]]:
    """Every case in turn; in each, qnext and the peers in turn within every repetition."""
    found = []
    for case in cases:
        # What was read for an earlier case may have been put out of memory since.
        subject.touch()
        sessions: dict[str, Session] = {OURS: subject.open([case])[0]}
        settings: dict[str, Peer] = {}
        for peer in peers:
            for name, session in peer.open(case).items():
                sessions[name], settings[name] = session, peer
        times = race(sessions, machine, steps=case.steps, repetitions=repetitions)
        row = row_of(subject, case, times[OURS])
        row["against"] = [
            against(name, settings[name], case, times[OURS], times[name], row)
            for name in sessions
            if name != OURS
        ]
        found.append(row)
    return found


def row_of(subject: Subject, case: Case, times: Sequence[Repetition]) -> dict[str, Any]:
    """What qnext's repetitions of a case come to."""
    costs = [
        case_cost(subject.config, subject.bits, subject.dtype_name, case, one.experts)
        for one in times
    ]
    return shares(case, times, costs)


def against(
    name: str,
    peer: Peer,
    case: Case,
    ours: Sequence[Repetition],
    theirs: Sequence[Repetition],
    row: Mapping[str, Any],
) -> dict[str, Any]:
    """How a peer did and how many times as fast qnext was; also if both had to read as much."""
    ratio = ratios(ours, theirs)
    out: dict[str, Any] = {
        "name": name,
        "tokens_per_second": Spread.of([case.tokens / one.seconds for one in theirs]).as_dict(),
        "ratio": ratio.as_dict(),
    }
    size = peer.bytes_per_step(case, row["experts_per_step"])
    if size is not None:
        share = [size * case.steps / one.seconds / one.limits.bandwidth for one in theirs]
        out["bytes_per_token"] = round(size / (case.sequences * case.rows))
        out["bandwidth_share"] = rounded(Spread.of(share).median)
        out["ratio_at_equal_bytes"] = rounded(ratio.median * row["bytes_per_step"] / size)
    return out


def rollback(subject: Subject, case: Case, *, repetitions: int) -> dict[str, float]:
    """Share of a verifying step that keeping a part of its tokens costs: median, low, high.

    The same step once with drafts that may be dropped and once with tokens that all stay. The two
    take turns step by step: the difference is smaller than what a machine's speed drifts.
    """
    pair = subject.open([case, replace(case, kind="batch")], is_choosing=False)
    found = []
    for _ in range(1 + repetitions):
        for session in pair:
            session.reset()
        spent = [0.0, 0.0]
        for step in range(case.steps):
            for which in (0, 1) if step % 2 else (1, 0):
                start = time.perf_counter()
                pair[which].step()
                spent[which] += time.perf_counter() - start
        found.append(1.0 - spent[1] / spent[0])
    # The first was the warm-up.
    return Spread.of(found[1:]).as_dict()


def run(arguments: Namespace) -> dict[str, Any]:
    """One ``qnext bench`` command, JSON-ready. Raises QnextError for what cannot be measured."""
    native.load()
    cases = cases_of(arguments)
    subject = Subject(arguments.model, threads=arguments.threads or usable_cores())
    for case in cases:
        subject.check(case)
    machine = Machine()
    report: dict[str, Any] = {
        "what": arguments.what,
        "model": subject.folder.name,
        "format": subject.format,
        "isa": native.load().isa(),
        "threads": subject.threads,
    }
    peers = _peers(arguments, subject)
    try:
        if arguments.what == "kernels":
            rows = measure_kernels(subject, repetitions=arguments.repetitions, machine=machine)
        else:
            rows = measure(
                subject, cases, repetitions=arguments.repetitions, machine=machine, peers=peers
            )
        report["against"] = [peer.about() for peer in peers]
    finally:
        for peer in peers:
            peer.close()
    if arguments.what == "decode":
        report["outside_kernels_share"] = rounded(time_outside(subject, steps=STEPS))
    if arguments.what == "verify":
        report["rollback_share"] = rollback(subject, cases[0], repetitions=arguments.repetitions)
    report["machine"] = {"processor": processor(), **machine_report(machine.seen)}
    first = {k: v for k, v in rows[0].items() if k not in ("kind", "against")}
    return {**report, **first, "cases": rows}


def _peers(arguments: Namespace, subject: Subject) -> list[Peer]:
    if arguments.against == "llama.cpp":
        from qnext.bench.llama_cpp import open_peers

        return list(open_peers(subject, formats=arguments.gguf_format, folder=arguments.gguf))
    if arguments.against == "transformers":
        from qnext.bench.transformers_peer import TransformersPeer

        return [TransformersPeer(subject)]
    return []


def usable_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    import platform

    return platform.processor() or platform.machine()


# -- for a reader --------------------------------------------------------------------------------


def render(report: Mapping[str, Any]) -> str:
    """A report as text."""
    threads = f"{report['threads']} thread{'s' if report['threads'] > 1 else ''}"
    lines = [f"{report['model']}, {report['format']}, {report['isa']}, {threads}"]
    machine = report["machine"]
    read, int8, bf16 = (
        machine[f"{name}_per_second"]
        for name in ("read_gigabytes", "int8_gigaoperations", "bf16_gigaoperations")
    )
    lines.append(
        f"{machine['processor']}: reads {_spread(read)} GB/s, int8 {_spread(int8)} GOP/s, "
        f"bf16 {_spread(bf16)} GOP/s"
    )
    for row in report["cases"]:
        lines += ["", *_render_row(row)]
    if "outside_kernels_share" in report:
        lines.append(
            f"outside the kernels: {100 * report['outside_kernels_share']:.2f} % of a step"
        )
    if "rollback_share" in report:
        share = {k: 100 * v for k, v in report["rollback_share"].items()}
        lines.append(f"dropping drafts costs {_spread(share)} % of a step")
    for peer in report["against"]:
        lines.append(", ".join(f"{key}: {value}" for key, value in peer.items()))
    return "\n".join(lines)


def _render_row(row: Mapping[str, Any]) -> list[str]:
    if row["kind"] == "kernel":
        return [
            f"{row['case']}: {_spread(row['microseconds'])} us, "
            f"{row['gigabytes_per_second']:g} GB/s, {row['gigaoperations_per_second']:g} GOP/s, "
            f"{100 * row['limit_share']['median']:.0f} % of its limit ({row['limited_by']})"
        ]
    share = {k: 100 * v for k, v in row["limit_share"].items()}
    lines = [
        f"{row['case']}: {_spread(row['tokens_per_second'])} tokens/s",
        f"  {row['bytes_per_token'] / 1e6:.1f} MB a token, {row['gigabytes_per_second']:g} GB/s, "
        f"{row['gigaoperations_per_second']:g} GOP/s, "
        f"{100 * row['bandwidth_share']:.1f} % of the bandwidth",
        f"  {_spread(share)} % of the limit, which is {row['limited_by']}",
    ]
    for other in row["against"]:
        line = (
            f"  {_spread(other['ratio'])} times as fast as {other['name']}, "
            f"{_spread(other['tokens_per_second'])} tokens/s"
        )
        if "ratio_at_equal_bytes" in other:
            line += (
                f" ({other['bytes_per_token'] / 1e6:.1f} MB a token, "
                f"{100 * other['bandwidth_share']:.1f} % of the bandwidth; "
                f"{other['ratio_at_equal_bytes']:.2f} times at equal bytes)"
            )
        lines.append(line)
    return lines


def _spread(value: Mapping[str, float]) -> str:
    return f"{value['median']:.4g} ({value['low']:.4g} to {value['high']:.4g})"
