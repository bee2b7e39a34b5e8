"""What structured output and path independence cost: masks, drafts under a grammar, equal bits.

    python -m benchmarks.structured [--model qnext-mini] [--rounds 8] [--record]

Three questions, without a prefix cache, greedy where nothing else is said. Which share of the time
of a step goes into what may follow: a stopwatch runs around all that tries tokens, finds masks, or
waits until another thread has; a second one around masks alone, and a third around llguidance,
which may work beside the model's forward. The goal is held against the first. Greedy choices are
tried first; behind a filter every choice needs its mask. How fast are answers with a grammar when
drafts are made, against none: paired rounds in an order drawn anew, for ``--seconds`` and batch
size (single answers take milliseconds, and scatter), the median of the ratios and its 95% interval.
And what path-independent mode costs on PyTorch, in the same way, without a grammar; the native
kernels are always path-independent. The time of a run is that of whole answers, prompts included.
"""

import argparse
import itertools
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from benchmarks.harness import write_result
from benchmarks.speculation import add_rounds, engine_of, interval, paired_rounds, parsed
from qnext import LLM, native
from qnext.engine import ruled
from qnext.engine.engine import Engine
from qnext.engine.guide import Guide
from qnext.engine.masks_ahead import MasksAhead
from qnext.engine.request import Request, SamplingParams, StructuredOutputs
from qnext.errors import QnextError
from qnext.text.grammar import GrammarMatcher

SETTINGS: tuple[int | str, ...] = (0, 1, "auto")
GOAL_SHARE, GOAL_EVEN, GOAL_PRICE = 0.05, 0.98, 0.20
"""Most of a step for masks; least speed with drafts against none; most that equal bits may cost."""

WAYS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    ", drawn from top_p 0.95": {"temperature": 1.0, "top_p": 0.95},
}
"""How tokens are chosen where masks are timed."""

_NAME: Mapping[str, Any] = {"type": "string", "maxLength": 20}
FORMS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("Describe a fox.", {"json_schema": {
        "type": "object",
        "properties": {"animal": _NAME, "color": _NAME, "legs": {"type": "integer"}},
        "required": ["animal", "color", "legs"],
    }}),
    ("Name three colors.", {"json_schema": {
        "type": "array", "items": _NAME, "minItems": 3, "maxItems": 3,
    }}),
    ("Tell me about a day at the sea.", {"json_schema": {
        "type": "object",
        "properties": {
            "title": _NAME,
            "weather": {"enum": ["sunny", "windy", "rainy"]},
            "people": {"type": "array", "items": {
                "type": "object",
                "properties": {"name": _NAME, "age": {"type": "integer"}},
                "required": ["name", "age"],
            }, "minItems": 1, "maxItems": 2},
        },
        "required": ["title", "weather", "people"],
    }}),
    ("When did it happen?", {"regex": r"On \d{4}-\d{2}-\d{2}, [a-z ]{10,60}\."}),
)  # fmt: skip
"""What is asked, and the form of the answer."""
QUESTIONS = ("Tell me a story about a kite.", "Why is it dark at night?", "Count from 1 to 20.")


