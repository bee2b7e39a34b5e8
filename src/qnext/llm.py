"""LLM: prompts in, texts out. The offline facade over text and engine; the server builds on it too.

Text stays at this edge: the engine sees token ids only. The way back, from events to pieces of
text, is in ``answers.py``.
"""

import itertools
import json
import logging
import sys
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, overload

import torch
from tqdm import tqdm

from qnext import native
from qnext.answers import Completion, Conversation, Delta, Message, Score, TextReader
from qnext.engine.engine import Engine
from qnext.engine.guide import Rules
from qnext.engine.request import (
    FinishReason,
    Request,
    SamplingParams,
)
from qnext.engine.sizes import check_counts, parse_bytes
from qnext.engine.watch import Watch
from qnext.errors import ConfigError, RequestError, TokenizerError
from qnext.model.model import CausalLM
from qnext.model.native import NativeModel
from qnext.rules import RuleBook, ToolUse
from qnext.text.calls.parts import assemble
from qnext.text.chat import BUILTIN_ORIGIN, ChatTemplate
from qnext.text.history import beginning_after, stable_lengths
from qnext.text.parse import TOOL_OPEN
from qnext.text.places import message_places
from qnext.text.tokenizer import Tokenizer
from qnext.text.vocabulary import KEPT_FILES
from qnext.weights.decoder import load_decoder
from qnext.weights.fingerprint import fingerprint
from qnext.weights.folder import resolve_model

_log = logging.getLogger(__name__)

MAX_ANSWERED = 4
"""Conversations remembered whose next turn may be prepared."""


