"""The corpora qnext-mini learns from: where each file lies and its licence.

This table is the only place that decides what may be read. Share-alike and unclear sources are
not in it on purpose: the licence of the weights must not depend on an unsettled question.
``model_card.py`` prints it, so a source that is used is a source that is credited.
"""

import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qnext.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One corpus file."""

    name: str
    """Short name; shards, logs and evaluation tables use it."""
    file: str
    """Path below the data folder."""
    licence: str
    """Licence of the text, as its publisher states it."""
    attribution: str
    """The line the licence asks for, or where the text comes from."""
    text: bool = True
    """Whether it is read from beginning to end."""
    lessons: bool = False
    """Whether conversations are made of it."""


SOURCES = (
    Source(
        name="tinystories",
        file="stories/tinystories_sample.jsonl.xz",
        licence="CDLA-Sharing-1.0",
        attribution="TinyStories by Ronen Eldan and Yuanzhi Li (roneneldan/TinyStories)",
        lessons=True,
    ),
    Source(
        name="picture_books",
        file="stories/children_short_stories.jsonl.xz",
        licence="CC BY 4.0; fairy tales Apache-2.0 (texts in the public domain)",
        attribution="African Storybook (African Storybook Initiative, Saide) and StoryWeaver "
        "(Pratham Books) picture books by their named authors, through the Global African "
        "Storybook Project; fairy tales from FairytaleQA (University of California, Irvine). "
        "Layout removed, lines joined",
        lessons=True,
    ),
    Source(
        name="children_classics",
        file="stories/children_classics.jsonl.xz",
        licence="public domain in the United States",
        attribution="classic children's novels, from mlschmitt/classic-books-markdown",
    ),
    Source(
        name="self_dialogue",
        file="dialogues/self_dialogue.jsonl.xz",
        licence="BSD-3-Clause",
        attribution="The Self-dialogue Corpus, copyright (c) Joachim Fainberg, Ben Krause, "
        "Mihai Dobre, Marco Damonte, Emmanuel Kahembwe, Daniel Duma, Bonnie Webber, Federico "
        "Fancellu (arXiv 1809.06641)",
        lessons=True,
    ),
    Source(
        name="topical_chat",
        file="dialogues/topical_chat.jsonl.xz",
        licence="CDLA-Sharing-1.0",
        attribution="Topical-Chat by Amazon Alexa AI (Gopalakrishnan and others, 2019)",
    ),
    Source(
        name="textbooks",
        file="openstax/openstax_society.jsonl.xz",
        licence="CC BY 4.0",
        attribution="OpenStax, Rice University. Access for free at https://openstax.org. "
        "*Life, Liberty, and the Pursuit of Happiness* is by the Bill of Rights Institute and "
        "OpenStax. Converted to plain text; figures and tables dropped",
    ),
    Source(
        name="science_textbooks",
        file="openstax/openstax_science.jsonl.xz",
        licence="CC BY 4.0",
        attribution="OpenStax, Rice University. Access for free at https://openstax.org. "
        "Converted to plain text; figures and tables dropped",
    ),
    Source(
        name="factbook",
        file="reference/world_factbook.jsonl.xz",
        licence="CC0 1.0",
        attribution="The World Factbook (public domain), through factbook/factbook.json",
        lessons=True,
    ),
    Source(
        name="wordnet",
        file="reference/wordnet_glosses.jsonl.xz",
        licence="CC BY 4.0 and the WordNet licence",
        attribution="Open English WordNet (https://en-word.net), derived from Princeton WordNet: "
        "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved",
        lessons=True,
    ),
    Source(
        name="fairytale_qa",
        file="instruct/fairytale_qa.jsonl.xz",
        licence="Apache-2.0",
        attribution="FairytaleQA (Xu and others, 2022), University of California, Irvine",
        lessons=True,
    ),
    Source(
        name="instructions",
        file="instruct/simple_instructions.jsonl.xz",
        licence="Apache-2.0",
        attribution="instruction examples of LLMs-from-scratch (Sebastian Raschka), identity "
        "examples of LLaMA-Factory, seed tasks of Stanford Alpaca",
        text=False,
        lessons=True,
    ),
)


# The plainest children's books; long mythologies and sea novels would teach a small model rare
# words.
_PLAIN_CLASSICS = (
    "Aesop",
    "Andersen",
    "Grimm",
    "Beatrix Potter",
    "L. Frank Baum",
    "Pinocchio",
    "Nesbit",
    "A Little Princess",
    "The Secret Garden",
    "Peter Pan",
    "The Wind in the Willows",
    "Doctor Dolittle",
    "Lewis Carroll",
    "Heidi",
    "Black Beauty",
    "The Boxcar Children",
    "The Happy Prince",
    "The Princess and the Goblin",
    "Aladdin",
    "Christmas",
    "Little Men",
)

# Whole pieces with any of these words are dropped: slurs and the coarsest language, which a model
# offered to anyone should not have seen.
_UNWANTED = re.compile(
    r"\b(fuck\w*|shit\w*|cunt\w*|nigger\w*|niggar\w*|darkies|darky|faggot\w*|bitch\w*|whore\w*|slut\w*"
    r"|rape[ds]?|raping|rapist|porn\w*|arse|penis|vagina|dick|pussy|cocks?ucker|motherfuck\w*|bastard"
    r"|asshole\w*|nazi\w*|orgasm\w*|retard\w*|masturbat\w*|copulat\w*|coitus|genital\w*|sexual\w*)\b",
    re.IGNORECASE,
)

_PUNCTUATION = str.maketrans(
    {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "…": "...", "\u00a0": " "}
)


def source(name: str) -> Source:
    """The table entry called ``name``; DataError names the known ones."""
    for entry in SOURCES:
        if entry.name == name:
            return entry
    raise DataError(f"no source is called {name!r}; known: {', '.join(s.name for s in SOURCES)}.")


def is_clean(text: str) -> bool:
    """Whether ``text`` is free of the words this recipe refuses."""
    return _UNWANTED.search(text) is None


def plain(text: str) -> str:
    """``text`` with typographic quotes, dots and spaces written in ASCII, outer blanks removed."""
    return text.translate(_PUNCTUATION).strip()


def read_rows(entry: Source, data_dir: Path) -> list[dict]:
    """All rows of a corpus file (JSON lines, xz). Raises DataError if the file is absent or
    damaged.
    """
    path = data_dir / entry.file
    if not path.is_file():
        raise DataError(
            f"source {entry.name}: {path} is not there. Give the folder with the corpora as --data."
        )
    try:
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    except (lzma.LZMAError, EOFError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"source {entry.name}: {path} cannot be read: {error}.") from error
    # Held-out stories are marked by their publisher's split; they are never training text.
    return [row for row in rows if not str(row.get("id", "")).startswith("tinystories-val/")]


def rewrapped(text: str) -> str:
    """``text`` with lines joined that were broken in the middle of a sentence."""
    return re.sub(r"(?<=[a-z,;])\n(?=[a-z])", " ", text)


def story_texts(entry: Source, rows: list[dict]) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of the story and book sources, plain books only."""
    for row in rows:
        if entry.name == "children_classics" and not any(s in row["id"] for s in _PLAIN_CLASSICS):
            continue
        yield row["id"], row.get("title", ""), plain(row["text"])


