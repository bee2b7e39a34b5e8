"""The published Qwen vocabulary, templates and test vectors, all of them.

These need the published files. What they show about rules, rather than about the 151,669 ids, the
other tests show without them.
"""

import json
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.text.chat import ChatTemplate, opens_thinking
from qnext.text.tokenizer import Detokenizer, Tokenizer
from qnext.text.vocabulary import QWEN3_ADDED_TOKENS

QWEN3 = ChatTemplate.builtin()
TEMPLATES = [
    "qwen3",
    "qwen3_coder_30b_a3b_instruct",
    "qwen3_instruct_2507",
    "qwen3_nonthinking",
    "qwen3_thinking_2507",
]

# Text -> ids that two independent implementations agree on.
KNOWN_IDS = [
    ("Hello, world!", [9707, 11, 1879, 0]),
    (
        "I\u2019M I'm we're they've I'll I'd",
        [40, 527, 44, 358, 2776, 582, 2299, 807, 3003, 358, 3278, 358, 4172],
    ),
    ("a   b    ", [64, 256, 293, 257]),
    ("one\r\ntwo\n\nthree\t end", [603, 319, 19789, 271, 27856, 197, 835]),
    (
        "0 12 345 6789 1000000",
        [15, 220, 16, 17, 220, 18, 19, 20, 220, 21, 22, 23, 24, 220, 16, 15, 15, 15, 15, 15, 15],
    ),
    ("raw completion <|endoftext|> café\n", [1041, 9755, 220, 151643, 51950, 198]),
    ("cafe\u0301", [924, 58858]),
    ("Line 1\nLine 22\n", [2460, 220, 16, 198, 2460, 220, 17, 17, 198]),
    (
        "<|im_start|>user\nName one JVM language.<|im_end|>\n<|im_start|>assistant\n",
        [151644, 872, 198, 675, 825, 72379, 4128, 13, 151645, 198, 151644, 77091, 198],
    ),
    (
        'fn main() { println!("hello"); } // comment\n',
        [8822, 1887, 368, 314, 13751, 17223, 14990, 5038, 335, 442, 3980, 198],
    ),
    ("\n", [198]),
    ("\n\n", [271]),
    ("system", [8948]),
    ("user", [872]),
    ("assistant", [77091]),
]


def rows_of(path):
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def encode_rows(qwen_data):
    return rows_of(qwen_data / "tests" / "encode_vectors.jsonl.xz")


@pytest.fixture(scope="module")
def chat_rows(qwen_data):
    return rows_of(qwen_data / "tests" / "chat_template_vectors.jsonl.xz")


def published(qwen_data, name):
    path = qwen_data / "chat_templates" / f"{name}.jinja"
    return ChatTemplate(path.read_text("utf-8"), origin=path.name)


@pytest.mark.parametrize(("text", "ids"), KNOWN_IDS)
def test_known_texts_have_the_known_ids(official, text, ids):
    assert official.encode(text) == ids


def test_all_published_vectors_are_reproduced(official, encode_rows):
    assert len(encode_rows) == 691
    wrong = [row["text"] for row in encode_rows if official.encode(row["text"]) != row["ids"]]
    assert wrong == []
    batch = official.encode_batch([row["text"] for row in encode_rows])
    assert batch == [row["ids"] for row in encode_rows]


def test_all_llama_cpp_vectors_are_reproduced(official, qwen_data):
    tests = qwen_data / "tests"
    texts = (tests / "ggml-vocab-qwen2.gguf.inp").read_bytes().decode("utf-8")
    texts = texts.split("\n__ggml_vocab_test__\n")
    lines = (tests / "ggml-vocab-qwen2.gguf.out").read_text("utf-8").split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        assert official.encode(text) == [int(word) for word in line.split()], text


def test_ids_stream_back_into_the_text(official, encode_rows):
    for row in encode_rows:
        stream = Detokenizer(official)
        text = "".join(stream.push([i]) for i in row["ids"]) + stream.finish()
        assert text == official.decode(row["ids"])
        assert official.encode(text) == row["ids"]


