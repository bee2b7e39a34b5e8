"""Where the time of a decoding step goes, with and without drafts, and what drafts could gain.

    python -m benchmarks.speculation_steps [--model qnext-mini] [--batches 1 4 16] [--record]

Answers to the stories of ``benchmarks.speculation`` are written with 0, 1, 2, ... drafts in turn.
Of all steps in which the whole batch decodes with as many drafts as were asked for, the medians of
the parts are reported, and how much drafting would gain if every draft were accepted: no acceptance
gains more. Native kernels only: there a step is one call that measures its own parts.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness import write_result
from benchmarks.speculation import add_rounds, engine_of, parsed, request_of
from benchmarks.speculation_prompts import CLASSES, Prompt
from qnext import LLM
from qnext.engine.engine import Engine
from qnext.engine.native_runner import NativeRunner
from qnext.engine.speculative import MAX_DRAFTS
from qnext.errors import QnextError, RequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one step: all of it, and the parts that the native call measures."""

    whole: float
    forward: float
    choose: float
    draft: float

    @property
    def around(self) -> float:
        """Outside those parts: the engine, and getting in and out of the call."""
        return self.whole - self.forward - self.choose - self.draft


def measure(
    llm: LLM, prompts: Sequence[Prompt], *, batch: int, rounds: int, max_tokens: int
) -> dict[int, StepTime]:
    """Medians by number of drafts, from ``rounds`` answers of a batch with each, in turn.

    RequestError if the native kernels do not run the model, or no step had so many drafts.
    """
    engines = {drafts: engine_of(llm, batch, drafts) for drafts in range(MAX_DRAFTS + 1)}
    found: dict[int, list[StepTime]] = {drafts: [] for drafts in engines}
    for number in range(rounds + 1):
        chosen = [prompts[(number * batch + i) % len(prompts)] for i in range(batch)]
        for drafts, engine in engines.items():
            times = _answer(engine, llm, chosen, drafts, max_tokens)
            if number:  # the first round warms up
                found[drafts] += times
    for drafts, times in found.items():
        if not times:
            raise RequestError(
                f"no step of {batch} sequences had {drafts} drafts each: the answers end too "
                "early. Raise --tokens or --rounds."
            )
    return {drafts: _median(times) for drafts, times in found.items()}


def _answer(
    engine: Engine, llm: LLM, prompts: Sequence[Prompt], drafts: int, max_tokens: int
) -> list[StepTime]:
    runner = engine.runner
    if not isinstance(runner, NativeRunner):
        raise RequestError(
            f"{llm.name}: the native kernels do not run this model, so its steps are not one call "
            "whose parts are measured. qnext doctor says why."
        )
    for prompt in prompts:
        engine.add(request_of(llm, prompt, max_tokens))
    times = []
    while engine.has_work:
        running = engine.scheduler.running
        is_full = len(running) == len(prompts) and all(len(s.drafts) == drafts for s in running)
        runner.seconds = (0.0, 0.0, 0.0)
        start = time.perf_counter()
        engine.step()
        whole = time.perf_counter() - start
        if is_full and runner.seconds[0]:  # or it was not one call
            forward, choose, draft = (seconds / runner.rounds for seconds in runner.seconds)
            whole /= runner.rounds
            times.append(StepTime(whole=whole, forward=forward, choose=choose, draft=draft))
    return times


def _median(times: Sequence[StepTime]) -> StepTime:
    return StepTime(
        whole=statistics.median(one.whole for one in times),
        forward=statistics.median(one.forward for one in times),
        choose=statistics.median(one.choose for one in times),
        draft=statistics.median(one.draft for one in times),
    )


def result_rows(times: dict[int, StepTime], batch: int, conditions: str) -> list[dict[str, str]]:
    """Rows for docs/results."""
    rows, plain = [], times[0].whole
    for drafts, one in times.items():
        value = (
            f"{one.whole * 1e6:.0f} us: forward {one.forward * 1e6:.0f}, choosing "
            f"{one.choose * 1e6:.0f}, drafting {one.draft * 1e6:.0f}, around the call "
            f"{one.around * 1e6:.0f}"
        )
        if drafts:
            value += (
                f"; {one.whole / plain:.2f} plain steps, so at most "
                f"{(1 + drafts) * plain / one.whole:.2f}x if every draft were accepted"
            )
        what = f"Batch {batch}, {drafts} drafts" if drafts else f"Batch {batch}, no drafts"
        rows.append({"what": what, "value": value, "conditions": conditions})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write docs/results/speculation_steps.json when asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation_steps", description=__doc__.splitlines()[0]
    )
    add_rounds(parser)
    parser.add_argument(
        "--record", action="store_true", help="write docs/results/speculation_steps.json"
    )
    args = parsed(parser, argv)
    rows = []
    try:
        llm = LLM(args.model, dtype=args.dtype, memory="64MiB", max_num_seqs=1)
        if not llm.model.has_mtp:
            raise RequestError(f"--model {args.model}: this model has no MTP head to draft with.")
        dtype = str(llm.model.dtype).removeprefix("torch.")
        conditions = f"{llm.name}, {dtype}, greedy, medians over {args.rounds} rounds of answers"
        for batch in args.batches:
            times = measure(
                llm, CLASSES["stories"], batch=batch, rounds=args.rounds, max_tokens=args.tokens
            )
            rows += result_rows(times, batch, conditions)
    except QnextError as error:
        print(error, file=sys.stderr)
        return 2
    for row in rows:
        print(f"{row['what']}: {row['value']}")
    if args.record:
        write_result("speculation_steps", "Parts of a decoding step", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
