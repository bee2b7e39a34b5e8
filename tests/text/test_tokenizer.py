"""Encoding, decoding and saving, on a tokenizer of 500 ids."""

import json
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.errors import TokenizerError
from qnext.text.tokenizer import MIN_KEPT_TEXT, Tokenizer
from qnext.text.vocabulary import QWEN3_ADDED_TOKENS, SPECIAL_TOKENS, byte_level

UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
WITH_TAGS = st.lists(st.one_of(UNICODE, st.sampled_from(QWEN3_ADDED_TOKENS))).map("".join)


@given(text=WITH_TAGS)
def test_decoding_an_encoded_text_gives_its_nfc_form(tiny, text):
    assert tiny.decode(tiny.encode(text, allow_added=False)) == unicodedata.normalize("NFC", text)


@given(text=UNICODE.filter(lambda text: "<" not in text))
def test_text_without_added_tokens_encodes_the_same_with_and_without_them(tiny, text):
    assert tiny.encode(text) == tiny.encode(text, allow_added=False)


@given(text=WITH_TAGS)
def test_untrusted_text_never_becomes_an_added_token(tiny, text):
    added = set(tiny.added_tokens.values())
    assert added.isdisjoint(tiny.encode(text, allow_added=False))


def test_learned_words_are_single_tokens_and_digits_are_not_joined(tiny):
    assert len(tiny.encode(" days")) == 1
    assert len(tiny.encode("1984")) == 4


def test_nothing_is_put_before_or_after_a_text(tiny):
    assert tiny.encode("") == []
    assert tiny.encode("<|im_start|>") == [tiny.added_tokens["<|im_start|>"]]