def test_sizes_and_added_tokens_are_the_published_ones(official, qwen_data):
    listed = json.loads((qwen_data / "special_tokens.json").read_text("utf-8"))
    assert official.added_tokens == listed["special_tokens"]
    assert tuple(official.added_tokens) == QWEN3_ADDED_TOKENS
    special = set(listed["special_tokens"]) - set(listed["non_special_added"])
    assert official.special_ids == {listed["special_tokens"][text] for text in special}
    assert official.vocab_size == official.id_limit == 151669
    rows = listed["padded_vocab_qwen3_next"]
    assert official.undefined_ids(rows) == list(range(151669, 151936))
    assert (official.eos_id, official.pad_id) == (151645, 151643)


def test_the_published_configuration_gives_the_same_tokenizer(official, qwen_data, tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes((qwen_data / "qwen.tiktoken").read_bytes())
    config = (qwen_data / "qwen3_tokenizer_config.json").read_bytes()
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.added_tokens == official.added_tokens
    assert tokenizer.special_ids == official.special_ids
    assert (tokenizer.eos_id, tokenizer.pad_id) == (official.eos_id, official.pad_id)

    template = ChatTemplate.from_folder(tmp_path)
    assert template.source == json.loads(config)["chat_template"]

    # What is saved keeps the configuration, and transformers' own Qwen2 class agrees.
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer_config.json").read_bytes() == config
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(theirs).__name__.startswith("Qwen2Tokenizer")
    for row in rows_of(qwen_data / "tests" / "encode_vectors.jsonl.xz")[::7]:
        assert theirs(row["text"])["input_ids"] == row["ids"]
        assert theirs.decode(row["ids"]) == official.decode(row["ids"])
    messages = [{"role": "user", "content": "Hi"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert template.encode(messages, official) == ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_published_templates_render_the_published_texts(qwen_data, chat_rows, name):
    template = published(qwen_data, name)
    rows = [row for row in chat_rows if row["template"] == name]
    assert len(rows) == (84 if name == "qwen3" else 28)
    for row in rows:
        assert rendering(template, row) == row["rendered"], row["case"]


def test_every_published_template_has_vectors(chat_rows):
    assert sorted({row["template"] for row in chat_rows}) == TEMPLATES


def test_the_built_in_template_renders_the_published_texts(chat_rows):
    for row in chat_rows:
        if row["template"] == "qwen3":
            assert rendering(QWEN3, row) == row["rendered"], row["case"]


def rendering(template, row):
    options = {key: row[key] for key in ("tools", "enable_thinking") if key in row}
    return template.render(
        row["messages"], add_generation_prompt=row["add_generation_prompt"], **options
    )


def test_the_thinking_template_opens_the_block_and_the_others_do_not(qwen_data):
    messages = [{"role": "user", "content": "<think> what?"}]
    opened = {
        name for name in TEMPLATES if opens_thinking(published(qwen_data, name).render(messages))
    }
    assert opened == {"qwen3_thinking_2507"}


WORDS = st.lists(
    st.sampled_from(
        [
            "a",
            "ü ",
            "\n",
            " ",
            "<think>",
            "</think>",
            "<tool_response>",
            "</tool_response>",
            '"',
            "\\",
        ]
    ),
    max_size=5,
).map("".join)
CALLS = st.lists(
    st.builds(
        lambda arguments, wrapped: {"function": arguments} if wrapped else arguments,
        st.fixed_dictionaries(
            {
                "name": st.sampled_from(["f", "g"]),
                "arguments": st.one_of(
                    st.dictionaries(WORDS, WORDS, max_size=2), st.just('{"x":1}')
                ),
            }
        ),
        st.booleans(),
    ),
    max_size=2,
)
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "user", "tool"]), "content": WORDS}
        ),
        st.fixed_dictionaries(
            {"role": st.just("assistant"), "content": WORDS},
            optional={"reasoning_content": WORDS, "tool_calls": CALLS},
        ),
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def hybrid(qwen_data):
    return published(qwen_data, "qwen3")


@settings(max_examples=300)
@given(
    messages=MESSAGES,
    tools=st.one_of(st.none(), st.lists(st.dictionaries(WORDS, WORDS, max_size=2), max_size=2)),
    prompt=st.booleans(),
    thinking=st.sampled_from([None, True, False]),
)
def test_the_built_in_template_equals_the_published_one_on_any_conversation(
    hybrid, messages, tools, prompt, thinking
):
    options = {"tools": tools, "add_generation_prompt": prompt, "enable_thinking": thinking}
    assert QWEN3.render(messages, **options) == hybrid.render(messages, **options)