class LLM:
    """A model folder (or ``qnext-mini``) ready to answer.

    ``backend`` chooses the kernels: ``native``, ``torch``, or ``auto`` for the fastest that fit.
    ``quantization`` (``int8``, ``int4``) packs the weights while they are read; a folder written by
    ``qnext quantize`` is packed already. ``threads`` is the native kernels' own number, by default
    PyTorch's.

    ``memory`` bounds the cache ("2GiB", "512MiB" or bytes). ``max_model_len`` bounds prompt and
    answer together; by default the model's own limit. ``speculative_tokens`` is how many tokens
    the MTP head drafts per step (0 for none, "auto" to decide by measurement); the tokens stay the
    same, on PyTorch up to rounding. ``prefix_cache`` lets prompts start where earlier ones were;
    ``background_prefill`` also lets ``idle`` prepare the next turn of conversations.
    Tokens and log-probabilities of the native kernels are bit-identical whatever else runs;
    ``batch_invariant`` makes those of PyTorch so, in float32 and bfloat16, and checks either at the
    start. Without it PyTorch's differ by rounding (docs/numerics.md).

    ``cache_dir`` is a folder where prefixes survive a restart (it then holds what was said in
    conversations), of at most ``cache_disk_limit`` bytes per model; they are written when memory
    runs out and by ``close``. Not thread-safe: use it from one thread.
    """

    def __init__(
        self,
        model: str | Path = "qnext-mini",
        *,
        dtype: str = "auto",
        device: str = "cpu",
        backend: str = "auto",
        quantization: str | None = None,
        threads: int | None = None,
        max_num_seqs: int = 16,
        max_batch_tokens: int = 2048,
        memory: str | int = "1GiB",
        max_model_len: int | None = None,
        speculative_tokens: int | str = 0,
        prefix_cache: bool = True,
        background_prefill: bool = True,
        snapshot_interval: int = 0,
        max_chunk_tokens: int | None = None,
        batch_invariant: bool = False,
        cache_dir: str | Path | None = None,
        cache_disk_limit: str | int = "10GiB",
    ) -> None:
        check_counts(
            max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens,
            max_model_len=max_model_len, max_chunk_tokens=max_chunk_tokens, threads=threads,
        )  # fmt: skip
        if native.unfit() is None:
            native.load().set_threads(threads or torch.get_num_threads())
        folder = resolve_model(model)
        tokenizer = Tokenizer.from_folder(folder)
        template = ChatTemplate.from_folder(folder)
        if template.origin == BUILTIN_ORIGIN:
            _log.warning(
                "%s has no chat template: conversations use the built-in one of Qwen3. Put the "
                "model's own into chat_template.jinja if it has another format.", folder,
            )  # fmt: skip
        self.name = folder.name
        self._assemble(
            load_decoder(
                folder,
                dtype=dtype,
                device=device,
                backend=backend,
                quantization=quantization,
                batch_invariant=batch_invariant,
            ),
            tokenizer,
            template,
            _generation_config(folder),
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            memory_bytes=parse_bytes(memory),
            max_model_len=max_model_len,
            speculative_tokens=speculative_tokens,
            prefix_cache=prefix_cache,
            background_prefill=background_prefill,
            snapshot_interval=snapshot_interval,
            max_chunk_tokens=max_chunk_tokens,
            batch_invariant=batch_invariant,
            cache_dir=cache_dir,
            cache_disk_limit=parse_bytes(cache_disk_limit, name="cache_disk_limit"),
            cache_key=_cache_key(folder, quantization) if cache_dir is not None else None,
        )

    def _assemble(
        self,
        model: CausalLM | NativeModel,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        generation: Mapping[str, Any],
        *,
        background_prefill: bool = True,
        **engine: Any,
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise TokenizerError(
                f"the tokenizer defines {tokenizer.vocab_size} ids and the model's vocabulary has "
                f"{model.config.vocab_size}: they do not belong together. Use the tokenizer files "
                "that came with the checkpoint."
            )
        self.model, self.config = model, model.config
        self.tokenizer, self.template = tokenizer, template
        self._generation = generation
        self.eos_ids = self._end_ids()
        self.engine = Engine(model, defined_ids=tokenizer.vocab_size, **engine)
        self.max_model_len = self.engine.max_model_len
        if (engine.get("max_model_len") or 0) > self.max_model_len:
            _log.warning(
                "A context of %s tokens was asked for; the model's holds %s, and no more are "
                "used.", f"{engine['max_model_len']:,}", f"{self.max_model_len:,}",
            )  # fmt: skip
        self.rule_book = RuleBook(
            tokenizer, template=template, eos_ids=self.eos_ids,
            vocab_size=self.config.vocab_size,
        )  # fmt: skip
        self._numbers = itertools.count()
        self._answered: deque[tuple[Conversation, Message]] = deque(
            maxlen=MAX_ANSWERED if background_prefill and self.engine.prefix.num_slots else 0
        )
        self._inbox: dict[str, deque[Delta]] = {}
        self._readers: dict[str, TextReader] = {}
        # Also when nobody calls close(): when this object goes, or the interpreter ends.
        self._closing = weakref.finalize(self, self.engine.close)

    def close(self) -> None:
        """Write the prefix cache to ``cache_dir``, if there is one. Harmless when done twice."""
        self._closing()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    # -- requests --------------------------------------------------------------------------------

    def default_params(self, **overrides: Any) -> SamplingParams:
        """The checkpoint's own sampling settings (generation_config.json), with overrides."""
        settings: dict[str, Any] = {}
        if self._generation.get("do_sample", True):
            for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
                if self._generation.get(key) is not None:
                    settings[key] = self._generation[key]
        else:
            settings["temperature"] = 0.0
        return SamplingParams(**{**settings, **overrides})

    def prepare_text(
        self, prompt: str | Sequence[int], params: SamplingParams
    ) -> tuple[Request, TextReader]:
        """A request that continues plain text or token ids."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            ids = [int(token) for token in prompt]
        text = prompt if isinstance(prompt, str) else self.rule_book.tags_in(ids)
        plain = params.form is None
        regions = self.rule_book.regions(text, chat=False, plain=plain)
        request = self._request(ids, params, rules=self.rule_book.rules(params, regions))
        return request, TextReader(
            self.tokenizer,
            request,
            split_reasoning=False,
            regions=regions,
        )

    def prepare_score(
        self, prompt: str | Sequence[int], *, top: int = 0, watch: Watch | None = None
    ) -> tuple[Request, TextReader]:
        """A request that says how likely a text is, with ``top`` alternatives of every token.

        They are the ``prompt_logprobs`` of its last delta; ``watch`` also records the routing.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        params = SamplingParams(temperature=0.0, prompt_logprobs=top)
        request = replace(self._request(ids, params, score_only=True), watch=watch)
        return request, TextReader(
            self.tokenizer, request, split_reasoning=False,
            regions=self.rule_book.regions("", chat=False),
        )  # fmt: skip

    def prepare_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        strict: bool | None = None,
        template_options: Mapping[str, Any] | None = None,
        parse_tools: bool = True,
    ) -> tuple[Request, TextReader]:
        """A request that answers a conversation through the checkpoint's chat template.

        The parameters are those of ``chat``; ``template_options`` go to the template as they are.
        ``parse_tools`` False leaves tool calls in the text, where the request forbids them.
        """
        options = {**(template_options or {}), "tools": tools}
        if enable_thinking is not None:
            options["enable_thinking"] = enable_thinking
        # Encoded with control tokens only where the template wrote them, not where a user did.
        prompt, ids = self.template.encode_prompt(messages, self.tokenizer, **options)
        hints = stable_lengths(self.template, self.tokenizer, messages, ids, options)
        places = message_places(self.tokenizer, ids)
        use = ToolUse(
            tools=tools or (), choice=tool_choice, parallel=parallel_tool_calls, strict=strict
        )
        regions = self.rule_book.regions(prompt, chat=True)
        rules = self.rule_book.rules(params, regions, use)
        request = self._request(ids, params, hints=hints, places=places, rules=rules)
        return request, TextReader(
            self.tokenizer,
            request,
            split_reasoning=True,
            regions=regions,
            conversation=Conversation(messages=tuple(messages), options=options),
            tool_format=self.template.tool_format if tools and parse_tools else None,
            tools=tools,
        )

    def _request(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        hints: tuple[tuple[int, str], ...] = (),
        places: tuple[tuple[int, str], ...] = (),
        rules: Rules | None = None,
        score_only: bool = False,
    ) -> Request:
        return Request(
            id=f"request-{next(self._numbers)}",
            prompt_ids=tuple(ids),
            params=params,
            eos_ids=self.eos_ids,
            bad_ids=self._bad_ids(params.bad_words),
            hints=hints,
            places=places,
            rules=rules,
            score_only=score_only,
        )

    def _bad_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences that spell a word, at the start of a text and after a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word, " " + word.lstrip(" ")):
                found[tuple(self.tokenizer.encode(text, allow_added=False))] = None
        return tuple(found)

    # -- answers ---------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Completion]:
        """Continue each prompt; one completion per prompt, in order.

        A single string is a list of one. ``params`` may be one for all or one per prompt. A
        progress bar is shown on a terminal when there is more than one prompt.
        """
        several = _several(prompts)
        prepared = [
            self.choices(*self.prepare_text(prompt, one))  # type: ignore[arg-type]
            for prompt, one in zip(several, self._per_prompt(params, len(several)), strict=True)
        ]
        return self._answers(prepared, thinks=False, bar="generate", progress=progress)

    def score(self, prompts: str | Sequence[str] | Sequence[Sequence[int]]) -> list[Score]:
        """Log-probability of every token of each text, given the tokens before it."""
        several = _several(prompts)
        pairs = []
        for prompt in several:
            pairs.append(self.prepare_score(prompt))
        scores = []
        with self._submitted(pairs) as names:
            for (request, _), name in zip(pairs, names, strict=True):
                found = _complete(self._follow(name)).prompt_logprobs
                logprobs = tuple(one.logprob for one in found)
                scores.append(Score(token_ids=request.prompt_ids, logprobs=logprobs))
        return scores

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        strict: bool | None = None,
        progress: bool | None = None,
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        strict: bool | None = None,
        progress: bool | None = None,
    ) -> list[Completion]: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        strict: bool | None = None,
        progress: bool | None = None,
    ) -> Completion | list[Completion]:
        """Answer a conversation: messages are dicts with ``role`` and ``content``.

        A list of conversations is answered together; then ``params`` may be one for all or one
        per conversation, and a list of answers comes back.

        ``tools`` are functions as OpenAI lists them. ``tool_choice`` is "auto", "none", "required"
        (at least one call) or ``{"name": ...}`` (that function). ``parallel_tool_calls=False``
        allows one call. ``strict`` binds arguments to the tools' schemas; None leaves that to each
        function's own ``strict``, and binds those of a required call. Raises RequestError for what
        cannot be enforced, before anything is generated.
        """
        several = bool(messages) and all(isinstance(one, (list, tuple)) for one in messages)
        asked = cast("Sequence[Sequence[Message]]", messages if several else [messages])
        params = params or self.default_params(max_tokens=None)
        prepared = [
            self.choices(
                *self.prepare_chat(
                    conversation, one, enable_thinking=enable_thinking, tools=tools,
                    tool_choice=tool_choice, parallel_tool_calls=parallel_tool_calls, strict=strict,
                )
            )
            for conversation, one in zip(asked, self._per_prompt(params, len(asked)), strict=True)
        ]  # fmt: skip
        answers = self._answers(prepared, thinks=True, bar="chat", progress=progress)
        return answers if several else answers[0]

    def stream(
        self,
        prompt: str | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        strict: bool | None = None,
    ) -> "Stream":
        """Like ``generate`` (for a string) or ``chat`` (for messages), piece by piece.

        Closing the stream, or dropping it, cancels the request. One answer only: ``n`` must be 1.
        """
        params = params or self.default_params(max_tokens=None)
        if params.n != 1:
            raise RequestError(f"stream: n must be 1, found {params.n}; use generate or chat.")
        if isinstance(prompt, str):
            pair = self.prepare_text(prompt, params)
        else:
            pair = self.prepare_chat(
                prompt, params, enable_thinking=enable_thinking, tools=tools,
                tool_choice=tool_choice, parallel_tool_calls=parallel_tool_calls, strict=strict,
            )  # fmt: skip
        return Stream(self, self._submit(*pair))

    def choices(self, request: Request, reader: TextReader) -> list[tuple[Request, TextReader]]:
        """The ``n`` answers to one prompt, which is run once for all of them."""
        pairs = [(request, reader)]
        if request.params.n > 1:
            first = replace(request, group=request.id)
            pairs = [(first, reader.alike(first))]
            for choice in range(1, request.params.n):
                other = replace(first, id=f"request-{next(self._numbers)}", choice=choice)
                pairs.append((other, reader.alike(other)))
        return pairs

    def _answers(
        self,
        prepared: Sequence[Sequence[tuple[Request, TextReader]]],
        *,
        thinks: bool,
        bar: str,
        progress: bool | None,
    ) -> list[Completion]:
        """One completion per prompt; ``prepared`` holds the requests of each."""
        if progress is None:
            progress = len(prepared) > 1 and sys.stderr.isatty()
        with self._submitted([pair for pairs in prepared for pair in pairs]) as names:
            left = iter(names)
            groups = [[next(left) for _ in pairs] for pairs in prepared]
            shown = tqdm(groups, desc=bar, unit="prompt", disable=not progress)
            return [self._gather(choices, thinks=thinks) for choices in shown]

    def _gather(self, names: Sequence[str], *, thinks: bool = False) -> Completion:
        """The answers to one prompt: the first, with the others attached."""
        first, *others = [_complete(self._follow(name), thinks=thinks) for name in names]
        return replace(first, others=tuple(others)) if others else first

    def _per_prompt(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.default_params()] * count
        if len(params) != count:
            raise RequestError(
                f"params: expected one SamplingParams or one per prompt ({count}), "
                f"found {len(params)}."
            )
        return list(params)

    def _submit(self, request: Request, reader: TextReader) -> str:
        self.engine.add(request)
        self._inbox[request.id], self._readers[request.id] = deque(), reader
        return request.id

    def _follow(self, name: str) -> Generator[Delta]:
        """Deltas of one request; the engine is stepped whenever none is waiting."""
        inbox = self._inbox[name]
        try:
            while True:
                while not inbox:
                    self._pump()
                delta = inbox.popleft()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._forget(name)

    @contextmanager
    def _submitted(self, pairs: Sequence[tuple[Request, TextReader]]) -> Iterator[list[str]]:
        """Submit several requests; whatever is unfinished at the end is cancelled."""
        names: list[str] = []
        try:
            for pair in pairs:
                names.append(self._submit(*pair))
            yield names
        finally:
            for name in names:
                self._forget(name)

    def _forget(self, name: str) -> None:
        """Cancel a request nobody waits for any more."""
        if self._inbox.pop(name, None) is not None:
            del self._readers[name]
            self.engine.cancel(name)

    def _pump(self) -> None:
        for event in self.engine.step():
            reader = self._readers.get(event.request_id)
            if reader is None:
                continue  # its iterator was closed
            delta = reader.push(event)
            if delta is not None:
                self._inbox[event.request_id].append(delta)
                if delta.finish_reason is not None:
                    self.ended(reader, delta.finish_reason)
            if reader.stopped:
                self.engine.cancel(event.request_id, "stop")

    # -- spare time ------------------------------------------------------------------------------

    def ended(self, reader: TextReader, reason: FinishReason) -> None:
        """Note that a request has ended, so that ``idle`` may prepare what follows it.

        ``chat`` and ``stream`` do this themselves; it is for those that step the engine.
        """
        answer = reader.answer()
        calls = answer.get("tool_calls") or TOOL_OPEN in answer["content"]
        is_over = reason != "cancelled" and not calls
        if reader.conversation is not None and is_over and reader.request.choice == 0:
            self._answered.append((reader.conversation, answer))

    def idle(self, max_tokens: int | None = None) -> int:
        """Use spare time to prepare the next turn of conversations that were answered lately.

        A template may show an answer otherwise than it was written, above all without its
        reasoning. Run in advance as it will be shown, the next turn costs only its new text. Call
        it while the user reads or a program does something else; the server does so by itself.
        Stops after about ``max_tokens``, goes on from there when called again. Returns the number
        of tokens run: 0 when nothing is left to prepare or an answer is still being written.
        """
        total = 0
        while max_tokens is None or total < max_tokens:
            count = self.idle_step()
            if count == 0:
                break
            total += count
        return total

    @property
    def unprepared(self) -> int:
        """Conversations for which ``idle`` still has something to do."""
        return len(self._answered) + len(self.engine.background)

    def idle_step(self) -> int:
        """One small step of ``idle``; returns the number of tokens run."""
        while not self.engine.has_work:
            count = self.engine.idle_step()
            if count or not self._answered:
                return count
            conversation, answer = self._answered.pop()
            ids = beginning_after(
                self.template, self.tokenizer, conversation.messages, answer, conversation.options
            )
            if ids:
                self.engine.background.add(ids)
        return 0

    def _end_ids(self) -> tuple[int, ...]:
        """Every id that ends a sequence, from generation_config.json, config.json, tokenizer."""
        named = self._generation.get("eos_token_id")
        ids = set(self.config.eos_ids)
        ids.update([named] if isinstance(named, int) else named or [])
        if self.tokenizer.eos_id is not None:
            ids.add(self.tokenizer.eos_id)
        limit = self.config.vocab_size
        wrong = [token for token in ids if type(token) is not int or not 0 <= token < limit]
        if wrong:
            raise ConfigError(
                f"eos_token_id: {wrong[0]!r} is no id of the vocabulary (0 ... {limit - 1}), so no "
                "answer could end with it. Correct it in generation_config.json or config.json."
            )
        return tuple(sorted(ids))


