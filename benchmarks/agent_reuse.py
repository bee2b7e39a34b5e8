"""What an agent's conversation reuses: ten turns with tools, and reasoning that history drops.

    python -m benchmarks.agent_reuse [--model qnext-mini] [--turns 10] [--restart] [--record]

Each turn is a question, a tool call, its result and an answer. The model writes reasoning and
answers (greedy); the script adds the calls, since a small model makes none. The rate is

    tokens reused / sum over requests of min(prompt - 1, longest beginning known before),

where known is every sequence that was run or rendered for the next turn: what a cache with a state
at every token could reuse. Between requests ``LLM.idle`` runs, or does not. Also measured: history
that keeps its reasoning, questions that are edited, a restart in the middle with a cache on disk,
64 prompts with common beginnings of two lengths, and time to the first token of a further turn.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import interleaved, machine, write_result
from qnext import LLM
from qnext.engine.request import SamplingParams
from qnext.errors import QnextError, RequestError
from qnext.text.chat import ChatTemplate
from qnext.text.history import beginning_after

ENOUGH = 0.95
"""Least share of what could be reused."""
QUICK = 0.15
"""Most time to the first token of the last turn, against none reused."""
PROMPTS, HITS = 64, 62
"""Of so many prompts with a common beginning so many find it."""
SPLITS = ((1600, 600), (1500, 700))
"""Tokens that are common and tokens that are not."""

SYSTEM = (
    "You are the assistant of a small harbour. You look things up with the tools you have and "
    "answer in one or two short sentences. Say which boat and which day you mean. If the tools do "
    "not know something, say so. Never guess the weather."
)
PLACES = ("the island", "the lighthouse", "the old town", "the north bay", "the bird rock")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")


def _tool(name: str, text: str, **fields: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": value} for key, value in fields.items()}
    parameters = {"type": "object", "properties": properties, "required": list(fields)}
    function = {"name": name, "description": text, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    _tool("find_boats", "Boats that go to a place.", place="Where to.", day="Day of the week."),
    _tool("free_seats", "How many seats of a boat are free.", boat="Name of the boat."),
    _tool("weather", "What the weather will be like at sea.", day="Day of the week."),
]

# The block of the generation prompt, and which turns show reasoning.
_OPENING = '{{- "<think>\\n\\n</think>\\n\\n" if enable_thinking is sameas false -}}'
_SHOWN = "loop.index0 > question.at and (loop.last or reasoning)"


def thinking_template(*, keeps: bool = False) -> ChatTemplate:
    """The built-in template, always thinking; ``keeps`` shows the reasoning of earlier turns too.

    Raises RequestError if the built-in template no longer has the places this changes.
    """
    source = ChatTemplate.builtin().source
    for place in (_OPENING, _SHOWN):
        if source.count(place) != 1:
            raise RequestError(f"the built-in template does not contain {place!r} exactly once.")
    source = source.replace(_OPENING, '{{- "<think>\\n" -}}')
    return ChatTemplate(source.replace(_SHOWN, "reasoning or loop.last") if keeps else source)


# -- the conversation ------------------------------------------------------------------------------


def question(turn: int, *, edited: bool = False) -> dict[str, Any]:
    """What the user asks; the edited form differs from the fourth word on."""
    place, day = PLACES[turn % len(PLACES)], DAYS[(turn // 2) % len(DAYS)]
    if edited:
        text = f"I want to stay at home on {day}. Is there still a boat that brings food?"
    else:
        text = f"I want to go to {place} on {day} with {turn + 2} friends. Which boat can we take?"
    return {"role": "user", "content": text}


def call(turn: int) -> list[dict[str, Any]]:
    """The tool call of a turn."""
    place, day = PLACES[turn % len(PLACES)], DAYS[(turn // 2) % len(DAYS)]
    function = {"name": "find_boats", "arguments": {"place": place, "day": day}}
    return [{"type": "function", "id": f"call-{turn}", "function": function}]


def result(turn: int) -> dict[str, Any]:
    """What the tool found: a table that is different in every turn."""
    dice = random.Random(turn)
    names = dice.sample(["Gull", "Star", "Anna", "Otter", "Wind", "Pearl", "Hope"], 4)
    boats = [
        {"boat": name, "leaves": f"{dice.randrange(6, 20)}:{dice.randrange(10, 60)}",
         "seats": dice.randrange(40)}
        for name in names
    ]  # fmt: skip
    return {"role": "tool", "tool_call_id": f"call-{turn}", "content": json.dumps(boats)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reuse:
    """One request of a conversation."""

    turn: int
    prompt_tokens: int
    reusable: int
    """Tokens that a state at every token ever known would have saved."""
    cached: int


@dataclass(kw_only=True)
class Agent:
    """A client of one model that keeps count of what could have been reused."""

    llm: LLM
    idles: bool
    params: SamplingParams
    messages: list[dict[str, Any]] = field(default_factory=list)
    known: list[list[int]] = field(default_factory=list)
    """Every sequence that was run, or rendered for the next turn."""
    requests: list[Reuse] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.messages = self.messages or [{"role": "system", "content": SYSTEM}]

    def ask(self, turn: int) -> dict[str, Any]:
        """One request; returns the assistant's message."""
        llm, messages = self.llm, list(self.messages)
        ids = list(llm.prepare_chat(messages, self.params, tools=TOOLS)[0].prompt_ids)
        shared = max((_common(ids, one) for one in self.known), default=0)
        answer = llm.chat(messages, self.params, tools=TOOLS)
        usage = answer.usage
        self.requests.append(
            Reuse(
                turn=turn, prompt_tokens=len(ids), reusable=min(len(ids) - 1, shared),
                cached=usage.cached_tokens,
            )
        )  # fmt: skip
        message = {"role": "assistant", "content": answer.text}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        self.known.append([*ids, *answer.token_ids])
        self.known.append(
            beginning_after(llm.template, llm.tokenizer, messages, message, {"tools": TOOLS})[:-1]
        )
        if self.idles:
            llm.idle()
        return message

    def turn(self, number: int, *, edited: bool = False) -> None:
        """Question, call, result, answer."""
        self.messages.append(question(number, edited=edited))
        self.messages.append({**self.ask(number), "tool_calls": call(number)})
        self.messages.append(result(number))
        self.messages.append(self.ask(number))

    def back_to(self, turn: int) -> None:
        """Forget everything from a turn's question on, as a user does who edits it."""
        del self.messages[1 + 4 * turn :]

    def rate(self, start: int = 0) -> float:
        """Share of what could be reused that was, from a request on."""
        counted = self.requests[start:]
        return sum(one.cached for one in counted) / sum(one.reusable for one in counted)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def load(model: str, *, keeps: bool = False, **options: Any) -> LLM:
    """A model that always thinks."""
    llm = LLM(model, **options)
    llm.template = thinking_template(keeps=keeps)
    return llm


