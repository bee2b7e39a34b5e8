"""What drafting with the MTP head gains: throughput with and without, class by class.

    python -m benchmarks.speculation [--model qnext-mini] [--batches 1 4 16] [--backend torch]
        [--record]

Every round runs the same prompts with every setting, in an order drawn anew, and compares each with
drafting off in the same round. A run of a small model takes some milliseconds, and single ones
scatter by several percent, so rounds go on for ``--seconds`` per class and batch size. Reported are
the median of these ratios and its 95% interval from a bootstrap over rounds, and how often a draft
was accepted at each position. Greedy, no prefix cache; the time of a run is that of whole answers,
prompts included. Answers must be those of drafting off; where they are not (ties of the
arithmetic), it is counted.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.harness import machine, write_result
from benchmarks.speculation_prompts import CLASSES, Prompt
from qnext import LLM
from qnext.engine.engine import Engine
from qnext.engine.request import Request, SamplingParams
from qnext.engine.speculative import MAX_DRAFTS
from qnext.errors import QnextError, RequestError

SETTINGS: tuple[int | str, ...] = (0, *range(1, MAX_DRAFTS + 1), "auto")
RESAMPLES = 10_000
EVEN = 0.98
"""Speculation chosen by measurement may not be slower than this share of none."""
WORTH, LIKELY = 1.3, 0.6
"""At batch 1, drafting gains ``WORTH`` where first drafts are accepted at least so often."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """One run of one setting."""

    seconds: float
    token_ids: tuple[tuple[int, ...], ...]

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return sum(map(len, self.token_ids)) / self.seconds


@dataclass(kw_only=True, slots=True)
class Cell:
    """One setting on one class of prompts at one batch size, against drafting off."""

    prompts: str
    batch: int
    setting: int | str
    ratios: list[float] = field(default_factory=list)
    """Throughput over that of drafting off, by round."""
    rates: list[float] = field(default_factory=list)
    """Tokens per second, by round."""
    differing: int = 0
    """Answers that are not those of drafting off."""
    tried: list[int] = field(default_factory=list)
    """Drafts verified by position."""
    taken: list[int] = field(default_factory=list)
    """Of those, accepted."""

    @property
    def acceptance(self) -> list[float | None]:
        """Chance of a draft once those before it were accepted; None where none was tried."""
        return [b / a if a else None for a, b in zip(self.tried, self.taken, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        ratio, low, high = interval(self.ratios)
        return {
            "prompts": self.prompts,
            "batch": self.batch,
            "setting": self.setting,
            "ratio": ratio,
            "low": low,
            "high": high,
            "tokens_per_s": float(np.median(self.rates)),
            "acceptance_by_position": self.acceptance,
            "drafts_tried": self.tried,
            "differing_answers": self.differing,
            "ratios": self.ratios,
        }


def interval(ratios: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median of paired ratios and its 95% interval: percentiles of a bootstrap over pairs."""
    values = np.asarray(ratios)
    picks = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5]).tolist()
    return float(np.median(values)), low, high


# -- measuring -------------------------------------------------------------------------------------


