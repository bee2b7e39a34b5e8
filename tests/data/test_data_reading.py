"""Reading files: every format and compression, and every way a file can be bad."""

import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import pytest

from qnext.data import cleaning, reading
from qnext.data.chats import chat_from_row
from qnext.errors import DataError

TEXTS = ["One cat sat.", "Zwei Hunde liefen über die Straße.", "三只鸟"]


def texts(path: Path, **options: object) -> list[str]:
    return [row.value["text"].strip() for row in reading.read_rows(path, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_every_format_gives_the_same_texts(tmp_path: Path, kind: str, suffix: str) -> None:
    if kind == ".txt":
        data = "\n---\n".join(TEXTS).encode()
    else:
        data = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS).encode()
    if suffix == ".zst":
        data = pytest.importorskip("zstandard").compress(data)
    elif suffix:
        data = {".gz": gzip.compress, ".xz": lzma.compress}[suffix](data)
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(data)
    assert texts(path) == TEXTS


def test_parquet_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS, "other": [1, 2, 3]}), path)
    assert texts(path) == TEXTS
    with pytest.raises(DataError, match=r"has no column body; it has text, other"):
        list(reading.read_rows(path, columns=("body",)))
    talk = [{"role": "user", "content": "a", "tools": None},
            {"role": "assistant", "content": "b", "tools": None}]  # fmt: skip
    parquet.write_table(pyarrow.table({"messages": [talk]}), tmp_path / "b.parquet")
    [row] = reading.read_rows(tmp_path / "b.parquet")
    chat = chat_from_row(row.value, row.where)
    assert chat.messages == ({"role": "user", "content": "a"},
                             {"role": "assistant", "content": "b"})  # fmt: skip
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        texts(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n\n", "only blank lines"),
        ("a.bin", b"x", "format cannot be told"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', r"line 2 is not a complete .* cut short"),
        ("a.jsonl", b'{"text": "a"}\n{"text": }\n', r"line 2 is not a complete JSON object"),
        ("a.jsonl", b'["a"]\n', "expected a JSON object, found list"),
        (
            "a.jsonl",
            b'{"text": "\xff\xfe"}\n',
            r"line 1 is not UTF-8: byte ff fe .. .. at position 11",
        ),
        ("a.txt", b"good\nb\xe4d\n", "not UTF-8: byte e4"),
        # Without a time, so that all workers of a parallel run give the test the same name.
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "abcdefgh"}\n', mtime=0)[:-9],
            "damaged or cut short",
        ),
        ("a.jsonl.xz", lzma.compress(b'{"text": "abcdefgh"}\n')[:-9], "damaged or cut short"),
        ("a.jsonl.gz", b"not gzip at all", "damaged or cut short"),
    ],
)
def test_bad_files_are_named_with_their_fault(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        texts(path)
    assert name in str(caught.value)


def test_broken_utf8_can_be_repaired(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 is open")
    assert texts(path, utf8="repair") == ["caf\ufffd is open"]
    assert not cleaning.is_broken("one \ufffd in a text")
    assert cleaning.is_broken("\ufffd\ufffd\ufffd many")


def test_a_huge_line_needs_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        for _ in range(40):
            file.write("wörter über ".encode() * 80_000)
    size = path.stat().st_size
    assert size > 40e6
    tracemalloc.start()
    total = sum(len(row.value["text"].encode()) for row in reading.read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == size
    assert peak < 12e6
    line = tmp_path / "a.jsonl"
    line.write_bytes(b'{"text": "' + b"x" * (3 << 20) + b'"}\n')
    with pytest.raises(DataError, match="line 1 is longer than 2 MiB"):
        list(reading.read_rows(line, max_line_bytes=2 << 20))


def test_a_line_without_spaces_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    whole = "三" * 1_000_000
    path.write_text(whole, encoding="utf-8")
    assert "".join(texts(path)) == whole


def test_cleaning_says_what_it_promises() -> None:
    assert cleaning.clean("\ufeffCafe\u0301 \r\nb\x00\x07\u200bc  \n\n\n\nd\t\n") == "Café\nbc\n\nd"


def test_duplicates_are_found_exactly_and_nearly() -> None:
    words = cleaning.Words()
    found = cleaning.Duplicates()
    text = " ".join(f"word{n} is here" for n in range(200))
    assert found.is_new(words.of(text))
    assert not found.is_new(words.of(text.upper() + "!"))
    assert found.exact_found == 1
    assert not found.is_new(words.of(text.replace("word7 ", "other ")))
    assert found.near_found == 1
    assert found.is_new(words.of(" ".join(f"thing{n} was there" for n in range(200))))


def test_evaluation_texts_are_found_in_training_texts() -> None:
    words = cleaning.Words()
    long = "the quick brown fox jumps over the lazy dog and then it runs away at once"
    known = cleaning.Contamination([long, "six words are enough for it", "too short"], words)
    assert (known.items, known.skipped) == (3, 1)
    assert known.holds(
        words.of("He said: The quick brown fox jumps over the lazy dog, and then it runs!")
    )
    assert known.holds(words.of("note that six words are enough for it today"))
    assert not known.holds(words.of("the quick brown fox jumps over the lazy cat and then it ran"))
    assert not known.holds(words.of("too short"))
