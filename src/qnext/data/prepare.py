"""From sources to shards: clean, deduplicate, decontaminate, hold out, tokenise, write.

A ``Plan`` names the sources and their licences. Everything is a pure function of the plan and the
files; one document in ``held_out`` stays out of training, chosen by the hash of its id, and is
kept as text for evaluation.
"""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from qnext.data import cleaning, reading
from qnext.data.chats import Chat, ChatEncoder, chat_from_row
from qnext.data.licences import Licence
from qnext.data.shards import ShardWriter
from qnext.errors import DataError
from qnext.text.chat import ChatTemplate
from qnext.text.tokenizer import Tokenizer

TRAIN, HELD_OUT, SUMMARY = "train", "held-out", "prepared.json"
BATCH = 256
"""Documents tokenised at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document: plain text, or a conversation."""

    id: str
    item: str | Chat
    held_out: bool | None = None
    """Whether it is kept for evaluation; None lets the hash of the id decide."""
    compare: bool = True
    """Whether it is dropped when something like it came before; not for what a generator made, nor
    for lessons made from a text that is read elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where documents come from, under which terms."""

    name: str
    licence: Licence
    documents: Callable[[], Iterator[Document]]
    sample_share: float = 0.0
    """Share of the tokenizer's training text."""
    held_out_only: bool = False
    """Never trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is prepared."""

    sources: tuple[Source, ...]
    against: tuple[Path, ...] = ()
    """Evaluation files whose texts must not be in training data."""
    held_out: int = 100
    """One document in so many is held out; 0 for none."""
    near: bool = True
    """Drop near-duplicates too."""


@dataclass
class Counts:
    """What became of the documents of one source."""

    read: int = 0
    broken: int = 0
    empty: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    contaminated: int = 0
    held_out: int = 0
    kept: int = 0
    samples: int = 0
    tokens: int = 0
    judged_tokens: int = 0
    judged_bytes: int = 0


@dataclass
class Sieve:
    """Cleaning, duplicates and contamination for all sources of one run."""

    against: tuple[Path, ...] = ()
    near: bool = True
    words: cleaning.Words = field(default_factory=cleaning.Words)

    def __post_init__(self) -> None:
        self.duplicates = cleaning.Duplicates(near=self.near)
        rows = itertools.chain.from_iterable(map(reading.read_rows, self.against))
        texts = itertools.chain.from_iterable(cleaning.texts_in(row.value) for row in rows)
        self.contamination = cleaning.Contamination(texts, self.words)

    def keep(self, document: Document, counts: Counts) -> Document | None:
        """The cleaned document, or None if it is left out; ``counts`` says why."""
        counts.read += 1
        item = document.item
        if isinstance(item, str):
            item = cleaning.clean(item)
            text = item
        else:
            item = _cleaned_chat(item)
            text = "\n".join(_said(item))
        if not text:
            counts.empty += 1
            return None
        if cleaning.is_broken(text):
            counts.broken += 1
            return None
        words = self.words.of(text)
        if self.against and self.contamination.holds(words):
            counts.contaminated += 1
            return None
        if document.compare:
            near = self.duplicates.near_found
            if not self.duplicates.is_new(words):
                found_near = self.duplicates.near_found > near
                counts.near_duplicates += found_near
                counts.duplicates += not found_near
                return None
        return replace(document, item=item)


def is_held_out(document: Document, one_in: int) -> bool:
    """Whether a document is kept for evaluation: as its source says, or by the hash of its id."""
    if document.held_out is not None:
        return document.held_out
    if not one_in:
        return False
    digest = hashlib.sha256(document.id.encode()).digest()
    return int.from_bytes(digest[:4], "big") % one_in == 0