class Stream(Iterator[Delta]):
    """The deltas of one answer, as they come. ``close`` cancels what is left of it."""

    def __init__(self, llm: LLM, name: str) -> None:
        self._llm, self._name = llm, name
        self._deltas = llm._follow(name)

    def __next__(self) -> Delta:
        return next(self._deltas)

    def close(self) -> None:
        """Cancel the request, if it still runs."""
        self._deltas.close()
        self._llm._forget(self._name)

    def __del__(self) -> None:
        self.close()


def _complete(deltas: Iterator[Delta], *, thinks: bool = False) -> Completion:
    pieces = list(deltas)
    last = pieces[-1]
    assert last.finish_reason is not None, last
    reasoning = "".join(piece.reasoning for piece in pieces)
    return Completion(
        text="".join(piece.text for piece in pieces),
        reasoning=reasoning if thinks and reasoning else None,
        tool_calls=assemble(part for piece in pieces for part in piece.parts).tool_calls,
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        finish_reason=last.finish_reason,
        usage=last.usage,
        ended_by=last.ended_by,
        logprobs=tuple(item for piece in pieces for item in piece.logprobs),
        prompt_logprobs=tuple(item for piece in pieces for item in piece.prompt_logprobs),
    )


def _cache_key(folder: Path, quantization: str | None) -> dict[str, str]:
    """What cached keys, values and states depend on beside the configuration."""
    files = tuple(name for name in KEPT_FILES if not name.startswith("chat_template"))
    # "tenant" is the place for a salt that keeps users of one server apart.
    return {
        "weights": fingerprint(folder, extra=files),
        "quantization": quantization or "",
        "adapter": "",
        "tenant": "",
    }


def _generation_config(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RequestError(f"{file} is not valid JSON: {error}.") from None
    if not isinstance(found, dict):
        raise RequestError(f"{file}: expected a JSON object, found {type(found).__name__}.")
    return found


def _several(prompts: Any) -> list[Any]:
    """A list of prompts, each a text or a list of token ids; RequestError for anything else."""
    if isinstance(prompts, str):
        return [prompts]
    found = list(prompts) if isinstance(prompts, Iterable) else [prompts]
    if found and isinstance(prompts, Iterable) and all(type(item) is int for item in found):
        return [found]  # one prompt of token ids
    for number, item in enumerate(found):
        is_ids = isinstance(item, Sequence) and all(type(token) is int for token in item)
        if not isinstance(item, str) and not is_ids:
            where = f"prompt {number}" if isinstance(prompts, Iterable) else "prompts"
            raise RequestError(f"{where}: expected a text, or a list of token ids, found {item!r}.")
    return found