def converse(
    model: str,
    *,
    turns: int,
    max_tokens: int,
    keeps: bool = False,
    idles: bool = True,
    edits: Sequence[int] = (),
    **options: Any,
) -> Agent:
    """A conversation; before it ends, the questions of the turns ``edits`` are asked anew."""
    llm = load(model, keeps=keeps, **options)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    agent = Agent(llm=llm, idles=idles, params=params)
    for turn in range(turns):
        agent.turn(turn)
        if turn in edits:
            agent.back_to(turn)
            agent.turn(turn, edited=True)
    return agent


# -- other measurements ----------------------------------------------------------------------------


def hits(llm: LLM, shared: int, unique: int, *, prompts: int = PROMPTS, seed: int = 0) -> int:
    """How many prompts with a common beginning of ``shared`` tokens start after all of it."""
    dice = random.Random(seed)
    limit = llm.tokenizer.vocab_size
    beginning = [dice.randrange(limit) for _ in range(shared)]
    params = SamplingParams(temperature=0.0, max_tokens=1)
    found = 0
    for _ in range(prompts):
        prompt = beginning + [dice.randrange(limit) for _ in range(unique)]
        found += llm.generate([prompt], params)[0].usage.cached_tokens >= shared
    return found


def first_token(agent: Agent, turn: int, *, repetitions: int) -> dict[str, Any]:
    """Seconds to the first token of a further turn, with the agent's cache and without one.

    After every repetition the cache is what it was before.
    """
    params = SamplingParams(temperature=0.0, max_tokens=1)
    messages = [*agent.messages, question(turn)]
    cold = load_like(agent.llm)
    before = set(agent.llm.engine.prefix)

    def ask(llm: LLM) -> None:
        llm.chat(messages, params, tools=TOOLS)

    def ask_warm() -> None:
        ask(agent.llm)
        for snapshot in set(agent.llm.engine.prefix) - before:
            agent.llm.engine.prefix.evict(snapshot)

    ids = cold.prepare_chat(messages, params, tools=TOOLS)[0].prompt_ids
    times = interleaved(
        {"cache": ask_warm, "none": partial(ask, cold)},
        repetitions=repetitions,
        label="first token",
    )
    ratios = [a / b for a, b in zip(times["cache"], times["none"], strict=True)]
    return {
        "prompt_tokens": len(ids),
        "ratio": statistics.median(ratios),
        "cache_s": statistics.median(times["cache"]),
        "none_s": statistics.median(times["none"]),
        "ratios": ratios,
    }


def load_like(llm: LLM) -> LLM:
    """The same model and template without a prefix cache."""
    cold = LLM(llm.name, prefix_cache=False)
    cold.template = llm.template
    return cold


