"""From corpus rows to training documents: plain text for pretraining, chats for fine-tuning.

Everything is a pure function of the rows and a seed. A document is held out for evaluation by the
hash of its id, one in a hundred, before anything is made from it.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from recipes.mini import sources
from recipes.mini.chats import Talk, single
from recipes.mini.smalltalk import identity

from qnext.data.generate.stories import request, subject_of

Row = dict
Item = str | Talk


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One training or evaluation document."""

    id: str
    item: Item


def is_held_out(document_id: str) -> bool:
    """One story, dialogue or piece in a hundred, decided by its id alone.

    Single facts are never held out: they cannot be guessed from other facts. All parts of a story
    go together, whichever corpus they come from.
    """
    if document_id.startswith(("fact:", "factbook/sentences/")):
        return False
    key = document_id
    if document_id.startswith(("tinystories", "asp/", "pb/")):
        key = document_id.split("#")[0]
    elif document_id.startswith("fairytale/"):
        key = document_id.split("/")[-1].split("#")[0]
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100 == 0


def pretraining(entry: sources.Source, rows: list[Row], seed: int) -> Iterator[Document]:
    """Pretraining documents of one source, in file order."""
    make = _PRETRAINING[entry.name]
    for document in make(entry, rows, Random(f"{seed}/{entry.name}/pretraining")):
        if isinstance(document.item, Talk) or sources.is_clean(document.item):
            yield document


def finetuning(entry: sources.Source, rows: list[Row], seed: int) -> Iterator[Document]:
    """Fine-tuning chats of one source."""
    make = _FINETUNING[entry.name]
    for document in make(entry, rows, Random(f"{seed}/{entry.name}/finetuning")):
        assert isinstance(document.item, Talk), document
        if all(sources.is_clean(content) for _, content in document.item.turns):
            yield document


# ---------------------------------------------------------------- stories and books


def _story_texts(entry: sources.Source, rows: list[Row], rng: Random) -> Iterator[Document]:
    for name, _, text in sources.story_texts(entry, rows):
        yield from pieces(name, text)


def _textbook_texts(entry: sources.Source, rows: list[Row], rng: Random) -> Iterator[Document]:
    for name, _, text in sources.textbook_texts(rows):
        yield from pieces(name, text)


def pieces(name: str, text: str, limit: int = 3000) -> Iterator[Document]:
    """A long text cut between paragraphs into pieces of about ``limit`` characters."""
    part: list[str] = []
    size = number = 0
    for paragraph in text.split("\n\n"):
        paragraph = paragraph.strip()
        if not paragraph:
            continue
        if part and size + len(paragraph) > limit:
            yield Document(id=f"{name}#{number}", item="\n\n".join(part))
            part, size, number = [], 0, number + 1
        part.append(paragraph)
        size += len(paragraph)
    if part:
        yield Document(id=f"{name}#{number}", item="\n\n".join(part))


def _story_requests(entry: sources.Source, rows: list[Row], rng: Random) -> Iterator[Document]:
    """Short corpus stories as answers to a request for them."""
    for name, title, text in sources.story_texts(entry, rows):
        if not 150 <= len(text) <= 1500:
            continue
        title = title.strip()
        if title and all(ord(c) < 128 for c in title) and len(title) < 40:
            ask = rng.choice(('Tell me the story "{}".', 'Tell me a story called "{}".')).format(
                title
            )
        else:
            ask = request(rng, subject_of(text))
        yield Document(id=f"{name}#0", item=single(ask, text))


# ---------------------------------------------------------------- conversations


def _turns(row: Row) -> list[tuple[str, str]]:
    """Alternating non-empty turns that begin with the user and end with the assistant."""
    turns: list[tuple[str, str]] = []
    for message in row["messages"]:
        content = sources.plain(message.get("content") or "")
        if not content or message["role"] not in ("user", "assistant"):
            break
        if turns and turns[-1][0] == message["role"]:
            break
        turns.append((message["role"], content))
    while turns and turns[0][0] != "user":
        turns.pop(0)
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    return turns