def compare(
    llm: LLM,
    prompts: Sequence[Prompt],
    *,
    name: str,
    batch: int,
    settings: Sequence[int | str],
    rounds: int,
    max_tokens: int,
    seconds: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> list[Cell]:
    """Measure every setting on a class of prompts; the first cell is drafting off.

    At least ``rounds`` of them, and for ``seconds``.

    Each setting has an engine of its own, so that "auto" learns from its own steps only; the first
    round, in which it begins to, is not counted.
    """
    settings = (0, *(setting for setting in settings if setting != 0))
    engines = {setting: engine_of(llm, batch, setting) for setting in settings}
    cells = {setting: Cell(prompts=name, batch=batch, setting=setting) for setting in settings}
    order = random.Random(seed)
    label = f"{name}, {batch} at a time"
    before: dict[int | str, tuple[list[int], list[int]]] = {}
    for number in paired_rounds(rounds, seconds, label=label, progress=progress):
        chosen = [prompts[(number * batch + i) % len(prompts)] for i in range(batch)]
        found = {}
        for setting in order.sample(settings, len(settings)):
            found[setting] = _answer(engines[setting], llm, chosen, max_tokens)
        if number == 0:
            for setting, engine in engines.items():
                before[setting] = list(engine.policy.tried), list(engine.policy.taken)
            continue
        for setting, cell in cells.items():
            cell.ratios.append(found[setting].rate / found[0].rate)
            cell.rates.append(found[setting].rate)
            pairs = zip(found[0].token_ids, found[setting].token_ids, strict=True)
            cell.differing += sum(a != b for a, b in pairs)
    for setting, cell in cells.items():
        policy, (tried, taken) = engines[setting].policy, before[setting]
        cell.tried = [b - a for a, b in zip(tried, policy.tried, strict=True)]
        cell.taken = [b - a for a, b in zip(taken, policy.taken, strict=True)]
    return list(cells.values())


def paired_rounds(
    rounds: int, seconds: float, *, label: str, progress: bool = True
) -> Iterator[int]:
    """Numbers of rounds: 0 to warm up, then at least ``rounds`` of them, and for ``seconds``."""
    end = time.perf_counter() + seconds
    for number in tqdm(count(), desc=label, leave=False, disable=not progress):
        if number > rounds and time.perf_counter() >= end:
            break
        yield number


def engine_of(llm: LLM, batch: int, setting: int | str) -> Engine:
    """An engine of its own for a batch, without a prefix cache."""
    return Engine(
        llm.model,
        defined_ids=llm.tokenizer.vocab_size,
        max_num_seqs=batch,
        max_batch_tokens=2048,
        memory_bytes=256 << 20,
        max_model_len=llm.max_model_len,
        speculative_tokens=setting,
        prefix_cache=False,
    )


def _answer(engine: Engine, llm: LLM, prompts: Sequence[Prompt], max_tokens: int) -> Answers:
    requests = [request_of(llm, prompt, max_tokens) for prompt in prompts]
    produced: dict[str, list[int]] = {request.id: [] for request in requests}
    start = time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for event in engine.step():
            produced[event.request_id].extend(event.token_ids)
    seconds = time.perf_counter() - start
    return Answers(seconds=seconds, token_ids=tuple(map(tuple, produced.values())))


def request_of(llm: LLM, prompt: Prompt, max_tokens: int) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    if isinstance(prompt, str):
        return llm.prepare_text(prompt, params)[0]
    return llm.prepare_chat(prompt, params, enable_thinking=False)[0]


# -- reporting -------------------------------------------------------------------------------------


def lines(cells: Sequence[Cell]) -> list[str]:
    """One class at one batch size, for a terminal."""
    off = cells[0].as_dict()
    shown = [f"{off['prompts']}, {off['batch']} at a time: off {off['tokens_per_s']:.1f} tokens/s"]
    for cell in cells[1:]:
        one = cell.as_dict()
        rates = ", ".join("-" if rate is None else f"{rate:.0%}" for rate in cell.acceptance)
        text = (
            f"  {one['setting']!s:>4}  {one['ratio']:5.2f} ({one['low']:.2f} to {one['high']:.2f})"
            f"  {one['tokens_per_s']:8.1f} tokens/s   accepted {rates}"
        )
        if cell.differing:
            text += f"   {cell.differing} answers differ"
        shown.append(text)
    return shown


def findings(cells: Sequence[Cell]) -> list[str]:
    """The two promises of speculation, held against what was measured."""
    found = []
    auto = [cell for cell in cells if cell.setting == "auto"]
    if auto:
        worst = min(auto, key=lambda cell: interval(cell.ratios)[0])
        ratio, low, high = interval(worst.ratios)
        below = [cell for cell in auto if interval(cell.ratios)[0] < EVEN]
        found.append(
            f"auto is at least {EVEN} of off in {len(auto) - len(below)} of {len(auto)} cases; "
            f"the lowest is {ratio:.2f} ({low:.2f} to {high:.2f}): {worst.prompts}, "
            f"{worst.batch} at a time."
        )
    for name in dict.fromkeys(cell.prompts for cell in cells):
        mine = [cell for cell in cells if cell.prompts == name and cell.batch == 1 and cell.setting]
        # What "auto" did not try says nothing; a fixed number tries the first position always.
        first = max((cell.acceptance[0] or 0.0 for cell in mine), default=0.0)
        if mine and first >= LIKELY:
            best = max(mine, key=lambda cell: interval(cell.ratios)[0])
            ratio, low, high = interval(best.ratios)
            verdict = "at least" if ratio >= WORTH else "less than"
            found.append(
                f"{name}, 1 at a time: {first:.0%} of first drafts are accepted; the best setting, "
                f"{best.setting}, gains {ratio:.2f} ({low:.2f} to {high:.2f}), {verdict} {WORTH}."
            )
    return found


def result_rows(cells: Sequence[Cell], conditions: str) -> list[dict[str, str]]:
    """Rows for docs/results."""
    rows = []
    for cell in cells:
        if cell.setting == 0:
            continue
        ratio, low, high = interval(cell.ratios)
        rates = ", ".join("-" if rate is None else f"{rate:.0%}" for rate in cell.acceptance)
        drafts = "as measurement says" if cell.setting == "auto" else f"{cell.setting} drafts"
        rows.append(
            {
                "what": f"{cell.prompts.capitalize()}, batch {cell.batch}, {drafts}",
                "value": f"{ratio:.2f}x ({low:.2f} to {high:.2f}); accepted by position {rates}",
                "conditions": f"{conditions}; {len(cell.ratios)} paired rounds; "
                f"{cell.differing} answers differ",
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write docs/results/speculation.json when asked."""
    args = parsed(_parser(), argv)
    try:
        llm = LLM(
            args.model, dtype=args.dtype, backend=args.backend, memory="64MiB", max_num_seqs=1
        )
        if not llm.model.has_mtp:
            raise RequestError(f"--model {args.model}: this model has no MTP head to draft with.")
    except QnextError as error:
        print(error, file=sys.stderr)
        return 2
    every: list[Cell] = []
    for batch in args.batches:
        for name in args.classes:
            cells = compare(
                llm, CLASSES[name], name=name, batch=batch, settings=SETTINGS, rounds=args.rounds,
                max_tokens=args.tokens, seconds=args.seconds, seed=args.seed, progress=True,
            )  # fmt: skip
            print("\n".join(lines(cells)), flush=True)
            every += cells
    print("\n".join(["", *findings(every)]))
    if args.out is not None:
        report: Mapping[str, Any] = {
            "model": llm.name,
            "machine": machine(),
            "max_tokens": args.tokens,
            "findings": findings(every),
            "cells": [cell.as_dict() for cell in every],
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.out}")
    if args.record:
        dtype = str(llm.model.dtype).removeprefix("torch.")
        conditions = f"{llm.name}, {dtype}, greedy, up to {args.tokens} tokens"
        title = "Throughput with MTP drafting, against the same engine without"
        name = "speculation"
        if args.backend == "torch":
            name, title = "speculation_torch", f"{title}, on PyTorch's kernels"
        write_result(name, title, result_rows(every, conditions))
    return 0


def add_rounds(parser: argparse.ArgumentParser) -> None:
    """The options of settings that are compared in paired rounds of answers."""
    add = parser.add_argument
    add("--model", default="qnext-mini")
    add("--dtype", default="auto")
    add("--batches", type=int, nargs="+", default=[1, 4, 16], metavar="B")
    add("--rounds", type=int, default=12, metavar="N")
    add("--tokens", type=int, default=96, metavar="N", help="most tokens of an answer")
    add("--seed", type=int, default=0, help="of the order of settings within a round")
    add("--threads", type=int, metavar="N", help="threads of the CPU (default: torch's own)")


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the counts of ``add_rounds`` checked and torch's threads set."""
    args = parser.parse_args(argv)
    if min(*args.batches, args.rounds, args.tokens, args.threads or 1) < 1:
        parser.error("--batches, --rounds, --tokens and --threads: expected at least 1")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation", description=__doc__.splitlines()[0]
    )
    add_rounds(parser)
    add = parser.add_argument
    # fmt: off
    add("--classes", nargs="+", choices=CLASSES, default=list(CLASSES))
    add("--seconds", type=float, default=30.0, help="rounds go on so long, if --rounds are fewer")
    add("--backend", choices=("auto", "native", "torch"), default="auto", help="the kernels")
    add("--out", type=Path, metavar="FILE", help="everything, as JSON")
    add("--record", action="store_true", help="write docs/results/speculation.json")
    # fmt: on
    return parser


if __name__ == "__main__":
    sys.exit(main())