def restarted(model: str, folder: str, *, turns: int, max_tokens: int) -> float:
    """Half a conversation, a restart with the cache on disk, the other half: its rate of reuse."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    first = Agent(llm=load(model, cache_dir=folder), idles=True, params=params)
    for turn in range(turns // 2):
        first.turn(turn)
    first.llm.close()
    second = Agent(
        llm=load(model, cache_dir=folder), idles=True, params=params,
        messages=first.messages, known=first.known,
    )  # fmt: skip
    for turn in range(turns // 2, turns):
        second.turn(turn)
    second.llm.close()
    return second.rate()


# -- the command -----------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as plain values for JSON."""
    talk = partial(converse, args.model, turns=args.turns, max_tokens=args.max_tokens)
    edits = range(1, args.turns, 3)
    agents = {
        "prepared": talk(),
        "not_prepared": talk(idles=False),
        "reasoning_kept": talk(keeps=True),
        "edited": talk(edits=edits),
    }
    report: dict[str, Any] = {
        "machine": machine(),
        "model": args.model,
        "turns": args.turns,
        "edited_turns": list(edits),
        "rates": {name: agent.rate() for name, agent in agents.items()},
        "requests": {
            name: [asdict(one) for one in agent.requests] for name, agent in agents.items()
        },
        "background": {
            name: agent.llm.engine.background.counts.as_dict() for name, agent in agents.items()
        },
        "first_token": first_token(
            agents["prepared"], args.turns, repetitions=args.repetitions
        ),
        "splits": [
            {"shared": shared, "unique": unique, "hits": hits(LLM(args.model), shared, unique)}
            for shared, unique in SPLITS
        ],
    }  # fmt: skip
    if args.restart:
        with tempfile.TemporaryDirectory() as folder:
            report["rates"]["restarted"] = restarted(
                args.model, folder, turns=args.turns, max_tokens=args.max_tokens
            )
    return report


def missed(report: dict[str, Any]) -> list[str]:
    """What does not hold; empty when all does."""
    rates = report["rates"]
    found = [
        f"{name}: {rates[name]:.1%} reused, not {ENOUGH:.0%}"
        for name in ("prepared", "restarted")
        if name in rates and rates[name] < ENOUGH
    ]
    if report["first_token"]["ratio"] > QUICK:
        found.append(f"first token after {report['first_token']['ratio']:.1%} of the time")
    found += [
        f"{one['shared']} tokens in common: {one['hits']} of {PROMPTS} prompts found them"
        for one in report["splits"]
        if one["hits"] < HITS
    ]
    return found


def rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """For the tables of the documentation."""
    names = {
        "prepared": "reused, next turn prepared in spare time",
        "not_prepared": "reused, nothing prepared",
        "reasoning_kept": "reused, template keeps reasoning",
        "edited": "reused, questions edited",
        "restarted": "reused after a restart in the middle",
    }
    about = f"{report['turns']} turns, two requests each, {report['model']}"
    table = [
        {"what": names[name], "value": f"{rate:.1%}", "conditions": about}
        for name, rate in report["rates"].items()
    ]
    first = report["first_token"]
    table.append(
        {
            "what": "time to the first token of a further turn, with the cache / without",
            "value": f"{first['ratio']:.1%}",
            "conditions": f"{first['prompt_tokens']} tokens, {first['cache_s'] * 1e3:.0f} ms / "
            f"{first['none_s'] * 1e3:.0f} ms, median of {len(first['ratios'])} pairs",
        }
    )
    table += [
        {
            "what": "prompts that start after what they have in common",
            "value": f"{one['hits']} of {PROMPTS}",
            "conditions": f"{one['shared']} tokens in common, {one['unique']} not",
        }
        for one in report["splits"]
    ]
    return table


def main() -> int:
    """Measure and print; returns the exit status: 1 when something that must hold does not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="qnext-mini")
    add("--turns", type=int, default=10)
    add("--max-tokens", type=int, default=40, help="of an answer, reasoning included")
    add("--repetitions", type=int, default=7, help="pairs of first tokens")
    add("--restart", action="store_true", help="also restart in the middle, with a cache on disk")
    add("--threads", type=int, default=1)
    add("--json", metavar="FILE", type=Path, help="write everything measured")
    add("--record", action="store_true", help="write docs/results/agent_reuse.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        report = measure(args)
    except QnextError as error:
        print(f"agent_reuse: {error}", file=sys.stderr)
        return 2
    for row in rows(report):
        print(f"{row['what']}: {row['value']} ({row['conditions']})")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.record:
        write_result("agent_reuse", "Reuse in an agent's conversation", rows(report))
    complaints = missed(report)
    for line in complaints:
        print(f"missed: {line}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
