"""A session over the model made of hashes: settings and traffic from dice, answers known."""

import random
from typing import Any

from hash_chain import Answer, Head, hash_engine
from traffic import Clock, Dice, Session, Traffic, drive

from qnext.engine.request import Event, Request
from qnext.engine.sizes import Settings

VOCABULARY = 16
HEAD = Head(VOCABULARY)


class Judge:
    """Knows every right answer, and compares."""

    def __init__(self, session: Session, traffic: Traffic) -> None:
        self.session, self.traffic = session, traffic
        self.answers: dict[str, Answer] = session.engine.runner.answers

    def judge(self, request: Request, tokens: list[int], events: list[Event]) -> None:
        answer, reason = self.answers.pop(request.id), events[-1].finish_reason
        wanted = answer.grow(len(tokens))
        assert tokens == wanted, f"S7: {tokens} instead of {wanted} for {request}"
        if reason != "cancelled":
            assert reason == answer.reason, f"S7: ended by {reason}, not {answer.reason}: {request}"
            assert len(answer.grow(len(tokens) + 1)) == len(tokens), f"S7: {request} ended early"
        found = [one for event in events for one in event.logprobs]
        if request.params.logprobs is not None:
            assert [one.token_id for one in found] == tokens
            for index, one in enumerate(found):
                assert abs(one.logprob - answer.logprob(index)) < 1e-5, f"S7: {request}, {index}"
                assert len(one.top) == request.params.logprobs
        else:
            assert not found
        self._judge_prompt(request, answer, events)
        self.traffic.past.append((*request.prompt_ids, *tokens))

    def _judge_prompt(self, request: Request, answer: Answer, events: list[Event]) -> None:
        wants = request.score_only or request.params.prompt_logprobs is not None
        found = [one for event in events for one in event.prompt_logprobs]
        if not wants or (events[-1].finish_reason == "cancelled" and not found):
            assert wants or not found
            return
        wanted = answer.prompt_logprobs()
        assert [one.token_id for one in found] == list(request.prompt_ids[1:]), f"S7: {request}"
        for one, logprob in zip(found, wanted, strict=True):
            assert abs(one.logprob - logprob) < 1e-5, f"S7: prompt of {request}"


class Known(Session):
    """A session that tells the runner and the judge what each request must be given."""

    def __init__(self, dice: Dice, *, seed: int, looks: bool = True, **settings: Any) -> None:
        page_size = (4, 2, 8)[dice(0, 2)]
        longest = dice(20, 60)
        fewest = -(-longest // page_size) + 2
        slots = dice(1, 6)
        chosen = {
            "num_pages": fewest * (2, 1, 4)[dice(0, 2)] + dice(0, 2 * slots),
            "rightness": (0.7, 0.0, 0.4, 1.0)[dice(0, 3)],
            "page_size": page_size,
            "num_slots": slots,
            "num_snapshots": (4, 0, 1, 2, 10, 16)[dice(0, 5)],
            "max_batch_tokens": slots + dice(1, 40),
            "max_chunk_tokens": (None, None, 1, 7)[dice(0, 3)],
            "max_model_len": longest + dice(0, 30),
            "vocab_size": VOCABULARY,
            "defined_ids": VOCABULARY - (0, 0, 2)[dice(0, 2)],
            "speculative_tokens": (0, 1, 2, 3, 4, "auto", "auto")[dice(0, 6)],
            "snapshot_interval": (0, 0, 0, 3, 8)[dice(0, 4)],
        } | settings
        self.settings = dict(chosen)
        num_pages, rightness = chosen.pop("num_pages"), chosen.pop("rightness")
        engine = hash_engine(
            HEAD, Settings(**chosen), num_pages=num_pages, rightness=rightness, seed=seed,
            clock=Clock(seed),
        )  # fmt: skip
        engine.runner.looks = looks
        self.traffic = Traffic(dice, vocab_size=VOCABULARY, longest=longest)
        super().__init__(engine, lambda *args: self.verdict(*args), looks=looks)
        self.verdict = Judge(self, self.traffic).judge

    def add(self, request: Request) -> bool:
        accepted = super().add(request)
        if accepted:
            self.engine.runner.answers[request.id] = Answer(
                HEAD, request, max_model_len=self.engine.max_model_len,
                defined_ids=self.engine.defined_ids,
            )  # fmt: skip
        return accepted


def drive_seed(seed: int, steps: int, **settings: Any) -> Known:
    """A session of so many steps with settings and traffic drawn from a seed."""
    dice = random.Random(seed).randint
    session = Known(dice, seed=seed, **settings)
    try:
        drive(session, session.traffic, dice, steps=steps)
    except AssertionError as error:
        error.add_note(f"seed {seed}, step {session.engine.steps}, {session.settings}")
        raise
    return session
