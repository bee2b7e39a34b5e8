"""What happens to every text before it is tokenised, and 13-gram and duplicate checks.

Cleaning changes characters only; what to leave out is decided by the sources.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff]")
_LINE_ENDS = re.compile(r"\r\n?|[\u2028\u2029\x85]")
_TRAILING = re.compile(r"[ \t]+(?=\n|$)")
_BLANKS = re.compile(r"\n{3,}")
_WORD = re.compile(r"\w+")

MAX_BROKEN_SHARE = 1e-3
"""Texts with a larger share of U+FFFD are dropped: their encoding is lost, not scratched."""
GRAM = 13
"""Words in a row that count as a copy of an evaluation item."""
SHORTEST_ITEM = 6
"""Evaluation texts of at least so many words, but fewer than ``GRAM``, are searched whole."""


def clean(text: str) -> str:
    """NFC, one kind of line end, no control or invisible characters, no trailing blanks."""
    text = _LINE_ENDS.sub("\n", unicodedata.normalize("NFC", text))
    text = _TRAILING.sub("", _CONTROL.sub("", text))
    return _BLANKS.sub("\n\n", text).strip()


def is_broken(text: str) -> bool:
    """Whether so much of a text was repaired that it is not worth reading."""
    return text.count("\ufffd") > max(1.0, MAX_BROKEN_SHARE * len(text))


class Words:
    """Texts as arrays of stable 64-bit word numbers, whatever their case and punctuation."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def of(self, text: str) -> np.ndarray:
        """uint64 [words]."""
        known = self._numbers
        numbers = []
        for word in _WORD.findall(text.casefold()):
            number = known.get(word)
            if number is None:
                digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
                number = known[word] = int.from_bytes(digest, "little")
            numbers.append(number)
        return np.array(numbers, dtype=np.uint64)


_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def grams(words: np.ndarray, n: int) -> np.ndarray:
    """Number of each ``n`` words in a row, uint64 [max(0, words - n + 1)]."""
    count = len(words) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    mixed = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        mixed = (mixed ^ words[offset : offset + count]) * _FACTOR
        mixed ^= mixed >> np.uint64(29)
    return mixed


@dataclass
class Duplicates:
    """Finds texts seen before: exactly (case, blanks and punctuation aside), or nearly.

    Near means that MinHash signatures over 5-word shingles agree in at least ``share`` of their 64
    places; candidates share one of 16 bands of 4. Texts under 20 words are compared exactly only.
    """

    near: bool = True
    share: float = 0.8
    exact_found: int = 0
    near_found: int = 0
    _seen: set[bytes] = field(default_factory=set, repr=False)
    _bands: dict[tuple[int, bytes], list[int]] = field(default_factory=dict, repr=False)
    _signatures: list[np.ndarray] = field(default_factory=list, repr=False)
    _factors: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        generator = np.random.Generator(np.random.Philox(20261121))
        self._factors = generator.integers(1, 2**63, 64, dtype=np.uint64) * np.uint64(
            2
        ) + np.uint64(1)

    def is_new(self, words: np.ndarray) -> bool:
        """Whether nothing like this text (as ``Words`` numbers) came before; remembers it."""
        digest = hashlib.blake2b(words.tobytes(), digest_size=16).digest()
        if digest in self._seen:
            self.exact_found += 1
            return False
        self._seen.add(digest)
        if not self.near or len(words) < 20:
            return True
        shingles = grams(words, 5)
        signature = np.full(64, np.iinfo(np.uint64).max, dtype=np.uint64)
        for start in range(0, len(shingles), 4096):
            part = shingles[start : start + 4096, None] * self._factors
            signature = np.minimum(signature, (part ^ (part >> np.uint64(31))).min(axis=0))
        # 32 bits of each place are kept: equal by chance in one of four billion.
        short = (signature >> np.uint64(32)).astype(np.uint32)
        keys = [(band, short[4 * band : 4 * band + 4].tobytes()) for band in range(16)]
        for other in {n for key in keys for n in self._bands.get(key, ())}:
            if float((self._signatures[other] == short).mean()) >= self.share:
                self.near_found += 1
                return False
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(short)
        return True


class Contamination:
    """Word sequences of evaluation files, to keep out of training data.

    A document is refused if it has 13 words in a row with an evaluation text. Evaluation texts of
    6 to 12 words are searched whole; shorter ones are not searched.
    """

    def __init__(self, texts: Iterable[str], words: Words) -> None:
        found: dict[int, list[np.ndarray]] = {}
        self.items = self.skipped = 0
        for text in texts:
            numbers = words.of(text)
            self.items += 1
            if len(numbers) < SHORTEST_ITEM:
                self.skipped += 1
                continue
            n = min(GRAM, len(numbers))
            found.setdefault(n, []).append(grams(numbers, n))
        self._known = {n: np.unique(np.concatenate(parts)) for n, parts in found.items()}

    def holds(self, words: np.ndarray) -> bool:
        """Whether a text (as ``Words`` numbers) repeats an evaluation text."""
        for n, known in self._known.items():
            here = grams(words, n)
            at = np.searchsorted(known, here).clip(max=len(known) - 1)
            if len(here) and bool((known[at] == here).any()):
                return True
        return False


def texts_in(value: Any) -> Iterator[str]:
    """All texts inside a JSON value, ids and labels of one word left out."""
    if isinstance(value, str):
        if " " in value:
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from texts_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from texts_in(one)