def prepare(
    plan: Plan, tokenizer_folder: Path, out: Path, *, policy: str, progress: bool | None = None
) -> dict[str, Counts]:
    """Write ``out/train/SOURCE`` shards, ``out/held-out/SOURCE.jsonl`` and a summary.

    Raises DataError before anything is written when a source is not allowed by ``policy``.
    """
    sources = checked_sources(plan.sources, policy)
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    encoder = ChatEncoder(ChatTemplate.from_folder(tokenizer_folder), tokenizer)
    digest = hashlib.sha256((tokenizer_folder / "tokenizer.json").read_bytes()).hexdigest()
    sieve = Sieve(plan.against, plan.near)
    (out / HELD_OUT).mkdir(parents=True, exist_ok=True)
    found: dict[str, Counts] = {}
    shown = sys.stderr.isatty() if progress is None else progress
    bar = tqdm(sources, desc="prepare", unit="source", disable=not shown)
    for source in bar:
        bar.set_postfix_str(source.name)
        counts = found[source.name] = Counts()
        held: list[Document] = []

        def kept(
            source: Source = source, counts: Counts = counts, held: list[Document] = held
        ) -> Iterator[Document]:
            for document in source.documents():
                passed = sieve.keep(document, counts)
                if counts.read % 500 == 0:
                    bar.set_postfix_str(f"{source.name}, {counts.read:,} documents")
                if passed is None:
                    continue
                if source.held_out_only or is_held_out(passed, plan.held_out):
                    counts.held_out += 1
                    held.append(passed)
                    continue
                counts.kept += 1
                yield passed

        writer = ShardWriter(
            out / TRAIN, source.name, id_limit=tokenizer.id_limit, tokenizer=digest,
            about=asdict(source.licence),
        )  # fmt: skip
        with writer:
            for ids, weights, size in encoded(kept(), tokenizer, encoder):
                writer.add(ids, weights, size)
            if not writer.documents and not held:
                raise DataError(
                    f"source {source.name}: no document is left after cleaning "
                    f"({counts.read} read, {counts.empty} empty, {counts.broken} broken, "
                    f"{counts.duplicates + counts.near_duplicates} seen before, "
                    f"{counts.contaminated} in evaluation files)."
                )
        counts.samples, counts.tokens = writer.documents, writer.tokens
        counts.judged_tokens, counts.judged_bytes = writer.judged, writer.bytes
        if held:
            _write_held_out(out / HELD_OUT / f"{source.name}.jsonl", held)
    summary = {
        "policy": policy,
        "tokenizer": digest,
        "evaluation_files": [path.name for path in plan.against],
        "evaluation_texts": sieve.contamination.items,
        "evaluation_texts_too_short": sieve.contamination.skipped,
        "sources": {s.name: {**asdict(s.licence), **asdict(found[s.name])} for s in sources},
    }
    _write_whole(out / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return found


def checked_sources(sources: Iterable[Source], policy: str) -> list[Source]:
    """The sources, if the policy allows all of them; DataError names those it does not."""
    several = list(sources)
    names = [source.name for source in several]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DataError(f"two sources are called {min(twice)!r}. Give each a name of its own.")
    refused = [s for s in several if not s.licence.allowed(policy)]
    if refused:
        said = "; ".join(f"{s.name} ({s.licence.text})" for s in refused)
        raise DataError(
            f"policy {policy} does not allow: {said}. Leave them out, or choose a wider policy."
        )
    return several


def encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, encoder: ChatEncoder
) -> Iterator[tuple[list[int], list[int], int]]:
    """(ids, weights, judged bytes). Plain text stands between two ``<|endoftext|>``."""
    end = tokenizer.id_of("<|endoftext|>")
    if end is None:
        raise DataError(f"{tokenizer.origin} has no <|endoftext|>, which stands between documents.")
    waiting = iter(documents)
    while group := list(itertools.islice(waiting, BATCH)):
        texts = [one.item for one in group if isinstance(one.item, str)]
        # Control tokens written out in a text are letters to the model.
        ids_of = iter(tokenizer.encode_batch(texts, allow_added=False) if texts else [])
        for one in group:
            if isinstance(one.item, str):
                ids = next(ids_of)
                weights = [0, *[1] * len(ids), 1]
                yield [end, *ids, end], weights, len(one.item.encode())
                continue
            try:
                for sample in encoder.samples(one.item):
                    yield sample.ids, sample.weights, len(sample.judged.encode())
            except DataError as error:
                raise DataError(f"{one.id}: {error}") from error


def tokenizer_texts(plan: Plan, size: int) -> Iterator[str]:
    """About ``size`` characters of the sources, each in its share, spread over its documents."""
    total = sum(source.sample_share for source in plan.sources)
    if not total:
        raise DataError("no source has a share of the tokenizer's text.")
    for source in plan.sources:
        budget = int(size * source.sample_share / total)
        if not budget:
            continue
        # Twice through the documents, so that they need not all be in memory.
        length = sum(map(len, _texts_of(source)))
        if not length:
            continue
        owed = 1.0
        for text in _texts_of(source):
            owed += min(1.0, budget / length) * len(text)
            if owed > 0:
                yield cleaning.clean(text)
                owed -= len(text)


def _texts_of(source: Source) -> Iterator[str]:
    for document in source.documents():
        yield from [document.item] if isinstance(document.item, str) else _said(document.item)


def file_source(
    path: Path, *, licence: Licence, field_name: str = "text", utf8: reading.Utf8 = "strict",
    max_line_bytes: int = reading.MAX_LINE_BYTES,
) -> Source:  # fmt: skip
    """One file as a source: rows with ``messages`` are chats, others text of ``field_name``."""

    def documents() -> Iterator[Document]:
        rows = reading.read_rows(
            path, columns=(field_name, "messages", "id", "tools"), utf8=utf8,
            max_line_bytes=max_line_bytes,
        )  # fmt: skip
        for row in rows:
            name = str(row.value.get("id") or row.where)
            if row.value.get("messages"):
                yield Document(id=name, item=chat_from_row(row.value, row.where))
                continue
            text = row.value.get(field_name)
            if not isinstance(text, str):
                raise DataError(
                    f"{row.where}: expected text in {field_name!r}, found "
                    f"{type(text).__name__}. Its fields are {', '.join(row.value)}; name the right "
                    "one with --field."
                )
            yield Document(id=name, item=text)

    name = path.name
    for suffix in reversed(path.suffixes):
        name = name.removesuffix(suffix)
    return Source(name=name, licence=licence, documents=documents, sample_share=1.0)


def _said(chat: Chat) -> list[str]:
    texts = []
    for message in chat.messages:
        for key in ("content", "reasoning_content"):
            if isinstance(message.get(key), str):
                texts.append(message[key])
        for call in message.get("tool_calls") or ():
            texts.append(json.dumps(call, ensure_ascii=False))
    if chat.cut_thinking is not None:
        texts.append(chat.cut_thinking)
    return texts


def _cleaned_chat(chat: Chat) -> Chat:
    def cleaned(message: Mapping[str, object]) -> dict[str, object]:
        return {
            key: cleaning.clean(value) if isinstance(value, str) and key != "role" else value
            for key, value in message.items()
        }

    return replace(chat, messages=tuple(map(cleaned, chat.messages)))


def _write_held_out(path: Path, documents: list[Document]) -> None:
    lines = []
    for one in documents:
        if isinstance(one.item, str):
            row: dict[str, object] = {"id": one.id, "text": one.item}
        else:
            row = {"id": one.id, "messages": list(one.item.messages)}
            if one.item.learn == "everything":
                row["learn"] = "everything"
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    _write_whole(path, "".join(lines))


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
