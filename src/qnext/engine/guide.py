"""What a request allows next, and what it says without being asked: masks and forced tokens.

A guide walks along one answer. Before every choice it knows the tokens that may follow: a grammar
where one rules, tags of the format where they are due, everything elsewhere. A row behind drafts
asks for the mask behind those drafts; what was looked up ahead is undone if the drafts do not stay.
Whether one token may follow is said far quicker than which tokens may.

Tokens are forced where nothing is left to choose: the text that ends the reasoning when its budget
is used up, and a token that is the only one a mask allows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from qnext.engine.regions import Regions, State

Calls = Literal["free", "none", "auto", "required"]
"""Tool calls: not spoken of, forbidden, allowed, or the only answer."""


class Matcher(Protocol):
    """A grammar in the middle of a text."""

    def fill(self, words: np.ndarray) -> str | None:
        """Write the tokens that may follow; the end tokens stand for "it may end here".

        Returns why it cannot, if the grammar has become too complex.
        """
        ...

    def knows_mask(self) -> bool:
        """Whether ``fill`` has nothing to find out."""
        ...

    def consume(self, token: int) -> bool: ...
    def rollback(self, count: int) -> None: ...

    def accepts(self, token: int) -> bool:
        """Whether a token may follow, where it is no end token and no token is certain."""
        ...

    def start_of(self, token: int) -> int | None:
        """A token whose text another one begins with, if one is known: its first byte.

        Where that may not follow, neither may the other.
        """
        ...

    def may_end(self) -> bool:
        """Whether the text is complete where it stands."""
        ...

    def is_over(self) -> bool:
        """Whether nothing may follow but an end token."""
        ...

    def may_be_forced(self) -> bool:
        """Whether it could be that one token only may follow: quickly said, never wrongly no."""
        ...

    def certain(self) -> tuple[int, ...] | None:
        """Tokens that follow for certain; none where more than one may follow, None if unknown."""
        ...


class Grammar(Protocol):
    """A compiled grammar."""

    def begin(self) -> Matcher: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Rules:
    """What a request asks of its answer beside sampling."""

    regions: Regions
    vocab_size: int
    end_ids: tuple[int, ...]
    """Tokens that end an answer."""
    control_ids: tuple[int, ...] = ()
    """Tokens that never stand in a text a grammar rules."""
    budget: int | None = None
    """Most sampled tokens of reasoning."""
    stop_thinking: tuple[int, ...] = ()
    """What is inserted when the budget is used up; it closes the reasoning."""
    answer: Grammar | None = None
    """Rules the answer, from behind the reasoning to its end."""
    call: Grammar | None = None
    """Rules what stands between the tags of a tool call."""
    calls: Calls = "free"
    parallel: bool = True
    """Whether another call may follow a call."""
    covers_calls: bool = False
    """Whether ``answer`` spells the tags of calls itself: the vocabulary has no tokens for them."""

    @property
    def is_closed(self) -> bool:
        """Whether the answer has a form, so that it cannot end before that is complete."""
        return self.answer is not None or self.calls == "required"


@dataclass(slots=True)
class Frame:
    """A place in the answer, or in drafts behind it."""

    state: State
    token: int = -1
    """The token before it."""
    call: Matcher | None = None
    """Of the tool call it stands in."""
    ruling: Matcher | None = None
    """The grammar in whose text it is."""
    is_strict: bool = False
    """Whether nothing of the format may stand here, only the text of the answer or of a call."""
    fed: Matcher | None = None
    """What has consumed the token before it."""
    is_done: bool = False
    mask: np.ndarray | None = None
    has_mask: bool = False
    """Whether ``mask`` is known; it may be known to be None."""
    is_settled: bool = False
    """Whether there is a choice is known: from the mask, or from one of the following."""
    is_open: bool = False
    """Whether a grammar rules here, and more than one token may follow."""
    certain: tuple[int, ...] = ()
    """Tokens that follow without a choice."""


@dataclass(eq=False)
class Guide:
    """One answer's way through its rules."""

    rules: Rules
    failed: str | None = None
    """Why its grammar cannot go on."""
    length: int = 0
    """Tokens of the answer."""
    cut_at: int | None = None
    """Where in the answer the reasoning was ended, its budget being used up."""
    _frames: list[Frame] = field(default_factory=list)
    """The newest committed place, then those behind drafts."""

    def __post_init__(self) -> None:
        self._answer = self.rules.answer.begin() if self.rules.answer else None
        self._frames = [self._placed(Frame(self.rules.regions.start()))]
        self._fixed: dict[tuple[int, ...], np.ndarray] = {}
        # End tokens stay as the grammar has them: they say that it may end.
        full = np.full(-(-self.rules.vocab_size // 32), 0xFFFFFFFF, dtype=np.uint32)
        _set(full, self.rules.control_ids, False)
        _set(full, self.rules.end_ids, True)
        self._text_only = full
        self._special = frozenset((*self.rules.control_ids, *self.rules.end_ids))

    @property
    def state(self) -> State:
        """Where the answer is."""
        return self._frames[0].state

    @property
    def is_done(self) -> bool:
        """Whether the form of the answer is complete and it has ended."""
        return self._frames[0].is_done

    @property
    def has_no_choice(self) -> bool:
        """Whether one token only may follow."""
        frame = self._settled(())
        return not frame.is_open and self._only(frame) is not None

    @property
    def is_due(self) -> bool:
        """Whether the reasoning has used up its budget."""
        return self._is_due(self._frames[0])

    def mask(self, drafts: Sequence[int] = ()) -> np.ndarray | None:
        """The tokens that may follow the answer and these drafts; None if all may.

        uint32 words as in ``SampleRow.mask``. Every draft must be allowed where it stands.
        """
        return self._mask(self._at(drafts))

    def can_try(self, drafts: Sequence[int] = ()) -> bool:
        """Whether ``allows`` is quicker here than ``mask``."""
        frame = self._settled(drafts)
        return frame.is_open and not frame.has_mask

    def allows(self, token: int, drafts: Sequence[int] = ()) -> bool:
        """Whether a token may follow the answer and these drafts: a bit of their mask."""
        said = self.says(token, drafts)
        if said is None:
            mask = self.mask(drafts)
            return mask is None or _has(mask, token)
        return said

    def says(self, token: int, drafts: Sequence[int] = ()) -> bool | None:
        """``allows`` where it can be said without a mask; else None."""
        return self._said(token, self._triable(drafts))

    def tester(
        self, drafts: Sequence[int] = ()
    ) -> tuple[Callable[[int], bool | None], Callable[[int], int | None]]:
        """For many tokens in one place: ``says``; and a token that another may not follow without.

        Where that is refused, the other would be, too; None if none is known.
        """
        frame = self._triable(drafts)
        if frame is None or not frame.is_strict or frame.ruling is None:
            return lambda token: self._said(token, frame), lambda token: None
        accepts, start_of, special = frame.ruling.accepts, frame.ruling.start_of, self._special
        return (
            lambda token: self._said(token, frame) if token in special else accepts(token),
            lambda token: None if token in special else start_of(token),
        )

    def _triable(self, drafts: Sequence[int]) -> Frame | None:
        """Where tokens can be tried; the grammars are there then."""
        frame = self._settled(drafts)
        if not frame.is_open or frame.has_mask:
            return None
        if len(self._frames) > 1:
            self._shorten(len(drafts) + 1)
        return frame

    def _said(self, token: int, frame: Frame | None) -> bool | None:
        if frame is None:
            return None
        assert frame.ruling is not None
        if token in self._special:
            return self._ends(frame, token) and frame.ruling.may_end() if frame.is_strict else None
        if frame.ruling.accepts(token):
            return True
        # Around a grammar's text the format may allow it.
        return False if frame.is_strict else None

    def valid(self, drafts: Sequence[int]) -> int:
        """How many of the drafts could be chosen, before one that cannot."""
        for count, token in enumerate(drafts):
            frame = self._at(drafts[:count])
            if self._is_due(frame) or frame.is_done or not self.allows(token, drafts[:count]):
                return count
        return len(drafts)

    def commit(self, token: int) -> None:
        """The answer goes on with a token."""
        if len(self._frames) > 1 and self._frames[1].token != token:
            self._shorten(1)
        if len(self._frames) == 1:
            self._push(token)
        del self._frames[0]
        self.length += 1

    def forced(self, *, room: int, stops: Sequence[int]) -> list[int]:
        """What follows without a choice, at most ``room`` tokens; it counts as committed."""
        found: list[int] = []
        while len(found) < room and not self.is_done and self.failed is None:
            if self.is_due:
                some, self.cut_at = self.rules.stop_thinking, self.length
            else:
                frame = self._settled(())
                one = None if frame.is_open else self._only(frame)
                some = () if one is None else (one,)
            for token in some:
                self.commit(token)
            found += some
            if not some or found[-1] in stops:
                break
        return found[:room]

    # -- the way ---------------------------------------------------------------------------------

    def _at(self, drafts: Sequence[int]) -> Frame:
        same = 0
        for frame, token in zip(self._frames[1:], drafts, strict=False):
            if frame.token != token:
                self._shorten(1 + same)
                break
            same += 1
        for token in drafts[same:]:
            self._push(token)
        return self._frames[len(drafts)]

    def _shorten(self, count: int) -> None:
        """Forget places behind drafts until ``count`` are left."""
        while len(self._frames) > count:
            last = self._frames.pop()
            if last.fed is not None:
                last.fed.rollback(1)

    def _push(self, token: int) -> None:
        before, rules = self._frames[-1], self.rules
        if not before.is_settled:
            self._settle(before)  # the grammars move on below
        state = rules.regions.next(before.state, token)
        frame = Frame(state, token)
        if state is before.state:
            # In the middle of a text, as almost always: no tag, and not the first of anything.
            frame.call, frame.ruling = before.call, before.ruling
            frame.is_strict = before.is_strict
        if len(before.certain) > 1 and before.certain[0] == token:
            frame.certain, frame.is_settled = before.certain[1:], True
        matcher = before.ruling
        if rules.is_closed and token in rules.end_ids and before.state.region == "content":
            frame.is_done = True
        elif matcher is not None and self._is_text(before.state, state, token):
            if matcher.consume(token):
                frame.fed = matcher
            elif self.failed is None:
                self.failed = f"the grammar does not go on with token {token}"
        if state is not before.state:
            if state.calls > before.state.calls:
                frame.call = rules.call.begin() if rules.call else None
            elif state.region == "tool":
                frame.call = before.call
            self._placed(frame)
        self._frames.append(frame)

    def _placed(self, frame: Frame) -> Frame:
        """A frame whose state and call are known, and what rules it."""
        frame.ruling = self._ruling(frame)
        frame.is_strict = frame.state.region == "tool" or _is_under_way(frame.state)
        return frame

    def _ruling(self, frame: Frame) -> Matcher | None:
        """The grammar in whose text a place is."""
        state, rules = frame.state, self.rules
        if rules.covers_calls:
            return self._answer if state.region != "reasoning" else None
        if state.region == "tool":
            return frame.call
        return self._answer if state.region == "content" and not state.calls else None

    def _ends(self, frame: Frame, token: int) -> bool:
        """Whether a token ends the text of the grammar that rules a place."""
        closing = self.rules.regions.tool[1].id
        if frame.state.region == "tool" and closing is not None and not self.rules.covers_calls:
            return token == closing
        return token in self.rules.end_ids

    def _is_text(self, before: State, after: State, token: int) -> bool:
        """Whether a token is part of what a grammar rules, not of the format around it."""
        if self.rules.covers_calls:
            return not (before.lead is not None and token in self.rules.regions.newlines)
        if before.region == "tool":
            # A tag spelled in the grammar's own text ends the region and is consumed.
            return after.region == "tool" or self.rules.regions.tool[1].id is None
        if after.region != before.region:
            return False
        return before.lead is None or token not in self.rules.regions.newlines

    def _is_due(self, frame: Frame) -> bool:
        budget = self.rules.budget
        state = frame.state
        return budget is not None and state.region == "reasoning" and state.thought >= budget

    # -- choices ---------------------------------------------------------------------------------

    def _settled(self, drafts: Sequence[int]) -> Frame:
        frame = self._at(drafts) if drafts else self._frames[0]
        if not frame.is_settled:
            self._settle(frame)
        return frame

    def _settle(self, frame: Frame) -> None:
        """Learn whether there is a choice, without a mask if that can be; the place is the newest.

        Behind it the grammars move on.
        """
        matcher = frame.ruling
        if matcher is None or matcher.knows_mask():
            self._mask(frame)
        elif not matcher.may_be_forced():
            frame.is_open = True
        else:
            certain = matcher.certain() if frame.is_strict else None
            # An end token that has a text may be meant as text: the mask tells.
            if certain is None or not self._special.isdisjoint(certain):
                self._mask(frame)
            else:
                frame.certain, frame.is_open = certain, not certain
        frame.is_settled = True

    def _only(self, frame: Frame) -> int | None:
        """The token that follows a place without a choice."""
        return frame.certain[0] if frame.certain else _only(self._mask(frame))

    # -- masks -----------------------------------------------------------------------------------

    def _mask(self, frame: Frame) -> np.ndarray | None:
        if not frame.has_mask:
            # Of the newest place, as a rule: behind it the grammars have moved on.
            if frame is not self._frames[-1]:
                self._shorten(next(i for i, one in enumerate(self._frames, 1) if one is frame))
            frame.mask, frame.has_mask = self._find_mask(frame), True
        return frame.mask

    def _find_mask(self, frame: Frame) -> np.ndarray | None:
        rules, state = self.rules, frame.state
        regions, matcher = rules.regions, frame.ruling
        opening = regions.tool[0].id
        if state.region == "reasoning":
            ends = rules.end_ids if rules.is_closed else ()
            no_calls = rules.calls == "none" or (rules.answer and rules.calls == "free")
            return self._without([*ends, *([opening] if no_calls and opening is not None else ())])
        if state.region == "tool":
            if matcher is None:
                return None
            words = self._filled(matcher)
            closing = regions.tool[1].id
            if closing is not None and not rules.covers_calls:
                may_end = any(_has(words, token) for token in rules.end_ids)
                _set(words, rules.end_ids, False)
                _set(words, [closing] if may_end else [], True)
            return words
        if matcher is not None and frame.is_strict:
            return self._only_these(rules.end_ids) if matcher.is_over() else self._filled(matcher)
        extra = [token for token, n in regions.newlines.items() if n <= (state.lead or 0)]
        thinks = regions.think[0].id
        if thinks is not None and regions.may_think and not state.begun:
            extra.append(thinks)
        may_call = rules.calls in ("auto", "required") and (rules.parallel or not state.calls)
        if may_call and not state.said and opening is not None and not rules.covers_calls:
            extra.append(opening)
        if matcher is not None:
            words = self._filled(matcher)
            _set(words, extra, True)
            return words
        if rules.is_closed and (state.calls or rules.calls == "required"):
            again = [opening] if may_call and opening is not None else []
            return self._only_these([*extra, *again, *(rules.end_ids if state.calls else ())])
        if rules.calls == "none" or (state.calls and not rules.parallel):
            return self._without([opening] if opening is not None else [])
        return None

    def _filled(self, matcher: Matcher) -> np.ndarray:
        words = np.zeros(-(-self.rules.vocab_size // 32), dtype=np.uint32)
        problem = matcher.fill(words)
        words &= self._text_only
        if problem is None and not matcher.may_end():
            # Of an end token that has a text, the grammar may have meant the text.
            _set(words, self.rules.end_ids, False)
        if problem is not None or not np.count_nonzero(words):
            self.failed = self.failed or problem or "the grammar allows nothing"
            _set(words, self.rules.end_ids, True)
        return words

    def _without(self, tokens: Sequence[int]) -> np.ndarray | None:
        if not tokens:
            return None
        key = (-1, *tokens)
        if key not in self._fixed:
            words = np.full(-(-self.rules.vocab_size // 32), 0xFFFFFFFF, dtype=np.uint32)
            _set(words, tokens, False)
            self._fixed[key] = words
        return self._fixed[key]

    def _only_these(self, tokens: Sequence[int]) -> np.ndarray:
        key = tuple(tokens)
        if key not in self._fixed:
            words = np.zeros(-(-self.rules.vocab_size // 32), dtype=np.uint32)
            _set(words, tokens, True)
            self._fixed[key] = words
        return self._fixed[key]


def _is_under_way(state: State) -> bool:
    """Whether nothing of the format may stand here, only the answer's own text."""
    return state.region == "content" and state.said and state.lead is None


def _has(words: np.ndarray, token: int) -> bool:
    return bool(words[token >> 5] >> np.uint32(token & 31) & np.uint32(1))


def _set(words: np.ndarray, tokens: Sequence[int], value: bool) -> None:
    for token in tokens:
        bit = np.uint32(1 << (token & 31))
        if value:
            words[token >> 5] |= bit
        else:
            words[token >> 5] &= ~bit


def _only(mask: np.ndarray | None) -> int | None:
    """The token of a mask that allows one only."""
    if mask is None:
        return None
    places = np.flatnonzero(mask)
    if len(places) != 1:
        return None
    word = int(mask[places[0]])
    return int(places[0]) * 32 + word.bit_length() - 1 if word & (word - 1) == 0 else None
