"""Vocabulary files, and the byte-level BPE built from them.

Here live the three ways a vocabulary is stored (``tokenizer.json``; ``vocab.json`` with
``merges.txt``; a ranks file ``*.tiktoken``), the added tokens of the Qwen3 family and the
pre-tokenisation rules.
What a program does with a vocabulary is in ``tokenizer.py``.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from qnext.errors import TokenizerError

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MARKUP_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""Added tokens that are not special: they stay in decoded text, where parsers look for them."""

QWEN3_ADDED_TOKENS = (*SPECIAL_TOKENS, *MARKUP_TOKENS)
"""The 26 added tokens of a Qwen3 vocabulary in id order (officially 151643 to 151668)."""

QWEN3_CONFIG = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
"""What tokenizer_config.json says in the Qwen3 family, for vocabularies without one."""

_QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN3_5_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
KEPT_FILES = (
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a model folder that belong to the tokenizer and are written back unchanged."""


def _byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in vocabulary files (the GPT-2 table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + index) for index, byte in enumerate(hidden)
    }


_CHAR_OF_BYTE = _byte_alphabet()
_BYTE_OF_CHAR = {char: byte for byte, char in _CHAR_OF_BYTE.items()}


def spelled_bytes(token: str) -> bytes:
    """The bytes a vocabulary entry spells; an entry outside the byte alphabet is plain text."""
    if all(char in _BYTE_OF_CHAR for char in token):
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    return token.encode("utf-8")


def _spelling(token: bytes) -> str:
    return "".join(_CHAR_OF_BYTE[byte] for byte in token)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """A byte-level BPE with its added tokens, and the files it was read from."""

    backend: tokenizers.Tokenizer
    config: Mapping[str, Any]
    """The content of tokenizer_config.json, or the family's defaults."""
    files: Mapping[str, bytes]
    """File name -> content, to be written back unchanged."""
    origin: str
    """Where it came from, for messages."""


def read_vocabulary(path: str | Path) -> Vocabulary:
    """Read the tokenizer files of a model folder.

    ``tokenizer.json`` is preferred, then ``vocab.json`` with ``merges.txt``, then one
    ``*.tiktoken`` file. Added tokens of ``tokenizer_config.json`` are included; the last two forms
    get the 26 of Qwen3 where it lists none. Raises TokenizerError naming the file and its fault.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise TokenizerError(
            f"{folder}: not a folder. Give the folder that holds the tokenizer files."
        )
    files = {name: (folder / name).read_bytes() for name in KEPT_FILES if (folder / name).is_file()}
    config_path = folder / TOKENIZER_CONFIG
    config = (
        _json_object(files[TOKENIZER_CONFIG], config_path) if TOKENIZER_CONFIG in files else None
    )
    declared = _declared_tokens(config or {}, config_path)
    ranks_files = sorted(folder.glob("*.tiktoken"))

    if TOKENIZER_JSON in files:
        origin = folder / TOKENIZER_JSON
        backend = _parse_tokenizer_json(files[TOKENIZER_JSON], origin)
        config = config or {}
    else:
        if "vocab.json" in files or "merges.txt" in files:
            origin = folder / "vocab.json"
            model = _read_vocab_and_merges(files, folder)
        elif len(ranks_files) == 1:
            origin = ranks_files[0]
            model = _read_ranks(origin)
        elif ranks_files:
            names = ", ".join(file.name for file in ranks_files)
            raise TokenizerError(
                f"{folder}: one ranks file expected, found {names}. Keep one of them."
            )
        else:
            raise TokenizerError(_nothing_found(folder))
        backend = byte_level(model, _pieces_of(config or {}))
        config = config if config is not None else QWEN3_CONFIG
        if not declared:
            first = backend.get_vocab_size()
            declared = dict(enumerate(qwen3_added_tokens(), start=first))
    _add_tokens(backend, declared, config_path)
    _check_bytes(backend, origin)
    return Vocabulary(backend=backend, config=config, files=files, origin=str(origin))


def byte_level(model: models.Model, pieces: str = _QWEN2_PIECES) -> tokenizers.Tokenizer:
    """The Qwen pipeline around a BPE: NFC, split by ``pieces``, then bytes as characters."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def train_byte_level(texts: Iterable[str], *, vocab_size: int) -> tokenizers.Tokenizer:
    """Learn at most ``vocab_size`` ids, the 256 bytes and the 26 added tokens included."""
    smallest = 256 + len(QWEN3_ADDED_TOKENS)
    if vocab_size < smallest:
        raise TokenizerError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(QWEN3_ADDED_TOKENS)} added "
            f"tokens need at least {smallest}."
        )
    backend = byte_level(models.BPE())
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(QWEN3_ADDED_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_tokens(qwen3_added_tokens())
    return backend


def qwen3_added_tokens() -> list[AddedToken]:
    """The 26 added tokens, matched in raw text exactly as written."""
    return [
        AddedToken(text, special=text in SPECIAL_TOKENS, normalized=False)
        for text in QWEN3_ADDED_TOKENS
    ]


def merges_from_ranks(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge list that gives the same tokens as the ranks, in rank order.

    A token's merge is the pair that remains when its bytes are merged with all earlier tokens.
    Raises TokenizerError for a token that no pair of earlier tokens gives.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts))]
            lowest, at = min(pairs)
            if lowest >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) != 2 or any(ranks.get(part, rank) >= rank for part in parts):
            raise TokenizerError(f"rank {rank}: {token!r} is not made of two tokens of lower rank.")
        merges.append((parts[0], parts[1]))
    return merges


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; TokenizerError with line and column when it is none."""
    return _json_object(path.read_bytes(), path)


def _json_object(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except json.JSONDecodeError as error:
        raise TokenizerError(
            f"{path}: not valid JSON ({error.msg}, line {error.lineno} column {error.colno}). "
            "The file is damaged; fetch it again."
        ) from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 text ({error}). Fetch the file again.") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def _parse_tokenizer_json(raw: bytes, path: Path) -> tokenizers.Tokenizer:
    backend = _build(lambda: tokenizers.Tokenizer.from_buffer(raw), path)
    if not isinstance(backend.decoder, decoders.ByteLevel):
        found = "none" if backend.decoder is None else type(backend.decoder).__name__
        raise TokenizerError(
            f"{path}: expected a byte-level tokenizer (decoder ByteLevel), found decoder {found}. "
            "Only byte-level BPE vocabularies, as all Qwen models use, can be read."
        )
    # A fine-tuning run may have left its batch settings in the file; they would cut prompts short.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _build(make: Any, path: Path) -> Any:
    """Call the library's constructor, which reports damage as a bare Exception."""
    try:
        return make()
    except Exception as error:
        if type(error) not in (Exception, TypeError, ValueError):
            raise
        raise TokenizerError(
            f"{path}: not a usable tokenizer ({error}). Fetch the file again."
        ) from error


