"""Text to token ids and back, in one piece or as a stream.

``Tokenizer`` is a byte-level BPE with added tokens (Qwen2, Qwen3 and Qwen3-Next use the same one).
``Detokenizer`` turns ids into text as they arrive. The file formats are in ``vocabulary.py``, the
making of prompts in ``chat.py``.
"""

import codecs
import json
import operator
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from qnext.errors import TokenizerError
from qnext.text.vocabulary import (
    QWEN3_CONFIG,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    read_vocabulary,
    spelled_bytes,
    train_byte_level,
)

MAX_KEPT_CHARACTERS = 1 << 22
"""Characters of text between added tokens whose ids are kept: a message is encoded once."""
MIN_KEPT_TEXT = 256
"""Texts of fewer characters are encoded as they are."""

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """A byte-level BPE vocabulary with added tokens.

    Nothing is ever put before or after a text. Text is NFC-normalised before it is encoded, so that
    ``decode(encode(text))`` is the NFC form of ``text``.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        origin: str = "tokenizer",
    ) -> None:
        """Wrap a ready pipeline; ``config`` holds the keys of tokenizer_config.json.

        Raises TokenizerError if ``config`` names an end or padding token that does not exist.
        """
        self._backend = backend
        # The same model and rules without added tokens; the model itself is shared, not copied.
        self._plain = tokenizers.Tokenizer(backend.model)
        self._plain.normalizer = backend.normalizer
        self._plain.pre_tokenizer = backend.pre_tokenizer
        self._config = dict(config or {})
        self._files = dict(files or {})
        self._bytes: dict[int, bytes] = {}
        self.origin = origin
        """Where the vocabulary was read from, for messages."""

        added = sorted(backend.get_added_tokens_decoder().items())
        self.added_tokens: dict[str, int] = {token.content: token_id for token_id, token in added}
        """Text -> id of the added tokens, in id order."""
        self.special_ids: frozenset[int] = frozenset(i for i, token in added if token.special)
        """Ids of the control tokens; ``skip_special`` leaves them out of decoded text."""
        ids = backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = len(set(ids))
        """Number of defined ids. A model may have more rows; those beyond are padding."""
        self.id_limit: int = max(ids) + 1
        """One more than the largest defined id; equals ``vocab_size`` where there are no holes."""
        self.eos_token = self._named_token("eos_token")
        self.pad_token = self._named_token("pad_token")
        # Longest first: where two added tokens start at one place, the longer one is meant.
        longest = sorted(self.added_tokens, key=len, reverse=True)
        self._added_pattern = "|".join(re.escape(text) for text in longest) or r"(?!)"
        self._added_parts = re.compile(f"({self._added_pattern})")
        # Then what lies between two added tokens is encoded as if it stood alone.
        self._cuts_cleanly = not any(
            token.lstrip or token.rstrip or token.single_word or token.normalized
            for _, token in added
        )
        self._kept = _KeptPieces(MAX_KEPT_CHARACTERS)

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Read the tokenizer of a model folder (see ``read_vocabulary`` for files and errors)."""
        vocabulary = read_vocabulary(path)
        return cls(
            vocabulary.backend,
            config=vocabulary.config,
            files=vocabulary.files,
            origin=vocabulary.origin,
        )

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> Self:
        """Learn a vocabulary of at most ``vocab_size`` ids with the 26 added tokens at its end."""
        backend = train_byte_level(texts, vocab_size=vocab_size)
        return cls(backend, config=QWEN3_CONFIG, origin="trained tokenizer")

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a turn, None if tokenizer_config.json names none."""
        return None if self.eos_token is None else self.id_of(self.eos_token)

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token, None if tokenizer_config.json names none."""
        return None if self.pad_token is None else self.id_of(self.pad_token)

    def encode(self, text: str, *, allow_added: bool = True) -> list[int]:
        """The ids of a text.

        ``allow_added=False`` reads the text as plain characters: ``<|im_end|>`` typed by a user
        becomes the tokens of its letters, never the control token. Raises TokenizerError for text
        that is not Unicode (a lone surrogate).

        Of a text with added tokens in it, such as a conversation, only what lies between two of
        them and was not encoded lately is encoded; the ids are the same.
        """
        if allow_added and self._cuts_cleanly and len(text) >= MIN_KEPT_TEXT:
            parts = self._added_parts.split(text)
            if len(parts) > 1 and not _SURROGATE.search(text):
                return self._join_parts(parts)
        return self.encode_batch([text], allow_added=allow_added)[0]

    def _join_parts(self, parts: Sequence[str]) -> list[int]:
        """The ids of a text that was split at its added tokens, which are every second part."""
        found = self._kept.find(parts[::2])
        missing = [piece for piece in dict.fromkeys(parts[::2]) if piece and piece not in found]
        if missing:
            new = dict(zip(missing, self.encode_batch(missing, allow_added=False), strict=True))
            found |= self._kept.keep(new)
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.added_tokens[part])
            elif part:
                ids.extend(found[part])
        return ids

    def encode_batch(self, texts: Sequence[str], *, allow_added: bool = True) -> list[list[int]]:
        """The ids of several texts, encoded side by side on all cores."""
        backend = self._backend if allow_added else self._plain
        try:
            # The fast form computes no character offsets; ids are the same.
            encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:
            raise TokenizerError(_why_not_text(texts)) from error
        return [one.ids for one in encoded]

    def encode_guarded(self, text: str, guard: str) -> list[int]:
        """The ids of a text in which ``guard`` marks added tokens to be read as plain characters.

        ``break_up`` puts the mark in; here it is taken out again. Everything between two unmarked
        added tokens is encoded in one piece, so that ids do not depend on where marks stood.
        """
        parts = self._added_parts.split(text)
        return self._join_parts([part.replace(guard, "") for part in parts])

    def break_up(self, text: str, guard: str) -> str:
        """Put ``guard`` behind the first character of every added token in the text."""
        if self._added_parts.search(text) is None:
            return text
        return re.sub(f"(?=(?:{self._added_pattern}))(.)", rf"\g<1>{guard}", text, flags=re.DOTALL)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD, as the Unicode standard advises.

        Raises TokenizerError for an id the vocabulary does not define.
        """
        return self._join(ids, skip_special).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one id stands for. Raises TokenizerError for an id that is not defined."""
        known = self._bytes.get(token_id)
        if known is not None:
            return known
        text = self._backend.id_to_token(token_id) if 0 <= token_id < self.id_limit else None
        if text is None:
            raise TokenizerError(
                f"token id {token_id} is not defined: {self.origin} has {self.vocab_size} ids, the "
                f"last is {self.id_limit - 1}. Rows of the model beyond it are padding: mask them."
            )
        is_added = self.added_tokens.get(text) == token_id
        self._bytes[token_id] = text.encode("utf-8") if is_added else spelled_bytes(text)
        return self._bytes[token_id]

    def id_of(self, text: str) -> int | None:
        """The id of the added token, or else the one ordinary token, that spells ``text``."""
        added = self.added_tokens.get(text)
        if added is not None:
            return added
        ids = self.encode(text, allow_added=False)
        return (
            ids[0] if len(ids) == 1 and self.token_bytes(ids[0]) == text.encode("utf-8") else None
        )

    def undefined_ids(self, rows: int) -> list[int]:
        """The ids below ``rows`` (the model's vocabulary size) that must never be sampled.

        Raises TokenizerError if the model has fewer rows than the vocabulary has ids.
        """
        if rows < self.id_limit:
            raise TokenizerError(
                f"{self.origin} has ids up to {self.id_limit - 1}, but the model's vocab_size is "
                f"{rows}. The tokenizer belongs to another model."
            )
        holes: list[int] = []
        if self.id_limit > self.vocab_size:
            defined = set(self._backend.get_vocab(with_added_tokens=True).values())
            holes = [i for i in range(self.id_limit) if i not in defined]
        return holes + list(range(self.id_limit, rows))

    def serialized(self) -> str:
        """The whole pipeline as the text of a ``tokenizer.json``."""
        return self._backend.to_str()

    def save(self, path: str | Path) -> None:
        """Write the tokenizer files into a folder, readable by Hugging Face transformers.

        Files it was read from are written back byte for byte; ``tokenizer.json`` and
        ``tokenizer_config.json`` are made where they did not exist.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        made: dict[str, bytes] = {}
        if TOKENIZER_JSON not in self._files:
            made[TOKENIZER_JSON] = self._backend.to_str().encode("utf-8")
        if TOKENIZER_CONFIG not in self._files:
            text = json.dumps(self._made_config(), indent=2, ensure_ascii=False) + "\n"
            made[TOKENIZER_CONFIG] = text.encode("utf-8")
        for name, content in {**self._files, **made}.items():
            (folder / name).write_bytes(content)

    def _made_config(self) -> dict[str, Any]:
        entries = {
            str(token_id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token_id, token in sorted(self._backend.get_added_tokens_decoder().items())
        }
        # The generic class reads every rule from tokenizer.json and assumes none of its own.
        return {
            "add_prefix_space": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
            **self._config,
            "added_tokens_decoder": entries,
        }

    def _named_token(self, key: str) -> str | None:
        """A token named in the configuration, as text or as the object older files hold."""
        value = self._config.get(key)
        if isinstance(value, Mapping):
            value = value.get("content")
        if value is None:
            return None
        if not isinstance(value, str) or self._backend.token_to_id(value) is None:
            raise TokenizerError(
                f"{self.origin}: tokenizer_config.json names {value!r} as {key}, which is not a "
                "token of this vocabulary. The files do not belong together."
            )
        return value

    def _join(self, ids: Iterable[int], skip_special: bool) -> bytes:
        skipped = self.special_ids if skip_special else frozenset()
        return b"".join(self.token_bytes(i) for i in map(operator.index, ids) if i not in skipped)


class _KeptPieces:
    """The ids of pieces of text, the ones used last; for several threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._characters = 0
        self._ids: OrderedDict[str, array[int]] = OrderedDict()
        self._mutex = threading.Lock()

    def find(self, pieces: Iterable[str]) -> "dict[str, array[int]]":
        """The ids of those that are kept."""
        found = {}
        with self._mutex:
            for piece in pieces:
                ids = self._ids.get(piece)
                if ids is not None:
                    self._ids.move_to_end(piece)
                    found[piece] = ids
        return found

    def keep(self, pieces: Mapping[str, Sequence[int]]) -> "dict[str, array[int]]":
        """Keep pieces; the oldest go when they become too many. Returns them as they are kept."""
        packed = {piece: array("i", ids) for piece, ids in pieces.items()}
        with self._mutex:
            for piece, ids in packed.items():
                if piece not in self._ids:
                    self._ids[piece] = ids
                    self._characters += len(piece)
            while self._characters > self._most:
                old, _ = self._ids.popitem(last=False)
                self._characters -= len(old)
        return packed


class Detokenizer:
    """Text from ids as they arrive.

    ``push`` returns only characters that no later id can change; what all calls return together
    equals ``Tokenizer.decode`` of all ids, for any ids and any cut. To learn which characters a
    token completes, push the ids one by one.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; an unfinished UTF-8 character is held back.

        Raises TokenizerError for an id that is not defined; then nothing of this call is taken in.
        """
        return self._decoder.decode(self._tokenizer._join(ids, self._skip_special))

    def finish(self) -> str:
        """What was held back: U+FFFD for bytes that never became a character. Ends the text."""
        return self._decoder.decode(b"", final=True)


def _why_not_text(texts: Sequence[str]) -> str:
    for text in texts:
        if not isinstance(text, str):
            return f"expected text to encode (str), got {type(text).__name__}."
        surrogate = _SURROGATE.search(text)
        if surrogate:
            return (
                f"the text cannot be encoded: character {surrogate.start()} is a lone surrogate "
                f"(U+{ord(surrogate.group()):04X}), half of a character. Repair or replace it."
            )
    return "the texts cannot be encoded: expected a list of str."