def textbook_texts(rows: list[dict]) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of textbook modules, front matter left out."""
    for row in rows:
        if row.get("title") == "Preface" or "About OpenStax" in row["text"][:400]:
            continue
        text = re.sub(r"(?m)^#{1,6} *", "", plain(row["text"]))
        yield row["id"], row.get("title", ""), text


def country_facts(rows: list[dict]) -> list[dict[str, str]]:
    """Per country: ``id``, ``name``, ``continent``, and where known ``capital``, ``language`` and
    ``place`` (a clause saying where the country lies).
    """
    continents = {
        "africa": "Africa",
        "europe": "Europe",
        "north-america": "North America",
        "south-america": "South America",
        "central-america-n-caribbean": "Central America and the Caribbean",
        "east-n-southeast-asia": "Asia",
        "south-asia": "Asia",
        "central-asia": "Asia",
        "middle-east": "the Middle East",
        "australia-oceania": "Oceania",
    }
    facts = []
    for row in rows:
        region = row["id"].split("/")[1]
        text = plain(row["text"])
        if region not in continents or len(row["title"]) < 3:
            continue
        fact = {
            "name": _country_name(row["title"]),
            "continent": continents[region],
            "id": row["id"],
        }
        capital = re.search(r"^Capital - name: *([^\n;(<]+)", text, re.MULTILINE)
        if capital and len(capital[1].strip()) < 24 and ":" not in capital[1]:
            fact["capital"] = capital[1].strip()
        place = re.search(r"^Location: *([^\n;:]+)", text, re.MULTILINE)
        if place and len(place[1]) < 110:
            fact["place"] = place[1].strip()
        tongue = re.search(r"^Languages - Languages: *([A-Z][a-z]+)", text, re.MULTILINE)
        if tongue:
            fact["language"] = tongue[1]
        facts.append(fact)
    return facts


def _country_name(title: str) -> str:
    """``"Korea, South"`` -> ``"South Korea"``; other names unchanged."""
    parts = [part.strip() for part in title.split(",")]
    name = f"{parts[1]} {parts[0]}" if len(parts) == 2 else title
    return {"The Dominican": "the Dominican Republic"}.get(name, name)


def plain_definitions(rows: list[dict], limit: int) -> list[tuple[str, str, str, str]]:
    """(word, part of speech, definition, example) of up to ``limit`` frequent words with one sense.

    Words with several senses are left out: a small model would learn a random one of them.
    """
    senses: dict[str, int] = {}
    for row in rows:
        for word in row["words"]:
            senses[word] = senses.get(word, 0) + 1
    found = []
    for row in rows:
        definition = plain(row["definition"])
        if not (8 <= len(definition) <= 110) or "(" in definition or not is_clean(definition):
            continue
        for word in row["words"][:1]:
            if senses[word] == 1 and re.fullmatch(r"[a-z]{3,14}", word) and is_clean(word):
                example = plain(row["examples"][0]) if row["examples"] else ""
                found.append((word, row["pos"], definition, example if is_clean(example) else ""))
    return found[:limit]