def _read_vocab_and_merges(files: Mapping[str, bytes], folder: Path) -> models.Model:
    for name, other in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")):
        if name not in files:
            raise TokenizerError(f"{folder}: {other} needs {name} beside it, which is missing.")
    path = folder / "vocab.json"
    vocab = _json_object(files["vocab.json"], path)
    for token, token_id in vocab.items():
        if type(token_id) is not int or token_id < 0:
            raise TokenizerError(f"{path}: {token!r}: expected an id, found {token_id!r}.")
    merges = []
    lines = files["merges.txt"].decode("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(part in vocab for part in (*pair, "".join(pair))):
            raise TokenizerError(
                f"{folder / 'merges.txt'}, line {number}: expected two tokens of vocab.json that "
                f"merge into a third, found {line!r}. One of the two files is damaged or "
                "belongs to another model."
            )
        merges.append((pair[0], pair[1]))
    return _build(lambda: models.BPE(vocab=vocab, merges=merges), path)


def _read_ranks(path: Path) -> models.Model:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            spelled, rank = line.split()
            token = base64.b64decode(spelled, validate=True)
            ranks[token] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"{path}, line {number}: expected a base64 token and its rank, found {line[:40]!r}."
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise TokenizerError(
            f"{path}: expected every rank from 0 up once, found {len(ranks)} tokens with ranks up "
            f"to {max(ranks.values(), default=0)}. The file is damaged; fetch it again."
        )
    try:
        merges = merges_from_ranks(ranks)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error} The file is damaged; fetch it again.") from error
    return models.BPE(
        vocab={_spelling(token): rank for token, rank in ranks.items()},
        merges=[(_spelling(left), _spelling(right)) for left, right in merges],
    )


def _pieces_of(config: Mapping[str, Any]) -> str:
    name = str(config.get("tokenizer_class") or "")
    return _QWEN3_5_PIECES if name.startswith("Qwen3_5") else _QWEN2_PIECES


def _declared_tokens(config: Mapping[str, Any], path: Path) -> dict[int, AddedToken]:
    """Id -> added token, from ``added_tokens_decoder``."""
    declared = {}
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        where = f"{path}: added_tokens_decoder[{key!r}]"
        if not key.isdecimal() or not isinstance(entry, dict) or not entry.get("content"):
            raise TokenizerError(
                f"{where}: expected an id and an object with content, found {entry!r}."
            )
        flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
        declared[int(key)] = AddedToken(
            entry["content"], **{flag: bool(entry.get(flag, False)) for flag in flags}
        )
    return dict(sorted(declared.items()))


def _add_tokens(
    backend: tokenizers.Tokenizer, declared: Mapping[int, AddedToken], path: Path
) -> None:
    present = backend.get_added_tokens_decoder()
    backend.add_tokens([token for token_id, token in declared.items() if token_id not in present])
    for token_id, token in declared.items():
        found = backend.token_to_id(token.content)
        if found != token_id:
            raise TokenizerError(
                f"{path}: added_tokens_decoder gives {token.content!r} the id {token_id}, but the "
                f"vocabulary beside it gives {found}. The files do not belong together."
            )


def _check_bytes(backend: tokenizers.Tokenizer, path: Path) -> None:
    missing = [byte for byte, char in _CHAR_OF_BYTE.items() if backend.token_to_id(char) is None]
    if missing:
        raise TokenizerError(
            f"{path}: {len(missing)} of the 256 single bytes have no id (the first is "
            f"0x{min(missing):02X}), so that some text could not be encoded. The vocabulary is "
            "damaged or not a byte-level one."
        )


def _nothing_found(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return (
        f"{folder}: no tokenizer. Looked for tokenizer.json, for vocab.json with merges.txt, and "
        f"for one *.tiktoken file; the folder holds {shown or 'nothing'}."
    )
