"""``GET /inspect/ID``: inside an answer, for the page's inspect view.

A request with ``"qnext": {"inspect": true}`` leaves its token ids and what the MTP head had drafted
for them; the last few answers are remembered. When one is inspected, its text is run once more as a
prompt, which gives the log-probabilities and the experts of every token. So an answer that nobody
inspects costs nothing, and one that is costs one prefill.
"""

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

from qnext import cost
from qnext.answers import Delta, TextReader
from qnext.engine.request import Request
from qnext.engine.watch import Watch
from qnext.errors import QnextError
from qnext.llm import LLM
from qnext.serve.refusals import ApiError
from qnext.serve.worker import Worker

MAX_REMEMBERED = 32
"""Answers that can be inspected, the latest ones."""
MAX_TOKENS = 2048
"""Tokens of an answer that are shown, from its beginning."""
TOP = 10
"""Alternatives of a token."""

Pairs = list[tuple[Request, TextReader]]


@dataclass(slots=True)
class _Answer:
    """One answer that can be inspected."""

    request: Request
    watch: Watch = field(default_factory=Watch)
    found: dict[str, Any] | None = None


class Inspector:
    """Remembers answers and looks into them."""

    def __init__(self, llm: LLM, worker: Worker) -> None:
        self._llm, self._worker = llm, worker
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        self._undefined = frozenset(llm.tokenizer.undefined_ids(llm.config.vocab_size))

    def watch(self, pairs: Pairs) -> Pairs:
        """The same requests, with somewhere to leave the tokens and drafts of the first."""
        (request, reader), *others = pairs
        watched = replace(request, watch=Watch())
        reader.request = watched
        return [(watched, reader), *others]

    def remember(self, name: str, request: Request) -> None:
        """Keep a watched request under the id of its answer, as long as there is room."""
        assert request.watch is not None
        self._answers[name] = _Answer(request, request.watch)
        if len(self._answers) > MAX_REMEMBERED:
            self._answers.popitem(last=False)

    async def inspect(self, name: str) -> dict[str, Any]:
        """What is inside an answer. Raises ApiError where it is not remembered."""
        answer = self._answers.get(name)
        if answer is None:
            raise ApiError(
                404,
                f"inspect: answer {name!r} is not remembered. The server keeps the last "
                f"{MAX_REMEMBERED} that were asked for with qnext.inspect, until it is restarted; "
                "let the model answer again to look inside.",
                param="id",
                code="answer_not_found",
            )
        if answer.found is None:
            answer.found = await self._look(name, answer)
        return answer.found

    async def _look(self, name: str, answer: _Answer) -> dict[str, Any]:
        prompt = answer.request.prompt_ids
        # The text has to leave room for one more token to be accepted as a prompt.
        room = self._llm.max_model_len - 1 - len(prompt)
        tokens = answer.watch.tokens[: min(MAX_TOKENS, room)]
        if not tokens:
            raise ApiError(404, f"inspect: answer {name!r} has no tokens yet.", code="no_tokens")
        watch = Watch(routes_from=len(prompt))
        pair = self._llm.prepare_score([*prompt, *tokens], top=TOP, watch=watch)
        try:
            job = await self._worker.submit([pair])
        except QnextError as error:
            raise ApiError.of(error) from error
        last: Delta | None = None
        try:
            async for batch in job.batches():
                last = batch[-1][1]
        except QnextError as error:
            raise ApiError(503, str(error), type="server_error", code="engine_stopped") from error
        finally:
            job.cancel()
        if last is None or not last.prompt_logprobs:
            raise ApiError(503, "inspect: the server is being stopped.", code="server_stopping")
        return self._body(name, answer, tokens, last, watch)

    def _body(
        self, name: str, answer: _Answer, tokens: list[int], scored: Delta, watch: Watch
    ) -> dict[str, Any]:
        config, prompt = self._llm.config, len(answer.request.prompt_ids)
        shown = []
        for number, (token, found) in enumerate(
            zip(tokens, scored.prompt_logprobs[prompt - 1 :], strict=True)
        ):
            draft = answer.watch.drafts.get(number)
            shown.append(
                {
                    "id": token,
                    "text": self._text(token),
                    "logprob": found.logprob,
                    "top": [
                        {"id": one, "text": self._text(one), "logprob": logprob}
                        for one, logprob in found.top
                    ],
                    "draft": None if draft is None else self._text(draft),
                    "accepted": None if draft is None else draft == token,
                }
            )
        dtype = str(self._llm.model.dtype).removeprefix("torch.")
        return {
            "id": name,
            "prompt_tokens": prompt,
            "completion_tokens": len(answer.watch.tokens),
            "tokens": shown,
            "layers": [
                {"kind": kind, "sparse": config.is_sparse(layer)}
                for layer, kind in enumerate(config.layer_types)
            ],
            "num_experts": config.num_experts,
            "experts_per_token": config.num_experts_per_tok if config.num_experts else 0,
            "routes": watch.routes.tolist(),
            "memory": {
                "kv_bytes_per_token": cost.kv_bytes_per_token(config, dtype),
                "state_bytes": cost.slot_bytes(config, dtype),
            },
        }

    def _text(self, token: int) -> str:
        # Rows of the head that the tokenizer has no token for can be among the alternatives.
        if token in self._undefined:
            return f"<unused {token}>"
        return self._llm.tokenizer.decode([token])