def test_added_tokens_follow_the_vocabulary_in_the_published_order(tiny):
    first = tiny.vocab_size - 26
    assert tiny.added_tokens == {text: first + i for i, text in enumerate(QWEN3_ADDED_TOKENS)}
    assert tiny.special_ids == frozenset(range(first, first + 14))
    assert tiny.id_limit == tiny.vocab_size
    assert (tiny.eos_token, tiny.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (tiny.eos_id, tiny.pad_id) == (first + 2, first)


def test_skip_special_leaves_reasoning_and_tool_tags_in_the_text(tiny):
    text = "".join(QWEN3_ADDED_TOKENS)
    kept = "".join(token for token in QWEN3_ADDED_TOKENS if token not in SPECIAL_TOKENS)
    assert tiny.decode(tiny.encode(text)) == text
    assert tiny.decode(tiny.encode(text), skip_special=True) == kept


def test_a_batch_gives_what_single_calls_give(tiny):
    texts = ["", "Hello, world!", "<think>\nhm\n</think>", "你好"]
    assert tiny.encode_batch(texts) == [tiny.encode(text) for text in texts]
    plain = [tiny.encode(text, allow_added=False) for text in texts]
    assert tiny.encode_batch(texts, allow_added=False) == plain


def test_every_id_has_bytes_and_all_bytes_are_ids(tiny):
    spelled = {tiny.token_bytes(i) for i in range(tiny.vocab_size)}
    assert len(spelled) == tiny.vocab_size
    assert {bytes([byte]) for byte in range(256)} <= spelled


def test_decode_agrees_with_the_tokenizers_library_on_any_ids(tiny, tmp_path):
    tiny.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = np.random.default_rng(0)
    for length in (1, 2, 7, 50):
        for _ in range(30):
            ids = rng.integers(0, tiny.vocab_size, length).tolist()
            assert tiny.decode(ids) == library.decode(ids, skip_special_tokens=False)
            assert tiny.decode(ids, skip_special=True) == library.decode(ids)


def test_id_of_finds_added_tokens_and_single_ordinary_ones(tiny):
    assert tiny.id_of("</think>") == tiny.added_tokens["</think>"]
    assert tiny.token_bytes(tiny.id_of("\n")) == b"\n"
    assert tiny.id_of("no such token") is None
    assert tiny.id_of("") is None


def test_ids_of_integer_types_are_accepted(tiny):
    ids = np.array(tiny.encode("Hello<|im_end|>"))
    assert tiny.decode(ids) == "Hello<|im_end|>"
    assert tiny.decode(ids, skip_special=True) == "Hello"


@pytest.mark.parametrize("offset", [0, 1, 1000])
def test_an_id_in_the_padded_rows_is_refused_with_the_limit(tiny, offset):
    token_id = tiny.vocab_size + offset
    with pytest.raises(
        TokenizerError, match=rf"token id {token_id} is not defined.*the last is \d+"
    ):
        tiny.decode([token_id])


def test_a_negative_id_is_refused(tiny):
    with pytest.raises(TokenizerError, match="token id -1 is not defined"):
        tiny.decode([-1])


def test_undefined_ids_are_the_padded_rows(tiny):
    assert tiny.undefined_ids(tiny.vocab_size) == []
    assert tiny.undefined_ids(tiny.vocab_size + 3) == [tiny.vocab_size + i for i in range(3)]


def test_holes_in_the_vocabulary_are_undefined():
    vocab = {
        char: i + 5 for i, char in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(byte_level(tokenizers.models.BPE(vocab=vocab, merges=[])))
    assert (tokenizer.vocab_size, tokenizer.id_limit) == (256, 261)
    assert tokenizer.undefined_ids(262) == [0, 1, 2, 3, 4, 261]
    with pytest.raises(TokenizerError, match="token id 3 is not defined"):
        tokenizer.decode([3])


def test_a_model_with_too_few_rows_is_refused(tiny):
    with pytest.raises(
        TokenizerError, match=rf"vocab_size is {tiny.vocab_size - 1}\..*another model"
    ):
        tiny.undefined_ids(tiny.vocab_size - 1)


def test_a_lone_surrogate_is_refused_with_its_place(tiny):
    with pytest.raises(TokenizerError, match=r"character 3 is a lone surrogate \(U\+D83D\)"):
        tiny.encode("abc\ud83dx")


def test_text_of_another_type_is_refused(tiny):
    with pytest.raises(TokenizerError, match=r"expected text to encode \(str\), got bytes"):
        tiny.encode(b"abc")


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(TokenizerError, match=r"vocab_size 281 is too small.*at least 282"):
        Tokenizer.train(["abc"], vocab_size=281)


def test_an_end_token_that_does_not_exist_is_refused(tiny):
    with pytest.raises(TokenizerError, match=r"names '<end>' as eos_token, which is not a token"):
        Tokenizer(tiny._backend, config={"eos_token": "<end>"})


def test_tokens_without_names_are_none(tiny):
    tokenizer = Tokenizer(tiny._backend)
    assert (tokenizer.eos_token, tokenizer.eos_id, tokenizer.pad_token, tokenizer.pad_id) == (
        None,
    ) * 4


def test_training_twice_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        texts = (f"{word} {word}s and {word}ing " for word in ("walk", "talk", "jump", "look"))
        Tokenizer.train(texts, vocab_size=300).save(tmp_path / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@settings(max_examples=50)
@given(text=WITH_TAGS, role_text=WITH_TAGS)
def test_guarded_tokens_are_read_as_characters_and_others_as_tokens(tiny, text, role_text):
    mark = "\U000f0000"
    text, role_text = text.replace(mark, ""), role_text.replace(mark, "")
    prompt = f"<|im_start|>{tiny.break_up(text, mark)}<|im_end|>"
    ids = tiny.encode_guarded(prompt, mark)
    start, end = tiny.added_tokens["<|im_start|>"], tiny.added_tokens["<|im_end|>"]
    assert ids == [start, *tiny.encode(text, allow_added=False), end]
    assert tiny.encode_guarded(role_text, mark) == tiny.encode(role_text)


LONG = "The quick brown fox jumps over the lazy dog. " * (MIN_KEPT_TEXT // 40)


@settings(max_examples=200)
@given(texts=st.lists(WITH_TAGS, min_size=1, max_size=4))
def test_pieces_that_are_kept_give_the_ids_of_the_whole_text(tiny, texts):
    """A conversation grows: every text goes on from the one before it."""
    fresh = Tokenizer(tiny._backend)
    for count in range(1, len(texts) + 1):
        text = LONG + "<|im_end|>" + "".join(texts[:count])
        assert fresh.encode(text) == tiny.encode_batch([text])[0]
        assert fresh.encode(text) == tiny.encode_batch([text])[0], "from what was kept"


@pytest.mark.parametrize("between", ["e<|im_end|>\u0301", " <think> ", "\r<|im_end|>\n", "<|im_"])
def test_nothing_joins_over_an_added_token(tiny, between):
    text = LONG + between + "<|im_start|>" + between
    assert tiny.encode(text) == tiny.encode_batch([text])[0]


@pytest.mark.parametrize("rule", ["lstrip", "rstrip", "single_word", "normalized"])
def test_added_tokens_that_reach_into_the_text_beside_them_are_left_to_the_pipeline(rule):
    backend = byte_level(
        tokenizers.models.BPE(
            vocab={c: i for i, c in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())},
            merges=[],
        )
    )
    backend.add_tokens([tokenizers.AddedToken("<a>", **{"normalized": False, rule: True})])
    tokenizer = Tokenizer(backend)
    for text in (LONG + " <a> b", LONG + "x<a>y", LONG + "<a>", "<a>\n\n" + LONG):
        assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0]


def test_what_is_kept_stays_within_bounds(tiny, monkeypatch):
    monkeypatch.setattr("qnext.text.tokenizer.MAX_KEPT_CHARACTERS", 1000)
    fresh = Tokenizer(tiny._backend)
    for number in range(40):
        text = f"{number} {LONG}<|im_end|>{number}<|im_end|>"
        assert fresh.encode(text) == tiny.encode_batch([text])[0]
        assert sum(map(len, fresh._kept._ids)) == fresh._kept._characters <= 1000
    assert len(fresh._kept._ids) > 2


def test_a_lone_surrogate_is_found_in_a_conversation_too(tiny):
    text = f"{LONG}<|im_end|>ab\ud800"
    with pytest.raises(TokenizerError, match=f"character {len(text) - 1} is a lone surrogate"):
        tiny.encode(text)


def test_overlapping_added_tokens_are_all_broken_up():
    backend = byte_level(
        tokenizers.models.BPE(
            vocab={c: i for i, c in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())},
            merges=[],
        )
    )
    backend.add_tokens(
        [tokenizers.AddedToken(text, normalized=False) for text in ("<a>", "<a><", "a><b")]
    )
    tokenizer = Tokenizer(backend)
    broken = tokenizer.break_up("<a><b", "\U000f0000")
    assert tokenizer.decode(tokenizer.encode_guarded(broken, "\U000f0000")) == "<a><b"
    assert max(tokenizer.encode_guarded(broken, "\U000f0000")) < 256


def test_saving_what_was_read_gives_the_same_bytes(tiny, tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    tiny.save(source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    odd = json.dumps({"unknown": [1, 2], **config}, indent=7).replace("\n", "\r\n")
    (source / "tokenizer_config.json").write_bytes(odd.encode())
    (source / "special_tokens_map.json").write_text('{ "eos_token":"<|im_end|>" }')
    (source / "chat_template.jinja").write_bytes(b"{{ messages }}\n\n")
    (source / "model.safetensors").write_bytes(b"not part of it")

    loaded = Tokenizer.from_folder(source)
    for file in source.iterdir():
        if file.name != "model.safetensors":
            original = file.read_bytes()
            file.unlink()
            loaded.save(copy)  # also without the source files
            assert (copy / file.name).read_bytes() == original
    assert not (copy / "model.safetensors").exists()


def test_transformers_reads_what_was_saved(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    tiny.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nHello,  wörld 12!<|im_end|>\n<think>\n\n</think>\n\n你好 😀 I'm"
    ids = tiny.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs.decode(ids, skip_special_tokens=True) == tiny.decode(ids, skip_special=True)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tiny.eos_id, tiny.pad_id)
    assert theirs.bos_token is None
    assert len(theirs) == tiny.vocab_size
