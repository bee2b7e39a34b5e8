"""Replay of real traffic against a model: in this process, or through its HTTP server.

    python -m benchmarks.serve --trace azure-conv --requests 200 --speed 4
    python -m benchmarks.serve --trace mooncake --target http --closed-loop 16 --plot queue.png
    python -m benchmarks.serve --url http://127.0.0.1:8000 --requests 50

Answers have exactly the traced length (end-of-sequence tokens are ignored). Exit status: 0 when
every request was answered or refused with a reason and the cache stayed inside its budget, 1 when
not, 2 when the command itself cannot be carried out. See ``benchmarks/traces.py`` for the traces.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from benchmarks.figures import load_in_words, result_rows, summary, table
from benchmarks.harness import ROOT, machine, write_result
from benchmarks.replay import (
    Load,
    Replay,
    facts,
    replay_in_process,
    since,
    totals,
    warm_up,
)
from benchmarks.replay_http import replay_over_http
from benchmarks.server_process import server_process
from benchmarks.traces import (
    KNOWN,
    Job,
    describe,
    find_trace,
    fitting_scale,
    read_trace,
    write_prompts,
)
from qnext import LLM
from qnext.errors import QnextError, RequestError
from qnext.llm import parse_bytes
from qnext.text.tokenizer import Tokenizer
from qnext.weights.folder import resolve_model

TRACES = ROOT.parent / "shared" / "data" / "serving_traces"
FAILED, IMPOSSIBLE = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Replay a trace and report; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return _run(args)
    except QnextError as error:
        print(error, file=sys.stderr)
        return IMPOSSIBLE


def _run(args: argparse.Namespace) -> int:
    if args.closed_loop is not None and args.speed != 1.0:
        raise RequestError("--closed-loop has no speed; leave --speed out.")
    folder = resolve_model(args.model).resolve()
    tokenizer = Tokenizer.from_folder(folder)
    words = _ordinary_ids(tokenizer)
    trace = find_trace(args.trace, args.data)
    requests = read_trace(trace, args.requests)
    load = Load(
        speed=args.speed,
        closed_loop=args.closed_loop,
        temperature=args.temperature,
        deadline_s=args.deadline,
    )
    show = not args.quiet

    def jobs_for(context: int) -> list[Job]:
        scale = fitting_scale(requests, context) if args.scale is None else args.scale
        args.scale = scale
        if show:
            print(f"{trace.name}, first {len(requests)} requests: {describe(requests, scale)}")
        return write_prompts(requests, words, scale=scale, seed=args.seed)

    options = {
        "model": str(folder),
        "dtype": args.dtype,
        "memory": args.memory,
        "max_num_seqs": args.max_num_seqs,
        "max_batch_tokens": args.max_batch_tokens,
        "max_model_len": args.max_model_len,
        "speculative_tokens": args.speculative,
        "prefix_cache": args.prefix_cache,
    }
    target: dict[str, Any] = {}
    counted: dict[str, Any] = {}
    if args.url is not None:
        jobs = jobs_for(_context_of(args.url))
        replay = replay_over_http(args.url, jobs, load, process=None, progress=show)
    elif args.target == "http":
        with server_process(
            {**options, "threads": args.threads, "warm_up_ids": words[-24:]}
        ) as server:
            target = server.facts
            jobs = jobs_for(target["max_model_len"])
            replay = replay_over_http(server.url, jobs, load, process=server.process, progress=show)
        counted = server.totals
    else:
        if args.threads is not None:
            import torch

            torch.set_num_threads(args.threads)
        llm = LLM(**options)
        warm_up(llm, words[-24:])
        target, before = facts(llm, parse_bytes(args.memory)), totals(llm)
        jobs = jobs_for(llm.max_model_len)
        replay = replay_in_process(llm, jobs, load, progress=show)
        counted = since(before, totals(llm))

    report = {
        "trace": trace.name,
        "scale": args.scale,
        "seed": args.seed,
        "target": args.url or args.target,
        "load": {
            "mode": "open loop" if load.closed_loop is None else "closed loop",
            "speed": load.speed,
            "concurrency": load.closed_loop,
            "temperature": load.temperature,
        },
        "engine": target,
        "machine": machine(),
        **summary(replay, target, counted, slo_ttft_s=args.slo_ttft, slo_tpot_s=args.slo_tpot),
    }
    if show:
        print(table(report))
    _write(args, report, replay)
    return verdict(report)


def _ordinary_ids(tokenizer: Tokenizer) -> list[int]:
    """Every id that stands for text: no control tokens, no holes, no padding of the vocabulary."""
    barred = {*tokenizer.added_tokens.values(), *tokenizer.undefined_ids(tokenizer.id_limit)}
    return [token for token in range(tokenizer.id_limit) if token not in barred]


def _context_of(url: str) -> int:
    """Tokens of context the server at an address says it has."""
    try:
        cards = httpx.get(f"{url.rstrip('/')}/v1/models", timeout=30).json()["data"]
        return int(cards[0]["max_model_len"])
    except httpx.HTTPError as error:
        raise RequestError(
            f"--url {url}: no server answers there ({error}). Start one with qnext serve, or "
            "leave --url out."
        ) from error
    except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
        raise RequestError(
            f"--url {url}: /v1/models does not say max_model_len, so lengths cannot be fitted to "
            "the context. Replay against a server that says it, such as qnext serve."
        ) from error


def verdict(report: Mapping[str, Any]) -> int:
    """0 when every request ended or was refused with a reason, inside the memory budget."""
    memory = report["memory"]
    inside = memory["cache_bytes"] is None or memory["cache_bytes"] <= memory["budget_bytes"]
    if not inside:
        print(
            f"the cache has {memory['cache_bytes']:,} bytes, the budget was "
            f"{memory['budget_bytes']:,}.",
            file=sys.stderr,
        )
    failures = report["requests"]["failures"]
    for reason, count in failures.items():
        print(f"{count} requests failed: {reason}", file=sys.stderr)
    return FAILED if failures or not inside else 0


def _write(args: argparse.Namespace, report: Mapping[str, Any], replay: Replay) -> None:
    """The files that were asked for."""
    if args.out is not None:
        whole = {
            **report,
            "looks": [asdict(look) for look in replay.looks],
            "outcomes": [asdict(one) for one in replay.outcomes],
        }
        args.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.out}")
    if args.plot is not None:
        from benchmarks.plots import draw

        title = f"{report['trace']} to {report['target']}, {load_in_words(report['load'])}"
        draw(replay, args.plot, title=title, slo_ttft_s=args.slo_ttft, slo_tpot_s=args.slo_tpot)
        print(f"wrote {args.plot}")
    if args.record is not None:
        title = f"Serving: replay of {report['trace']}"
        write_result(args.record, title, result_rows(report))


# -- arguments -------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve", description=__doc__.splitlines()[0]
    )
    # fmt: off
    add = parser.add_argument_group("traffic").add_argument
    add("--trace", default="azure-conv", metavar="NAME",
        help=f"{', '.join(KNOWN)}, or a file (default: %(default)s)")
    add("--data", type=Path, default=TRACES, metavar="FOLDER",
        help="where the traces are (default: %(default)s)")
    add("--requests", type=_count, default=100, metavar="N",
        help="the first N of the trace (default: %(default)s)")
    add("--speed", type=_positive, default=1.0, metavar="X",
        help="send X times as fast as the trace (default: 1)")
    add("--closed-loop", type=_count, metavar="C",
        help="keep C requests under way, whatever times the trace has")
    add("--scale", type=_positive, metavar="S",
        help="divide all lengths by S (default: the least that fits the context)")
    add("--temperature", type=float, default=0.7, metavar="X",
        help="0 for greedy; otherwise each request has a seed (default: %(default)s)")
    add("--seed", type=_natural, default=0, metavar="N",
        help="of token ids and sampling (default: 0)")
    add("--deadline", type=_positive, default=3600.0, metavar="S",
        help="seconds after which what has not ended has failed (default: %(default)g)")

    add = parser.add_argument_group("target").add_argument
    add("--target", choices=("llm", "http"), default="llm",
        help="LLM in this process, or a server started for the purpose (default: llm)")
    add("--url", metavar="URL",
        help="a running server instead; --model then only names its vocabulary")
    add("--model", default="qnext-mini", metavar="MODEL")
    add("--dtype", default="auto")
    add("--threads", type=_count, metavar="N")
    add("--memory", default="1GiB", metavar="AMOUNT")
    add("--max-num-seqs", type=_count, default=16, metavar="N")
    add("--max-batch-tokens", type=_count, default=2048, metavar="N")
    add("--max-model-len", type=_count, metavar="N")
    add("--speculative", type=_drafts, default=0, metavar="K",
        help="tokens to draft per step, or auto (default: 0)")
    add("--no-prefix-cache", dest="prefix_cache", action="store_false")

    add = parser.add_argument_group("report").add_argument
    add("--slo-ttft", type=_positive, default=2.0, metavar="S",
        help="a good request has its first token after at most S seconds (default: %(default)g)")
    add("--slo-tpot", type=_positive, default=0.2, metavar="S",
        help="and takes at most S seconds for every further one (default: %(default)g)")
    add("--out", type=Path, metavar="FILE", help="everything, as JSON")
    add("--plot", type=Path, metavar="FILE", help="a picture, as PNG")
    add("--record", metavar="NAME", help="write docs/results/NAME.json")
    add("--quiet", action="store_true", help="no table, no progress")
    # fmt: on
    return parser


def _drafts(text: str) -> int | str:
    """A number of drafts, or "auto"."""
    return "auto" if text == "auto" else _natural(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 on, found {text!r}")
    return int(text)


def _count(text: str) -> int:
    if _natural(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