class Stopwatch:
    """Seconds spent in some functions while it runs; calls inside one another count once.

    ``everywhere`` counts those of other threads too, which are never in them at the same time.
    """

    def __init__(self, *places: tuple[Any, str], everywhere: bool = False) -> None:
        self.places = places
        self._thread = None if everywhere else threading.get_ident()
        self.seconds = 0.0
        self._depth = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Put in place of the methods, and taken away again."""
        before = [(owner, name, getattr(owner, name)) for owner, name in self.places]
        for owner, name, method in before:
            setattr(owner, name, self._timed(method))
        try:
            yield
        finally:
            for owner, name, method in before:
                setattr(owner, name, method)

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            if self._depth or self._thread not in (None, threading.get_ident()):
                return method(*args, **options)
            self._depth += 1
            started = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                self.seconds += time.perf_counter() - started
                self._depth -= 1

        return timed


# -- measuring -------------------------------------------------------------------------------------


def mask_share(
    llm: LLM, batch: int, *, rounds: int, max_tokens: int, **sampling: Any
) -> dict[str, float]:
    """Shares of the time of a step, and the step in ms.

    All that ``rules`` take; the part of it that waits for ``masks``, the rest tries tokens and
    chooses again; and what ``llguidance`` works, beside the forward too.

    They are measured in turn: a stopwatch inside another one would be counted by it.
    """
    engine, steps = engine_of(llm, batch, 0), []
    watches = {
        "rules": (
            (Guide, "allows"), (Guide, "_settle"), (Guide, "_find_mask"), (ruled, "choose_again"),
            (MasksAhead, "begin"), (Future, "result"),
        ),
        "masks": ((Guide, "_find_mask"), (MasksAhead, "begin"), (Future, "result")),
        "llguidance": tuple(
            (GrammarMatcher, name)
            for name in ("fill", "accepts", "may_end", "is_over", "may_be_forced", "certain")
        ),
    }  # fmt: skip
    shares: dict[str, list[float]] = {name: [] for name in watches}
    for number in range(-1, rounds):
        requests = _forms(llm, batch, number, max_tokens, **sampling)
        for name, places in watches.items():
            watch, before = Stopwatch(*places, everywhere=name == "llguidance"), engine.steps
            with watch.running():
                seconds, _ = _answer(engine, requests)
            if number >= 0:
                shares[name].append(watch.seconds / seconds)
                steps.append(seconds / (engine.steps - before))
    found = {name: statistics.median(values) for name, values in shares.items()}
    return {**found, "step_ms": statistics.median(steps) * 1e3}


def compare(
    engines: Mapping[Any, Engine],
    requests: Callable[[int], Sequence[Request]],
    *,
    rounds: int,
    label: str,
    seconds: float = 0.0,
    seed: int = 0,
) -> dict[Any, tuple[tuple[float, float, float], list[float]]]:
    """For each engine its throughput against the first one's (median, interval), and all tokens/s.

    At least ``rounds`` of them, and for ``seconds``. The first round warms up and is not counted.
    """
    first, order = next(iter(engines)), random.Random(seed)
    rates: dict[Any, list[float]] = {name: [] for name in engines}
    for number in paired_rounds(rounds, seconds, label=label):
        chosen = requests(number)
        for name in order.sample(list(engines), len(engines)):
            taken, tokens = _answer(engines[name], chosen)
            if number > 0:
                rates[name].append(tokens / taken)
    return {
        name: (
            interval([a / b for a, b in zip(mine, rates[first], strict=True)]),
            mine,
        )
        for name, mine in rates.items()
    }


def _forms(llm: LLM, batch: int, number: int, max_tokens: int, **sampling: Any) -> list[Request]:
    requests = []
    for i in range(batch):
        text, form = FORMS[(number + i) % len(FORMS)]
        params = SamplingParams(
            **{"temperature": 0.0, "seed": i, **sampling}, max_tokens=max_tokens,
            structured_outputs=StructuredOutputs(**form),
        )  # fmt: skip
        requests.append(llm.prepare_chat(_asked(text), params, enable_thinking=False)[0])
    return requests


def _questions(llm: LLM, batch: int, number: int, max_tokens: int) -> list[Request]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    texts = [QUESTIONS[(number + i) % len(QUESTIONS)] for i in range(batch)]
    return [llm.prepare_chat(_asked(text), params, enable_thinking=False)[0] for text in texts]


def _asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _answer(engine: Engine, requests: Sequence[Request]) -> tuple[float, int]:
    """Seconds and tokens of answering all of them together."""
    tokens, start = 0, time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for event in engine.step():
            tokens += len(event.token_ids)
    return time.perf_counter() - start, tokens


# -- reporting -------------------------------------------------------------------------------------


def mask_rows(llm: LLM, args: argparse.Namespace) -> list[dict[str, str]]:
    """Rows about masks: on the kernels of ``llm``, and on PyTorch's if those are others."""
    rows = []
    for batch, (label, sampling) in itertools.product(args.batches, WAYS.items()):
        rows.append(_mask_row(llm, batch, label, args, args.rounds, sampling))
    if native.unfit() is None:
        plain = LLM(args.model, dtype=args.dtype, backend="torch", memory="64MiB", max_num_seqs=1)
        for batch in args.batches:
            rows.append(_mask_row(plain, batch, ", PyTorch", args, max(args.rounds // 2, 3), {}))
    return rows


def _mask_row(
    llm: LLM, batch: int, label: str, args: argparse.Namespace, rounds: int,
    sampling: Mapping[str, Any],
) -> dict[str, str]:  # fmt: skip
    found = mask_share(llm, batch, rounds=rounds, max_tokens=args.tokens, **sampling)
    share = found["rules"]
    return {
        "what": f"Masks, batch {batch}{label}",
        "value": f"{share:.1%} of a step of {found['step_ms']:.2f} ms, with trying tokens and "
        f"choosing again; finding masks {found['masks']:.1%}, llguidance works "
        f"{found['llguidance']:.1%}",
        "goal": f"at most {GOAL_SHARE:.0%}",
        "met": "yes" if share <= GOAL_SHARE else "no",
        "conditions": f"{args.about}, schemas and a regular expression",
    }


def speed_rows(llm: LLM, args: argparse.Namespace) -> list[dict[str, str]]:
    """Rows about drafts under a grammar."""
    rows = []
    for batch in args.batches:
        found = compare(
            {setting: engine_of(llm, batch, setting) for setting in SETTINGS},
            lambda number, batch=batch: _forms(llm, batch, number, args.tokens),
            rounds=2 * args.rounds, seconds=args.seconds, label=f"grammar, {batch} at a time",
            seed=args.seed,
        )  # fmt: skip
        off = found[0][1]
        for setting in SETTINGS[1:]:
            (ratio, low, high), rates = found[setting]
            name = "auto" if setting == "auto" else f"{setting} draft"
            rows.append(
                {
                    "what": f"With a grammar, batch {batch}, {name}",
                    "value": f"{ratio:.2f}x ({low:.2f} to {high:.2f}) of none: "
                    f"{statistics.median(rates):.0f} and {statistics.median(off):.0f} tokens/s",
                    "goal": f"at least {GOAL_EVEN}x" if setting == "auto" else "",
                    "met": ("yes" if ratio >= GOAL_EVEN else "no") if setting == "auto" else "",
                    "conditions": f"{args.about}, {len(off)} paired rounds",
                }
            )
    return rows


def price_rows(args: argparse.Namespace) -> list[dict[str, str]]:
    """Rows about path-independent mode on PyTorch: the native kernels have no other."""
    rows = []
    modes = {
        is_equal: LLM(
            args.model, dtype=args.dtype, backend="torch", batch_invariant=is_equal,
            memory="64MiB", max_num_seqs=1,
        )
        for is_equal in (False, True)
    }  # fmt: skip
    rounds, tokens = max(args.rounds // 2, 3), max(args.tokens // 4, 8)
    for batch in args.batches:
        found = compare(
            {is_equal: engine_of(llm, batch, 0) for is_equal, llm in modes.items()},
            lambda number, batch=batch: _questions(modes[False], batch, number, tokens),
            rounds=rounds, seconds=args.seconds, label=f"torch, {batch} at a time", seed=args.seed,
        )  # fmt: skip
        (ratio, low, high), rates = found[True]
        price = 1.0 - ratio
        dtype = str(modes[True].model.dtype).removeprefix("torch.")
        rows.append(
            {
                "what": f"Path-independent, torch, batch {batch}",
                "value": f"{price:.1%} slower ({1.0 - high:.1%} to {1.0 - low:.1%}): "
                f"{statistics.median(rates):.0f} and {statistics.median(found[False][1]):.0f} "
                "tokens/s",
                "goal": f"at most {GOAL_PRICE:.0%}",
                "met": "yes" if price <= GOAL_PRICE else "no",
                "conditions": f"{modes[True].name}, {dtype}, greedy, {tokens} tokens, "
                f"{len(rates)} paired rounds",
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write docs/results/structured.json when asked."""
    args = parsed(_parser(), argv)
    rows: list[dict[str, str]] = []
    try:
        llm = LLM(args.model, dtype=args.dtype, memory="64MiB", max_num_seqs=1)
        dtype = str(llm.model.dtype).removeprefix("torch.")
        args.about = f"{llm.name}, {dtype}, greedy, up to {args.tokens} tokens"
        parts = {
            "masks": lambda: mask_rows(llm, args),
            "speed": lambda: speed_rows(llm, args),
            "price": lambda: price_rows(args),
        }
        for part in args.parts:
            found = parts[part]()
            rows += found
            print("\n".join(f"{row['what']}: {row['value']}" for row in found), flush=True)
    except QnextError as error:
        print(error, file=sys.stderr)
        return 2
    if args.record:
        write_result("structured", "Structured output and path independence", rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.structured", description=(__doc__ or "").splitlines()[0]
    )
    add_rounds(parser)
    add = parser.add_argument
    # fmt: off
    add("--parts", nargs="+", choices=("masks", "speed", "price"),
        default=["masks", "speed", "price"])
    add("--seconds", type=float, default=15.0,
        help="paired rounds go on so long, if --rounds are fewer")
    add("--record", action="store_true", help="write docs/results/structured.json")
    # fmt: on
    return parser


if __name__ == "__main__":
    sys.exit(main())
