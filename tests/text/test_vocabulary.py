"""Reading tokenizer files: three formats that mean the same, and every way they can be damaged."""

import base64
import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from qnext.errors import TokenizerError
from qnext.text.tokenizer import Tokenizer
from qnext.text.vocabulary import merges_from_ranks, read_vocabulary, spelled_bytes

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """A folder with tokenizer.json and tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("saved")
    tiny.save(folder)
    return folder


def content_of(saved):
    return json.loads((saved / "tokenizer.json").read_text("utf-8"))


def write_vocab_and_merges(saved, folder, *, version_line=True, end="\n"):
    model = content_of(saved)["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    lines = ["#version: 0.2"] * version_line + [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_bytes((end.join(lines) + end).encode())


def write_ranks(tiny, folder, name="tiny.tiktoken"):
    count = tiny.vocab_size - 26
    lines = [b"%s %d" % (base64.b64encode(tiny.token_bytes(i)), i) for i in range(count)]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")


@pytest.fixture(scope="module")
def from_merges(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merges")
    write_vocab_and_merges(saved, folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def from_ranks(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_ranks(tiny, folder)
    return Tokenizer.from_folder(folder)


@given(text=UNICODE)
def test_the_three_formats_give_the_same_ids(tiny, from_merges, from_ranks, text):
    ids = tiny.encode(text)
    assert from_merges.encode(text) == ids
    assert from_ranks.encode(text) == ids


def test_formats_without_a_configuration_get_the_published_added_tokens(
    tiny, from_merges, from_ranks
):
    for tokenizer in (from_merges, from_ranks):
        assert tokenizer.added_tokens == tiny.added_tokens
        assert tokenizer.special_ids == tiny.special_ids
        assert (tokenizer.eos_id, tokenizer.pad_id) == (tiny.eos_id, tiny.pad_id)


def test_added_tokens_of_the_configuration_are_used(tiny, saved, tmp_path):
    write_vocab_and_merges(saved, tmp_path, version_line=False, end="\r\n")
    first = tiny.vocab_size - 26
    entries = {
        str(first + 1): {"content": "<b>", "special": False},
        str(first): {"content": "<a>", "special": True},
    }
    config = {"added_tokens_decoder": entries, "eos_token": {"content": "<a>"}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.added_tokens == {"<a>": first, "<b>": first + 1}
    assert tokenizer.special_ids == {first}
    assert (tokenizer.eos_id, tokenizer.pad_id) == (first, None)
    assert tokenizer.encode("Hello<b>") == [*tiny.encode("Hello"), first + 1]


def test_a_folder_of_vocab_and_merges_can_be_saved_and_read_back(saved, from_merges, tmp_path):
    from_merges.save(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}
    again = Tokenizer.from_folder(tmp_path)
    assert again.origin.endswith("tokenizer.json")
    assert again.encode("Hello, <think> 你好") == from_merges.encode("Hello, <think> 你好")


def test_batch_settings_left_in_the_file_do_not_cut_prompts(tiny, saved, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=40)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "Hello, world! How are you today?"
    assert Tokenizer.from_folder(tmp_path).encode(text) == tiny.encode(text)


def test_tokenizer_json_alone_names_no_end_token(saved, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((saved / "tokenizer.json").read_bytes())
    assert Tokenizer.from_folder(tmp_path).eos_token is None


@pytest.mark.parametrize(
    ("tokenizer_class", "pieces"), [("Qwen2Tokenizer", 2), ("Qwen3_5Tokenizer", 1)]
)
def test_combining_marks_are_split_as_the_tokenizer_class_says(
    saved, tmp_path, tokenizer_class, pieces
):
    write_vocab_and_merges(saved, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": tokenizer_class})
    )
    splitter = read_vocabulary(tmp_path).backend.pre_tokenizer
    assert len(splitter.pre_tokenize_str("x\u093f")) == pieces


def test_merges_follow_from_ranks(tiny, saved):
    ranks = {tiny.token_bytes(i): i for i in range(tiny.vocab_size - 26)}
    learned = content_of(saved)["model"]["merges"]
    assert merges_from_ranks(ranks) == [tuple(map(spelled_bytes, pair)) for pair in learned]


def test_a_token_no_pair_gives_is_refused():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"abc": 3}
    with pytest.raises(TokenizerError, match=r"rank 3: b'abc' is not made of two tokens"):
        merges_from_ranks(ranks)


# Damage, and what is said about it.


def refusal(folder):
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(folder)
    return str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    assert "nowhere: not a folder" in refusal(tmp_path / "nowhere")


def test_a_folder_without_a_tokenizer_lists_what_was_looked_for_and_found(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    text = refusal(tmp_path)
    for part in ("tokenizer.json", "vocab.json with merges.txt", "*.tiktoken", "holds config.json"):
        assert part in text


def test_an_empty_folder_is_said_to_hold_nothing(tmp_path):
    assert "the folder holds nothing" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"a": 1}',
        b"[]",
        b"\xff\xfe",
        b"version https://git-lfs.github.com/spec/v1\noid 1\n",
    ],
)
def test_a_damaged_tokenizer_json_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    text = refusal(tmp_path)
    assert "tokenizer.json: not a usable tokenizer" in text
    assert "Fetch the file again" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{\n  oops", r"tokenizer_config.json: not valid JSON .*line 2 column 3"),
        (b"[1]", "tokenizer_config.json: expected a JSON object, found list"),
        (b"\xff\xff", "tokenizer_config.json: not UTF-8 text"),
        (
            b'{"added_tokens_decoder": {"x": {"content": "<a>"}}}',
            r"added_tokens_decoder\['x'\]: expected an id",
        ),
        (b'{"added_tokens_decoder": {"5": "<a>"}}', r"added_tokens_decoder\['5'\]: expected an id"),
        (
            b'{"added_tokens_decoder": {"9999": {"content": "<a>"}}}',
            r"gives '<a>' the id 9999, but the vocabulary beside it gives 500",
        ),
        (b'{"eos_token": "<end>"}', "names '<end>' as eos_token"),
        (b'{"pad_token": 7}', "names 7 as pad_token"),
    ],
)
def test_a_damaged_configuration_is_named(tiny, saved, tmp_path, content, message):
    assert tiny.vocab_size == 500
    (tmp_path / "tokenizer.json").write_bytes((saved / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    assert "expected a byte-level tokenizer (decoder ByteLevel), found decoder none" in refusal(
        tmp_path
    )
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert "found decoder Metaspace" in refusal(tmp_path)


def test_a_vocabulary_without_all_bytes_is_refused(saved, tmp_path):
    content = content_of(saved)
    kept = {token: i for token, i in content["model"]["vocab"].items() if token != "!"}
    content["model"]["vocab"] = kept
    content["model"]["merges"] = [m for m in content["model"]["merges"] if "!" not in "".join(m)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert "1 of the 256 single bytes have no id (the first is 0x21)" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_a_pair_of_files_is_refused(saved, tmp_path, name):
    write_vocab_and_merges(saved, tmp_path)
    (tmp_path / name).unlink()
    assert f"needs {name} beside it, which is missing" in refusal(tmp_path)


@pytest.mark.parametrize("line", ["oneword", "a b c", "zzz qqq"])
def test_a_bad_merge_is_named_by_its_line(saved, tmp_path, line):
    write_vocab_and_merges(saved, tmp_path)
    lines = (tmp_path / "merges.txt").read_text("utf-8").split("\n")
    lines[4] = line
    (tmp_path / "merges.txt").write_text("\n".join(lines), "utf-8")
    text = refusal(tmp_path)
    assert "merges.txt, line 5: expected two tokens" in text
    assert repr(line) in text


def test_a_vocabulary_entry_without_an_id_is_named(saved, tmp_path):
    write_vocab_and_merges(saved, tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": "1"}')
    assert "vocab.json: 'a': expected an id, found '1'" in refusal(tmp_path)


def test_two_ranks_files_are_refused(tiny, tmp_path):
    write_ranks(tiny, tmp_path, "a.tiktoken")
    write_ranks(tiny, tmp_path, "b.tiktoken")
    assert "one ranks file expected, found a.tiktoken, b.tiktoken" in refusal(tmp_path)


@pytest.mark.parametrize("line", [b"IQ== x", b"IQ==", b"!!! 5", b"<html>"])
def test_a_bad_rank_is_named_by_its_line(tiny, tmp_path, line):
    write_ranks(tiny, tmp_path)
    lines = (tmp_path / "tiny.tiktoken").read_bytes().split(b"\n")
    lines[2] = line
    (tmp_path / "tiny.tiktoken").write_bytes(b"\n".join(lines))
    assert "tiny.tiktoken, line 3: expected a base64 token and its rank" in refusal(tmp_path)


def test_a_missing_rank_is_noticed(tiny, tmp_path):
    write_ranks(tiny, tmp_path)
    lines = (tmp_path / "tiny.tiktoken").read_bytes().split(b"\n")
    del lines[300]
    (tmp_path / "tiny.tiktoken").write_bytes(b"\n".join(lines))
    assert "expected every rank from 0 up once, found 473 tokens" in refusal(tmp_path)


def test_an_empty_ranks_file_is_noticed(tmp_path):
    (tmp_path / "tiny.tiktoken").write_bytes(b"")
    assert "found 0 tokens" in refusal(tmp_path)


def test_ranks_out_of_order_are_noticed(tiny, tmp_path):
    write_ranks(tiny, tmp_path)
    lines = (tmp_path / "tiny.tiktoken").read_bytes().split()
    tokens = [
        *lines[0::2][256:],
        *lines[0::2][:256],
    ]  # long tokens before the bytes they are made of
    text = b"\n".join(b"%s %d" % (token, rank) for rank, token in enumerate(tokens))
    (tmp_path / "tiny.tiktoken").write_bytes(text)
    text = refusal(tmp_path)
    assert "is not made of two tokens of lower rank" in text
    assert "tiny.tiktoken: rank" in text
