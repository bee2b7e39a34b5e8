"""Likelihoods of text: bits per byte of held-out documents, minimal pairs, drafts of the head."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qnext.data.chats import ChatEncoder, chat_from_row
from qnext.data.reading import read_rows
from qnext.engine.request import SamplingParams
from qnext.errors import DataError
from qnext.eval.scores import share
from qnext.llm import LLM
from qnext.model.batch import TokenBatch
from qnext.model.model import CausalLM

OPENING = 32
"""Tokens of a story that generation goes on from."""
PIECE = 1024
"""Tokens judged together; longer documents are cut, and a piece's first token is not judged."""
STORIES = ("tinystories", "picture_books", "children_classics", "fiction")
"""Held-out sources whose passages open the stories that drafts are counted on."""


def _end_of_text(llm: LLM) -> int:
    end = llm.tokenizer.id_of("<|endoftext|>")
    if end is None:
        raise DataError(f"{llm.tokenizer.origin} has no <|endoftext|>: texts cannot be begun.")
    return end


def held_out_files(folder: Path) -> list[Path]:
    """The JSON-lines files of a folder, lessons left out; DataError without any."""
    found = [path for path in sorted(folder.glob("*.jsonl*")) if not _is_lesson(path)]
    if not found:
        raise DataError(
            f"{folder} has no .jsonl files. It is the held-out folder of prepared data."
        )
    return found


def _is_lesson(file: Path) -> bool:
    """Whether a file holds conversations of which only the assistant's turns were learned."""
    first = next(read_rows(file)).value
    return "messages" in first and first.get("learn") != "everything"


def bits_per_byte(llm: LLM, file: Path, *, most_bytes: int) -> dict[str, Any]:
    """Bits per byte of one held-out source; of conversations all that is said is judged.

    Documents are taken in file order until ``most_bytes`` of text.
    """
    end = _end_of_text(llm)
    encoder = ChatEncoder(llm.template, llm.tokenizer)
    nats, tokens, size, documents = 0.0, 0, 0, 0
    pieces: list[list[int]] = []
    marks: list[list[int]] = []
    for row in read_rows(file):
        if row.value.get("messages"):
            chat = chat_from_row({**row.value, "learn": "everything"}, row.where)
            [sample] = encoder.samples(chat)
            ids, weights = sample.ids, sample.weights
            text_bytes = len(sample.judged.encode())
        else:
            text = row.value["text"]
            ids = [end, *llm.tokenizer.encode(text, allow_added=False), end]
            weights, text_bytes = [1] * len(ids), len(text.encode())
        for start in range(0, len(ids), PIECE):
            if len(ids[start : start + PIECE]) > 1:
                pieces.append(ids[start : start + PIECE])
                marks.append(weights[start : start + PIECE])
        documents += 1
        size += text_bytes
        if size >= most_bytes:
            break
    for score, weights in zip(llm.score(pieces), marks, strict=True):
        for logprob, weight in zip(score.logprobs, weights[1:], strict=True):
            if weight:
                nats -= logprob
                tokens += 1
    return {
        "bits_per_byte": round(nats / math.log(2) / size, 4),
        "loss_per_token": round(nats / tokens, 4),
        "documents": documents,
        "bytes": size,
        "tokens": tokens,
    }


def minimal_pairs(llm: LLM, file: Path, *, per_paradigm: int) -> dict[str, Any]:
    """Share of minimal pairs whose good sentence is likelier: sum of log-probabilities after a
    document start, ties wrong.
    """
    end = _end_of_text(llm)
    by_paradigm: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(file):
        value = dict(row.value)
        missing = [key for key in ("uid", "good", "bad") if key not in value]
        if missing:
            raise DataError(f"{row.where}: a minimal pair needs {', '.join(missing)}.")
        by_paradigm.setdefault(value["uid"], []).append(value)
    pairs = [pair for rows in by_paradigm.values() for pair in rows[:per_paradigm]]
    prompts = [
        [end, *llm.tokenizer.encode(pair[key], allow_added=False)]
        for pair in pairs
        for key in ("good", "bad")
    ]
    totals = [score.total for score in llm.score(prompts)]
    marks = [good > bad for good, bad in zip(totals[::2], totals[1::2], strict=True)]
    fields: dict[str, list[bool]] = {}
    paradigms: dict[str, list[bool]] = {}
    for pair, mark in zip(pairs, marks, strict=True):
        fields.setdefault(str(pair.get("field", "all")), []).append(mark)
        paradigms.setdefault(pair["uid"], []).append(mark)
    return {
        "accuracy": share(marks),
        "by_field": {name: share(found) for name, found in sorted(fields.items())},
        "by_paradigm": {n: share(found)["share"] for n, found in sorted(paradigms.items())},
    }


def passages(llm: LLM, folder: Path, count: int) -> list[list[int]]:
    """Held-out story passages of at least 64 tokens, as ids after a document start."""
    end = _end_of_text(llm)
    found: list[list[int]] = []
    for name in STORIES:
        file = folder / f"{name}.jsonl"
        if not file.is_file():
            continue
        for text in _passages(file):
            ids = llm.tokenizer.encode(text, allow_added=False)
            if len(ids) >= 64:
                found.append([end, *ids])
            if len(found) == count:
                return found
    if not found:
        raise DataError(f"{folder} has none of {', '.join(n + '.jsonl' for n in STORIES)}.")
    return found


def _passages(file: Path) -> Iterator[str]:
    """Texts cut between paragraphs into passages of at least 600 characters."""
    for row in read_rows(file):
        waiting = ""
        for paragraph in row.value["text"].split("\n\n"):
            waiting = f"{waiting}\n\n{paragraph}" if waiting else paragraph
            if len(waiting) >= 600:
                yield waiting
                waiting = ""
        if len(waiting) >= 300:
            yield waiting


def draft_acceptance(llm: LLM, prompts: list[list[int]], *, tokens: int = 128) -> dict[str, Any]:
    """How often the MTP head's first draft is the next token of greedy generation.

    ``llm`` drafts one token per step. The share is of the drafts that were checked.
    """
    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    answers = llm.generate(prompts, params, progress=False)
    drafted = sum(one.usage.drafted_tokens for one in answers)
    accepted = sum(one.usage.accepted_tokens for one in answers)
    return {
        **share([True] * accepted + [False] * (drafted - accepted)),
        "openings": len(prompts),
        "tokens": sum(one.usage.completion_tokens for one in answers),
        "tokens_each": tokens,
    }


@torch.no_grad()
def teacher_forced(model: CausalLM, texts: list[list[int]]) -> dict[str, Any]:
    """How often the MTP head's first choice for the token after next is what the main head says
    one token later, and how often it is the text's own token, on given texts.
    """
    right = same = total = 0
    for ids in texts:
        batch = TokenBatch.pack([torch.tensor(ids)])
        hidden_PD = model.run(batch)
        next_ids = torch.cat((batch.ids[1:], batch.ids.new_zeros(1)))
        drafted = model.lm_logits(model.run_mtp(batch, next_ids, hidden_PD))[:-2].argmax(-1)
        main = model.lm_logits(hidden_PD)[1:-1].argmax(-1)
        right += int((drafted == batch.ids[2:]).sum())
        same += int((drafted == main).sum())
        total += len(drafted)
    return {
        "same_as_main_head": round(same / total, 4),
        "right": round(right / total, 4),
        "tokens": total,
    }