def _dialogues(entry: sources.Source, rows: list[Row], rng: Random) -> Iterator[Document]:
    for row in rows:
        turns = _turns(row)
        if len(turns) >= 4 and sources.is_clean(" ".join(content for _, content in turns)):
            yield Document(id=row["id"], item=Talk(turns=tuple(turns)))


def _dialogue_windows(entry: sources.Source, rows: list[Row], rng: Random) -> Iterator[Document]:
    """The first two to eight turns: an opening is what a user sees most."""
    for row in rows:
        turns = _turns(row)
        length = 2 * rng.randint(1, 4)
        if len(turns) >= length:
            yield Document(id=row["id"], item=Talk(turns=tuple(turns[:length])))


def _instructions(entry: sources.Source, rows: list[Row], rng: Random) -> Iterator[Document]:
    for row in rows:
        turns = [(role, identity(content)) for role, content in _turns(row)]
        size = sum(len(content) for _, content in turns)
        text = " ".join(content for _, content in turns)
        if turns and size <= 700 and all(ord(c) < 0x2000 for c in text):
            yield Document(id=row["id"], item=Talk(turns=tuple(turns)))


# ---------------------------------------------------------------- facts


def _country_sentences(fact: dict[str, str]) -> list[str]:
    name = fact["name"]
    found = [f"{name} is a country in {fact['continent']}."]
    if "capital" in fact:
        found.append(f"The capital of {name} is {fact['capital']}.")
        found.append(f"{fact['capital']} is the capital of {name}.")
    if "place" in fact:
        found.append(f"{name} lies in {fact['place']}.")
    if "language" in fact:
        found.append(f"People in {name} speak {fact['language']}.")
    return found


def _country_texts(entry: sources.Source, rows: list[Row], rng: Random) -> Iterator[Document]:
    """The sentences about every country, in several orders, and the background sections."""
    facts = sources.country_facts(rows)
    for copy in range(4):
        rng.shuffle(facts)
        for start in range(0, len(facts), 4):
            group = facts[start : start + 4]
            lines = [rng.sample(s, len(s)) for s in map(_country_sentences, group)]
            text = "\n".join(" ".join(line) for line in lines)
            yield Document(id=f"factbook/sentences/{copy}/{start}", item=text)
    for row in rows:
        text = sources.plain(row["text"])
        background = text.partition("Background: ")[2].partition("\n\n##")[0].strip()
        if background:
            yield from pieces(row["id"], background, limit=2000)


def _country_questions(entry: sources.Source, rows: list[Row], rng: Random) -> Iterator[Document]:
    for fact in sources.country_facts(rows):
        name = fact["name"]
        pairs = []
        if "capital" in fact:
            capital = fact["capital"]
            say = f"The capital of {name} is {capital}."
            for ask in (
                "What is the capital of {}?",
                "what is the capital of {}",
                "What is the capital city of {}?",
                "Do you know the capital of {}?",
                "Tell me the capital of {}.",
                "Name the capital of {}.",
            ):
                pairs.append((ask.format(name), say))
            pairs.append(
                (
                    f"Which country has the capital {capital}?",
                    f"{capital} is the capital of {name}.",
                )
            )
        pairs.append((f"Where is {name}?", f"{name} is in {fact['continent']}."))
        pairs.append((f"Which continent is {name} in?", f"{name} is in {fact['continent']}."))
        if "place" in fact:
            pairs.append((f"Where does {name} lie?", f"{name} lies in {fact['place']}."))
        if "language" in fact:
            pairs.append(
                (
                    f"What language do people speak in {name}?",
                    f"People in {name} speak {fact['language']}.",
                )
            )
        for number, (ask, say) in enumerate(pairs):
            # Facts cannot be guessed from other facts: the id keeps all of them in training.
            yield Document(id=f"fact:{fact['id']}/{number}", item=single(ask, say))


