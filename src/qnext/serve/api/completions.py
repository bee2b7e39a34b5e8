"""``POST /v1/completions``: plain texts or token ids to continue."""

from typing import Any

from qnext.answers import Delta
from qnext.engine.request import TokenLogprobs
from qnext.errors import RequestError
from qnext.llm import LLM
from qnext.serve.api.fields import Head, Pairs, Sampling, StreamOptions
from qnext.serve.api.gathered import Gathered, LogprobsText, finite, usage_body
from qnext.serve.events import DONE, event
from qnext.serve.refusals import ApiError

MAX_PROMPTS = 64


class CompletionRequest(Sampling, kw_only=True):
    """Texts to continue: one, or several side by side."""

    IGNORED = frozenset({"user"})
    REFUSED = {  # noqa: RUF012
        "suffix": ("",), "use_beam_search": (False,), "guided_json": (), "guided_regex": (),
        "guided_choice": (), "guided_grammar": (),
    }  # fmt: skip

    LABORIOUS = frozenset({"n", "best_of"})

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None

    def is_laborious(self) -> bool:
        """Several prompts are, too."""
        return super().is_laborious() or not isinstance(self.prompt, str)

    def prompts(self) -> list[Any]:
        """The prompts, one item each. Raises RequestError for anything else."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if _are_ids(given):
            return [given]
        found = given
        texts = all(isinstance(item, str) for item in found)
        if not texts and not all(isinstance(item, list) and _are_ids(item) for item in found):
            raise RequestError(
                "prompt: expected str, a list of str, a list of token ids, or a list of such lists."
            )
        if len(found) > MAX_PROMPTS:
            raise RequestError(f"prompt: expected at most {MAX_PROMPTS} prompts, got {len(found)}.")
        return found

    def prepare(self, llm: LLM) -> Pairs:
        """The requests that answer it, prompt by prompt. Raises QnextError."""
        n = self.n or 1
        if self.best_of not in (None, n):
            raise RequestError(
                f"best_of: {self.best_of} asks for more answers than n ({n}) to choose from; this "
                "server returns every answer it makes. Leave best_of out."
            )
        scores = {"prompt_logprobs": self.logprobs} if self.echo else {}
        params = self.params(llm, logprobs=self.logprobs, **scores)
        return [
            pair
            for prompt in self.prompts()
            for pair in llm.choices(*llm.prepare_text(prompt, params))
        ]

    def writer(self, llm: LLM, head: Head) -> "CompletionWriter":
        """Writes the answer."""
        return CompletionWriter(self, llm, head)


def _are_ids(items: list[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in items)


class CompletionWriter:
    """One text completion, of one or several prompts."""

    def __init__(self, asked: CompletionRequest, llm: LLM, head: Head) -> None:
        self._per_prompt = asked.n or 1
        prompts = asked.prompts()
        self._ids = [
            llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            for prompt in (prompts if asked.echo else [])
        ]
        count = len(prompts) * self._per_prompt
        self._choices = [Gathered() for _ in range(count)]
        self._prompt_logprobs: list[tuple[TokenLogprobs, ...]] = [()] * count
        self._offsets = [0] * count
        """Characters of each choice that were given log-probabilities."""
        self._explain = asked.wants_explanation()
        self._usage = bool((asked.stream_options or StreamOptions()).include_usage)
        hidden = () if asked.ignore_eos else (*llm.eos_ids, *(asked.stop_token_ids or ()))
        self._names = LogprobsText(llm.tokenizer, hidden)
        self._wants_logprobs = asked.logprobs is not None
        self._text = llm.tokenizer.decode
        self._head = {
            "id": head.id, "object": "text_completion", "created": head.created,
            "model": head.model,
        }  # fmt: skip
        self._echoed = [False] * count

    def take(self, index: int, delta: Delta) -> None:
        """Note a delta."""
        if delta.prompt_logprobs:
            self._prompt_logprobs[index] = delta.prompt_logprobs
        self._choices[index].take(delta)

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, found in enumerate(self._choices):
            logprobs = self._logprobs(index, found.logprobs) if self._wants_logprobs else None
            choices.append(
                {
                    "index": index,
                    "text": self._prompt_text(index) + found.output.content,
                    "logprobs": logprobs,
                    "finish_reason": found.finish_reason,
                }
            )
        return {**self._head, "choices": choices, "usage": self._counts()}

    def opening(self) -> bytes:
        """Nothing: the first chunk has text."""
        return b""

    def piece(self, index: int, delta: Delta) -> bytes:
        """Chunks of one delta: text first, then the reason the answer ended."""
        self.take(index, delta)
        logprobs = None
        if self._wants_logprobs and (delta.logprobs or delta.prompt_logprobs):
            logprobs = self._logprobs(index, delta.logprobs)
        text = delta.text
        if not self._echoed[index]:
            text, self._echoed[index] = self._prompt_text(index) + text, True
        events = b""
        if text or logprobs is not None:
            events = self._chunk(index, text, logprobs, None)
        if delta.finish_reason is not None:
            events += self._chunk(index, "", None, delta.finish_reason)
        return events

    def closing(self) -> bytes:
        """The usage, where it was asked for, and the end."""
        if not self._usage:
            return DONE
        return event({**self._head, "choices": [], "usage": self._counts()}) + DONE

    def failure(self, error: ApiError) -> bytes:
        """An error is the last event."""
        return event(error.body())

    def _counts(self) -> dict[str, Any]:
        return usage_body(self._choices, per_prompt=self._per_prompt, explain=self._explain)

    def _prompt_text(self, index: int) -> str:
        return self._text(self._ids[index // self._per_prompt]) if self._ids else ""

    def _logprobs(self, index: int, items: Any) -> dict[str, Any]:
        """The lists of ``logprobs`` for some tokens; the first have the prompt's before them."""
        rows: list[tuple[int, float | None, dict[str, float] | None]] = []
        if self._ids and not self._offsets[index]:
            ids = self._ids[index // self._per_prompt]
            rows.append((ids[0], None, None))
            known = self._prompt_logprobs[index // self._per_prompt * self._per_prompt]
            rows += [self._row(item) for item in known]
        rows += [self._row(item) for item in self._names.shown(items)]
        offsets, at = [], self._offsets[index]
        tokens = [self._names.token(token)[0] for token, _, _ in rows]
        for text in tokens:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        return {
            "tokens": tokens,
            "token_logprobs": [value for _, value, _ in rows],
            "top_logprobs": [top for _, _, top in rows],
            "text_offset": offsets,
        }

    def _row(self, item: TokenLogprobs) -> tuple[int, float, dict[str, float]]:
        top = {self._names.token(token)[0]: finite(value) for token, value in item.top}
        return item.token_id, finite(item.logprob), top

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None
    ) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._usage:
            chunk["usage"] = None
        return event(chunk)