def _defined(word: str, kind: str, definition: str) -> str:
    if kind == "noun":
        return f'"{word}" is a noun. It means: {definition}.'
    names = {"verb": "a verb", "adj": "an adjective", "adv": "an adverb"}
    return f'"{word}" is {names.get(kind, "a word")}. It means: {definition}.'


def _definition_texts(entry: sources.Source, rows: list[Row], rng: Random) -> Iterator[Document]:
    found = sources.plain_definitions(rows, limit=9000)
    rng.shuffle(found)
    for start in range(0, len(found), 8):
        lines = []
        for word, kind, definition, example in found[start : start + 8]:
            extra = f" Example: {example[0].upper() + example[1:]}." if example else ""
            lines.append(_defined(word, kind, definition) + extra)
        yield Document(id=f"wordnet/{start}", item="\n".join(lines))


def _definition_questions(
    entry: sources.Source, rows: list[Row], rng: Random
) -> Iterator[Document]:
    for word, kind, definition, example in sources.plain_definitions(rows, limit=3500):
        ask = rng.choice(
            (
                'What does "{}" mean?',
                "What does {} mean?",
                "What is the meaning of {}?",
                'Define "{}".',
                "Explain the word {}.",
            )
        ).format(word)
        say = f"{word.capitalize()} means {definition}."
        if example and rng.random() < 0.5:
            say += f" For example: {example[0].upper() + example[1:]}."
        yield Document(id=f"fact:wordnet/{word}/{kind}", item=single(ask, say))


# ---------------------------------------------------------------- reading


def _sentence(answer: str) -> str:
    answer = sources.plain(answer)
    answer = answer[0].upper() + answer[1:]
    return answer if answer[-1] in ".!?" else answer + "."


def _passage_texts(entry: sources.Source, rows: list[Row], rng: Random) -> Iterator[Document]:
    for row in rows:
        lines = [
            f"Question: {q['question']}\nAnswer: {_sentence(q['answer'])}"
            for q in row["qa"]
            if q["answer"]
        ]
        text = sources.rewrapped(sources.plain(row["passage"])) + "\n\n" + "\n".join(lines)
        yield Document(id=f"fairytale/{row['section']}", item=text)


def _passage_questions(entry: sources.Source, rows: list[Row], rng: Random) -> Iterator[Document]:
    """Short passages with one to three explicit questions about them."""
    for row in rows:
        pairs = [
            (sources.plain(q["question"]), _sentence(q["answer"]))
            for q in row["qa"]
            if q["answer"] and q["type"] == "explicit"
        ][:3]
        passage = sources.rewrapped(sources.plain(row["passage"]))
        if not pairs or len(passage) > 900:
            continue
        opening = rng.choice(("Read this story.", "Here is a story.", "Read the text and answer."))
        turns = [("user", f"{opening}\n\n{passage}\n\n{pairs[0][0]}"), ("assistant", pairs[0][1])]
        for question, answer in pairs[1:]:
            turns += [("user", question), ("assistant", answer)]
        yield Document(id=f"fairytale/{row['section']}", item=Talk(turns=tuple(turns)))


_PRETRAINING: dict[str, Callable[..., Iterator[Document]]] = {
    "tinystories": _story_texts,
    "picture_books": _story_texts,
    "children_classics": _story_texts,
    "self_dialogue": _dialogues,
    "topical_chat": _dialogues,
    "textbooks": _textbook_texts,
    "science_textbooks": _textbook_texts,
    "factbook": _country_texts,
    "wordnet": _definition_texts,
    "fairytale_qa": _passage_texts,
}

_FINETUNING: dict[str, Callable[..., Iterator[Document]]] = {
    "tinystories": _story_requests,
    "picture_books": _story_requests,
    "self_dialogue": _dialogue_windows,
    "factbook": _country_questions,
    "wordnet": _definition_questions,
    "fairytale_qa": _passage_questions,
    "instructions": _instructions,
}
